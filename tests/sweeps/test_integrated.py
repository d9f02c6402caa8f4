"""Attribution by gradients, against plain torch and the axioms of its source."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conformance import suite
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.errors import HookedVLMWarning, InterventionError
from hooked_vlm.hooks.patch_order import listed
from hooked_vlm.interventions.recording import record
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.sweeps.integrated import gradient_attribution, integrated_gradients
from hooked_vlm.sweeps.pixels import pixel_attribution


SITE = "blocks.1.hook_resid_pre"


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def of_embeddings(model: HookedVLM, inputs: Any, streams: Tensor) -> Tensor:
    """Returns the scores of streams written by torch's own hook before block 1."""
    block = model.hf_model.get_submodule(model.anatomy.lm.blocks[1].path)

    def write(module: Any, args: tuple, kwargs: dict) -> Any:
        return (
            ((streams, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": streams})
        )

    handle = block.register_forward_pre_hook(write, with_kwargs=True)
    try:
        return difference(model.hf_model(**inputs, use_cache=False).logits)
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl", "mllama"])
def test_they_are_those_of_plain_torch(family: str) -> None:
    if family in FAMILIES:
        model, inputs = tiny(family), make_inputs(family, batch=2)
    else:
        model = suite.build(family)
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    with torch.no_grad():
        stream = model.run_with_cache(inputs, SITE)[1][SITE]
    base = stream.mean((0, 1)).expand_as(stream)
    steps, total = 4, torch.zeros_like(stream)
    for step in range(steps):
        leaf = (base + (step + 0.5) / steps * (stream - base)).requires_grad_(True)
        total += torch.autograd.grad(of_embeddings(model, inputs, leaf).sum(), leaf)[0] / steps
    with torch.no_grad():
        scores = [of_embeddings(model, inputs, x) for x in (stream, base)]
    found = integrated_gradients(model, inputs, difference, SITE, "mean", steps=steps)
    assert isinstance(found.values, Tensor)
    size = float(((stream - base) * total).abs().max())
    torch.testing.assert_close(found.values, (stream - base) * total, rtol=1e-3, atol=1e-4 * size)
    torch.testing.assert_close(found.score, scores[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.baseline_score, scores[1], rtol=1e-4, atol=1e-5)
    gap = scores[0] - scores[1] - found.values.flatten(1).sum(1)
    torch.testing.assert_close(found.gap, gap, rtol=1e-3, atol=1e-4)
    # The plain gradient, at the end of the line.
    leaf = stream.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(of_embeddings(model, inputs, leaf).sum(), leaf)
    plain = gradient_attribution(model, inputs, difference, SITE, "mean")
    assert isinstance(plain.values, Tensor) and plain.steps == 1
    torch.testing.assert_close(plain.values, (stream - base) * gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2-vl", "gemma-3"))]
)
def test_more_steps_close_the_gap(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    other = make_inputs(family, batch=2, seed=4)
    sites = (2, "blocks.1.attn.hook_z", "vision_projector.hook_out", "blocks.0.mlp.hook_post")
    for site in sites:
        few, many = (
            integrated_gradients(model, inputs, difference, site, other, steps=n) for n in (2, 40)
        )
        moved = (many.score - many.baseline_score).abs().max()
        assert many.gap.abs().max() <= 0.02 * moved
        assert many.gap.abs().max() < max(float(few.gap.abs().max()), 1e-4)
        recorded = record(model, other, [few.site])
        same = integrated_gradients(model, inputs, difference, site, recorded, steps=2)
        torch.testing.assert_close(same.values, few.values)


def test_prompts_do_not_see_one_another() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=2)
    both = integrated_gradients(model, inputs, difference, 1, steps=3)
    for b in (0, 1):
        alone = {n: x[b : b + 1] for n, x in inputs.items()}
        one = integrated_gradients(model, alone, difference, 1, steps=3)
        torch.testing.assert_close(one.values, both.values[b : b + 1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.gap, both.gap[b : b + 1], rtol=1e-3, atol=1e-4)


def test_where_the_score_is_linear_the_gradient_is_complete() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", batch=2)
    with torch.no_grad():
        found = gradient_attribution(model, inputs, difference, "ln_final.hook_normalized")
    assert found.gap.abs().max() < 1e-4
    by_position = found.by_position
    assert isinstance(by_position, Tensor) and not by_position[:, :-1].any()
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0))
    moved = gradient_attribution(model, inputs, difference, found.site, vector)
    assert moved.gap.abs().max() < 1e-4


def test_images_of_different_sizes_have_a_list() -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    pictures = [suite.picture(96, 64), suite.picture(64, 64, seed=1)]
    inputs = model.prepare(pictures, ["What is this?", "What?"])
    found = integrated_gradients(
        model, inputs, difference, "vision_encoder.blocks.1.hook_resid_post", "mean", steps=20
    )
    assert [tuple(x.shape) for x in listed(found.by_position)] == [(96,), (64,)]
    sums = torch.stack([x.sum() for x in listed(found.values)])
    torch.testing.assert_close(
        found.gap, found.score - found.baseline_score - sums, rtol=1e-3, atol=1e-4
    )
    assert (found.gap.abs() <= 0.1 * (found.score - found.baseline_score).abs() + 0.05).all()


def test_the_mean_leaves_padding_out() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    site = "ln_final.hook_normalized"
    plain = gradient_attribution(model, inputs, difference, site, "mean")
    padded = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        padded[name] = torch.cat([torch.zeros(1, 4, dtype=torch.long), inputs[name]], dim=1)
    found = gradient_attribution(model, padded, difference, site, "mean")
    assert isinstance(found.values, Tensor)
    torch.testing.assert_close(found.values[:, 4:], plain.values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "zeros"}, "does not fit"),
        ({"baseline": torch.zeros(47)}, "does not fit"),
        ({"baseline": make_inputs("llava", text=9)}, "does not fit"),
        ({"metric": lambda x: x[:, -1, 5].mean()}, r"shape \(\)"),
        ({"metric": lambda x: x[:, -1, 5:7]}, "one score for each prompt"),
        ({"metric": lambda x: x.argmax(-1)[:, -1].float()}, "without a gradient"),
        ({"metric": "logits"}, "metric="),
        ({"site": "vision_encoder.blocks.2.hook_resid_post"}, "cannot be written"),
        ({"steps": 0}, "steps"),
    ],
)
def test_what_is_refused(change: dict[str, Any], said: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=2)
    given = {"metric": difference, "site": 1, "steps": 2} | change
    with pytest.raises(InterventionError, match=said) as caught:
        integrated_gradients(model, inputs, **given)
    assert len(str(caught.value)) <= 400
    text = {n: x for n, x in inputs.items() if n != "pixel_values"}
    text["input_ids"] = text["input_ids"].clamp(max=200)
    with pytest.raises(InterventionError, match="never ran"), pytest.warns(HookedVLMWarning):
        integrated_gradients(model, text, difference, "vision_projector.hook_out")


# --- pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("integrated", [True, False])
def test_pixels_are_those_of_plain_torch(family: str, integrated: bool) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    pixels = inputs["pixel_values"]
    base = make_inputs(family, batch=2, seed=4)["pixel_values"]
    points = [0.125, 0.375, 0.625, 0.875] if integrated else [1.0]
    total = torch.zeros_like(pixels)
    for point in points:
        leaf = (base + point * (pixels - base)).requires_grad_(True)
        score = difference(model.hf_model(**{**inputs, "pixel_values": leaf}).logits)
        total += torch.autograd.grad(score.sum(), leaf)[0] / len(points)
    found = pixel_attribution(
        model, inputs, difference, integrated=integrated, baseline=base, steps=4
    )
    expected = (pixels - base) * total
    size = float(expected.abs().max())
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-4 * size)
    # A map has all of its image, and so have the cells.
    assert not found.by_patch and [tuple(m.shape) for m in found.maps] == [(48, 48)] * 2
    of_image = found.values.reshape(2, -1).sum(1)
    for folded in (found.maps, found.cells):
        torch.testing.assert_close(
            torch.stack([m.sum() for m in folded]), of_image, rtol=1e-3, atol=1e-4
        )
    gap = found.score - found.baseline_score - of_image
    torch.testing.assert_close(found.gap, gap, rtol=1e-3, atol=1e-4)
    if family != "qwen2-vl":
        torch.testing.assert_close(torch.stack(found.maps), found.values.sum(1))


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-gemma-3"])
def test_a_map_is_in_raster_order(name: str) -> None:
    # Only one cell of two pictures differs: with one as baseline, nothing else has a value.
    model = HookedVLM.from_pretrained(name)
    size = (96, 64) if "qwen" in name else suite.image_size(model)
    pixels = np.array(suite.picture(*size))
    inputs = model.prepare(Image.fromarray(pixels), "What is this?")
    x0, y0, x1, y1 = (int(edge) for edge in inputs.grid.cell_box((1, 3)))
    pixels[y0:y1, x0:x1] = 255 - pixels[y0:y1, x0:x1]
    other = model.prepare(Image.fromarray(pixels), "What is this?")
    found = pixel_attribution(model, inputs, difference, baseline=other, steps=2)
    (image,), (cells,) = found.maps, found.cells
    assert tuple(image.shape) == size[::-1] and tuple(cells.shape) == inputs.grid.shape
    assert image[y0:y1, x0:x1].abs().max() > 0 and cells[1, 3] != 0
    image, cells = image.clone(), cells.clone()
    image[y0:y1, x0:x1], cells[1, 3] = 0, 0
    assert not image.any() and not cells.any()


TILED = ("llava_next", "llava_onevision", "internvl", "idefics3", "mistral3", "qwen3_vl")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", TILED)
def test_tiles_and_packed_images_fold_to_cells(model_type: str) -> None:
    model = suite.build(model_type)
    width, height = suite.image_size(model)
    pixels = np.array(suite.picture(2 * width, height))
    second = suite.picture(width, height, seed=1)
    texts = ["What is this?", "What?"]
    inputs = model.prepare([[Image.fromarray(pixels)], [second]], texts)
    row, col = 1, inputs.grids[0][0].cols - 2
    x0, y0, x1, y1 = (int(edge) for edge in inputs.grids[0][0].cell_box((row, col)))
    pixels[y0:y1, x0:x1] = 255 - pixels[y0:y1, x0:x1]
    other = model.prepare([[Image.fromarray(pixels)], [second]], texts)
    found = pixel_attribution(model, inputs, difference, integrated=False, baseline=other)
    grids = [grid for prompt in inputs.grids for grid in prompt]
    assert [tuple(c.shape) for c in found.cells] == [grid.shape for grid in grids]
    total = float(sum(m.sum() for m in found.maps))
    assert found.values.sum().item() == pytest.approx(total, rel=1e-3, abs=1e-5)
    # What differs is in this cell, and in its neighbours where the processor resizes.
    assert not found.cells[1].any() and found.cells[0][row, col] != 0
    at = found.cells[0].nonzero()
    assert bool(((at - torch.tensor([row, col])).abs() <= 1).all())


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_of_tiles_without_a_grid_has_maps() -> None:
    model = suite.build("mllama")
    width, height = suite.image_size(model)
    pictures = [[suite.picture(2 * width, height)], [suite.picture(width, height, seed=1)]]
    inputs = model.prepare(pictures, ["What is this?", "What?"])
    found = pixel_attribution(model, inputs, difference, baseline="mean", integrated=False)
    assert len(found.maps) == 3 and not found.cells  # two tiles and one; padding has none
    by_prompt = found.values.flatten(1).sum(1)
    gap = found.score - found.baseline_score - by_prompt
    torch.testing.assert_close(found.gap, gap, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_takes_zeros_for_padding_says_so() -> None:
    model = suite.build("idefics3")
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What?")
    with pytest.raises(InterventionError, match="does not run on the baseline's pixels"):
        pixel_attribution(model, inputs, difference, steps=1)


def test_pixels_that_are_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=2)
    for change, said in (
        ({"baseline": "grey"}, "does not fit"),
        ({"metric": lambda x: x[:, -1, 5].detach()}, "No gradient"),
        ({"metric": lambda x: x[:, -1, 5].mean()}, "one score"),
    ):
        with pytest.raises(InterventionError, match=said):
            pixel_attribution(model, inputs, **{"metric": difference, "steps": 1, **change})
    trained = HookedVLM(build("llava"))
    trained.train()
    with pytest.raises(InterventionError, match="training mode"):
        pixel_attribution(trained, inputs, difference, steps=1)
    with torch.inference_mode(), pytest.raises(InterventionError, match="inference_mode"):
        pixel_attribution(model, inputs, difference, steps=1)

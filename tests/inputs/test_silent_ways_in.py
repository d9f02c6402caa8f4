"""Other ways in than `prepare` on an image alone: each once gave a wrong number in silence.

Names begin with the case: C1, a mapping that `prepare` did not make; C3, videos and embeddings;
C4, measurements inside `hooks` and in inference mode.
"""

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchFeature

from conformance import suite
from conformance.tiny import tiny_config, tiny_model
from helpers.prepared_models import prepared
from helpers.tiny_encoders import encoder, pictures
from helpers.tiny_models import build, make_inputs, tiny
from hooked_vlm import Ablate, HookedVLM, LastToken, Patch, Region, Span, Sweep
from hooked_vlm.errors import (
    GridError,
    HookedVLMWarning,
    InterventionError,
    NoGridError,
    RegionError,
    UnsupportedModelError,
)
from hooked_vlm.hooks import attention
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.inputs.videos import frame_grids
from hooked_vlm.interventions.hook_at import HookAt
from hooked_vlm.model.encoder import HookedVisionEncoder
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.positions import Positions, TextTokens


pytestmark = [
    pytest.mark.filterwarnings("ignore:The image processor changed"),
    pytest.mark.filterwarnings("ignore:Attention scores or patterns"),
]
PROJECTED = "vision_projector.hook_out"


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def made(model_type: str) -> HookedVLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return suite.build(model_type)


def fresh(model: HookedVLM) -> HookedVLM:
    """The same model, of which nothing was measured yet."""
    return HookedVLM(model.hf_model, model.processor)


def prepare(model: HookedVLM, wide: int = 1, **options: Any) -> Any:
    width, height = suite.image_size(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.prepare([suite.picture(wide * width, height)], "What is this?", **options)


# --- C1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("model_type", ["got_ocr2", "t5gemma2", "gemma3", "qwen2_5_vl", "llama4"])
def test_c1_a_plain_mapping_gets_the_grids_of_prepare(model_type: str, measured: bool) -> None:
    model = fresh(made(model_type))
    inputs = prepare(model)
    trusted = model.grid_finder.trusts_rule is True
    assert trusted == (model_type in ("gemma3", "qwen2_5_vl"))
    for own in (dict(inputs), BatchFeature(dict(inputs))):
        other = model if measured else fresh(model)
        if trusted:
            ((grid,),) = other.grids(own)
            assert torch.equal(grid.positions, inputs.grid.positions)
            continue
        with pytest.raises(NoGridError, match=r"Use prepare|[Uu]se .*positions"):
            other.grids(own)
        side = suite.image_size(model)[0] // 8
        # Of an encoder-decoder, no place of the prompt is one of its blocks.
        with pytest.raises(InterventionError if model_type == "t5gemma2" else GridError):
            other.run_with_hooks(own, [Ablate(1, at=Region.column_band((side, side), 0, 1))])


@pytest.mark.parametrize("with_processor", [False, True])
def test_c1_tokens_in_another_order_have_no_grid_in_a_plain_mapping(with_processor: bool) -> None:
    model = flipped(prepared("llava"))
    model = model if with_processor else HookedVLM(model.hf_model)
    inputs = dict(prepare(prepared("llava")))
    for _ in range(2):
        with pytest.raises(NoGridError, match=r"Use prepare\(images, texts\), which measures"):
            model.grids(inputs)
    if with_processor:  # prepare measures it, and a mapping of its tensors does not tell
        inputs = prepare(model)
        assert inputs.grid.positions[0, 0] > inputs.grid.positions[-1, -1]
        with pytest.raises(NoGridError):
            model.grids(dict(inputs))
    # What needs no grid runs.
    logits = model.run_with_hooks(dict(inputs), [Ablate(1, at=LastToken())])
    assert logits.isfinite().all()


class Flipped(nn.Module):
    """A projector whose tokens come out in the opposite order."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x).flip(-2)


def flipped(model: HookedVLM) -> HookedVLM:
    hf_model: Any = copy.deepcopy(model.hf_model)
    assert model.anatomy.projector is not None
    owner, _, name = model.anatomy.projector.rpartition(".")
    parent = hf_model.get_submodule(owner)
    setattr(parent, name, Flipped(getattr(parent, name)))
    return HookedVLM(hf_model, model.processor)


def test_c1_tiles_of_one_image_are_no_images_of_a_plain_mapping() -> None:
    model = fresh(made("internvl"))
    square, wide = prepare(model), prepare(model, 2)
    assert torch.equal(model.grids(dict(square))[0][0].positions, square.grid.positions)
    assert wide.grid.overview is not None
    for other in (model, fresh(model)):
        with pytest.raises(NoGridError, match=r"cuts large images into tiles.*Use prepare"):
            other.grids(dict(wide))


def test_c1_sweeps_of_a_plain_mapping_need_no_grid_for_places_without_one() -> None:
    model = fresh(made("llava_onevision"))
    inputs = prepare(model, 2)

    def scores(given: Any) -> Any:
        sweep = Sweep(given, {"slot": range(3)}, lambda slot: Ablate(slot, at=LastToken()))
        assert sweep.plan(model).explain().n_cells == 3
        return sweep.run(model, lambda logits: logits[:, -1, 0])

    torch.testing.assert_close(
        torch.tensor(scores(dict(inputs)).values), torch.tensor(scores(inputs).values)
    )


def test_c1_frames_of_a_video_are_compared_with_a_measurement() -> None:
    model, inputs = of_videos(), with_video()
    assert [len(video) for video in frame_grids(model, inputs)[0]] == [2]
    ((frames,),) = frame_grids(model, with_video(image=True))
    assert torch.equal(frames[0].positions.flatten() - frames[0].positions.min(), torch.arange(6))
    for given in (inputs, with_video(image=True)):
        with pytest.raises(NoGridError, match=r"video tokens of .* do not follow"):
            frame_grids(flipped(model), given)


def test_c1_an_encoders_inputs_under_another_name_are_refused() -> None:
    with pytest.raises(GridError, match="hold images and no 'pixel_values'"):
        encoder("dinov2").grids({"images": torch.zeros(1, 3, 48, 48)})


# --- C3 ------------------------------------------------------------------------------------

IMAGE, VIDEO, START, END = 39, 40, 41, 42
SHAPE = (2, 4, 6)  # frames, rows and columns of patches


@cache
def of_videos() -> HookedVLM:
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
    config = tiny_config("qwen2_vl", **ids, vision_end_token_id=END)
    return HookedVLM(tiny_model("qwen2_vl", config))


def with_video(image: bool = False) -> dict[str, Any]:
    """Inputs of a prompt with a video, after an image if asked for."""
    vision = of_videos().cfg.vision
    assert vision is not None
    random = torch.Generator().manual_seed(0)
    width = 3 * 2 * vision.patch_size**2
    picture = [START, *[IMAGE] * 4, END] if image else []
    ids = torch.tensor([[5, *picture, START, *[VIDEO] * 12, END, 7, 8]])
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(48, width, generator=random),
        "video_grid_thw": torch.tensor([SHAPE]),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    if image:
        inputs["pixel_values"] = torch.randn(16, width, generator=random)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    return inputs


def changed(model: HookedVLM, inputs: Any, edit: Any) -> set[int]:
    """The positions that an intervention at slot 2 writes."""
    site = "blocks.1.hook_resid_post"
    _, clean = model.run_with_cache(inputs, site)
    _, edited = model.run_with_cache(inputs, site, fwd_hooks=[edit])
    moved = (clean[site] != edited[site]).any(-1)
    return set(moved[0].nonzero().flatten().tolist())


@pytest.mark.parametrize("image", [False, True])
def test_c3_places_in_the_text_of_a_prompt_with_a_video(image: bool) -> None:
    model, inputs = of_videos(), with_video(image)
    ids = inputs["input_ids"][0]
    text = set(((ids != IMAGE) & (ids != VIDEO)).nonzero().flatten().tolist())
    last = len(ids) - 1
    assert changed(model, inputs, Ablate(2, at=LastToken())) == {last}
    assert changed(model, inputs, Ablate(2, at=Positions((0, -1)))) == {0, last}
    assert changed(model, inputs, Ablate(2, at=TextTokens())) == text
    assert changed(model, inputs, Ablate(2)) == set(range(len(ids)))
    assert [len(row) for row in model.grids(inputs)] == [image]
    with pytest.raises(RegionError, match="this prompt has 0 images"):
        model.run_with_hooks(with_video(), [Ablate(2, at=Region.column_band((2, 2), 0, 1))])


def test_c3_edits_of_the_encoder_reach_a_video_before_the_image() -> None:
    """A sweep's rows start no later than the video, which the encoder makes too."""
    model, inputs = of_videos(), with_video(image=True)
    order = [0, *range(7, 21), *range(1, 7), 21, 22]  # the video first
    inputs = {n: v[:, order] if v.shape[:1] == (1,) and v.ndim == 2 and v.shape[1] == 23 else v
              for n, v in inputs.items()}  # fmt: skip
    sites = [f"vision_encoder.blocks.{i}.hook_resid_post" for i in (0, 0, 1, 1)]

    def make(cell: int) -> Any:
        return HookAt(sites[cell], lambda x, hook: each_scaled(x, 1.5 + cell))

    sweep = Sweep(inputs, {"cell": range(4)}, make)
    fast = sweep.run(model, lambda logits: logits[:, -1, 0])
    plain = sweep.run(model, lambda logits: logits[:, -1, 0], engine="plain")
    assert "growing" in fast.attrs["engine"]
    torch.testing.assert_close(torch.tensor(fast.values), torch.tensor(plain.values))


def each_scaled(x: Any, factor: float) -> Any:
    return [image * factor for image in x] if isinstance(x, list) else x * factor


def test_c3_embeddings_have_a_last_token() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2)
    _, found = model.run_with_cache(inputs, "hook_merged_embed")
    embedded = {"inputs_embeds": found["hook_merged_embed"]}
    for edit in (Ablate(2, at=LastToken()), Ablate(2, at=Positions((0, -2))), Ablate(1)):
        expected = model.run_with_hooks(inputs, [edit])
        torch.testing.assert_close(model.run_with_hooks(embedded, [edit]), expected)
    for place, why in ((TextTokens(), "given as embeddings"), (Span("a"), "needs the text")):
        with pytest.raises(RegionError, match=why):
            model.run_with_hooks(embedded, [Ablate(2, at=place)])
    with pytest.raises(NoGridError, match="no input_ids"):
        model.run_with_hooks(embedded, [Ablate(2, at=Region.column_band((6, 6), 0, 1))])


def test_c3_separators_and_thumbnails_are_no_text() -> None:
    model = made("llava_onevision")
    inputs = prepare(model, 2)
    assert inputs.grid.overview is not None
    token = model.cfg.image_token_id
    text = set((inputs["input_ids"][0] != token).nonzero().flatten().tolist())
    for given in (inputs, dict(inputs)):
        assert changed(model, given, Ablate(2, at=TextTokens())) == text


# --- C4 ------------------------------------------------------------------------------------


def turned(x: Any, hook: Any) -> Any:
    return [image.flip(0) for image in x] if isinstance(x, list) else x.flip(1)


def surroundings(model: Any, site: str) -> dict[str, Any]:
    return {
        "hooks": lambda: model.hooks([(site, turned)]),
        "inference mode": torch.inference_mode,
        "both": lambda: Both(model.hooks([(site, turned)])),
    }


class Both:
    """Inference mode and another context."""

    def __init__(self, other: Any) -> None:
        self.contexts = torch.inference_mode(), other

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


@pytest.mark.parametrize("where", ["hooks", "inference mode", "both"])
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "mistral3"])
def test_c4_grids_are_measured_without_the_users_hooks(model_type: str, where: str) -> None:
    expected = prepare(fresh(made(model_type)))
    model = fresh(made(model_type))
    assert not expected.no_grid
    with surroundings(model, PROJECTED)[where]():
        inside = prepare(model)
        assert model.is_hooked == (where != "inference mode")
    after = prepare(model)
    assert model.grid_finder.trusts_rule == (None if model_type == "mistral3" else True)
    for grid in (inside.grid, after.grid):
        assert torch.equal(grid.positions, expected.grid.positions)
    # What was made in inference mode serves outside of it.
    left = after.grid.strip("vertical", 0, 1)
    with torch.enable_grad():
        edit = Ablate("vision_encoder.blocks.0.hook_resid_post", at=left)
        model.run_with_hooks(after, [edit])[0, -1, 0].backward()


@pytest.mark.parametrize("where", ["hooks", "inference mode", "both"])
def test_c4_the_grids_of_a_plain_mapping_too(where: str) -> None:
    inputs = prepare(prepared("llava"))
    model = fresh(prepared("llava"))
    with surroundings(model, PROJECTED)[where]():
        ((grid,),) = model.grids(dict(inputs))
    assert torch.equal(grid.positions, inputs.grid.positions)


def test_c4_hooks_act_again_after_a_measurement() -> None:
    model = fresh(prepared("llava"))
    inputs = prepare(prepared("llava"))
    clean = model(inputs)
    with model.hooks([(PROJECTED, turned)]):
        hooked = model(inputs)
        with model.without_hooks():
            assert not model.is_hooked
            assert torch.equal(model(inputs), clean)
        assert model.is_hooked
        assert torch.equal(model(inputs), hooked)
        with pytest.raises(ZeroDivisionError), model.without_hooks():
            raise ZeroDivisionError
        assert torch.equal(model(inputs), hooked)
    assert not torch.equal(hooked, clean)
    assert torch.equal(model(inputs), clean)


@pytest.mark.parametrize("where", ["hooks", "inference mode", "both"])
def test_c4_an_encoders_grids_too(where: str) -> None:
    known = encoder("vit")
    expected = known.prepare(pictures(1)).grids[0][0]
    model = HookedVisionEncoder(known.hf_model, known.processor)
    with surroundings(model, "vision_encoder.blocks.0.hook_resid_pre")[where]():
        inside = model.prepare(pictures(1)).grids[0][0]
    after = model.prepare(pictures(1)).grids[0][0]
    for grid in (inside, after):
        assert torch.equal(grid.positions, expected.positions)
        assert grid.n_prefix == expected.n_prefix


def test_c4_what_blocks_return_is_measured_without_the_users_functions() -> None:
    model, inputs = HookedVLM(build("gemma-3")), make_inputs("gemma-3")
    seen: list[int] = []
    with model.hooks([("blocks.0.hook_resid_pre", lambda x, hook: seen.append(1))]):
        model.block_outputs(lambda: model(inputs))
        assert not seen
        model(inputs)
    assert len(seen) == 1


@pytest.mark.parametrize("site", ["hook_v", "hook_q"])
def test_c4_edited_values_do_not_verify_an_attention(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros agree in any arithmetic, and what is NaN in none."""
    model, inputs = HookedVLM(build("llava")), make_inputs("llava")
    block = model.anatomy.lm.blocks[1]
    assert block.attn is not None
    own = attention._base_function("sdpa", model.hf_model.get_submodule(block.attn.path))
    pattern = ("blocks.1.attn.hook_pattern", lambda x, hook: None)
    monkeypatch.setattr(attention, "_VERIFIED", set())
    nan = (f"blocks.1.attn.{site}", lambda x, hook: x * float("nan"))
    model.run_with_hooks(inputs, [nan, pattern])

    def sharper(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        return own(module, query * 1.1, *args, **options)

    monkeypatch.setattr(attention, "_VERIFIED", set())
    monkeypatch.setattr(attention, "_base_function", lambda base, module: sharper)
    zero = (f"blocks.1.attn.{site}", lambda x, hook: x * 0)
    with pytest.raises(UnsupportedModelError, match="do not reproduce"):
        model.run_with_hooks(inputs, [zero, pattern])


def test_c4_weights_of_inference_mode_are_named_as_the_reason() -> None:
    with torch.inference_mode():
        hf_model = copy.deepcopy(prepared("llava").hf_model)
        for name, weight in [*hf_model.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            setattr(hf_model.get_submodule(owner), leaf, nn.Parameter(weight.clone(), False))
    model = HookedVLM(hf_model, prepared("llava").processor)
    with pytest.warns(HookedVLMWarning, match=r"Load the model outside torch\.inference_mode"):
        model.prepare(suite.picture(64, 64), "Where?")


def test_c1_paired_cells_of_a_measured_grid_are_those_of_its_cells_at_every_site() -> None:
    """The projector's rows are in another order than the cells."""
    model = flipped(prepared("llava"))
    inputs = prepare(model)
    assert inputs.grid.projected is not None
    one, other = (Region(inputs.grid.shape, (cell,)) for cell in ((0, 0), (0, 2)))
    source = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) + 1}
    source = Inputs(source, grids=inputs.grids, texts=inputs.texts, no_grid=inputs.no_grid)
    _, clean = model.run_with_cache(inputs, "hook_merged_embed")
    wanted = {int(inputs.grid.positions[cell]) for cell in ((0, 0), (0, 2))}
    for site in (PROJECTED, "vision_encoder.hook_out", "hook_merged_embed"):
        edit = Patch(site, at=swap_pairs(one, other), source=source)
        _, edited = model.run_with_cache(inputs, "hook_merged_embed", fwd_hooks=[edit])
        moved = (clean["hook_merged_embed"] != edited["hook_merged_embed"]).any(-1)[0]
        assert set(moved.nonzero().flatten().tolist()) == wanted, site

"""Places in public: indices, token strings, answers that a prompt was given, caches of a place."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conformance import suite
from helpers.prepared_models import prepared
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import (
    Ablate,
    ActivationCache,
    Answer,
    HookedVisionEncoder,
    LastToken,
    Patch,
    Positions,
    Region,
    Span,
    Steer,
    Sweep,
    TextTokens,
    record,
)
from hooked_vlm.checks.places import check_append
from hooked_vlm.errors import (
    DataError,
    InterventionError,
    NoGridError,
    RegionError,
    UnknownHookError,
    UnsupportedModelError,
)


FIVE = ("qwen2_vl", "gemma3", "llava", "qwen3_vl", "mllama")
NEAR: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def picture(seed: int = 0, width: int = 64, height: int = 64) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def not_scores(name: str) -> bool:
    return not name.endswith(("attn_scores", "pattern"))


def rectangle(grid: Any, rows: tuple[int, int], cols: tuple[int, int]) -> Region:
    return Region.rectangle(grid.shape, rows, cols)


def both(family: str) -> Any:
    """Two prompts of different lengths, the second one padded."""
    return prepared(family).prepare([picture(0), picture(1)], ["left or right", "yes"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_place_is_found_in_each_prompt(family: str) -> None:
    inputs = both(family)
    ids, mask = inputs.input_ids, inputs.attention_mask
    assert not mask.all()
    last = [int(row.nonzero()[-1]) for row in mask]
    assert [x.tolist() for x in inputs.positions(LastToken())] == [[i] for i in last]
    everything = inputs.positions(None)
    for row, found in zip(mask, everything, strict=True):
        assert torch.equal(found, row.nonzero().flatten())
    grids = [row[0] for row in inputs.grids]
    corners = [rectangle(grids[0], (0, 2), (1, 3)), grids[1].all()]
    found = inputs.positions(corners)
    assert torch.equal(found[0], grids[0].positions[0:2, 1:3].flatten())
    assert torch.equal(found[1], grids[1].positions.flatten())
    token = prepared(family).cfg.image_token_id
    for row, text in zip(ids, inputs.positions(TextTokens()), strict=True):
        assert not (row[text] == token).any()
    one = prepared(family).prepare(picture(0), "left or right")
    (span,) = one.positions(Span("left"))
    assert "left" in one.tokenizer.decode(one.input_ids[0][span])


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_shown_as_text_and_cells(family: str) -> None:
    inputs = both(family)
    for b, labels in enumerate(inputs.to_str_tokens()):
        mask, (grid,) = inputs.attention_mask[b], inputs.grids[b]
        assert len(labels) == len(mask)
        assert [label == "<pad>" for label in labels] == (mask == 0).tolist()
        for r in range(grid.rows):
            for c in range(grid.cols):
                assert labels[int(grid.positions[r, c])] == f"<img0 r{r}c{c}>"
        text = inputs.positions(TextTokens())[b]
        shown = "".join(labels[i] for i in text.tolist())
        assert shown == inputs.tokenizer.decode(inputs.input_ids[b][text])


def test_a_thumbnail_is_shown_as_its_own_cells() -> None:
    model = suite.build("llava_next")
    width, height = suite.image_size(model)
    inputs = model.prepare(suite.picture(2 * width, height), "What?")
    labels = inputs.to_str_tokens()[0]
    assert inputs.grid.overview is not None
    assert labels[int(inputs.grid.overview.positions[0, 1])] == "<thumb0 r0c1>"
    assert labels[int(inputs.grid.positions[0, 1])] == "<img0 r0c1>"


@pytest.mark.filterwarnings("ignore")  # of pictures that a processor resizes
@pytest.mark.parametrize("model_type", FIVE)
def test_appended_tokens_have_the_logits_of_a_generation(model_type: str) -> None:
    model = suite.build(model_type)
    size = suite.image_size(model)
    images = [[suite.picture(*size, seed=seed)] for seed in (0, 1)]
    inputs = model.prepare(images, ["What is this?", "What"])
    steps: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    told = {"output_logits": True, "return_dict_in_generate": True}
    given: Any = model.hf_model.generate(**inputs, **steps, **told)  # type: ignore[operator]
    plain, start = torch.stack(given.logits, 1), inputs.input_ids.shape[1]
    new = given.sequences[:, start:]
    # 1. Equally many tokens in each prompt.
    longer = model.append(inputs, new[:, :-1])
    torch.testing.assert_close(model(longer)[:, start - 1 :], plain, **NEAR)
    # 2. One token and three: the padding changes, and what depends on it.
    uneven = model.append(inputs, [new[0, :1].tolist(), new[1, :3].tolist()])
    logits = model(uneven)
    torch.testing.assert_close(logits[0, -2:], plain[0, :2], **NEAR)
    torch.testing.assert_close(logits[1, -4:], plain[1], **NEAR)
    assert [len(x) for x in uneven.positions(Answer())] == [1, 3]
    for old, moved in zip(inputs.grids, uneven.grids, strict=True):
        for a, b in zip(old, moved, strict=True):
            assert (uneven.input_ids[b.prompt][b.positions] == model.cfg.image_token_id).all()
            assert a.shape == b.shape
    # 3. In two goes.
    twice = model.append(model.append(inputs, new[:, :1]), new[:, 1:3])
    assert torch.equal(twice.input_ids, longer.input_ids)
    assert twice.answers == longer.answers == (3, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pads_with_end", [False, True])
def test_padding_of_a_generation_is_no_answer(family: str, pads_with_end: bool) -> None:
    model, inputs = prepared(family), both(family)
    end, pad = model.tokenizer.eos_token_id, model.tokenizer.pad_token_id
    fill = end if pads_with_end else pad
    assert end != pad
    for rows, answers in (
        ([[105, end, fill, fill], [106, 107, 108, end]], [[105, end], [106, 107, 108, end]]),
        (
            [[106, 107, 108, 105], [105, end, 107, end]],
            [[106, 107, 108, 105], [105, end, 107, end]],
        ),
        ([[105, pad, pad, pad], [106, 107, 108, 105]], [[105], [106, 107, 108, 105]]),
    ):
        longer = model.append(inputs, torch.tensor(rows))
        assert longer.answers == tuple(map(len, answers))
        logits, places = model(longer), longer.positions(Answer())
        images = picture(0), picture(1)
        for b, answer in enumerate(answers):
            assert longer.input_ids[b][places[b]].tolist() == answer
            assert longer.attention_mask[b].sum() == inputs.attention_mask[b].sum() + len(answer)
            alone = model.append(model.prepare(images[b], ("left or right", "yes")[b]), [answer])
            expected = model(alone)[0, alone.positions(Answer())[0]]
            torch.testing.assert_close(logits[b, places[b]], expected, **NEAR)
    with pytest.raises(DataError, match=r"prompt 1: its row .* is padding alone"):
        model.append(inputs, torch.tensor([[105], [pad]]))
    as_they_are = model.append(inputs, [[105, pad], [106, end]])
    assert as_they_are.answers == (2, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["idefics", "paligemma", "gemma3n", "molmo2"])
def test_the_law_of_appended_answers_holds(model_type: str) -> None:
    model = suite.build(model_type)
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    found = check_append(model, inputs)
    assert (found.verdict, found.note) == ("yes", "")


def test_text_after_an_image_at_the_end_is_no_image() -> None:
    model = prepared("gemma-3")
    inputs = model.prepare(picture(0), "What is this?")
    stop = int(inputs.grid.positions.max()) + 1
    shape = inputs.input_ids.shape
    inputs = inputs.but({n: v[:, :stop] if v.shape == shape else v for n, v in inputs.items()})
    assert inputs.token_type_ids[0, -1]
    longer = model.append(inputs, "red")
    new = longer.positions(Answer())[0]
    assert not longer.token_type_ids[0][new].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_prepare_takes_the_beginning_of_an_answer(family: str) -> None:
    model = prepared(family)
    plain = both(family)
    begun = model.prepare(
        [picture(0), picture(1)], ["left or right", "yes"], assistant=["left", "yes yes"]
    )
    for b, text in enumerate(("left", "yes yes")):
        own = plain.input_ids[b][plain.attention_mask[b].bool()].tolist()
        new = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert begun.input_ids[b][begun.attention_mask[b].bool()].tolist() == own + new
        assert begun.input_ids[b][begun.positions(Answer())[b]].tolist() == new
        assert begun.texts[b].endswith(text)
    # A padded batch gives what each prompt gives alone.
    for b, (text, answer) in enumerate((("left or right", "left"), ("yes", "yes yes"))):
        alone = model.prepare(picture(b), text, assistant=answer)
        torch.testing.assert_close(model(begun)[b, -1], model(alone)[0, -1], **NEAR)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_appended_is_refused() -> None:
    model = prepared("llava")
    inputs = both("llava")
    image = model.cfg.image_token_id
    for wrong, said in (
        ([[5]] * 3, "append was given 3 rows of tokens for 2 prompts"),
        ("", "no token to append to prompt 0"),
        ([[5], []], "no token to append to prompt 1"),
        ([[image]], "stands for an image"),
        ([[0.5]], "expected a text, a list with a text for each prompt"),
        (None, "expected a text"),
    ):
        with pytest.raises(DataError, match=said):
            model.append(inputs, wrong)
    with pytest.raises(DataError, match="inputs of type dict"):
        model.append(dict(inputs), "red")
    with pytest.raises(RegionError, match="was given no answer"):
        inputs.positions(Answer())
    other = suite.build("florence2")
    made = other.prepare([suite.picture(*suite.image_size(other))], "What?")
    with pytest.raises(UnsupportedModelError, match="decoder_input_ids"):
        other.append(made, "red")


def test_a_place_that_is_not_there_is_an_error() -> None:
    inputs = both("llava")
    with pytest.raises(InterventionError, match="3 places for 2 prompts"):
        inputs.positions([LastToken()] * 3)
    with pytest.raises(InterventionError, match="is no place here"):
        inputs.positions([LastToken(), None])
    with pytest.raises(InterventionError, match="is no place here"):
        inputs.positions("last")
    with pytest.raises(RegionError, match="does not contain 'green'"):
        inputs.positions(Span("green"))
    bare = inputs.but(dict(inputs), grids=((), ()), no_grid="The tokens form no grid.")
    with pytest.raises(NoGridError, match="form no grid"):
        bare.positions(inputs.grids[0][0].all())
    assert bare.positions(LastToken())[0].shape == (1,)
    with pytest.raises(DataError, match="made without a tokenizer"):
        inputs.but(dict(inputs), tokenizer=None).to_str_tokens()


# --- caches of a place -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_a_place_has_its_positions_and_patches(family: str) -> None:
    model, inputs = prepared(family), both(family)
    _, cache = model.run_with_cache(inputs, not_scores)
    last = inputs.positions(LastToken())
    here = cache.at(LastToken())
    for name in ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "hook_logits"):
        expected = torch.stack([cache[name][b, last[b]] for b in (0, 1)])
        assert torch.equal(here[name], expected)
    with pytest.raises(UnknownHookError, match="left out sites without positions for last token"):
        here["resid_post", 0, "vision_encoder"]
    assert not any(name.startswith("vision") for name in here)
    region = rectangle(inputs.grids[0][0], (1, 3), (0, 2))
    part = cache.at(region)
    site = "vision_encoder.blocks.0.hook_resid_post"
    patches = region.patches(inputs.grids[0][0])
    assert torch.equal(part[site], cache[site][:, patches])
    out = "vision_projector.hook_out"
    assert torch.equal(part[out], cache[out][:, region.tokens])
    rows = torch.stack(inputs.positions(region))
    assert torch.equal(part["resid_post", 1][1], cache["resid_post", 1][1, rows[1]])
    one = cache.select([1]).remove_batch_dim().at(LastToken())
    assert torch.equal(one["resid_post", 0], cache["resid_post", 0][1, last[1]])
    assert torch.equal(cache.select([1]).at(region)["resid_post", 0], part["resid_post", 0][1:])


def test_a_cache_of_places_of_different_sizes_is_by_prompt() -> None:
    model, inputs = prepared("llava"), both("llava")
    _, cache = model.run_with_cache(inputs, "blocks.*.hook_resid_post")
    with pytest.raises(DataError, match=r"cache.select\(\[0\]\).at\(place\)"):
        cache.at(TextTokens())
    found = inputs.positions(TextTokens())
    one = cache.select([0]).at(TextTokens())
    assert torch.equal(one["resid_post", 0][0], cache["resid_post", 0][0, found[0]])
    with pytest.raises(DataError, match="cut to a place already"):
        one.at(LastToken())
    with pytest.raises(DataError, match="made by hand"):
        ActivationCache({"hook_embed": torch.zeros(1, 2, 3)}).at(LastToken())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of eager attention
        _, patterns = model.run_with_cache(inputs, "blocks.0.attn.hook_pattern")
    with pytest.raises(DataError, match="No cached site has a position"):
        patterns.at(LastToken())


def test_an_encoders_cache_is_cut_to_a_region() -> None:
    rich = prepared("llava")
    encoder = HookedVisionEncoder(rich.hf_model, rich.processor.image_processor)
    pictures = encoder.prepare(picture(0))
    _, cache = encoder.run_with_cache(pictures, not_scores)
    region = rectangle(pictures.grid, (0, 2), (0, 2))
    site = "vision_encoder.blocks.0.hook_resid_post"
    assert torch.equal(cache.at(region)[site], cache[site][:, region.patches(pictures.grid)])


# --- a place for each prompt -----------------------------------------------------------------


def _batch(family: str) -> tuple[Any, Any, list[Any]]:
    model = tiny(family)
    inputs = make_inputs(family, batch=2)
    grids = [row[0] for row in model.grids(inputs)]
    regions = [rectangle(grids[0], (0, 2), (0, 2)), rectangle(grids[1], (1, 3), (1, 3))]
    return model, inputs, regions


@pytest.mark.parametrize("site", [1, "vision_encoder.blocks.1.hook_resid_post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_of_a_batch_may_have_its_own_region(family: str, site: Any) -> None:
    model, inputs, regions = _batch(family)
    source = record(model, make_inputs(family, batch=2, seed=5), not_scores)
    width = model.cfg.d_model if site == 1 else model.cfg.vision.d_model
    direction = torch.ones(width)
    for make in (
        lambda at: Ablate(site, at=at),
        lambda at: Patch(site, at=at, source=source),
        lambda at: Steer(site, at=at, directions=direction, alpha=3.0),
        lambda at: Patch(site, at=at, source=source, source_at=regions),
    ):
        together = model.run_with_hooks(inputs, [make(regions)])
        for b, region in enumerate(regions):
            alone = model.run_with_hooks(inputs, [make([region, region])])
            torch.testing.assert_close(together[b], alone[b], **NEAR)
        assert not torch.allclose(together[1], model.run_with_hooks(inputs, [make(regions[0])])[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_takes_a_region_for_each_prompt(family: str) -> None:
    model, inputs, regions = _batch(family)
    places = {"own": regions, "swapped": regions[::-1], "last": LastToken()}
    sweep = Sweep(
        inputs,
        {"slot": [0, 1, 2], "place": list(places)},
        lambda slot, place: Ablate(slot, at=places[place]),
    )
    scores = sweep.run(model, lambda logits: logits[:, -1].amax(-1))
    for slot in (0, 1, 2):
        for place, at in places.items():
            plain = model.run_with_hooks(inputs, [Ablate(slot, at=at)])[:, -1].amax(-1)
            found = torch.as_tensor(scores.sel(slot=slot, place=place).values).float()
            torch.testing.assert_close(found, plain, **NEAR)


def test_places_of_each_prompt_fit_the_batch() -> None:
    model, inputs, regions = _batch("llava")
    for wrong in (regions[:1], [*regions, regions[0]], []):
        with pytest.raises(InterventionError, match="for 2 prompts"):
            model.run_with_hooks(inputs, [Ablate(1, at=wrong)])
    mixed = [regions[0], Positions((-1,))]
    edited = model.run_with_hooks(inputs, [Ablate(1, at=mixed)])
    plain = model.run_with_hooks(inputs, [Ablate(1, at=Positions((-1,)))])
    torch.testing.assert_close(edited[1], plain[1], **NEAR)

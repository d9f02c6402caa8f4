"""Patch, Ablate, Steer, Chain: what they write, and what they refuse before anything runs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.forward_counter import count_forwards
from helpers.tiny_models import FAMILIES, IMAGE, PAD, make_inputs, tiny, tokens_of
from hooked_vlm.analysis.directions import add, scale_projections
from hooked_vlm.errors import (
    HookedVLMError,
    HookedVLMWarning,
    InterventionError,
    RegionError,
    UnknownHookError,
)
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import Recording, record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.positions import LastToken, Positions, TextTokens
from hooked_vlm.regions.region import Region


SITES = (
    "hook_merged_embed",
    "blocks.1.hook_resid_mid",
    "blocks.2.hook_resid_post",
    "blocks.0.attn.hook_q",
    "blocks.1.attn.hook_v",
    "blocks.1.attn.hook_z",
    "blocks.0.mlp.hook_post",
    "vision_encoder.hook_patch_embed",
    "vision_encoder.blocks.0.hook_resid_post",
    "vision_encoder.blocks.1.attn.hook_k",
    "vision_encoder.hook_out",
    "vision_projector.hook_out",
)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def side(family: str) -> int:
    return 6 if family == "llava" else 3


def columns(family: str, start: int, stop: int) -> Region:
    return Region.column_band((side(family), side(family)), start, stop)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def two_sizes(seed: int = 0) -> dict[str, Tensor]:
    """Two Qwen prompts of one length with images of 6x6 and 4x6 patches (3x3 and 2x3 cells)."""
    inputs = make_inputs("qwen2-vl", batch=2, seed=seed)
    ids = inputs["input_ids"].clone()
    ids[1, (ids[1] == IMAGE).nonzero().flatten()[6:]] = 5
    inputs["input_ids"] = ids
    inputs["image_grid_thw"] = torch.tensor([[1, 6, 6], [1, 4, 6]])
    inputs["pixel_values"] = inputs["pixel_values"][: 36 + 24]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def padded(family: str, inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The same prompts after `n` positions of padding."""
    grown = dict(inputs)
    for name, fill in (
        ("input_ids", PAD),
        ("attention_mask", 0),
        ("mm_token_type_ids", 0),
        ("token_type_ids", 0),
    ):
        if name in inputs:
            front = torch.full((len(inputs[name]), n), fill, dtype=inputs[name].dtype)
            grown[name] = torch.cat([front, inputs[name]], dim=1)
    if family != "qwen2-vl":
        mask = grown["attention_mask"]
        grown["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return grown


# --- Patch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_with_itself_changes_nothing_and_with_another_run_something(family: str) -> None:
    model = tiny(family)
    inputs, other = make_inputs(family, 2, seed=1), make_inputs(family, 2, seed=2)
    clean = model(inputs)
    region = columns(family, 0, 2)
    own, foreign = record(model, inputs, SITES), record(model, other, SITES)
    for site in SITES:
        patch = Patch(site, at=region, source=own)
        assert same(model.run_with_hooks(inputs, [patch]), clean), site
        patch = Patch(site, at=region, source=foreign)
        assert not same(model.run_with_hooks(inputs, [patch]), clean), site


@pytest.mark.parametrize(
    "site",
    [
        "vision_encoder.blocks.0.hook_resid_post",
        "vision_projector.hook_out",
        "blocks.1.hook_resid_pre",
    ],
)
def test_images_of_different_sizes_are_patched_one_by_one(site: str) -> None:
    model = tiny("qwen2-vl")
    inputs, other = two_sizes(1), two_sizes(2)
    clean = model(inputs)
    assert same(model.run_with_hooks(inputs, [Patch(site, source=inputs)]), clean)
    assert not same(model.run_with_hooks(inputs, [Patch(site, source=other)]), clean)


def test_heads_of_listed_images_are_chosen_too() -> None:
    model = tiny("qwen2-vl")
    inputs, other = two_sizes(1), two_sizes(2)
    site = "vision_encoder.blocks.1.attn.hook_z"
    clean, foreign = record(model, inputs, site).cache[site], record(model, other, site).cache[site]
    seen: list[list[Tensor]] = []
    patch = Patch(site, source=other, heads=(1, 3))

    def look(activation: list[Tensor], hook: Any) -> None:
        seen.append([image.clone() for image in activation])

    model.run_with_hooks(inputs, [patch, (site, look)])
    for now, before, source in zip(seen[0], clean, foreign, strict=True):
        assert same(now[:, [1, 3]], source[:, [1, 3]])
        assert same(now[:, [0, 2]], before[:, [0, 2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_at_slot_0_from_another_run_is_that_run(family: str) -> None:
    model = tiny(family)
    inputs, other = make_inputs(family, 2, seed=1), make_inputs(family, 2, seed=2)
    for slot in (0, "hook_merged_embed"):
        patched = model.run_with_hooks(inputs, [Patch(slot, source=other)])
        torch.testing.assert_close(patched, model(other), rtol=0, atol=1e-6)
    # The image alone: the other run's pixels with this run's text.
    image = model.grids(inputs)[0][0]
    everything = Region.everything(image.shape)
    patched = model.run_with_hooks(inputs, [Patch(0, at=everything, source=other)])
    mixed = {**inputs, "pixel_values": other["pixel_values"]}
    torch.testing.assert_close(patched, model(mixed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_map_across_prompts_of_other_lengths_and_padding(family: str) -> None:
    model = tiny(family)
    inputs, other = make_inputs(family, seed=1), make_inputs(family, seed=2, text=9)
    region = columns(family, 0, 1)
    site = "blocks.1.hook_resid_post"
    source = record(model, other, site)
    seen: list[Tensor] = []
    look = (site, lambda activation, hook: seen.append(activation.clone()))
    model.run_with_hooks(inputs, [Patch(site, at=region, source=source), look])
    here, there = (region.positions(model.grids(i)[0][0]) for i in (inputs, other))
    assert same(seen[0][0, here], source.cache[site][0, there])
    rest = [p for p in range(seen[0].shape[1]) if p not in here.tolist()]
    clean = record(model, inputs, site).cache[site]
    assert same(seen[0][0, rest], clean[0, rest])
    # Behind padding, the same places are meant.
    late = padded(family, inputs, 3)
    patches = [
        Patch(site, at=region, source=source),
        Patch(site, at=LastToken(), source=source),
        Patch(site, at=Positions((0,)), source=source),
    ]
    for patch in patches:
        plain, later = (model.run_with_hooks(i, [patch]) for i in (inputs, late))
        torch.testing.assert_close(later[:, 3:], plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_of_one_prompt_serves_all(family: str) -> None:
    model = tiny(family)
    inputs, one = make_inputs(family, 2, seed=1), make_inputs(family, seed=2)
    two = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in one.items()}
    pairs = swap_pairs(columns(family, 0, 1), columns(family, 2, 3))
    for at in (columns(family, 0, 1), pairs):
        for site in (1, "vision_projector.hook_out", "vision_encoder.blocks.0.hook_resid_pre"):
            single = model.run_with_hooks(inputs, [Patch(site, at=at, source=one)])
            double = model.run_with_hooks(inputs, [Patch(site, at=at, source=two)])
            torch.testing.assert_close(single, double, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "site",
    [
        "blocks.0.hook_resid_post",
        "vision_encoder.blocks.0.hook_resid_pre",
        "vision_projector.hook_out",
    ],
)
def test_swapping_twice_gives_back_what_was_there(family: str, site: str) -> None:
    model = tiny(family)
    inputs = make_inputs(family, 2, seed=1)
    pairs = swap_pairs(columns(family, 0, 1), columns(family, 2, 3))
    swapped: list[Tensor] = []
    look = (site, lambda activation, hook: swapped.append(activation.clone()))
    once = model.run_with_hooks(inputs, [Patch(site, at=pairs, source=inputs), look])
    assert not same(once, model(inputs))
    middle = Recording(inputs, ActivationCache({site: swapped[0]}))
    # Swapped into the swapped run: first the whole of it, then the swap read from it.
    twice = [Patch(site, source=middle), Patch(site, at=pairs, source=middle)]
    torch.testing.assert_close(model.run_with_hooks(inputs, twice), model(inputs), rtol=0, atol=0)


@settings(max_examples=8, deadline=None)
@given(
    cells=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9, unique=True
    ),
    slot=st.integers(0, 3),
)
def test_a_patch_writes_its_cells_and_no_others(cells: list[tuple[int, int]], slot: int) -> None:
    model = tiny("gemma-3")
    inputs, other = make_inputs("gemma-3", seed=1), make_inputs("gemma-3", seed=2)
    region = Region((3, 3), tuple(cells))
    seen: list[Tensor] = []
    with torch.no_grad():
        patch = Patch(slot, at=region, source=other)
        ((site, hook_fn),) = patch.hooks_for(model, inputs)
        clean, source = (record(model, i, site).cache[site] for i in (inputs, other))
        model.run_with_hooks(inputs, [(site, hook_fn), (site, lambda a, hook: seen.append(a))])
    positions = region.positions(model.grids(inputs)[0][0])
    expected = clean.clone()
    expected[:, positions] = source[:, positions]
    assert same(seen[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_are_the_hooks_one_would_write(family: str) -> None:
    model = tiny(family)
    inputs, other = make_inputs(family, 2, seed=1), make_inputs(family, 2, seed=2)
    region, site = columns(family, 0, 1), "blocks.1.hook_resid_post"
    positions = region.positions(model.grids(inputs)[0][0])
    source = record(model, other, site)
    direction = torch.randn(48)

    def patched(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, positions] = source.cache[site][:, positions]
        return activation

    def steered(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, positions] = add(activation[:, positions], direction, 2.0)
        return activation

    def zeroed(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, positions] = 0
        return activation

    for intervention, hook_fn in (
        (Patch(site, at=region, source=source), patched),
        (Steer(site, at=region, directions=direction, alpha=2.0), steered),
        (Ablate(site, at=region), zeroed),
    ):
        declared = model.run_with_hooks(inputs, [intervention])
        assert same(declared, model.run_with_hooks(inputs, [(site, hook_fn)])), intervention
        with model.hooks([intervention], inputs=inputs):
            assert same(model(inputs), declared)
        assert not same(declared, model(inputs))


@pytest.mark.parametrize(
    "site", ["blocks.1.hook_resid_post", "vision_encoder.blocks.0.hook_resid_post"]
)
@pytest.mark.parametrize(
    "sizes",
    [
        two_sizes,
        lambda seed: make_inputs("qwen2-vl", 2, seed=seed),
        lambda seed: make_inputs("qwen2-vl", 1, seed=seed),
    ],
    ids=["two sizes", "two prompts", "one prompt"],
)
def test_j2_what_an_earlier_function_was_shown_stays_as_it_was(site: str, sizes: Any) -> None:
    model, inputs, other = tiny("qwen2-vl"), sizes(1), sizes(2)
    clean = record(model, inputs, site).cache[site]
    width = clean[0].shape[-1]
    for intervention in (
        Patch(site, source=other),
        Ablate(site),
        Steer(site, directions=torch.ones(width), alpha=2.0),
        Steer(site, directions=torch.ones(width), alpha=2.0, mode="project"),
    ):
        shown: list[Any] = []
        look = (site, lambda activation, hook, shown=shown: shown.append(activation))
        changed = model.run_with_hooks(inputs, [look, intervention, look])
        assert not same(changed, model(inputs))
        before, after = shown
        for now, then, new in zip(before, clean, after, strict=True):
            assert same(now, then), intervention
            assert not same(new, then), intervention


# --- Ablate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["blocks.1.hook_resid_pre", "vision_projector.hook_out"])
def test_ablations_write_what_they_say(family: str, site: str) -> None:
    model = tiny(family)
    inputs, other = make_inputs(family, 2, seed=1), make_inputs(family, 2, seed=2)
    region = columns(family, 0, 1)
    reference = record(model, other, site)
    index = region.tokens
    if site.startswith("blocks"):
        index = region.positions(model.grids(inputs)[0][0])
    rows = reference.cache[site][:, index]
    vector = torch.randn(48)
    for ablation, expected in (
        (Ablate(site, at=region), torch.zeros(48)),
        (Ablate(site, at=region, to=vector), vector),
        (Ablate(site, at=region, to="mean", reference=reference), rows.flatten(0, 1).mean(0)),
        (Ablate(site, at=region, to="mean", reference=other), rows.flatten(0, 1).mean(0)),
        (Ablate(site, at=region, to="position_mean", reference=reference), rows.mean(0)),
    ):
        seen: list[Tensor] = []
        look = (site, lambda activation, hook, seen=seen: seen.append(activation.clone()))
        model.run_with_hooks(inputs, [ablation, look])
        torch.testing.assert_close(seen[0][:, index], expected.expand_as(rows), rtol=0, atol=1e-6)


def test_ablation_of_chosen_heads() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", seed=1)
    site = "blocks.1.attn.hook_z"
    seen: list[Tensor] = []
    look = (site, lambda activation, hook: seen.append(activation.clone()))
    model.run_with_hooks(inputs, [Ablate(site, at=LastToken(), heads=(0, 2)), look])
    clean = record(model, inputs, site).cache[site]
    assert (seen[0][:, -1, [0, 2]] == 0).all()
    assert same(seen[0][:, -1, [1, 3]], clean[:, -1, [1, 3]])
    assert same(seen[0][:, :-1], clean[:, :-1])


# --- Steer and Chain ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_is_the_formula_and_alpha_0_an_exact_replay(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    directions = torch.randn(3, 48)
    clean = model(inputs)
    for site in (0, "vision_projector.hook_out"):
        off = Steer(site, directions=directions, alpha=0.0, mode="project")
        assert same(model.run_with_hooks(inputs, [off]), clean)
        name = off.hooks_for(model, inputs)[0][0]
        h = record(model, inputs, name).cache[name]
        for steer, expected in (
            (
                Steer(site, directions=directions, alpha=2.5, mode="project"),
                scale_projections(h, directions, 2.5),
            ),
            (Steer(site, directions=directions[0], alpha=-1.5), add(h, directions[0], -1.5)),
        ):
            seen: list[Tensor] = []
            look = (name, lambda activation, hook, seen=seen: seen.append(activation.clone()))
            assert not same(model.run_with_hooks(inputs, [steer, look]), clean)
            torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_the_order_in_a_chain_matters() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", 2, seed=1)
    other = make_inputs("qwen2-vl", 2, seed=2)
    region = columns("qwen2-vl", 0, 1)
    patch = Patch(1, at=region, source=other)
    steer = Steer(1, at=region, directions=torch.randn(48), alpha=4.0)
    first, second = (
        model.run_with_hooks(inputs, [Chain(*parts)]) for parts in ((patch, steer), (steer, patch))
    )
    assert same(second, model.run_with_hooks(inputs, [patch]))  # the patch overwrote the steering
    assert not same(first, second)
    hooks = [*patch.hooks_for(model, inputs), *steer.hooks_for(model, inputs)]
    assert same(first, model.run_with_hooks(inputs, hooks))
    moved = Chain(patch, steer).at_site(2)
    assert [name for name, _ in moved.hooks_for(model, inputs)] == ["blocks.1.hook_resid_post"] * 2


# --- in a generation ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_act_on_the_prompt_of_a_generation(family: str) -> None:
    model = tiny(family)
    inputs, other = make_inputs(family, 2, seed=1), make_inputs(family, 2, seed=2)
    patch = Patch(3, at=LastToken(), source=other)
    options = {"max_new_tokens": 3, "do_sample": False}
    new = model.generate(inputs, fwd_hooks=[patch], **options)[:, inputs["input_ids"].shape[1] :]
    assert same(new[:, 0], model(other)[:, -1].argmax(-1))
    uncached = model.generate(inputs, fwd_hooks=[patch], use_cache=False, **options)
    assert same(uncached[:, -3:], new)
    both = model.generate(inputs, fwd_hooks=[patch], prefill_only=True, **options)
    assert same(both[:, -3:], new)
    assert same(model(inputs), model(inputs))  # and nothing stayed attached
    assert not model.hf_model._forward_pre_hooks


# --- what is refused ------------------------------------------------------------------------


def refused(
    family: str, intervention: Any, error: type[HookedVLMError], match: str, **inputs: Any
) -> None:
    model = tiny(family)
    with count_forwards(model) as forwards:
        with pytest.raises(error, match=match):
            model.run_with_hooks(make_inputs(family, 2, seed=1) | inputs, [intervention])
        assert not forwards
        with pytest.raises(error, match=match):
            intervention.check(model, make_inputs(family, 2, seed=1) | inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_places_that_do_not_fit_are_refused_before_anything_runs(family: str) -> None:
    source = make_inputs(family, 2, seed=2)
    n = side(family)
    strip, wide = columns(family, 0, 1), columns(family, 0, 2)
    for site in (1, "vision_projector.hook_out", "vision_encoder.hook_out"):
        unequal = Patch(site, at=strip, source=source, source_at=wide)
        refused(family, unequal, RegionError, "Give places of equal size")
        foreign = Region.column_band((n + 1, n), 0, 1)
        refused(family, Patch(site, at=foreign, source=source), RegionError, "visual tokens")
        refused(family, Ablate(site, at=strip - strip), RegionError, "has no cells")
        narrow = torch.ones(7)
        for wrong in (Steer(site, directions=narrow, alpha=1.0), Ablate(site, to=narrow)):
            if site != "vision_encoder.hook_out":
                refused(family, wrong, InterventionError, "7 were given")
                continue
            # How wide the projector's input is, is only known when it is there.
            with pytest.raises(InterventionError, match="7 were given"):
                tiny(family).run_with_hooks(make_inputs(family, 2, seed=1), [wrong])
    three = make_inputs(family, 3, seed=2)
    refused(
        family, Patch(1, at=strip, source=three), InterventionError, "Give a source of the same"
    )
    pairs = swap_pairs(strip, columns(family, 2, 3))
    refused(family, Patch(1, at=pairs, source=three), InterventionError, "source of the same")
    for place in (LastToken(), TextTokens(), Positions((0,))):
        text = Ablate("vision_encoder.blocks.0.hook_resid_pre", at=place)
        refused(family, text, InterventionError, "no part of an image")
    if "vision_encoder.hook_pos_embed" in tiny(family).sites:
        refused(family, Ablate("vision_encoder.hook_pos_embed"), InterventionError, "no position")


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_and_heads_that_do_not_exist_are_refused(family: str) -> None:
    refused(family, Ablate("blocks.0.hook_resid_pots"), UnknownHookError, "Did you mean")
    refused(family, Ablate(9), UnknownHookError, "slots 0 to 3")
    refused(family, Ablate("blocks.7.hook_resid_post"), UnknownHookError, "out of range")
    refused(family, Ablate("blocks.0.attn.hook_q", heads=(4,)), InterventionError, "heads 0 to 3")
    refused(family, Ablate("blocks.0.attn.hook_k", heads=(2,)), InterventionError, "heads 0 to 1")
    refused(family, Ablate(0, heads=(0,)), InterventionError, "no heads to choose")
    if family == "llava":
        dead = Ablate("vision_encoder.blocks.2.hook_resid_post")
        refused(family, dead, InterventionError, "cannot be written")


def test_words_that_are_not_known_are_refused() -> None:
    other = make_inputs("llava", 2, seed=2)
    refused("llava", Ablate(1, to="zeros"), InterventionError, "Did you mean 'zero'")
    refused("llava", Ablate(1, to="mean"), InterventionError, "needs reference")
    uneven = Ablate(
        1, at=LastToken(), to="position_mean", reference=other, reference_at=columns("llava", 0, 1)
    )
    refused("llava", uneven, RegionError, "keeps positions apart")
    rows = torch.ones(2, 48)
    refused("llava", Steer(1, directions=rows, alpha=1.0), InterventionError, "one direction")
    wrong = Steer(1, directions=rows, alpha=1.0, mode="projekt")
    refused("llava", wrong, InterventionError, "Did you mean 'project'")
    refused("llava", Chain(Ablate(1), wrong), InterventionError, "Did you mean 'project'")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "1", None, 1j])
def test_j2_an_alpha_that_is_no_finite_number_is_refused(alpha: Any) -> None:
    steer = Steer(1, directions=torch.ones(48), alpha=1.0)
    object.__setattr__(steer, "alpha", alpha)  # past the checks of types, which only tests have
    refused("llava", steer, InterventionError, "expected a finite number")


@pytest.mark.parametrize(
    ("directions", "words"),
    [
        (torch.ones(1, 1, 48), "expected a tensor"),
        (torch.ones(48, dtype=torch.complex64), "expected a tensor"),
        (torch.ones(0, 48), "expected a tensor"),
        (torch.full((48,), float("nan")), "NaN or infinite"),
        (torch.tensor([float("nan"), *[1.0] * 47]), "NaN or infinite"),
        (torch.full((48,), float("-inf")), "NaN or infinite"),
    ],
)
def test_j2_directions_that_are_none_are_refused(directions: Tensor, words: str) -> None:
    steer = Steer(1, directions=torch.ones(48), alpha=1.0)
    object.__setattr__(steer, "directions", directions)  # past the checks of shapes
    refused("llava", steer, InterventionError, words)


def test_an_intervention_made_for_one_batch_refuses_another() -> None:
    model = tiny("gemma-3")
    inputs = make_inputs("gemma-3", 2, seed=1)
    for run in (make_inputs("gemma-3", 3, seed=1), make_inputs("gemma-3", 2, seed=1, text=8)):
        made_for_another = model.hooks([Ablate(1, at=LastToken())], inputs=inputs)
        with pytest.raises(InterventionError, match="made for 2 prompts"), made_for_another:
            model(run)
    with pytest.raises(HookedVLMError, match="needs the inputs"), model.hooks([Ablate(1)]):
        pass


def test_a_vision_site_without_an_image() -> None:
    model = tiny("llava")
    ids = torch.randint(2, 290, (2, 9))
    blind = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    source = make_inputs("llava", 2, seed=2)
    with pytest.raises(InterventionError, match="writes 0 prompts"):
        model.run_with_hooks(blind, [Patch("vision_projector.hook_out", source=source)])
    with pytest.warns(HookedVLMWarning, match="never ran"):
        model.run_with_hooks(blind, [Ablate("vision_projector.hook_out")])
    with pytest.raises(RegionError, match="this prompt has 0"):
        model.run_with_hooks(blind, [Ablate(1, at=columns("llava", 0, 1))])


def test_they_print_what_they_do() -> None:
    source = make_inputs("llava", seed=2)
    region = Region.column_band((6, 6), 0, 2, "left strip")
    shown = str(Chain(Patch(3, at=region, source=source), Ablate("hook_embed", at=LastToken())))
    assert "Patch(3, left strip" in shown
    assert "Ablate(hook_embed, last token, to zero)" in shown
    assert str(Steer(0, directions=torch.ones(4), alpha=2.0)) == "Steer(0, None, add, alpha=2)"
    assert tokens_of("llava") == 36


@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_run_ends_behind_what_is_read_of_it(family: str) -> None:
    """Behind the last block no vocabulary is computed, and the values are those of a whole run."""
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    n = model.cfg.n_layers
    names = ["blocks.0.hook_resid_pre", f"blocks.{n - 1}.hook_resid_post"]
    _, whole = model.run_with_cache(inputs, names)
    ran: list[int] = []
    head = model.hf_model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_hook(lambda *_: ran.append(0))
    found = record(model, inputs, names).cache
    assert ran == [] and all(torch.equal(found[name], whole[name]) for name in names)
    record(model, inputs, [*names, "hook_logits"])
    assert ran == [0]
    handle.remove()


def test_j2_one_value_that_is_nan_is_refused_in_what_is_written() -> None:
    value = torch.ones(48)
    value[3] = float("nan")
    refused("llava", Ablate(1, to=value), InterventionError, "NaN or infinite")

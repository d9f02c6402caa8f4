"""Activation patching under TransformerLens's names, on runs with images."""

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from helpers.tiny_models import FAMILIES, IMAGE, build, make_inputs, tiny, tokens_of
from hooked_vlm.errors import HookedVLMWarning, InterventionError, UnknownHookError
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import Positions
from hooked_vlm.sweeps import transformer_lens


TOWER = "vision_encoder"


WITHIN: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
"""How far the fast engine may be from passes by hand."""


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 7].mean() - logits[:, -1, 11].mean()


def short_inputs(family: str, **options: Any) -> dict[str, Tensor]:
    """Inputs with little text, so that a sweep over positions stays quick."""
    return make_inputs(family, text=1, **options)


def cached(model: HookedVLM, inputs: dict[str, Tensor], names: Any = None) -> Any:
    with torch.no_grad():
        return model.run_with_cache(inputs, names)[1]


def by_hand(model: HookedVLM, inputs: Any, name: str, where: tuple, clean: Tensor) -> Tensor:
    """The metric when a user's own hook writes the clean values at an index."""

    def hook(activation: Tensor, hook: Any) -> Tensor:
        changed = activation.clone()
        changed[where] = clean[where]
        return changed

    with torch.no_grad():
        return metric(model.run_with_hooks(inputs, [(name, hook)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_all_positions_one_by_one_is_what_hooks_by_hand_do(family: str) -> None:
    model = tiny(family)
    corrupted, clean = short_inputs(family, seed=1), short_inputs(family, seed=2)
    cache = cached(model, clean, "blocks.*.hook_resid_pre")
    scores = transformer_lens.get_act_patch_resid_pre(model, corrupted, cache, metric)
    assert scores.shape == (3, corrupted["input_ids"].shape[1])
    for layer, pos in ((0, 0), (1, 5), (2, -1)):
        name = f"blocks.{layer}.hook_resid_pre"
        expected = by_hand(model, corrupted, name, (slice(None), pos), cache[name])
        torch.testing.assert_close(scores[layer, pos], expected, **WITHIN)
    last = scores[0, -1], metric(model(corrupted))
    assert not torch.equal(*last)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tower", [None, TOWER])
@pytest.mark.parametrize("short", ["resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_residual_family_has_layer_and_pos_in_every_tower(
    family: str, tower: str | None, short: str
) -> None:
    model = tiny(family)
    corrupted = short_inputs(family, seed=1)
    prefix = f"{tower}." if tower else ""
    cache = cached(model, short_inputs(family, seed=2), f"{prefix}blocks.*.hook_{short}")
    positions = pd.DataFrame({"layer": [0, 1, 0], "pos": [4, 6, 5]})
    scores = transformer_lens.generic_activation_patch(
        model,
        corrupted,
        cache,
        metric,
        transformer_lens.layer_pos_patch_setter,
        short,
        index_df=positions,
        tower=tower,
    )
    assert scores.shape == (3,)
    for score, (layer, pos) in zip(scores, positions.itertuples(index=False), strict=True):
        name = f"{prefix}blocks.{layer}.hook_{short}"
        expected = by_hand(model, corrupted, name, (slice(None), pos), cache[name])
        torch.testing.assert_close(score, expected, **WITHIN)
        assert score != metric(model(corrupted))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_patched_by_patch_and_the_projector_by_token(family: str) -> None:
    model = tiny(family)
    corrupted = short_inputs(family, seed=1)
    names = [f"{TOWER}.blocks.*.hook_resid_pre", "vision_projector.hook_out"]
    cache = cached(model, short_inputs(family, seed=2), names)
    by_patch = transformer_lens.get_act_patch_resid_pre(
        model, corrupted, cache, metric, tower=TOWER
    )
    n_patches = 37 if family == "llava" else 36
    n_layers = 2 if family == "llava" else 3  # LLaVA's projector reads vision block 1 of 0..2
    assert by_patch.shape == (n_layers, n_patches)
    by_token = transformer_lens.get_act_patch_projector(model, corrupted, cache, metric)
    assert by_token.shape == (tokens_of(family),)
    # A token of the projector is what the LM finds at its position: the two must agree.
    grid = model.grids(corrupted)[0][0]
    for token in (0, tokens_of(family) - 1):
        position = int(grid.positions.flatten()[token])
        with torch.no_grad():
            merged = model.run_with_hooks(
                corrupted,
                [
                    Patch(
                        "hook_merged_embed",
                        at=Positions((position,)),
                        source=short_inputs(family, seed=2),
                    )
                ],
            )
        torch.testing.assert_close(by_token[token], metric(merged), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tower", [None, TOWER])
def test_heads_follow_the_activation_and_not_the_config(family: str, tower: str | None) -> None:
    model = tiny(family)
    corrupted = short_inputs(family, seed=1)
    cache = cached(
        model, short_inputs(family, seed=2), lambda name: name[-2:] in ("_q", "_k", "_v", "_z")
    )
    counts = {"out": 4, "q": 4, "k": 4 if tower else 2, "v": 4 if tower else 2}
    last = 2 if tower and family == "llava" else 3
    for letter, n_heads in counts.items():
        function = getattr(transformer_lens, f"get_act_patch_attn_head_{letter}_all_pos")
        scores = function(model, corrupted, cache, metric, tower=tower)
        assert scores.shape == (last, n_heads)
        short = "z" if letter == "out" else letter
        name = f"{tower + '.' if tower else ''}blocks.1.attn.hook_{short}"
        where = (slice(None), slice(None), 1)
        torch.testing.assert_close(
            scores[1, 1], by_hand(model, corrupted, name, where, cache[name]), **WITHIN
        )


def test_heads_by_position() -> None:
    model = tiny("gemma-3")
    corrupted = short_inputs("gemma-3", seed=1)
    cache = cached(model, short_inputs("gemma-3", seed=2), "blocks.*.attn.hook_k")
    scores = transformer_lens.get_act_patch_attn_head_k_by_pos(model, corrupted, cache, metric)
    assert scores.shape == (3, corrupted["input_ids"].shape[1], 2)
    name = "blocks.2.attn.hook_k"
    where = (slice(None), 4, 1)
    torch.testing.assert_close(
        scores[2, 4, 1], by_hand(model, corrupted, name, where, cache[name]), **WITHIN
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns(family: str) -> None:
    model = HookedVLM(build(family))  # a new one: the warning comes once for each model
    corrupted = short_inputs(family, seed=1)
    with pytest.warns(HookedVLMWarning, match="[Ee]ager attention"):
        cache = cached(model, short_inputs(family, seed=2), "*.attn.hook_pattern")
    whole = transformer_lens.get_act_patch_attn_head_pattern_all_pos(
        model, corrupted, cache, metric
    )
    assert whole.shape == (3, 4)
    name = "blocks.1.attn.hook_pattern"
    where = (slice(None), 2)
    torch.testing.assert_close(
        whole[1, 2], by_hand(model, corrupted, name, where, cache[name]), **WITHIN
    )
    rows = pd.DataFrame({"layer": [0, 0], "head_index": [1, 3], "dest_pos": [-0 + 3, 9]})
    by_row = transformer_lens.generic_activation_patch(
        model,
        corrupted,
        cache,
        metric,
        transformer_lens.layer_head_pos_pattern_patch_setter,
        "pattern",
        index_df=rows,
    )
    first = "blocks.0.attn.hook_pattern"
    where = (slice(None), 3, 9)
    torch.testing.assert_close(
        by_row[1], by_hand(model, corrupted, first, where, cache[first]), **WITHIN
    )
    entries = pd.DataFrame({"layer": [1], "head": [2], "dest_pos": [9], "src_pos": [4]})
    vision = transformer_lens.generic_activation_patch(
        model,
        corrupted,
        cache,
        metric,
        transformer_lens.layer_head_dest_src_pos_pattern_patch_setter,
        "pattern",
        index_df=entries,
        tower=TOWER,
    )
    inside = f"{TOWER}.blocks.1.attn.hook_pattern"
    where = (slice(None), 2, 9, 4)
    assert torch.equal(vision[0], by_hand(model, corrupted, inside, where, cache[inside]))


@pytest.mark.filterwarnings("ignore:Attention scores or patterns")
def test_the_every_functions_stack_their_parts() -> None:
    model = tiny("qwen2-vl")
    corrupted = make_inputs("qwen2-vl", seed=1, text=1)
    cache = cached(model, make_inputs("qwen2-vl", seed=2, text=1))
    every = transformer_lens.get_act_patch_attn_head_all_pos_every(model, corrupted, cache, metric)
    assert every.shape == (5, 3, 4)
    missing = torch.isnan(every)
    assert missing[2:4, :, 2:].all()
    assert missing.sum() == 2 * 3 * 2
    keys = transformer_lens.get_act_patch_attn_head_k_all_pos(model, corrupted, cache, metric)
    torch.testing.assert_close(every[2, :, :2], keys, **WITHIN)
    blocks = transformer_lens.get_act_patch_block_every(model, corrupted, cache, metric)
    assert blocks.shape == (3, 3, corrupted["input_ids"].shape[1])
    out = transformer_lens.get_act_patch_mlp_out(model, corrupted, cache, metric)
    assert torch.equal(blocks[2], out)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attention scores or patterns")
def test_every_by_position() -> None:
    model = tiny("qwen2-vl")
    corrupted = make_inputs("qwen2-vl", seed=1, text=1)
    cache = cached(model, make_inputs("qwen2-vl", seed=2, text=1))
    n_pos = corrupted["input_ids"].shape[1]
    every = transformer_lens.get_act_patch_attn_head_by_pos_every(model, corrupted, cache, metric)
    assert every.shape == (5, 3, n_pos, 4)
    rows = transformer_lens.get_act_patch_attn_head_pattern_by_pos(model, corrupted, cache, metric)
    torch.testing.assert_close(every[4], rows.transpose(1, 2), **WITHIN)
    entries = transformer_lens.get_act_patch_attn_head_pattern_dest_src_pos(
        model, corrupted, cache, metric
    )
    assert entries.shape == (3, 4, n_pos, n_pos)


def test_a_clean_cache_of_the_same_run_changes_nothing() -> None:
    model = tiny("llava")
    inputs = short_inputs("llava", seed=1)
    cache = cached(model, inputs, "blocks.*.hook_mlp_out")
    rows = pd.DataFrame({"layer": [0, 2], "pos": [1, 6]})
    scores = transformer_lens.generic_activation_patch(
        model,
        inputs,
        cache,
        metric,
        transformer_lens.layer_pos_patch_setter,
        "mlp_out",
        index_df=rows,
    )
    torch.testing.assert_close(scores, metric(model(inputs)).expand(2), **WITHIN)


def test_one_clean_prompt_serves_a_batch() -> None:
    model = tiny("gemma-3")
    corrupted, clean = short_inputs("gemma-3", batch=2, seed=1), short_inputs("gemma-3", seed=2)
    cache = cached(model, clean, "blocks.*.hook_resid_post")
    rows = pd.DataFrame({"layer": [2], "pos": [corrupted["input_ids"].shape[1] - 1]})
    score = transformer_lens.generic_activation_patch(
        model,
        corrupted,
        cache,
        metric,
        transformer_lens.layer_pos_patch_setter,
        "resid_post",
        None,
        rows,
    )
    torch.testing.assert_close(score[0], metric(model(clean)), rtol=0, atol=1e-6)


def test_sites_without_a_layer_a_setter_of_ones_own_and_progress() -> None:
    model = tiny("qwen2-vl")
    corrupted, clean = short_inputs("qwen2-vl", seed=1), short_inputs("qwen2-vl", seed=2)
    cache = cached(model, clean, "hook_merged_embed")
    told: list[tuple[int, int]] = []
    seen: list[list[int]] = []

    def setter(corrupted: Tensor, index: list[int], clean: Tensor) -> None:
        seen.append(index)
        corrupted[:, index[0]] = clean[:, index[0]]

    scores, index_df = transformer_lens.generic_activation_patch(
        model,
        corrupted,
        cache,
        metric,
        setter,
        "merged_embed",
        ("pos",),
        return_index_df=True,
        on_progress=lambda done, total: told.append((done, total)),
    )
    n_pos = corrupted["input_ids"].shape[1]
    assert scores.shape == (n_pos,)
    assert list(index_df.columns) == ["pos"]
    # More than once for some: rows that join a pass are made there.
    assert list(map(list, dict.fromkeys(map(tuple, seen)))) == [[pos] for pos in range(n_pos)]
    assert told == [(i + 1, n_pos) for i in range(n_pos)]
    # A setter that writes in place and returns nothing must not have been ignored.
    assert len(set(scores.tolist())) > 2


# --- what is refused, before any forward pass -----------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts the forward passes of the shared tiny models."""
    calls: list[str] = []
    original = HookedVLM.forward

    def counted(self: HookedVLM, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(self.cfg.model_name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HookedVLM, "forward", counted)
    return calls


def refused(
    model: HookedVLM, inputs: Any, cache: Any, match: str, forwards: list[str], **options: Any
) -> None:
    given = {
        "patch_setter": transformer_lens.layer_pos_patch_setter,
        "activation_name": "resid_pre",
        "index_axis_names": ("layer", "pos"),
    } | options
    forwards.clear()
    with pytest.raises((InterventionError, UnknownHookError), match=match):
        transformer_lens.generic_activation_patch(model, inputs, cache, metric, **given)
    assert forwards == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_run_that_does_not_fit_is_refused(family: str, forwards: list[str]) -> None:
    model = tiny(family)
    corrupted = short_inputs(family, seed=1)
    all_of = ["blocks.*.hook_resid_pre", f"{TOWER}.blocks.*.hook_resid_pre"]
    cache = cached(model, short_inputs(family, seed=2), all_of)
    refused(model, corrupted, cache, "lacks 3 of the 3 sites", forwards, activation_name="mlp_out")
    longer = cached(model, make_inputs(family, seed=2, text=4), all_of)
    refused(model, corrupted, longer, "along 'pos'", forwards)
    two = cached(model, short_inputs(family, batch=2, seed=2), all_of)
    refused(model, corrupted, two, "along 'batch'", forwards)
    refused(model, corrupted, two, "along 'image'", forwards, tower=TOWER)
    blind = {"input_ids": corrupted["input_ids"]}
    refused(model, blind, cache, "no pixel_values, but the clean cache", forwards)
    only_lm = cached(model, short_inputs(family, seed=2), "blocks.*.hook_resid_pre")
    refused(model, blind, only_lm, "the prompt holds image tokens", forwards)


def test_images_of_other_sizes_are_refused(forwards: list[str]) -> None:
    model = tiny("qwen2-vl")
    corrupted = short_inputs("qwen2-vl", seed=1)
    other = {name: value[1:] for name, value in uneven_images().items()}
    other["pixel_values"] = other["pixel_values"][-24:]
    cache = cached(model, other, f"{TOWER}.*.hook_resid_pre")
    refused(model, corrupted, cache, "along 'patch'", forwards, tower=TOWER)
    uneven = uneven_images()
    cache = cached(model, uneven, f"{TOWER}.*.hook_resid_pre")
    refused(model, uneven, cache, "a list by image", forwards, tower=TOWER)
    even = cached(model, make_inputs("qwen2-vl", batch=2, seed=3), f"{TOWER}.*.hook_resid_pre")
    refused(model, uneven, even, "2 different sizes", forwards, tower=TOWER)


def uneven_images() -> dict[str, Tensor]:
    """Two prompts of one length with images of 6x6 and of 4x6 patches."""
    inputs = make_inputs("qwen2-vl", batch=2, seed=1)
    ids = inputs["input_ids"].clone()
    image_of_second = (ids[1] == IMAGE).nonzero().flatten()
    ids[1, image_of_second[6:]] = 5
    inputs["input_ids"] = ids
    inputs["image_grid_thw"] = torch.tensor([[1, 6, 6], [1, 4, 6]])
    inputs["pixel_values"] = inputs["pixel_values"][: 36 + 24]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


def test_wrong_requests_are_refused(forwards: list[str]) -> None:
    model = tiny("llava")
    corrupted = short_inputs("llava", seed=1)
    cache = cached(model, short_inputs("llava", seed=2), "*.hook_resid_pre")
    axes = {"index_axis_names": None}
    refused(model, corrupted, cache, "one of the two", forwards, **axes)
    both = {"index_df": pd.DataFrame({"layer": [0], "pos": [0]})}
    refused(model, corrupted, cache, "one of the two", forwards, **both)
    refused(model, corrupted, cache, "not known", forwards, tower="vision_encode")
    refused(
        model,
        corrupted,
        cache,
        "no index axis 'head'",
        forwards,
        index_axis_names=("layer", "head"),
    )
    refused(
        model,
        corrupted,
        cache,
        "no index axis 'poss'",
        forwards,
        index_axis_names=("layer", "poss"),
    )
    off = pd.DataFrame({"layer": [0], "pos": [400]})
    refused(model, corrupted, cache, "from 400 to 400", forwards, index_df=off, **axes)
    dead = pd.DataFrame({"layer": [2], "pos": [0]})
    refused(
        model, corrupted, cache, "cannot be written", forwards, index_df=dead, tower=TOWER, **axes
    )
    none = pd.DataFrame({"layer": [], "pos": []})
    refused(model, corrupted, cache, "no rows", forwards, index_df=none, **axes)
    with pytest.raises(UnknownHookError, match="resid_pre"):
        transformer_lens.generic_activation_patch(
            model,
            corrupted,
            cache,
            metric,
            transformer_lens.layer_pos_patch_setter,
            "resid_prae",
            ("layer", "pos"),
        )
    with pytest.raises(InterventionError, match="one number"):
        transformer_lens.get_act_patch_resid_pre(
            model, corrupted, cache, lambda logits: logits[:, -1]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_indices_go_through_in_few_passes(family: str, forwards: list[str]) -> None:
    model = tiny(family)
    corrupted, clean = short_inputs(family, seed=1), short_inputs(family, seed=2)
    cache = cached(model, clean, "blocks.*.hook_resid_pre")
    fast = transformer_lens.get_act_patch_resid_pre(model, corrupted, cache, metric)
    forwards.clear()
    again = transformer_lens.get_act_patch_resid_pre(model, corrupted, cache, metric)
    n_fast = len(forwards)
    forwards.clear()
    plain = transformer_lens.get_act_patch_resid_pre(
        model, corrupted, cache, metric, engine="plain"
    )
    assert len(forwards) == plain.numel()
    assert n_fast < plain.numel() / 2
    assert torch.equal(fast, again)
    torch.testing.assert_close(fast, plain, **WITHIN)

"""Attend: what it does to attention, against attention written out in plain torch."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import suite
from helpers.growing_sweeps import compared
from helpers.tiny_models import FAMILIES, IMAGE, PAD, build, make_inputs, tiny
from hooked_vlm.checks.attend import check_attend
from hooked_vlm.errors import (
    HookedVLMError,
    HookedVLMWarning,
    InterventionError,
    RegionError,
    UnknownHookError,
)
from hooked_vlm.hooks.attention import repeat_heads
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.attend import Attend
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import record
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.generated import Generated
from hooked_vlm.regions.positions import LastToken, Positions, TextTokens
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep, final_logits


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
FIVE = (*FAMILIES, "qwen3_vl", "mllama")
FROZEN = {"query": LastToken(), "key": Positions((2, 3, 4))}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def made(family: str, batch: int = 1, seed: int = 0) -> tuple[HookedVLM, Any]:
    if family in FAMILIES:
        return tiny(family), make_inputs(family, batch, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = suite.build(family)
        pictures = [suite.picture(*suite.image_size(model), seed=seed + i) for i in range(batch)]
        return model, model.prepare(pictures, ["What is this?"] * batch)


def image_keys(family: str, model: HookedVLM, inputs: Any) -> Any:
    return Positions((0, 2)) if family == "mllama" else model.grids(inputs)[0][0].all()


def z_by_hand(pattern: Tensor, value: Tensor) -> Tensor:
    """Attention's output `[batch, query, head, d_head]`, of values `[batch, key, kv_head, d]`."""
    value = repeat_heads(value.transpose(1, 2), pattern.shape[1])
    return (pattern @ value).transpose(1, 2)


def parts_of(model: HookedVLM, inputs: Any, attention: str, hooks: Any = ()) -> Any:
    names = [f"{attention}.hook_{part}" for part in ("attn_scores", "pattern", "v", "z")]
    return model.run_with_cache(inputs, names, fwd_hooks=hooks)[1]


def changed(kind: str, scores: Tensor, pairs: Tensor) -> Tensor:
    """The pattern that an edit of some pairs gives, from clean scores."""
    seen = pairs & (scores > -1e30)
    if kind == "mask":
        return scores.masked_fill(pairs, -torch.inf).softmax(-1)
    if kind == "bias":
        return (scores + 1.5 * seen).softmax(-1)
    if kind == "score_scale":
        return torch.where(seen, 0.5 * scores, scores).softmax(-1)
    return torch.where(pairs, 0.25 * scores.softmax(-1), scores.softmax(-1))


KINDS = {"mask": True, "bias": 1.5, "score_scale": 0.5, "scale": 0.25}


# --- one attention, written out -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FIVE)
def test_it_is_attention_written_out(family: str, kind: str) -> None:
    model, inputs = made(family, batch=2)
    for layer in (0, 1):
        name = f"blocks.{layer}.attn"
        if f"{name}.hook_k" in model.sites and "source" in model.sites[f"{name}.hook_k"].axes:
            continue
        key = image_keys(family, model, inputs)
        clean = parts_of(model, inputs, name)
        scores = clean[f"{name}.hook_attn_scores"]
        pairs = torch.zeros_like(scores[:, :1], dtype=torch.bool)
        for b in range(2):
            row = model.grids(inputs)[b][0].positions.flatten() if family != "mllama" else [0, 2]
            pairs[b, 0, -1, row] = True
        expected = z_by_hand(changed(kind, scores, pairs), clean[f"{name}.hook_v"])
        edit = Attend(name, query=LastToken(), key=key, **{kind: KINDS[kind]})
        found = parts_of(model, inputs, name, [edit])[f"{name}.hook_z"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found, clean[f"{name}.hook_z"])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_knockout_in_all_layers_is_a_mask_given_to_the_model(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, 2)
    length = inputs["input_ids"].shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    mask = mask.expand(2, 1, -1, -1).clone()
    image = inputs["input_ids"][0] == IMAGE
    mask[:, :, -3:, image] = torch.finfo(torch.float32).min
    positions = {}
    if family == "qwen2-vl":
        positions = {"position_ids": _mrope(model, inputs)}
    expected = model.hf_model(**{**inputs, **positions, "attention_mask": mask}).logits
    key = model.grids(inputs)[0][0].all()
    knockout = Attend("blocks.0.attn", query=Positions((-3, -2, -1)), key=key, mask=True)
    found = model.run_with_hooks(inputs, [knockout.at_layers(range(3))])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, model(inputs), atol=1e-3)


def _mrope(model: HookedVLM, inputs: Any) -> Tensor:
    found: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        found.append(kwargs["position_ids"].clone())

    lm = model.hf_model.get_submodule("model.language_model")
    handle = lm.register_forward_pre_hook(note, with_kwargs=True)
    model(inputs)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", FIVE)
def test_keys_without_weight_are_values_of_zero(family: str) -> None:
    model, inputs = made(family, batch=2)
    key = image_keys(family, model, inputs)
    for name in ("blocks.0.attn", "blocks.1.attn"):
        if "source" in model.sites[f"{name}.hook_v"].axes:
            key = None
        cut = model.run_with_hooks(inputs, [Attend(name, key=key, scale=0.0)])
        values = Ablate(f"{name}.hook_v", at=key)
        if key is None and "source" in model.sites[f"{name}.hook_v"].axes:
            values = (f"{name}.hook_v", lambda value, hook: 0 * value)
        expected = model.run_with_hooks(inputs, [values])
        torch.testing.assert_close(cut, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FIVE)
def test_it_keeps_the_law_of_every_model(family: str) -> None:
    model, inputs = made(family)
    found = check_attend(model, inputs)
    assert (found.verdict, found.note) == ("yes", "")


def test_cross_attention_is_knocked_out_for_the_last_token() -> None:
    model, inputs = made("mllama")
    name = next(
        n.removesuffix(".hook_v")
        for n, site in model.sites.items()
        if n.endswith("attn.hook_v") and "source" in site.axes and n.startswith("blocks.")
    )
    clean = parts_of(model, inputs, name)
    found = parts_of(model, inputs, name, [Attend(name, query=LastToken(), scale=0.0)])
    assert not found[f"{name}.hook_z"][:, -1].any()
    torch.testing.assert_close(found[f"{name}.hook_z"][:, :-1], clean[f"{name}.hook_z"][:, :-1])
    with pytest.raises(InterventionError, match="no positions of the prompt"):
        Attend(name, key=TextTokens(), scale=0.0).check(model, inputs)


def test_heads_are_chosen_among_those_of_queries() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")  # 4 heads share 2 of keys
    key = model.grids(inputs)[0][0].all()
    name = "blocks.1.attn"
    clean = parts_of(model, inputs, name)
    whole = parts_of(model, inputs, name, [Attend(name, key=key, query=LastToken(), mask=True)])
    one = Attend(name, key=key, query=LastToken(), heads=(3,), mask=True)
    found = parts_of(model, inputs, name, [one])[f"{name}.hook_z"]
    assert torch.equal(found[:, :, :3], clean[f"{name}.hook_z"][:, :, :3])
    assert torch.equal(found[:, :, 3], whole[f"{name}.hook_z"][:, :, 3])
    for heads in ((4,), ()):
        with pytest.raises(InterventionError, match="heads"):
            Attend(name, heads=heads, scale=0.0).check(model, inputs)


# --- prompts, caches, generation ------------------------------------------------------------


def test_prompts_of_a_batch_have_places_of_their_own() -> None:
    """Left padding moves an image; each prompt gives what it gives alone."""
    model = tiny("llava")
    inputs = make_inputs("llava", batch=2)
    ids, pad = inputs["input_ids"], 4
    rows = [torch.cat([torch.full((pad,), PAD), ids[0]]), torch.cat([ids[1], ids[1, -pad:]])]
    both = torch.stack(rows)
    mask = torch.ones_like(both)
    mask[0, :pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {
        "input_ids": both,
        "attention_mask": mask,
        "position_ids": positions,
        "pixel_values": inputs["pixel_values"],
    }
    region = Region.column_band((6, 6), 1, 4)

    def edits(kind: str) -> list[Any]:
        what = {"query": Positions((-2, -1)), "key": region, kind: KINDS[kind]}
        return [Attend("blocks.0.attn", **what), Attend("blocks.2.attn", **what)]

    for kind in KINDS:
        found = model.run_with_hooks(batch, edits(kind))
        for b, own in enumerate((ids[:1], both[1:])):
            alone = {
                "input_ids": own,
                "attention_mask": torch.ones_like(own),
                "pixel_values": inputs["pixel_values"][b : b + 1],
            }
            expected = model.run_with_hooks(alone, edits(kind))
            torch.testing.assert_close(found[b, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts_on_the_prompt_of_a_generation(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    key = model.grids(inputs)[0][0].all()
    edits = [Attend("blocks.1.attn", query=TextTokens(), key=key, scale=0.0)]
    how = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]}
    cached = model.generate(inputs, fwd_hooks=edits, **how)
    plain = model.generate(inputs, fwd_hooks=edits, use_cache=False, **how)
    assert torch.equal(cached, plain)
    logits = model.run_with_hooks(inputs, edits)[:, -1]
    logits[:, IMAGE] = -torch.inf
    assert torch.equal(cached[:, inputs["input_ids"].shape[1]], logits.argmax(-1))
    with model.hooks(edits, inputs=inputs):
        assert torch.equal(model.generate(inputs, **how), cached)
    copies = model.generate(inputs, fwd_hooks=edits, num_beams=1, num_return_sequences=1, **how)
    assert torch.equal(copies, cached)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_of_generated_tokens(family: str, use_cache: bool, beams: int) -> None:
    """As a hook function that finds them by itself, with a cache and without one."""
    model, inputs = tiny(family), make_inputs(family, batch=2)
    grids = [row[0] for row in model.grids(inputs)]
    length = inputs["input_ids"].shape[1]

    def by_hand(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        late = [i for i, position in enumerate(hook.positions) if position >= length - 1]
        for row in range(len(pattern)):
            keys = hook.keys_at(grids[row * 2 // len(pattern)].positions)
            for i in late:
                pattern[row, 1:, i, keys] = 0.0
        return pattern

    how = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]}
    how |= {"use_cache": use_cache, "num_beams": beams, "output_logits": True}
    how |= {"return_dict_in_generate": True}
    sites = [f"blocks.{i}.attn" for i in range(3)]
    what = {"query": LastToken() | Generated(), "key": grids[0].all(), "heads": (1, 2, 3)}
    edits = [Attend(site, scale=0.0, **what) for site in sites]
    found = model.generate(inputs, fwd_hooks=edits, **how)
    hooks = [(f"{site}.hook_pattern", by_hand) for site in sites]
    expected = model.generate(inputs, fwd_hooks=hooks, **how)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other)
    plain = model.generate(inputs, **how).logits
    alone = [Attend(site, scale=0.0, **{**what, "query": Generated()}) for site in sites]
    late = model.generate(inputs, fwd_hooks=alone, **how).logits
    torch.testing.assert_close(late[0], plain[0])
    assert not torch.allclose(late[1], plain[1], atol=1e-3)
    with pytest.raises(InterventionError, match="generates nothing"):
        model.run_with_hooks(inputs, edits)
    for wrong in ({"key": Generated(), "scale": 0.0}, {"query": Generated(), "to": inputs}):
        with pytest.raises(InterventionError, match="generated tokens are queries"):
            Attend("blocks.0.attn", **wrong).check(model, inputs)


def test_beams_are_copies_of_the_prompt() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=2)
    key = model.grids(inputs)[0][0].all()
    edits = [Attend("blocks.1.attn", query=LastToken(), key=key, mask=True)]
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "suppress_tokens": [IMAGE]}
    cached = model.generate(inputs, fwd_hooks=edits, **how)
    assert torch.equal(cached, model.generate(inputs, fwd_hooks=edits, use_cache=False, **how))


@pytest.mark.parametrize("layer", [0, 1])
def test_inputs_that_continue_a_cache(layer: int) -> None:
    """In the sliding layer 0 the first keys are gone, and indices count from the others."""
    model = HookedVLM(build("gemma-3"))
    whole = make_inputs("gemma-3", text=16)
    first = {n: x[:, :-4] if x.ndim == 2 else x for n, x in whole.items()}
    past = model.hf_model(**first, use_cache=True).past_key_values
    n = whole["input_ids"].shape[1]
    rest = {
        "input_ids": whole["input_ids"][:, -4:],
        "attention_mask": whole["attention_mask"],
        "token_type_ids": whole["token_type_ids"][:, -4:],
        "past_key_values": past,
    }
    name = f"blocks.{layer}.attn"
    what = {"query": LastToken(), "scale": 0.0}
    expected = model.run_with_hooks(whole, [Attend(name, key=Positions((n - 3,)), **what)])
    found = model.run_with_hooks(rest, [Attend(name, key=Positions((1,)), **what)])
    torch.testing.assert_close(found[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[:, -1], model(whole)[:, -1], atol=1e-3)


# --- the vision encoder ---------------------------------------------------------------------


def _two_sizes() -> dict[str, Tensor]:
    inputs = make_inputs("qwen2-vl", batch=2)
    ids = inputs["input_ids"].clone()
    ids[1, (ids[1] == IMAGE).nonzero().flatten()[6:]] = 5
    inputs |= {"input_ids": ids, "image_grid_thw": torch.tensor([[1, 6, 6], [1, 4, 6]])}
    inputs["pixel_values"] = inputs["pixel_values"][: 36 + 24]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


@pytest.mark.parametrize("case", [*FAMILIES, "two sizes", "windows"])
def test_patches_without_weight_are_values_of_zero(case: str, request: Any) -> None:
    family = "qwen2-vl" if case == "two sizes" else case
    if case == "windows":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = suite.build("qwen2_5_vl")
            inputs = model.prepare([suite.picture(16 * 28, 8 * 28)], "What is this?")
        region = inputs.grid.strip("vertical", 1, 6)
    else:
        model = tiny(family)
        inputs = _two_sizes() if case == "two sizes" else make_inputs(family, batch=2)
        n = model.grids(inputs)[0][0].shape[0]
        region = Region.column_band((n, n), 0, n - 1)
        if case == "two sizes":
            region = None
    n_windows = set()
    for layer in range(2):
        name = f"vision_encoder.blocks.{layer}.attn"
        what = {"key": region, "scale": 0.0, "heads": (0, 2)}
        found = model.run_with_hooks(inputs, [Attend(name, **what)])
        expected = model.run_with_hooks(inputs, [Ablate(f"{name}.hook_v", at=region, heads=(0, 2))])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        pattern = model.run_with_cache(inputs, f"{name}.hook_pattern")[1][f"{name}.hook_pattern"]
        n_windows.add(len(pattern))
    if case == "windows":
        assert max(n_windows) > 1  # a layer with windows is among them


@pytest.mark.parametrize("family", ["gemma-3", "qwen2-vl"])
def test_queries_of_an_encoder_are_patches(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    name = "vision_encoder.blocks.1.attn"
    n = model.grids(inputs)[0][0].shape[0]
    query, key = Region.column_band((n, n), 0, 1), Region.column_band((n, n), 2, 3)
    clean = parts_of(model, inputs, name)
    found = parts_of(model, inputs, name, [Attend(name, query=query, key=key, mask=True)])
    grid = model.grids(inputs)[0][0]
    q, k = query.patches(grid), key.patches(grid)
    pattern = found[f"{name}.hook_pattern"]
    assert not pattern[:, :, q[:, None], k].any()
    others = [i for i in range(pattern.shape[-1]) if i not in q.tolist()]
    assert torch.equal(pattern[:, :, others], clean[f"{name}.hook_pattern"][:, :, others])
    with pytest.raises(InterventionError, match=r"leaves query .* no key"):
        model.run_with_hooks(inputs, [Attend(name, query=query, mask=True)])


# --- freezing -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pattern_is_frozen_while_its_input_changes(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    name = "blocks.1.attn"
    patch = Patch(0, at=LastToken(), source=make_inputs(family, batch=2, seed=3))
    clean = record(model, inputs, [f"{name}.hook_pattern"])
    site = f"{name}.hook_pattern"
    for to in (clean, inputs, clean.cache[site]):
        edits = [patch, Attend(name, to=to)]
        found = parts_of(model, inputs, name, edits)
        assert torch.equal(found[site], clean.cache[site])
    moved = parts_of(model, inputs, name, [patch])
    assert not torch.equal(moved[site], clean.cache[site])
    row = parts_of(model, inputs, name, [patch, Attend(name, to=clean, **FROZEN)])[site]
    assert torch.equal(row[:, :, -1, 2:5], clean.cache[site][:, :, -1, 2:5])
    assert torch.equal(row[:, :, -1, 5:], moved[site][:, :, -1, 5:])


def test_a_pattern_of_prompts_of_another_length_is_taken_in_order() -> None:
    model = tiny("llava")
    inputs, other = make_inputs("llava", 2, text=5), make_inputs("llava", 1, text=8, seed=1)
    name, site = "blocks.1.attn", "blocks.1.attn.hook_pattern"
    region = Region.column_band((6, 6), 0, 2)
    run = record(model, other, [site])
    edit = Attend(name, query=LastToken(), key=region, to=run)
    found = parts_of(model, inputs, name, [edit])[site]
    index = region.positions(model.grids(inputs)[0][0])
    assert torch.equal(found[:, :, -1, index], run.cache[site][:, :, -1, index].expand(2, -1, -1))
    with pytest.raises(RegionError, match="places of equal size"):
        Attend(name, query=TextTokens(), to=run).check(model, inputs)
    with pytest.raises(InterventionError, match="prompts of one length"):
        model.run_with_hooks(inputs, [Attend(name, query=LastToken(), to=run)])
    with pytest.raises(InterventionError, match="was recorded"):
        model.run_with_hooks(inputs, [Attend(name, to=run)])


# --- sweeps ---------------------------------------------------------------------------------


def _sweep(family: str, make: Any, axes: dict[str, Any]) -> Sweep:
    return Sweep(make_inputs(family, 2, seed=1), axes, make)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_of_layers_heads_and_kinds_is_plain_passes(family: str) -> None:
    model = tiny(family)
    inputs = make_inputs(family, 2, seed=1)
    key = model.grids(inputs)[0][0].all()
    frozen = make_inputs(family, 2, seed=2)

    def make(kind: str, layer: int, heads: Any) -> Attend:
        value = frozen if kind == "to" else KINDS[kind]
        what = {"query": Positions((-2, -1)), "key": key, "heads": heads, kind: value}
        return Attend(f"blocks.{layer}.attn", **what)

    sweep = Sweep(inputs, {"kind": [*KINDS, "to"], "layer": [0, 1, 2], "heads": [None, (1,)]}, make)
    for kwargs in ({}, {"logits_to_keep": 1}):
        report = compared(model, sweep, **kwargs)
        # Rows carry the queries alone.
        assert max(report.starts) >= inputs["input_ids"].shape[1] - 2 or family == "gemma-3"


def test_a_sweep_of_windows_of_layers() -> None:
    model = tiny("llava")
    inputs = make_inputs("llava", 2, seed=1)
    knockout = Attend(
        "blocks.0.attn", query=LastToken(), key=model.grids(inputs)[0][0].all(), mask=True
    )
    sweep = Sweep(inputs, {"layer": range(3)}, lambda layer: knockout.window(layer, 2, 3))
    compared(model, sweep)
    scores = sweep.run(model, final_logits, dims=("batch", "vocab"))
    assert str(scores.attrs["engine"]).startswith("growing")
    both = [knockout.at_site("blocks.0.attn"), knockout.at_site("blocks.1.attn")]
    expected = final_logits(model.run_with_hooks(inputs, both))
    torch.testing.assert_close(
        torch.tensor(scores.sel(layer=1).values), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_of_the_encoder_and_beside_other_interventions(family: str) -> None:
    model = tiny(family)
    n = 6 if family == "llava" else 3
    region = Region.column_band((n, n), 0, 1)

    def make(kind: str, layer: int) -> Any:
        return {
            "encoder": Attend(f"vision_encoder.blocks.{layer}.attn", key=region, scale=0.0),
            "chain": Chain(
                Attend(f"blocks.{layer}.attn", query=LastToken(), key=region, mask=True),
                Ablate(2, at=LastToken()),
            ),
            "other": Ablate(layer, at=region),
        }[kind]

    sweep = _sweep(family, make, {"kind": ["encoder", "chain", "other"], "layer": [0, 1]})
    compared(model, sweep)
    plain = sweep.run(model, final_logits, dims=("batch", "vocab"), engine="plain")
    restart = sweep.run(model, final_logits, dims=("batch", "vocab"), engine="restart")
    assert (plain == restart).all()


def test_an_estimate_of_first_order() -> None:
    model = tiny("llava")
    inputs = make_inputs("llava", 2)
    key = model.grids(inputs)[0][0].all()
    cut = Attend("blocks.2.attn", query=LastToken(), key=key, scale=0.999)
    sweep = Sweep(inputs, {"layer": [0, 2]}, lambda layer: cut.at_layers([layer]))

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 7].double()

    exact, clean = sweep.run(model, metric), metric(model(inputs)).numpy()
    estimate = sweep.attribution(model, metric)
    assert abs((estimate - exact) / (exact - clean)).max() < 0.2
    masked = Sweep(inputs, {"layer": [0]}, lambda layer: Attend("blocks.0.attn", mask=True))
    with pytest.raises(InterventionError, match=r"scale=0\.0 for an estimate"):
        masked.attribution(model, metric)


# --- patterns and scores as sites -----------------------------------------------------------


@pytest.mark.parametrize("part", ["pattern", "attn_scores"])
@pytest.mark.parametrize("tower", ["", "vision_encoder."])
@pytest.mark.parametrize("family", FAMILIES)
def test_patches_at_patterns_and_scores(family: str, tower: str, part: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    other = make_inputs(family, batch=2, seed=5)
    site = f"{tower}blocks.1.attn.hook_{part}"
    n = 6 if family == "llava" else 3
    column = Region.column_band((n, n), 1, 2)
    at = column if tower else Positions((-3, -1))
    read = model.run_with_hooks(inputs, [(site, lambda x, hook: None)])
    own, foreign = record(model, inputs, [site]), record(model, other, [site])
    assert torch.equal(model.run_with_hooks(inputs, [Patch(site, at=at, source=own)]), read)
    patch = Patch(site, at=at, source=foreign, heads=(0, 3))
    found = model.run_with_cache(inputs, [site], fwd_hooks=[patch])[1][site]
    rows = [-3, -1]
    if tower:
        rows = column.patches(model.grids(inputs)[0][0]).tolist()
    expected = own.cache[site].clone()
    for head in (0, 3):
        expected[:, head, rows] = foreign.cache[site][:, head, rows]
    assert torch.equal(found, expected)
    assert not torch.equal(model.run_with_hooks(inputs, [patch]), read)


@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_at_patterns_and_scores(family: str) -> None:
    model, source = tiny(family), make_inputs(family, 2, seed=2)

    def make(kind: str, layer: int, part: str) -> Any:
        site = f"blocks.{layer}.attn.hook_{part}"
        at = Positions((-2, -1))
        if kind == "patch":
            return Patch(site, at=at, source=source, heads=(1, 2))
        return Ablate(site, at=at, to=kind, reference=None if kind == "zero" else source)

    kinds = ["patch", "zero", "mean", "position_mean"]
    parts = ["pattern", "attn_scores"]
    sweep = _sweep(family, make, {"kind": kinds, "layer": [0, 2], "part": parts})
    compared(model, sweep)


def test_a_score_of_zero_does_not_show_what_the_model_masks() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    site = "blocks.0.attn.hook_attn_scores"
    pattern = site.replace("attn_scores", "pattern")
    for to in ("zero", "mean"):
        reference = make_inputs("llava", seed=4)
        edit = Ablate(site, to=to, reference=reference)
        found = model.run_with_cache(inputs, [pattern], fwd_hooks=[edit])[1][pattern]
        assert not found.triu(1).any()
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    rows = torch.ones(found.shape[-1], found.shape[-1]).tril()
    zero = model.run_with_cache(inputs, [pattern], fwd_hooks=[Ablate(site)])[1][pattern]
    torch.testing.assert_close(zero[0, 0], rows / rows.sum(-1, keepdim=True))


def test_rows_of_different_lengths_are_refused() -> None:
    model = tiny("qwen2-vl")
    inputs = _two_sizes()
    site = "vision_encoder.blocks.1.attn.hook_pattern"
    with pytest.raises(InterventionError, match="images or windows of different sizes"):
        model.run_with_hooks(inputs, [Ablate(site)])
    longer = make_inputs("llava", text=9)
    patch = Patch("blocks.1.attn.hook_pattern", at=LastToken(), source=longer)
    with pytest.raises(InterventionError, match="features"):
        tiny("llava").run_with_hooks(make_inputs("llava"), [patch])


def test_rows_of_generated_tokens_are_written() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    site = "blocks.1.attn.hook_pattern"
    how = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE]}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    found = model.generate(inputs, fwd_hooks=[Ablate(site, at=Generated())], **how).logits
    z = Ablate("blocks.1.attn.hook_z", at=Generated())
    expected = model.generate(inputs, fwd_hooks=[z], **how).logits
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# --- what is refused ------------------------------------------------------------------------


WRONG = {
    "expected one of mask=True": {},
    "scale and mask": {"mask": True, "scale": 1.0},
    "expected a finite number": {"scale": float("nan")},
    "take a key away use mask=True": {"bias": -float("inf")},
    "expected a pattern": {"to": torch.ones(3)},
    "NaN or infinite": {"to": torch.full((1, 4, 3, 3), torch.nan)},
    "no place here": {"scale": 0.0, "key": "image"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with pytest.raises(HookedVLMError, match=message):
        Attend("blocks.0.attn", **WRONG[message]).check(model, inputs)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("blocks.3.attn", "layers 0 to 2|Did you mean"),
        ("blocks.0.atn", "Did you mean 'blocks.0.attn'"),
        ("blocks.0.mlp", "No attention named"),
        ("vision_encoder.blocks.2.attn", "cannot be written"),
    ],
)
def test_sites_that_are_no_attention(site: Any, message: str) -> None:
    with pytest.raises((InterventionError, UnknownHookError), match=message):
        Attend(site, scale=0.0).check(tiny("llava"), make_inputs("llava"))


def test_an_attention_without_a_pattern_says_what_to_do() -> None:
    model, inputs = HookedVLM(build("llava")), make_inputs("llava")
    for part in ("attn_scores", "pattern"):
        model.sites.pop(f"blocks.1.attn.hook_{part}")
    with pytest.raises(InterventionError, match=r"Ablate or patch its heads, blocks.1.attn.hook_z"):
        Attend("blocks.1.attn", scale=0.0).check(model, inputs)


def test_negative_layers_and_names_of_sites_are_taken() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    runs = [
        model.run_with_hooks(inputs, [Attend(site, key=Positions((0,)), scale=0.0)])
        for site in ("blocks.2.attn", "blocks.-1.attn", "blocks.2.attn.hook_pattern")
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_a_query_without_keys_is_an_error() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with pytest.raises(InterventionError, match=r"leaves query 0 of row 0 no key.*scale=0.0"):
        model.run_with_hooks(inputs, [Attend("blocks.0.attn", key=Positions((0,)), mask=True)])


def test_pairs_that_the_model_masks_are_warned_of() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    first, last = Positions((0,)), LastToken()
    clean = model.run_with_hooks(inputs, [("blocks.1.attn.hook_pattern", lambda x, hook: None)])
    kinds: list[dict[str, Any]] = [{"mask": True}, {"scale": 0.0}]
    for kind in kinds:
        edit = Attend("blocks.1.attn", query=first, key=last, **kind)
        with pytest.warns(HookedVLMWarning, match="its queries come before its keys"):
            assert torch.equal(model.run_with_hooks(inputs, [edit]), clean)


@pytest.mark.parametrize("kind", [{"score_scale": 0.0}, {"bias": 1e30}, {"scale": 5.0}])
def test_what_the_model_masks_stays_masked(kind: dict[str, Any]) -> None:
    """A score of the lowest number, times zero, would be a score like any other."""
    model, inputs = tiny("llava"), make_inputs("llava")
    site = "blocks.1.attn.hook_pattern"
    edit = Attend("blocks.1.attn", key=model.grids(inputs)[0][0].all(), **kind)
    found = model.run_with_cache(inputs, site, fwd_hooks=[edit])[1][site]
    assert not found.triu(1).any() and found.isfinite().all()


def test_it_is_the_same_in_half_precision() -> None:
    model, inputs = HookedVLM(build("llava", dtype=torch.bfloat16)), make_inputs("llava")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    name, site = "blocks.1.attn", "blocks.1.attn.hook_pattern"
    key = model.grids(inputs)[0][0].all()
    clean = parts_of(model, inputs, name)
    found = parts_of(model, inputs, name, [Attend(name, query=LastToken(), key=key, mask=True)])
    pairs = torch.zeros_like(clean[site], dtype=torch.bool)
    pairs[:, :, -1] = inputs["input_ids"] == IMAGE
    expected = changed("mask", clean[f"{name}.hook_attn_scores"].float(), pairs)
    assert found[site].dtype == torch.bfloat16
    torch.testing.assert_close(found[site].float(), expected, atol=2e-2, rtol=2e-2)
    assert not found[site][pairs].any()


def test_it_does_not_run_on_other_inputs() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    edit = Attend("blocks.1.attn", key=Positions((0,)), scale=0.0)
    with (
        pytest.raises(InterventionError, match="Give hooks"),
        model.hooks([edit], inputs=inputs),
    ):
        model(make_inputs("llava", seed=1))


def test_windows_of_layers() -> None:
    knockout = Attend("blocks.0.attn", mask=True)
    for (layer, width), expected in {
        (4, 3): [3, 4, 5],
        (4, 4): [2, 3, 4, 5],
        (0, 3): [0, 1],
        (9, 5): [7, 8, 9],
    }.items():
        found = [part.site for part in knockout.window(layer, width, 10).parts]
        assert found == [f"blocks.{i}.attn" for i in expected]
    tower = Attend("vision_encoder.blocks.0.attn", scale=0.0).at_layers([1])
    assert tower.parts[0].site == "vision_encoder.blocks.1.attn"
    for wrong in (lambda: knockout.window(10, 3, 10), lambda: knockout.at_layers([])):
        with pytest.raises(InterventionError):
            wrong()
    with pytest.raises(UnknownHookError, match="no layer that could be replaced"):
        Attend("attn", mask=True).at_layers([1])

"""Every law holds on models it holds for, and fails where its violation was planted."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.strange_models import Pre, Sandwich, Stranger, stranger_inputs
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.checks import laws
from hooked_vlm.checks.laws import NO, NONE, YES, Finding
from hooked_vlm.checks.residual import BlockSums, same
from hooked_vlm.hooks import attention, dispatch
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.model.vlm import HookedVLM


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


WHOLE: dict[str, Callable[..., Finding]] = {
    "parity": laws.check_parity,
    "fires": laws.check_fires,
    "residual": laws.check_residual,
    "patterns": laws.check_patterns,
    "grid": laws.check_grid,
    "generate": laws.check_generate,
    "start layer": laws.check_start_layer,
}


@cache
def inputs_for(family: str) -> dict[str, Tensor]:
    return make_inputs(family, batch=2)


def fresh(family: str) -> tuple[HookedVLM, dict[str, Tensor]]:
    """A model to break."""
    return HookedVLM(build(family)), inputs_for(family)


def assert_broken(found: Finding, match: str) -> None:
    assert (found.verdict, bool(re.search(match, found.note))) == (NO, True), found


# --- models for which they hold ------------------------------------------------------------


@pytest.mark.parametrize("law", WHOLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_laws_hold(family: str, law: str) -> None:
    found = WHOLE[law](tiny(family), inputs_for(family))
    assert (found.law, found.verdict) == (law, YES), found
    assert found.note == ({"grid": "6x6" if family == "llava" else "3x3"}.get(law, ""))


@pytest.mark.parametrize("family", FAMILIES)
def test_laws_of_sites_hold(family: str) -> None:
    model, seen = tiny(family), set[str]()
    for group in laws.SITE_GROUPS:
        names = laws.group_of(model, group)
        seen.update(names)
        # of the blocks the last: in LLaVA's encoder it is one that cannot be written
        chosen = [n for n in names if "blocks." not in n or "blocks.2." in n]
        found = laws.check_sites(model, make_inputs(family), group, chosen)
        assert (found.verdict, found.note) == (YES, ""), found
    assert seen == set(model.hook_names)  # every site is in a column


@cache
def stranger(block: type[nn.Module]) -> tuple[HookedVLM, dict[str, Tensor]]:
    torch.manual_seed(0)
    return HookedVLM(Stranger(block)), stranger_inputs()


@pytest.mark.parametrize("block", [Pre, Sandwich])
def test_laws_hold_on_a_model_of_ones_own(block: type[nn.Module]) -> None:
    """An architecture that no suite has seen: they are about what runs, not what it is called."""
    model, inputs = stranger(block)
    found = {name: WHOLE[name](model, inputs) for name in WHOLE if name != "generate"}
    expected = dict.fromkeys(found, YES) | {"patterns": NONE}  # it computes attention itself
    assert {name: f.verdict for name, f in found.items()} == expected, found
    assert found["grid"].note == "2x2"


def test_laws_of_sites_hold_on_a_model_of_ones_own() -> None:
    model, inputs = stranger(Sandwich)
    for group in laws.SITE_GROUPS:
        names = [n for n in laws.group_of(model, group) if not re.search(r"blocks\.[02]", n)]
        found = laws.check_sites(model, inputs, group, names)
        assert (found.verdict, found.note) == (YES, ""), found


def test_what_a_model_has_not_is_not_applicable() -> None:
    model = tiny("llava")
    text = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert laws.check_grid(model, text) == Finding("grid", NONE, "no image in these inputs")
    told = Inputs(inputs_for("llava"), [(), ()], no_grid="a resampler")
    assert laws.check_grid(model, told) == Finding("grid", NONE, "a resampler")
    model, text = HookedVLM(Stranger()), {"input_ids": torch.tensor([[3, 4, 5]])}
    assert laws.check_patterns(model, text).verdict == NONE
    assert_broken(laws.check_fires(tiny("llava"), text), "vision_encoder.* never fires")


def test_findings_count_their_problems() -> None:
    assert laws.finding("x", ["a", "b", "c"]) == Finding("x", NO, "a (and 2 more)")
    assert laws.finding("x", ["a"], found=False, note="n") == Finding("x", NO, "a")
    assert laws.finding("x", [], found=False, note="n") == Finding("x", NONE, "n")
    assert laws.finding("x", [], note="n") == Finding("x", YES, "n")


def test_perturbing_changes_every_element() -> None:
    for tensor in (torch.zeros(4, 3), torch.randn(2, 5), torch.full((3,), -3e38)):
        for dtype in (torch.float32, torch.bfloat16):
            changed = laws.perturbed(tensor.to(dtype))
            assert changed.dtype == dtype
            assert bool((changed != tensor.to(dtype)).all())


# --- parity --------------------------------------------------------------------------------


def test_a_forward_that_differs_is_found() -> None:
    class Off(HookedVLM):
        def forward(self, inputs: Any, **kwargs: Any) -> Tensor:
            return super().forward(inputs, **kwargs) + 1e-6

        __call__ = forward

    assert_broken(laws.check_parity(Off(build("llava")), inputs_for("llava")), "forward changes")


def test_reading_that_edits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dispatch.read

    def read(site: Site, raw: Tensor, layout: Any) -> Any:
        return own(
            site, raw.mul_(1 + 1e-6) if site.name == "blocks.1.mlp.hook_post" else raw, layout
        )

    monkeypatch.setattr(dispatch, "read", read)
    model, inputs = fresh("llava")
    assert_broken(laws.check_parity(model, inputs), "reading moves logits by")


# --- sites ---------------------------------------------------------------------------------


def add_site(model: HookedVLM, site: Site) -> None:
    model.sites[site.name] = site
    model.hook_dict[site.name] = HookPoint(site.name, site.axes, site.read_only)


def check_only(model: HookedVLM, inputs: Any, name: str) -> Finding:
    """What the law of a site's own column says of it alone."""
    (group,) = (g for g in laws.SITE_GROUPS if name in laws.group_of(model, g))
    return laws.check_sites(model, inputs, group, [name])


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("qwen2-vl", "blocks.1.hook_mlp_out"),
        ("gemma-3", "blocks.0.ln1.hook_normalized"),
        ("llava", "vision_encoder.blocks.1.hook_mlp_out"),
        ("llava", "vision_projector.hook_out"),
    ],
)
def test_a_write_that_is_dropped_is_found(family: str, site: str) -> None:
    model, inputs = fresh(family)
    assert check_only(model, inputs, site).verdict == YES
    module = model.hf_model.get_submodule(model.sites[site].module)
    # after the library's own hooks: what the module gives is computed anew
    module.register_forward_hook(lambda module, args, out: type(module).forward(module, *args))
    assert_broken(check_only(model, inputs, site), f"^{site}: a write changes nothing$")


@pytest.mark.parametrize(
    "site", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_q", "vision_projector.hook_out"]
)
def test_a_write_back_that_changes_a_bit_is_found(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, model, inputs = dispatch.write, tiny("qwen2-vl"), inputs_for("qwen2-vl")
    assert check_only(model, inputs, site).verdict == YES

    def write(*args: Any) -> Tensor:
        written = own(*args)
        return written.nextafter(torch.full_like(written, torch.inf))

    monkeypatch.setattr(dispatch, "write", write)
    assert_broken(check_only(model, inputs, site), f"^{site}: writing back what was read moves")


def test_a_dead_name_is_found() -> None:
    model, inputs = fresh("gemma-3")
    model.hf_model.spare = nn.Linear(48, 48)
    site = Site("blocks.1.hook_resid_spare", "batch pos d_model", "spare", "output")
    add_site(model, site)
    assert_broken(laws.check_fires(model, inputs), f"^{site.name} never fires$")
    assert_broken(check_only(model, inputs, site.name), "a write changes nothing")


def test_a_site_of_another_shape_is_found() -> None:
    model, inputs = fresh("llava")
    name = "blocks.1.attn.hook_q"
    add_site(model, replace(model.sites[name], heads=7))
    assert_broken(check_only(model, inputs, name), f"^{name}: RuntimeError")


def test_a_read_only_site_that_can_be_written_is_found() -> None:
    model, inputs = fresh("llava")
    name = "vision_encoder.blocks.2.hook_mlp_out"
    assert model.sites[name].read_only
    assert check_only(model, inputs, name).verdict == YES
    model.hook_dict[name].read_only = ""
    assert_broken(check_only(model, inputs, name), "is read-only, and a write was not refused")


def test_a_write_that_breaks_the_model_is_found() -> None:
    model, inputs = fresh("llava")
    name, first = "blocks.1.hook_mlp_out", list[Tensor]()

    def breaks(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        first.append(out)
        return out if torch.equal(out, first[0]) else out * torch.nan

    model.hf_model.get_submodule(model.sites[name].module).register_forward_hook(breaks)
    assert_broken(check_only(model, inputs, name), "makes every logit NaN")


# --- the residual --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "site", "path"),
    [
        # Gemma-3 normalises what attention gives before it is added; these are before that
        ("gemma-3", "blocks.1.hook_attn_out", "model.language_model.layers.1.self_attn"),
        ("gemma-3", "blocks.1.hook_mlp_out", "model.language_model.layers.1.mlp"),
        ("qwen2-vl", "blocks.0.hook_attn_out", "model.language_model.layers.0.mlp"),
        ("qwen2-vl", "vision_encoder.blocks.1.hook_mlp_out", "model.visual.blocks.1.attn"),
        ("llava", "blocks.2.hook_mlp_out", "model.language_model.layers.1.mlp"),
    ],
)
def test_a_part_taken_at_the_wrong_module_is_found(family: str, site: str, path: str) -> None:
    model, inputs = fresh(family)
    add_site(model, replace(model.sites[site], module=path))
    block, part = site.rsplit(".hook_", 1)
    assert_broken(
        laws.check_residual(model, inputs), f"^{block}: {part} is not what the residual gains$"
    )


def shifted(module: nn.Module, args: tuple, out: Any) -> Any:
    return out + 0.01


@pytest.mark.parametrize("stack", ["", "vision_encoder."])
def test_what_is_added_behind_a_block_is_found(stack: str) -> None:
    model, inputs = fresh("llava")
    block = model.hf_model.get_submodule(model.sites[f"{stack}blocks.0.hook_resid_post"].module)
    block.register_forward_hook(shifted)
    assert_broken(
        laws.check_residual(model, inputs), f"{stack}blocks.0: a part without a site is added after"
    )


# --- patterns ------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", ["", "vision_encoder."])
def test_a_pattern_that_does_not_sum_to_one_is_found(stack: str) -> None:
    name, model, inputs = (
        f"{stack}blocks.1.attn.hook_pattern",
        tiny("qwen2-vl"),
        inputs_for("qwen2-vl"),
    )
    larger = [(name, laws.writing(lambda x: x * 1.1))]
    with laws.quiet(), model.hooks(larger):
        found = laws.check_patterns(model, inputs)
    assert_broken(found, f"{name}: rows do not sum to one")


def test_less_than_one_is_excused_only_where_there_are_sinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = tiny("llava"), inputs_for("llava")
    with laws.quiet(), model.hooks([("blocks.1.attn.hook_pattern", lambda x, hook: x * 0.99)]):
        assert_broken(laws.check_patterns(model, inputs), "rows do not sum to one")
        monkeypatch.setattr(laws, "_has_sinks", lambda *_: True)
        assert "sinks" in laws.check_patterns(model, inputs).note


def test_a_pattern_that_is_not_the_one_used_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention.pattern
    monkeypatch.setattr(attention, "pattern", lambda weights, *rest: own(weights * 1.2, *rest))
    found = laws.check_patterns(tiny("llava"), inputs_for("llava"))
    assert_broken(found, "reading patterns moves logits by")


def test_scores_that_are_not_those_of_the_pattern_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = attention.AttentionTap.apply

    def apply(tap: Any, part: Any, value: Any) -> Any:
        return value if part == "attn_scores" else own(tap, part, value)

    monkeypatch.setattr(attention.AttentionTap, "apply", apply)
    with pytest.warns(UserWarning, match="never ran"):
        found = laws.check_patterns(tiny("llava"), inputs_for("llava"))
    assert_broken(found, r"blocks\.0\.attn\.hook_pattern: zeroing a key is off by .* from masking")


# --- the grid ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_grid_shifted_by_one_cell_is_found(family: str) -> None:
    model, inputs = tiny(family), inputs_for(family)
    grids = model.grids(inputs)
    assert laws.check_grid(model, Inputs(inputs, grids)).verdict == YES
    for shift in (1, -1):
        moved = [[replace(g, positions=g.positions + shift) for g in row] for row in grids]
        assert_broken(laws.check_grid(model, Inputs(inputs, moved)), r"cell \(0, 0\) reaches")


def test_a_grid_of_another_image_and_one_with_a_row_too_few_are_found() -> None:
    model, inputs = tiny("llava"), inputs_for("llava")
    grids = model.grids(inputs)
    swapped = [[replace(g, image=1 - g.image) for g in row] for row in grids]
    assert_broken(laws.check_grid(model, Inputs(inputs, swapped)), "reaches .*, not position")
    short = [[replace(g, positions=g.positions[:-1], patch_rows=5) for g in row] for row in grids]
    assert_broken(laws.check_grid(model, Inputs(inputs, short)), "12 visual tokens in no grid")


def test_patches_named_wrongly_are_found() -> None:
    model, inputs = tiny("llava"), inputs_for("llava")
    wrong = [[replace(g, n_prefix=0) for g in row] for row in model.grids(inputs)]
    found = laws.check_grid(model, Inputs(inputs, wrong))
    assert_broken(found, r"vision_encoder\.blocks\.0\.hook_resid_pre: cell \(0, 0\) reaches \[-1\]")


# --- generation and starting from a layer --------------------------------------------------


class Talks(HookedVLM):
    """Says something else as soon as functions are attached."""

    uncached_only = False

    def generate(self, inputs: Any, *, fwd_hooks: Any = (), **kwargs: Any) -> Tensor:
        if kwargs.get("use_cache", True) and self.uncached_only:
            return super().generate(inputs, fwd_hooks=fwd_hooks, **kwargs)
        edit = ("blocks.0.hook_resid_post", lambda x, hook: -5 * x.flip(-1))
        return super().generate(inputs, fwd_hooks=[*fwd_hooks, edit], **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_that_differs_under_hooks_is_found(family: str) -> None:
    model = Talks(build(family))
    found = laws.check_generate(model, inputs_for(family))
    assert_broken(found, r"^hooked generation differs \(and 1 more\)$")
    model.uncached_only = True
    found = laws.check_generate(model, inputs_for(family))
    assert_broken(found, "^hooked generation without a cache differs$")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_from_another_residual_is_found(family: str) -> None:
    class Elsewhere(HookedVLM):
        def run_from_layer(self, inputs: Any, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().run_from_layer(inputs, residual * (1 + 1e-5), *args, **kwargs)

    found = laws.check_start_layer(Elsewhere(build(family)), inputs_for(family))
    assert_broken(found, "^off by")


# --- sums of a block -----------------------------------------------------------------------


def block_of(**changed: Any) -> dict[str, Any]:
    """The activations of a block that adds up, under a prefix, some of them changed."""
    pre, attn, mlp = (torch.randn(2, 5, 6) for _ in range(3))
    made = {"resid_pre": pre, "attn_out": attn, "resid_mid": pre + attn, "mlp_out": mlp}
    made["resid_post"] = made["resid_mid"] + mlp
    made |= {name: f(made) for name, f in changed.items()}
    return {f"blocks.3.hook_{name}": value for name, value in made.items() if value is not None}


def sums(block: dict[str, Any], listed: bool = False) -> list[str]:
    block = {n: list(v) for n, v in block.items()} if listed else block
    return list(BlockSums(block, "blocks.3.hook_").sums())


def gone(made: dict[str, Tensor]) -> None:
    return None


@pytest.mark.parametrize("listed", [False, True])
def test_a_block_that_adds_up(listed: bool) -> None:
    assert not sums(block_of(), listed)
    assert not sums(block_of(resid_mid=gone), listed)  # both parts added at once
    for part in ("attn_out", "mlp_out"):
        wrong = block_of(**{part: lambda made, part=part: made[part].flip(-1)})
        assert sums(wrong, listed) == [f"blocks.3: {part} is not what the residual gains"]
    wrong = block_of(resid_post=lambda made: made["resid_post"] + 1e-2)
    assert sums(wrong, listed) == ["blocks.3: mlp_out is not what the residual gains"]
    wrong = block_of(resid_mid=gone, mlp_out=lambda made: made["mlp_out"].flip(0))
    assert sums(wrong, listed) == ["blocks.3: mlp_out is not what the residual gains"]


def test_one_part_alone_is_all_that_is_gained() -> None:
    def only_attention(made: dict[str, Tensor]) -> Tensor:
        return made["resid_pre"] + made["attn_out"]

    changes: dict[str, Any] = {"resid_mid": gone, "mlp_out": gone, "resid_post": only_attention}
    assert not sums(block_of(**changes))
    assert sums(block_of(resid_mid=gone, mlp_out=gone))


def test_a_factor_for_every_feature_is_a_scale_and_no_error() -> None:
    factor = torch.rand(6) + 0.5

    def scaled(made: dict[str, Tensor]) -> Tensor:
        return made["resid_mid"] + factor * made["mlp_out"]

    assert sums(block_of(resid_post=scaled)) == ["scaled on the way into the LM's residual"]
    by_row = block_of(resid_post=lambda m: m["resid_mid"] + torch.rand(2, 5, 1) * m["mlp_out"])
    assert sums(by_row) == ["blocks.3: mlp_out is not what the residual gains"]


def test_a_block_that_works_in_windows_is_held_to_what_it_shows() -> None:
    def windows(made: dict[str, Tensor]) -> Tensor:
        return made["attn_out"].reshape(1, 10, 6)

    assert not sums(block_of(attn_out=windows))
    wrong = block_of(attn_out=windows, mlp_out=lambda made: made["mlp_out"].flip(0))
    assert sums(wrong) == ["blocks.3: mlp_out is not what the residual gains"]


def test_equal_is_bit_for_bit() -> None:
    x = torch.randn(2, 3)
    assert same(x, x.clone())
    assert same(list(x), list(x.clone()))
    assert not same(x, x.nextafter(torch.full_like(x, torch.inf)))

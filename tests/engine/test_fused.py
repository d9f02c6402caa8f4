"""Rows made by the kernel are those that hooks make; the definition stands in for the kernel."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.growing_sweeps import compared, make, sweep_of
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.engine import fused
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.proofs import forget
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.sweeps.sweep import Sweep


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the definition make rows, and counts its calls."""
    made: list[int] = []
    true = fused.fused_rows

    def counted(*args: Any) -> torch.Tensor:
        rows = true(*args)
        made.append(len(rows))
        return rows

    monkeypatch.setattr(fused, "WAYS", ("reference",))
    monkeypatch.setattr(fused, "fused_rows", counted)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_same_logits_come_of_them(family: str, data: st.DataObject) -> None:
    kinds = data.draw(
        st.lists(st.sampled_from(["swap", "last", "all", "steer"]), min_size=1, max_size=2)
    )
    sites = data.draw(
        st.lists(st.sampled_from([0, 1, 2, 3, "hook_merged_embed"]), min_size=2, unique=True)
    )
    keep = data.draw(st.sampled_from([{}, {"logits_to_keep": 1}]))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fused, "WAYS", ("reference",))
        compared(tiny(family), sweep_of(family, list(dict.fromkeys(kinds)), sites), **keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_have_the_bits_that_hooks_give(family: str, calls: list[int]) -> None:
    model, sweep = tiny(family), sweep_of(family, ["swap", "all"], [0, 1, 2])
    cells = sweep.recorded(model)
    by_kernel, _ = run_growing(model, sweep.inputs, cells, lambda x: x)
    assert sum(calls) >= 12
    ran = len(calls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "WAYS", ())
        by_hooks, _ = run_growing(model, sweep.inputs, cells, lambda x: x)
    assert len(calls) == ran
    assert all(map(torch.equal, by_kernel, by_hooks))


def test_sources_of_several_runs_go_in_one_call(calls: list[int]) -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2, seed=1)
    sources = [make_inputs("llava", n, seed=seed) for n, seed in ((2, 2), (1, 3))]
    sweep = Sweep(inputs, {"k": [0, 1]}, lambda k: Patch(1, source=sources[k]))
    compared(model, sweep)
    assert 4 in calls


def test_what_it_does_not_know_is_left_to_hooks(calls: list[int]) -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2, seed=1)
    wide = Steer(1, directions=torch.eye(48)[:2], alpha=2.0, mode="project")
    narrow = Steer(1, directions=torch.ones(48), alpha=2.0)
    twice = Chain(make("llava", "last", 1, 2), make("llava", "swap", 1, 2))
    for made in (
        [wide, wide],
        [twice, twice],
        [wide, Patch(1, source=make_inputs("llava", 2, seed=2))],
        [narrow, Patch(1, source=make_inputs("llava", 2, seed=2))],
    ):
        sweep = Sweep(inputs, {"i": [0, 1]}, lambda i, made=made: made[i])
        compared(model, sweep)
    assert calls == []


def test_a_kernel_that_is_off_or_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["swap"], [1, 2])
    true, ran = fused.patched_rows, []

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        ran.append(0)
        return true(*args, **kwargs) + 1e-6

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise Exception("a compiler's own kind of error")

    monkeypatch.setattr(fused, "WAYS", ("reference",))
    for kernel in (wrong, failing):
        forget(model)
        monkeypatch.setattr(fused, "patched_rows", kernel)
        compared(model, sweep)
    assert len(ran) == 1
    forget(model)


def test_j2_steering_that_is_off_in_one_place_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["steer"], [1, 2])
    true, ran = fused.patched_rows, []

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        ran.append(0)
        rows = true(*args, **kwargs).clone()
        rows[-1, -1, -1] += 1
        return rows

    forget(model)
    monkeypatch.setattr(fused, "WAYS", ("reference",))
    monkeypatch.setattr(fused, "patched_rows", wrong)
    compared(model, sweep)
    assert len(ran) == 1
    forget(model)


def test_a_mistake_of_ours_turns_the_kernel_off_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, sweep = tiny("llava"), sweep_of("llava", ["swap"], [1, 2])
    forget(model)
    monkeypatch.setattr(fused, "WAYS", ("reference",))
    monkeypatch.setattr(fused, "patched_rows", lambda: None)  # takes no argument
    with pytest.warns(HookedVLMWarning, match="kernel.*TypeError.*a mistake in hooked_vlm"):
        compared(model, sweep)
    forget(model)

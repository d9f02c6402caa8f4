"""Interventions of a user's own class act as this package's do, and mistakes in them are named."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from helpers.tiny_models import make_inputs, tiny
from hooked_vlm import Chain, Intervention, LastToken, Patch, Sweep, place_index
from hooked_vlm.errors import HookedVLMError, HookError, InterventionError, UnknownHookError
from hooked_vlm.interventions.ablate import Ablate


@dataclass(frozen=True)
class Zero:
    """Sets a place to zero, as `Ablate` does."""

    site: Any
    at: Any = None

    def hooks_for(self, model: Any, inputs: Any) -> list[Any]:
        index = place_index(model, inputs, self.site, self.at)

        def zero(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            activation = activation.clone()
            activation[index] = 0
            return activation

        return [(self.site, zero)]

    def at_site(self, site: Any) -> "Zero":
        return replace(self, site=site)


@dataclass(frozen=True)
class LateZero(Zero):
    """The same, and it says where it begins."""

    first_position: int = 0


@dataclass(frozen=True)
class Named(Zero):
    """The same, with fields whose names mean something to this package's own classes."""

    parts: Any = ()
    place: Any = "here"
    source: Any = None
    first: Any = 0


SITE = "blocks.1.hook_mlp_out"


def test_an_own_intervention_acts_wherever_interventions_do() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2)
    own, ours = Zero(SITE, LastToken()), Ablate(SITE, at=LastToken())
    assert isinstance(own, Intervention) and isinstance(ours, Intervention)
    assert not isinstance("blocks", Intervention)
    expected = model.run_with_hooks(inputs, [ours])
    assert torch.equal(model.run_with_hooks(inputs, [own]), expected)
    assert torch.equal(model.run_with_hooks(inputs, [Chain(own)]), expected)
    with model.hooks([own], inputs), pytest.raises(InterventionError, match="made for 2 prompts"):
        model(make_inputs("llava", 1))
    # In a generation it acts on the prompt alone, in each copy of it; every step if it says so.
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    for more in ({}, {"num_beams": 2}):
        how |= more
        generated = [model.generate(inputs, fwd_hooks=[x], **how) for x in (own, ours)]
        assert torch.equal(*generated)


def test_a_sweep_takes_the_fast_way_where_the_first_position_is_known() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2)
    length = inputs["input_ids"].shape[1]
    sites = [f"blocks.{i}.hook_resid_post" for i in (0, 1)] + ["blocks.0.hook_mlp_out", SITE]
    run: Any = {"metric": lambda x: x[:, -1, :4], "dims": ("batch", "token")}

    def swept(kind: Any, **how: Any) -> Any:
        made = Sweep(inputs, {"site": sites}, lambda site: kind(site, at=LastToken(), **how))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made.run(model, **run)

    ours, own, late = swept(Ablate), swept(Zero), swept(LateZero, first_position=length - 1)
    named = swept(Named, parts=(Zero(SITE),), source=inputs)
    assert (named == own).all()
    assert own.attrs["engine"].startswith("plain (no growing batch: rows cannot carry")
    assert late.attrs["engine"].startswith("growing")
    assert abs(own - ours).max() < 1e-4 and abs(late - ours).max() < 1e-4


def returns(value: Any) -> Any:
    """An intervention whose `hooks_for` returns a value."""
    return type("Mine", (), {"hooks_for": lambda *_: value, "__repr__": lambda _: "Mine()"})()


def hooks_on(model: Any) -> int:
    return sum(len(module._forward_hooks) for module in model.hf_model.modules())


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (None, InterventionError, r"Mine.hooks_for returned None; expected a list of pairs"),
        ([SITE], InterventionError, "expected a list of pairs"),
        ((SITE, lambda x, hook: x), InterventionError, "expected a list of pairs"),
        ([("blocks.9.hook_mlp_out", lambda x, hook: x)], UnknownHookError, "layer 9 is out of"),
        ([(SITE, lambda x: x)], InterventionError, r"takes \(x\); it is called as"),
        (
            [(SITE, lambda x, hook: x[:1])],
            HookError,
            r"'<lambda> of Mine'.* returned \(1, 45, 48\)",
        ),
        (
            [(SITE, lambda x, hook: x.double())],
            HookError,
            r"float64 .*expected \(2, 45, 48\) float32",
        ),
        ([(SITE, lambda x, hook: 3)], HookError, "returned a int"),
    ],
)
def test_a_wrong_implementation_is_named(value: Any, error: type, said: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2)
    before = hooks_on(model)
    with pytest.raises(error, match=said):
        model.run_with_hooks(inputs, [returns(value)])
    with pytest.raises(error, match=said):
        Sweep(inputs, {"i": [0]}, lambda i: returns(value)).run(model, lambda x: x[:, -1, 0])
    assert hooks_on(model) == before


def test_what_an_own_class_lacks_is_said() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    nothing = returns([])
    with pytest.raises(UnknownHookError, match=r"Mine cannot be moved to another site"):
        Chain(Patch(0, source=inputs), nothing).at_site(1)
    nothing.first_position = "last"
    with pytest.raises(InterventionError, match="first_position is 'last'; expected a whole"):
        Sweep(inputs, {"i": [0]}, lambda i: nothing).plan(model)
    with pytest.raises(HookedVLMError, match="hooks_for"):
        Sweep(inputs, {"i": [0]}, lambda i: object()).plan(model)

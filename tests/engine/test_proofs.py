"""A control goes before the first pass of a kind; a wrong one stops the growing batch."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.growing_sweeps import sweep_of
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm import Ablate, HookedVLM, LastToken, Patch, Sweep
from hooked_vlm.engine import proofs
from hooked_vlm.engine.arguments import Fit
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.batch import Growing
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.proofs import ENCODER, forget
from hooked_vlm.engine.stages import RowPlan
from hooked_vlm.errors import HookedVLMWarning


def test_a_control_that_is_off_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["swap"], [0, 1, 2, 3])
    true = Fit.arguments

    def wrong(self: Fit, given: dict) -> dict:
        made = true(self, given)
        made["position_embeddings"] = tuple(x.flip(1) for x in made["position_embeddings"])
        return made

    forget(model)
    monkeypatch.setattr(Fit, "arguments", wrong)
    with pytest.raises(GrowthError, match="the control's logits are off by"):
        run_growing(model, sweep.inputs, sweep.recorded(model), lambda x: x)
    with pytest.warns(HookedVLMWarning, match="engine 'growing': the control's logits are off by"):
        score = sweep.run(model, lambda x: x[:, -1, 0], logits_to_keep=1)
    assert "restart (no growing batch: the control's" in score.attrs["engine"]
    plain = sweep.run(model, lambda x: x[:, -1, 0], logits_to_keep=1, engine="plain")
    assert score.equals(plain)


def test_a_control_speaks_for_later_passes_of_its_kind() -> None:
    model, batch = tiny("qwen2-vl"), 2

    def report(sites: list[int], kind: str = "swap", batch: int = batch, **keep: int) -> Any:
        sweep = sweep_of("qwen2-vl", [kind], sites, batch)
        cells = sweep.recorded(model)
        return run_growing(model, sweep.inputs, cells, lambda x: x, None, keep)[1]

    forget(model)
    assert report([2, 3]).controls == 1
    assert report([2, 3]).controls == 0
    assert report([1, 2, 3]).controls == 1  # through a block that none has gone through
    assert report([1, 2], logits_to_keep=1).controls == 1
    assert report([1, 2], batch=3).controls == 1
    assert report([1, 2], "last", logits_to_keep=1).controls == 1  # from another position on
    assert report([1, 3], "last", logits_to_keep=1).controls == 0
    forget(model)
    assert report([1, 2], batch=3).controls == 1


def test_j2_noise_that_moves_nothing_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["swap"], [1, 2])
    forget(model)
    monkeypatch.setattr(proofs, "noise_from", lambda start, layout: lambda x, hook: x)
    with pytest.raises(GrowthError, match="does not move the logits"):
        run_growing(model, sweep.inputs, sweep.recorded(model), lambda x: x)
    forget(model)


def test_noise_of_which_nobody_knows_what_it_moves_proves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["swap"], [1, 2])
    forget(model)
    found = iter([0.0, float("nan")])
    monkeypatch.setattr(proofs, "apart", lambda *_: next(found))
    with pytest.raises(GrowthError, match="does not move the logits"):
        run_growing(model, sweep.inputs, sweep.recorded(model), lambda x: x)
    forget(model)


@pytest.mark.parametrize("order", [(False, True), (True, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_cells_in_the_encoder_grow_with_and_without_padding(
    family: str, order: tuple[bool, bool]
) -> None:
    """Their blocks get a mask, or none, for inputs of the same shapes."""
    model = tiny(family)
    forget(model)
    site = "vision_encoder.blocks.{}.hook_resid_post"
    for is_padded in order:
        inputs, source = (make_inputs(family, 2, seed=seed, text=30) for seed in (1, 2))
        for given in (inputs, source):
            given["attention_mask"][0, :1] = 1 - is_padded
        sweep = Sweep(inputs, {"i": [0, 1]}, lambda i, s=source: Patch(site.format(i), source=s))
        found = sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"))
        assert found.attrs["engine"].startswith("growing")
        plain = sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"), engine="plain")
        assert abs(found - plain).max() <= 5e-6 * abs(plain).max()


@torch.no_grad()
def test_keeping_keys_is_asked_again_where_it_may_be_another_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs, true = HookedVLM(build("llava")), make_inputs("llava"), proofs.run_clean
    made: list[Any] = []

    def counting(*args: Any, **options: Any) -> Any:
        made.append(args)
        return true(*args, **options)

    monkeypatch.setattr(proofs, "run_clean", counting)
    base = [Ablate(1).place(model, inputs)]

    def n_runs(base: Any, arguments: dict) -> int:
        made.clear()
        assert proofs.keeps_keys(model, inputs, base, arguments)
        return len(made)

    ways: list[tuple[Any, dict]] = [((), {}), ((), {"logits_to_keep": 1}), (base, {})]
    assert [n_runs(*way) for way in ways] == [2, 2, 2]
    assert [n_runs(*way) for way in ways] == [0, 0, 0]
    model.hf_model.set_attn_implementation("eager")  # type: ignore[operator]
    assert [n_runs(*way) for way in ways] == [2, 2, 2]


@pytest.mark.parametrize(
    ("front", "steps", "stage", "expected"),
    [
        (["hook_embed"], [], 0, ["hook_embed"]),
        (["vision_encoder.blocks.1.hook_mlp_out", "hook_embed"], [], 0, ["hook_embed", ENCODER]),
        (["vision_projector.hook_out"], ["hook_merged_embed"], 0, [ENCODER, "hook_merged_embed"]),
        ([], ["blocks.1.hook_mlp_out"], 1, ["blocks.1.hook_resid_pre"]),
        ([], ["blocks.2.hook_resid_post"], 3, ["blocks.2.hook_resid_post"]),
    ],
)
def test_j2_noise_goes_in_where_a_job_first_acts(
    front: list[str], steps: list[str], stage: int, expected: list[str]
) -> None:
    before, inside = (
        tuple(SimpleNamespace(site=site) for site in sites) for sites in (front, steps)
    )
    job = RowPlan(0, stage, 0)
    object.__setattr__(job, "front", before)
    object.__setattr__(job, "steps", inside)
    assert proofs._noise_sites(tiny("gemma-3"), job) == set(expected)


def test_torch_hooks_of_others_are_another_model() -> None:
    """A hook that reads its batch is right in a plain pass alone; what was proved does not hold."""
    model = HookedVLM(build("llava"), name="hooked by another")
    sweep = sweep_of("llava", ["last"], [1, 2, 3])
    before = sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"))
    block = model.hf_model.get_submodule(model.anatomy.lm.blocks[2].path)

    def first_prompt_only(module: Any, args: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        whole = torch.cat([whole[:1].flip(-1), whole[1:]])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handle = block.register_forward_hook(first_prompt_only)
    plain = sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"), engine="plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"))
    assert abs(plain - before).max() > 0.1
    assert abs(found - plain).max() <= 5e-6 * abs(plain).max()
    handle.remove()
    again = sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"))
    assert (again == before).all()


def _padded(family: str, seed: int) -> dict[str, torch.Tensor]:
    inputs = make_inputs(family, 2, seed=seed, text=30)
    inputs["attention_mask"][0, :2] = 0
    return inputs


def _logits_where(inputs: dict, sweep: Sweep, model: HookedVLM, engine: str) -> Any:
    """Returns the logits of real positions of every cell, and the engine that made them."""
    real = inputs["attention_mask"].bool()
    score = sweep.run(model, lambda x: x[real], dims=("token", "word"), engine=engine)
    return torch.from_numpy(score.values), score.attrs["engine"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_padding_are_not_compared(family: str) -> None:
    """In eager attention a position that sees no key attends to all alike, however many."""
    model, inputs, source = tiny(family, "eager"), _padded(family, 1), _padded(family, 2)
    sweep = Sweep(inputs, {"slot": [0, 1, 2]}, lambda slot: Patch(slot, source=source))
    forget(model)
    last = Sweep(inputs, {"slot": [0, 1, 2]}, lambda slot: Ablate(slot, at=LastToken()))
    for made in (sweep, last):
        found, engine = _logits_where(inputs, made, model, "growing")
        plain, _ = _logits_where(inputs, made, model, "plain")
        assert engine.startswith("growing"), engine
        assert (found - plain).abs().max() <= 5e-6 * plain.abs().max()


@pytest.mark.parametrize(("position", "is_found"), [(0, False), (2, True), (-1, True)])
def test_a_difference_at_a_token_is_found(
    position: int, is_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny("llava", "eager"), _padded("llava", 1)
    sweep = Sweep(inputs, {"slot": [1, 2]}, lambda slot: Ablate(slot, at=LastToken()))
    true = Growing.run

    def wrong(self: Growing) -> torch.Tensor:
        logits = true(self).clone()
        logits[:, 0, position] += 0.01 * logits.abs().max()
        return logits

    forget(model)
    monkeypatch.setattr(Growing, "run", wrong)
    if is_found:
        with pytest.raises(GrowthError, match="the control's logits are off by"):
            run_growing(model, inputs, sweep.recorded(model), lambda x: x)
    else:
        run_growing(model, inputs, sweep.recorded(model), lambda x: x)
    forget(model)

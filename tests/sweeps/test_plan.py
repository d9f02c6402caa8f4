"""What a plan says about a sweep, against what running it does."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.built import on_meta
from helpers.live_memory import peak_live
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import HookedVLM, LastToken, Patch, Sweep, shared_runs
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.plan import costs_of


def sweep_of(family: str, at: object = None, batch: int = 2) -> Sweep:
    source = make_inputs(family, batch, seed=2)
    return Sweep(
        make_inputs(family, batch, seed=1),
        {"slot": [0, 1, 2, 3]},
        lambda slot: Patch(slot, at=at, source=source),
    )


def counted(run: object) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_costs_what_torch_counts(family: str) -> None:
    model, inputs = tiny(family, "eager"), make_inputs(family, 2, seed=1)
    costs = costs_of(model, inputs)
    length = inputs["input_ids"].shape[1]
    said = costs.vision + costs.rows(2, length, length) + 2 * length * costs.head
    assert said == pytest.approx(counted(lambda: model(inputs)), rel=0.06)


@pytest.mark.parametrize("at", [None, LastToken()], ids=["all", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_costs_what_its_plan_says(family: str, at: object) -> None:
    model, sweep = tiny(family, "eager"), sweep_of(family, at)
    sweep.run(model, lambda x: x[:, -1, 0], logits_to_keep=1)  # what is proved once a model
    plan = sweep.plan(model).explain(logits_to_keep=1)
    ran = counted(lambda: sweep.run(model, lambda x: x[:, -1, 0], logits_to_keep=1))
    assert plan.planned == pytest.approx(ran, rel=0.15)
    assert plan.floor <= plan.planned < plan.naive
    assert plan.passes == 1 and plan.rows == 2 * 4
    naive = counted(
        lambda: sweep.run(model, lambda x: x[:, -1, 0], engine="plain", logits_to_keep=1)
    )
    assert plan.naive == pytest.approx(naive, rel=0.25)  # the source's pass ends early even so


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_sweep_of_the_encoder_is_planned_without_a_clean_run(family: str) -> None:
    model, source = tiny(family, "eager"), make_inputs(family, 2, seed=2)
    inputs = make_inputs(family, 2, seed=1)
    band = Region.column_band(model.grids(inputs)[0][0].shape, 0, 2)
    sites = [f"vision_encoder.blocks.{i}.hook_resid_post" for i in (0, 1)]
    given = (inputs, {"site": sites}, lambda site: Patch(site, at=band, source=source))
    kwargs = {"metric": lambda x: x[:, -1, 0], "logits_to_keep": 1}
    sweep = Sweep(*given)
    sweep.run(model, **kwargs)  # what is proved once a model
    plan = sweep.plan(model).explain(logits_to_keep=1)
    ran = counted(lambda: sweep.run(model, **kwargs))
    assert plan.planned == pytest.approx(ran, rel=0.06)  # 0.13 with the whole encoder once more
    assert "No clean run is made" in str(plan) and "once for the clean run" not in str(plan)
    # What all cells begin with is a clean run of its own.
    under = Sweep(*given, base=[Ablate("hook_merged_embed", at=band)])
    assert "once for the clean run" in str(under.plan(model).explain(logits_to_keep=1))


def test_planning_runs_nothing() -> None:
    model, sweep = tiny("llava"), sweep_of("llava")
    assert counted(lambda: str(sweep.plan(model).explain())) == 0


def test_cells_that_cannot_grow_are_said() -> None:
    model = tiny("llava")
    sweep = Sweep(
        make_inputs("llava"),
        {"i": [0, 1]},
        lambda i: Ablate("vision_projector.hook_out"),
        [Ablate(1)],
    )
    text = str(sweep.plan(model).explain())
    assert "Rows cannot carry what 2 cells would change: cells run one by one" in text


@pytest.mark.parametrize("name", ["Qwen2-VL-7B", "Gemma-3-4b"])
def test_published_sizes_are_planned_without_weights(name: str) -> None:
    model = HookedVLM(on_meta(name), name=name)
    assert all(p.is_meta for p in model.hf_model.parameters())
    side, inputs = _inputs(name)
    shape = (side, side)
    third = side // 3
    swap = swap_pairs(
        Region.column_band(shape, 0, third), Region.column_band(shape, side - third, side)
    )
    slots, source = range(model.cfg.n_layers + 1), dict(inputs)
    sweep = Sweep(
        inputs,
        {"kind": ["strip", "last"], "slot": list(slots)},
        lambda kind, slot: Patch(slot, at=swap if kind == "strip" else LastToken(), source=source),
    )
    with shared_runs(model):
        plan = sweep.plan(model).explain(logits_to_keep=1, memory=2**34)
    assert plan.naive > 1e14 and plan.floor <= plan.planned < plan.naive / 2
    assert plan.peak < 2**34
    assert "TFLOP" in str(plan) or "PFLOP" in str(plan)
    strengths = Sweep(
        inputs,
        {"alpha": [0.0, 1.0]},
        lambda alpha: Steer(
            0, at=Region.everything(shape), directions=torch.zeros(model.cfg.d_model), alpha=alpha
        ),
    )
    assert strengths.plan(model).explain(logits_to_keep=1).naive > 0


def _inputs(name: str) -> tuple[int, dict[str, torch.Tensor]]:
    """Four prompts with one image each, as the model's processor would make them."""
    side = 12 if name.startswith("Qwen") else 16
    image = 151655 if name.startswith("Qwen") else 262144
    ids = torch.full((4, side * side + 40), 100)
    ids[:, 4 : 4 + side * side] = image
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("Qwen"):
        inputs["pixel_values"] = torch.zeros(4 * 4 * side * side, 1176)
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * side, 2 * side]] * 4)
    else:
        inputs["pixel_values"] = torch.zeros(4, 3, 896, 896)
        inputs["token_type_ids"] = (ids == image).long()
    return side, inputs


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_pass_takes_no_more_than_its_budget(family: str) -> None:
    """Beside what every way of running keeps: sources, the clean run, the scores."""
    model, sweep = tiny(family), sweep_of(family, batch=4)
    kwargs = {"metric": lambda x: x[:, -1, 0], "logits_to_keep": 1}
    sweep.run(model, **kwargs)  # its controls are made

    def peak(memory: int) -> int:
        return peak_live(lambda: sweep.run(model, memory=memory, **kwargs))

    alone = peak(1)
    each = sweep.plan(model).explain(memory=1, logits_to_keep=1).peak
    for cells in (2, 4, 8):
        budget = cells * each
        assert sweep.plan(model).explain(memory=budget, logits_to_keep=1).peak <= budget
        assert peak(budget) - alone <= budget
    assert peak(8 * each) > alone

"""A growing batch gives what hooked passes give, one by one, or says why it cannot be had."""

import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.suite import build, image_size, picture
from helpers.growing_sweeps import compared, make_region, sweep_of
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.engine import growing
from hooked_vlm.engine.arguments import Fit, causal_mask, is_closed
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.batch import Growing
from hooked_vlm.engine.budget import row_bytes, rows_within
from hooked_vlm.engine.growing import run_growing, starts_of
from hooked_vlm.engine.proofs import forget
from hooked_vlm.engine.stages import RowPlan, job_of, stage_of
from hooked_vlm.errors import InterventionError
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken, Positions
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep


SITES = (
    0,
    1,
    2,
    3,
    "hook_merged_embed",
    "blocks.0.attn.hook_z",
    "blocks.1.attn.hook_q",
    "blocks.2.attn.hook_v",
    "blocks.1.hook_attn_out",
    "blocks.0.hook_resid_mid",
    "blocks.2.hook_mlp_out",
    "ln_final.hook_normalized",
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores or patterns")
        yield


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_sweep_gives_what_plain_passes_give(family: str, data: st.DataObject) -> None:
    kinds = data.draw(
        st.lists(
            st.sampled_from(["clean", "swap", "last", "all", "zero", "steer", "chain"]),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    sites: list[Any] = data.draw(
        st.lists(st.sampled_from(SITES), min_size=2, max_size=4, unique=True)
    )
    batch = data.draw(st.integers(1, 3))
    keep = data.draw(st.sampled_from([{}, {"logits_to_keep": 1}, {"logits_to_keep": 3}]))
    compared(tiny(family), sweep_of(family, kinds, sites, batch), **keep)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_and_kind(family: str, attn: str) -> None:
    model = tiny(family, attn)
    report = compared(model, sweep_of(family, ["swap", "all", "zero", "chain"], list(SITES)))
    assert 0 in report.starts and report.rows >= 2 * 48
    report = compared(model, sweep_of(family, ["last"], list(SITES)), logits_to_keep=1)
    assert report.starts == [make_inputs(family)["input_ids"].shape[1] - 1]  # one row a cell


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_the_same_where_the_arithmetic_is(family: str) -> None:
    """All positions carried, all logits kept: the same sums in the same order."""
    sweep = sweep_of(family, ["all"], [0, 1, 2, 3])
    report = compared(tiny(family), sweep, bound=0.0)
    assert report.worst == 0 and report.starts == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_within_its_bound(family: str, dtype: torch.dtype) -> None:
    model = HookedVLM(deepcopy(tiny(family).hf_model).to(dtype))

    def halved(seed: int) -> dict[str, Any]:
        made = make_inputs(family, 2, seed=seed)
        return {n: x.to(dtype) if x.is_floating_point() else x for n, x in made.items()}

    source = halved(2)
    sweep = Sweep(
        halved(1),
        {"at": ["last", "all"], "site": [0, 1, 2, 3]},
        lambda at, site: Patch(site, at=LastToken() if at == "last" else None, source=source),
    )
    compared(model, sweep, bound=growing.BOUNDS[dtype], logits_to_keep=1)


ARCHITECTURES = (
    "qwen2_5_vl",
    "gemma3",
    "llava_next",
    "idefics3",
    "smolvlm",
    "paligemma",
    "internvl",
    "mistral3",
    "aya_vision",
    "glm4v",
    "qwen3_vl",
    "vipllava",
    "cohere2_vision",
)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_dozen_families(model_type: str) -> None:
    model = build(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = image_size(model)
        inputs, source = (model.prepare([picture(*size, seed=s)], "What is this?") for s in (0, 1))
        for prepared in (inputs, source):
            prepared.tensors.pop("labels", None)  # PaliGemma's, for a loss over all positions
    image = inputs.grids[0][0].positions.flatten()
    places = {
        "image": Positions(tuple(image.tolist()[:2])),
        "last": LastToken(),
        "all": None,
    }
    slots = range(model.cfg.n_layers + 1)
    sweep = Sweep(
        inputs,
        {"at": list(places), "slot": list(slots)},
        lambda at, slot: Patch(slot, at=places[at], source=source),
    )
    compared(model, sweep, bound=1e-4, logits_to_keep=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", [0, 1, "blocks.1.hook_attn_out", "hook_logits"])
def test_what_all_cells_begin_with_is_kept(family: str, site: Any) -> None:
    at = LastToken() if site == "hook_logits" else make_region(family)
    sweep = sweep_of(family, ["swap", "last"], [2, 3])
    under = Sweep(sweep.inputs, sweep.axes, sweep.make, [Ablate(site, at=at)])
    if site == "hook_logits":  # behind where the cells' own begins
        with pytest.raises(GrowthError, match="cells change what rows cannot carry"):
            compared(tiny(family), under)
        fast = under.run(tiny(family), lambda x: x[:, -1], dims=("batch", "token"))
        assert fast.attrs["engine"].startswith("restart (no growing batch: ")
        return
    compared(tiny(family), under, logits_to_keep=1)


def test_rows_go_in_passes_that_a_budget_holds() -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["swap", "zero"], [0, 1, 2, 3])
    cells = sweep.recorded(model)
    whole, _ = run_growing(model, sweep.inputs, cells, lambda x: x)
    length = sweep.inputs["input_ids"].shape[1]
    each = row_bytes(model, length, 3, length, 4)
    told: list[tuple[int, int]] = []
    parts, report = run_growing(
        model, sweep.inputs, cells, lambda x: x, lambda *step: told.append(step), memory=8 * each
    )
    # Eight rows are four cells of two prompts.
    assert report.passes == 2 and report.rows == 16 and told[-1] == (8, 8)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))
    scores = sweep.run(model, lambda x: x[:, -1, 0], memory=1)
    assert scores.attrs["engine"].startswith("growing: 8 passes of 16 rows")
    assert rows_within(model, length, 3, length, 4, None) == 512


def test_a_pass_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sweep = tiny("llava"), sweep_of("llava", ["swap", "zero"], [0, 1, 2, 3])
    true = Growing.run
    forget(model)

    def run(self: Growing) -> Tensor:
        if len(self.jobs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self)

    monkeypatch.setattr(Growing, "run", run)
    report = compared(model, sweep)
    assert report.passes == 2


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


def test_a_short_front_is_carried() -> None:
    """Where little stands in front of the first change, rows are whole: the same bits, no mask."""
    inputs = {"input_ids": torch.zeros(1, 40)}
    jobs = [RowPlan(0, 1, first) for first in (3, 4, 30)]
    assert starts_of(jobs, {}, inputs) == [0, 4, 30]


def test_what_cannot_grow_says_why() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2, seed=1)
    under = Sweep(inputs, {"i": [0, 1]}, lambda i: Ablate("vision_projector.hook_out"), [Ablate(1)])
    with pytest.raises(GrowthError, match="2 cells change what rows cannot carry"):
        run_growing(model, inputs, under.recorded(model), lambda x: x)
    sweep = Sweep(inputs, {"i": [0, 1]}, lambda i: Ablate(i))
    cells = sweep.recorded(model)
    doubled = model.hooks([("blocks.0.hook_mlp_out", lambda x, hook: x * 2)])
    with doubled, pytest.raises(GrowthError, match="hooks are open"):
        run_growing(model, inputs, cells, lambda x: x)
    with pytest.raises(InterventionError, match=r"no engine 'growin' .*'growing'"):
        sweep.run(model, lambda x: x, engine="growin")


def test_errors_of_a_metric_are_not_taken_for_something_else() -> None:
    model, sweep = tiny("llava"), sweep_of("llava", ["zero"], [0, 1])

    def metric(logits: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        sweep.run(model, metric)


def test_no_trace_is_left_in_the_model() -> None:
    model, sweep = tiny("gemma-3"), sweep_of("gemma-3", ["swap", "last"], list(SITES))
    modules = list(model.hf_model.modules())

    def state() -> list[Any]:
        return [
            (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in modules
        ]

    before = state()
    sweep.run(model, lambda x: x[:, -1, 0], logits_to_keep=1)
    assert state() == before and not model.is_hooked


def test_where_cells_join() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2, seed=1)
    (swap,) = sweep_of("llava", ["swap"], [2]).plan(model)
    job = job_of(model, inputs, swap, 0)
    first = int(model.grids(inputs)[0][0].positions.min())
    assert job is not None and (job.stage, job.first) == (2, first)
    assert stage_of("blocks.1.hook_resid_pre", 3) == (1, True)
    assert stage_of("hook_logits", 3) == (3, False)
    assert stage_of("hook_embed", 3) == (-1, False)
    assert stage_of("hook_merged_embed", 3) == (0, True)
    assert stage_of("hook_merged_embed", 3, merged_first=False) == (-1, False)


def test_a_prefix_is_clean_only_where_nothing_looks_ahead() -> None:
    causal = causal_mask(0, 5, torch.device("cpu"))
    assert causal[0, 0].tolist() == torch.ones(5, 5).tril().bool().tolist()
    assert causal_mask(3, 5, torch.device("cpu")).shape == (1, 1, 2, 5)
    assert all(is_closed(causal, start) for start in range(5))
    block = causal.clone()
    block[..., 1:4, 1:4] = True  # an image block that sees all of itself, as in Gemma 3
    assert [is_closed(block, start) for start in range(5)] == [True, True, False, False, True]
    additive = torch.where(block, 0.0, torch.finfo(torch.float32).min)
    assert [is_closed(additive, start) for start in range(5)] == [True, True, False, False, True]
    assert is_closed(None, 3)


def test_rows_of_an_image_block_that_sees_itself_begin_in_front_of_it() -> None:
    """In Gemma 3 image tokens in front of a patched one see it: their keys change."""
    model, inputs = tiny("gemma-3"), make_inputs("gemma-3", 2, seed=1)
    inputs["token_type_ids"] = (inputs["input_ids"] == 299).long()
    source = make_inputs("gemma-3", 2, seed=2) | {"token_type_ids": inputs["token_type_ids"]}
    last_column = Region.column_band((3, 3), 2, 3)
    sweep = Sweep(
        inputs, {"slot": [0, 1, 2]}, lambda slot: Patch(slot, at=last_column, source=source)
    )
    compared(model, sweep)

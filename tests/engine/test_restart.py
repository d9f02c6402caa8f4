"""Cells that start where they differ give the bits of whole hooked passes, or run as those."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.engine import run
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.proofs import forget
from hooked_vlm.engine.run import run_restarted, spread
from hooked_vlm.engine.stages import start_layer
from hooked_vlm.engine.vision import TowerRestart, tower_depth
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def logits(found: Tensor) -> Tensor:
    return found.flatten(1)


def grid_side(family: str) -> int:
    return 6 if family == "llava" else 3


def make(family: str, kind: str, site: Any) -> Any:
    source, n = make_inputs(family, 2, seed=2), grid_side(family)
    left, right = Region.column_band((n, n), 0, 1), Region.column_band((n, n), n - 1, n)
    return {
        "clean": lambda: None,
        "swap": lambda: Patch(site, at=swap_pairs(left, right), source=source),
        "last": lambda: Patch(site, at=LastToken(), source=source),
        "zero": lambda: Ablate(site, at=left),
        "steer": lambda: Steer(site, at=right, directions=torch.ones(48), alpha=2.0),
        "chain": lambda: Chain(Ablate(0, at=left), Patch(site, at=LastToken(), source=source)),
    }[kind]()


def sweep_of(family: str, kinds: list[str], sites: list[Any]) -> Sweep:
    return Sweep(
        make_inputs(family, 2, seed=1),
        {"kind": kinds, "site": sites},
        make=lambda kind, site: make(family, kind, site),
    )


def both(sweep: Sweep, family: str, **kwargs: Any) -> tuple[Any, Any]:
    model = tiny(family)
    dims = ("batch", "logit")
    fast = sweep.run(model, logits, dims=dims, engine="restart", **kwargs)
    return fast, sweep.run(model, logits, dims=dims, engine="plain", **kwargs)


@pytest.mark.parametrize(
    "family",
    [f if f == "gemma-3" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_sweep_gives_the_same_bits(family: str, data: st.DataObject) -> None:
    kinds = data.draw(
        st.lists(
            st.sampled_from(["clean", "swap", "last", "zero", "steer", "chain"]),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    sites: list[Any] = data.draw(
        st.lists(
            st.sampled_from(
                [0, 1, 2, 3, "hook_merged_embed", "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out"]
            ),
            min_size=2,
            max_size=4,
            unique=True,
        )
    )
    keep = data.draw(st.sampled_from([{}, {"logits_to_keep": 1}]))
    fast, plain = both(sweep_of(family, kinds, sites), family, **keep)
    assert fast.equals(plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_runs_once_and_skipped_blocks_do_not_run(family: str) -> None:
    model, sweep = tiny(family), sweep_of(family, ["zero", "steer"], [2, 3])
    sweep_of(family, ["zero"], [2]).run(model, lambda x: x[:, -1, 0])  # what is found out once
    encoder = model.hf_model.get_submodule(str(model.anatomy.vision and model.anatomy.vision.path))
    lowest = model.hf_model.get_submodule(model.anatomy.lm.blocks[0].path)
    calls = {"encoder": 0, "lowest": 0}
    inner = next(m for m in encoder.modules() if isinstance(m, torch.nn.Linear))
    own = next(m for m in lowest.modules() if isinstance(m, torch.nn.Linear))

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    handles = [
        inner.register_forward_hook(count("encoder")),
        own.register_forward_hook(count("lowest")),
    ]
    try:
        sweep.run(model, lambda x: x[:, -1, 0], engine="restart")
    finally:
        for handle in handles:
            handle.remove()
    # The recorded pass and the plain one that proves it; one more finds what blocks return.
    assert calls["encoder"] <= 3
    assert calls["lowest"] <= 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", [0, 1, "blocks.1.hook_attn_out", "hook_logits"])
def test_what_all_cells_begin_with_is_kept(family: str, site: Any) -> None:
    base = [make(family, "zero", site) if site != "hook_logits" else Ablate(site, at=LastToken())]
    kinds = ["clean", "swap", "zero"]
    sweep = sweep_of(family, kinds, [0, 1, 2, 3])
    under = Sweep(sweep.inputs, sweep.axes, sweep.make, base)
    fast, plain = both(under, family)
    assert fast.equals(plain)
    free, _ = both(sweep, family)
    assert not fast.equals(free)
    by_hand = tiny(family).run_with_hooks(sweep.inputs, [*base, make(family, "zero", 2)])
    assert (fast.sel(kind="zero", site=2).values == by_hand.flatten(1).numpy()).all()


def restarted(family: str, *cells: Any) -> Any:
    """Returns each cell's logits from a restart; raises `GrowthError` where there is none."""
    sweep = Sweep(make_inputs(family, 2, seed=1), {"i": range(len(cells))}, make=lambda i: cells[i])
    model = tiny(family)
    return run_restarted(model, sweep.inputs, sweep.recorded(model), lambda x: x)


def test_cells_of_the_projector_have_the_encoder_in_common() -> None:
    assert len(restarted("llava", *[Ablate("vision_projector.hook_out")] * 5)) == 5
    patches = [Ablate("vision_encoder.hook_patch_embed")] * 5
    with pytest.raises(GrowthError, match="later than a whole pass"):
        restarted("llava", *patches)
    assert len(restarted("llava", *patches, Ablate(2))) == 6  # one cell has


@pytest.mark.parametrize("family", ["qwen2-vl", "llava"])
def test_the_first_sweep_of_a_model_is_restarted_too(family: str) -> None:
    model = HookedVLM(tiny(family).hf_model)
    sweep = Sweep(make_inputs(family, 2, seed=1), {"i": [0, 1, 2, 3]}, make=lambda i: Ablate(i))
    assert len(run_restarted(model, sweep.inputs, sweep.recorded(model), lambda x: x)) == 4


def test_few_cells_and_open_hooks_run_plainly() -> None:
    with pytest.raises(GrowthError, match="few cells"):
        restarted("llava", *[Ablate(2)] * 3)
    with tiny("llava").hooks([("blocks.0.hook_mlp_out", lambda x, hook: x * 2)]):
        with pytest.raises(GrowthError, match="hooks are open"):
            restarted("llava", *[Ablate(2)] * 5)
        fast, plain = both(sweep_of("llava", ["zero"], [0, 1, 2, 3]), "llava")
        assert fast.equals(plain)
        assert fast.attrs["engine"].startswith("plain (no restart: hooks are open")


def test_a_model_that_cannot_be_cut_exactly_runs_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen2-vl")
    true = type(model).run_from_layer

    def off(self: Any, inputs: Any, residual: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return true(self, inputs, residual * (1 + 1e-4), *args, **kwargs)

    forget(model)
    monkeypatch.setattr(type(model), "run_from_layer", off)
    with pytest.raises(GrowthError, match="other bits"):
        restarted("qwen2-vl", *[Ablate(slot) for slot in (1, 2, 3, 3)])
    with pytest.warns(HookedVLMWarning, match="cannot run by the engine 'restart': passes that"):
        fast, plain = both(sweep_of("qwen2-vl", ["zero"], [0, 1, 2, 3]), "qwen2-vl")
    assert fast.equals(plain) and "no restart: passes that start" in fast.attrs["engine"]
    forget(model)


def test_where_cells_start() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")

    def start(*own: Any, base: Any = ()) -> int | None:
        sweep = Sweep(inputs, {"i": [0]}, lambda i: list(own), base)
        return start_layer(model, inputs, sweep.plan(model)[0])

    assert start(Ablate(0)) == 0
    assert start(Ablate("blocks.1.attn.hook_z")) == 1
    assert start(Ablate("blocks.1.hook_resid_post")) == 1  # what is on its output needs the block
    assert start(Chain(Ablate("blocks.2.hook_mlp_out"), Ablate("hook_logits"))) == 2
    assert start() == 2  # the last block
    assert start(Ablate("vision_projector.hook_out")) is None
    # All that the base does has to lie before the start.
    second = Ablate("blocks.2.hook_resid_pre")
    assert start(second, base=[Ablate("blocks.1.hook_mlp_out"), second]) == 2
    assert start(second, base=[Ablate("blocks.2.hook_mlp_out")]) == 0
    assert start(Ablate("blocks.1.hook_mlp_out"), base=[second]) == 0
    assert start(second, base=[Ablate("vision_projector.hook_out")]) is None


def test_j2_residuals_fit_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread([], 3) == []
    assert spread(list(range(10)), 3) == [0, 4, 8]
    monkeypatch.setattr(run, "BUDGET", 1)
    model, started = tiny("llava"), []
    true = type(model).run_from_layer

    def noted(self: Any, inputs: Any, residual: Tensor, layer: int, *args: Any, **kw: Any) -> Any:
        started.append(layer)
        return true(self, inputs, residual, layer, *args, **kw)

    monkeypatch.setattr(type(model), "run_from_layer", noted)
    cells = [Ablate(slot) for slot in (1, 2, 3, 3)]
    restarted("llava", *cells)
    assert set(started) == {1}
    # A residual is as large as all positions of all prompts together.
    each = make_inputs("llava", 2, seed=1)["input_ids"].numel() * 48 * 4
    for budget, expected in ((2 * each - 1, {1}), (2 * each, {1, 2})):
        monkeypatch.setattr(run, "BUDGET", budget)
        started.clear()
        restarted("llava", *cells)
        assert set(started) == expected
    monkeypatch.setattr(run, "BUDGET", 1)
    fast, plain = both(sweep_of("llava", ["zero", "last"], [0, 1, 2, 3]), "llava")
    assert fast.equals(plain)


def test_no_trace_is_left_in_the_model() -> None:
    model = tiny("gemma-3")

    def hooks() -> int:  # transformers may keep some of its own
        modules = list(model.hf_model.modules())
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()
    with pytest.raises(RuntimeError, match="planted"):
        sweep_of("gemma-3", ["zero"], [0, 1, 2, 3]).run(model, lambda _: _fails())
    assert not any("forward" in vars(m) for m in model.hf_model.modules())
    assert hooks() == before


def _fails() -> Tensor:
    raise RuntimeError("planted")


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_in_the_vision_encoder_start_from_their_block(family: str) -> None:
    model = tiny(family)
    assert model.cfg.vision is not None and model.anatomy.vision is not None
    n_blocks = model.cfg.vision.n_layers
    sites = [f"vision_encoder.blocks.{i}.hook_resid_{end}" for i in range(n_blocks) for end in ENDS]
    sites = [site for site in sites if not model.sites[site].read_only]
    sweep = sweep_of(family, ["swap", "zero"], sites)
    cells = sweep.recorded(model)
    start = TowerRestart.of(model, sweep.inputs, [cell.interventions for cell in cells])
    assert start is not None
    ran: list[int] = []
    handles = [
        model.hf_model.get_submodule(f"{block.path}.{_some_linear(model, block.path)}")
        .register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(model.anatomy.vision.blocks)
    ]  # fmt: skip
    for cell in cells:
        ran.clear()
        kept = sum(map(bool, start.outputs))  # the rest of what lies below is kept now
        found = start.run(cell, {})
        depth = tower_depth(model, cell.interventions)
        assert sorted(set(ran)) == list(range(min(kept, depth), n_blocks))
        assert torch.equal(found, model.run_with_hooks(sweep.inputs, cell.interventions))
    for handle in handles:
        handle.remove()
    fast, plain = both(sweep, family)
    assert fast.equals(plain)


ENDS = ("pre", "post")


def _some_linear(model: HookedVLM, path: str) -> str:
    block = model.hf_model.get_submodule(path)
    return next(name for name, part in block.named_modules() if isinstance(part, nn.Linear))


def test_what_lies_below_in_the_encoder() -> None:
    model = tiny("llava")
    assert model.cfg.vision is not None
    n_blocks, site = model.cfg.vision.n_layers, "vision_encoder.blocks.1.{}"
    inputs = make_inputs("llava")

    def placed(*parts):
        return [part.place(model, inputs) for part in parts]

    depth = {
        name: tower_depth(model, placed(Ablate(site.format(name))))
        for name in ("hook_resid_pre", "attn.hook_z", "hook_resid_post")
    }
    assert depth == {"hook_resid_pre": 1, "attn.hook_z": 1, "hook_resid_post": 2}
    assert tower_depth(model, placed(Ablate("vision_projector.hook_out"))) == n_blocks
    assert tower_depth(model, placed(Ablate(site.format("hook_resid_post")), Ablate(0))) == 2
    assert tower_depth(model, [("hook_embed", lambda x, hook: x)]) == 0
    assert tower_depth(model, placed(Ablate("vision_encoder.hook_patch_embed"))) == 0

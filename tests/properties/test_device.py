"""The public surface on a stand-in for a CUDA device: nothing is refused, and the fast ways run."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from helpers.device_stand_in import OnDevice, StandIn
from hooked_vlm import (
    Ablate,
    HookedVLM,
    LastToken,
    Patch,
    Region,
    Steer,
    Sweep,
    shared_runs,
    swap_pairs,
)
from hooked_vlm.engine import fused
from hooked_vlm.experiments.dual_mechanisms import final_token, strip_swap


MODELS = ("tiny-qwen2-vl", "tiny-gemma-3")
PROMPTS = 2
QUESTION = "What is on the left?"


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel's place in a sweep is taken by its definition: the stand-in compiles nothing."""
    monkeypatch.setattr(fused, "WAYS", ("reference",))
    # Where triton is installed, it takes the device for a GPU.
    monkeypatch.setattr(fused, "way_for", lambda clean: "reference")
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[HookedVLM, HookedVLM, StandIn]]:
    """One model on the host, the same on the device, and the device."""
    host, moved = (HookedVLM.from_pretrained(request.param) for _ in range(2))
    with StandIn() as device:
        device.move(moved.hf_model)
        yield host, moved, device


def pictures(seed: int) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [
        Image.fromarray(random.integers(0, 256, (192, 192, 3), dtype=np.uint8))
        for _ in range(PROMPTS)
    ]


def prepared(model: HookedVLM, seed: int = 0) -> Any:
    return model.prepare(pictures(seed), [QUESTION] * PROMPTS)


def close(found: Tensor, expected: Tensor) -> None:
    assert isinstance(found, OnDevice)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def sweep_of(model: HookedVLM, kind: str) -> Sweep:
    """A sweep of each kind over the slots."""
    inputs, source = prepared(model), prepared(model, seed=1)
    grid = model.grids(inputs)[0][0]
    columns = grid.shape[1]
    left, right = (
        Region.column_band(grid.shape, a, b) for a, b in ((0, 2), (columns - 2, columns))
    )
    direction = torch.linspace(-1, 1, model.cfg.d_model)
    slots = list(range(model.cfg.n_layers + 1))
    encoder = [site for site in model.sites if site.endswith("hook_resid_pre") and "vision" in site]
    makers: dict[str, tuple[list[Any], Callable[[Any], Any]]] = {
        "strips": (slots, lambda s: Patch(s, at=swap_pairs(left, right), source=source)),
        "final token": (slots, lambda s: Patch(s, at=LastToken(), source=source)),
        "strengths": (
            [-2.0, -1.0, 1.0, 2.0],
            lambda a: Steer(1, at=left, directions=direction, alpha=a),
        ),
        "heads": (
            list(range(model.cfg.n_heads)),
            lambda h: Patch("blocks.1.attn.hook_z", at=LastToken(), source=source, heads=(h,)),
        ),
        "vision": (
            encoder,
            lambda site: Patch(site, at=left, source=source),
        ),
        "ablated": (slots, lambda s: Ablate(s, at=right)),
    }
    values, make = makers[kind]
    return Sweep(inputs, {"value": values}, make=lambda value: make(value))


KINDS = ("strips", "final token", "strengths", "heads", "vision", "ablated")


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(KINDS, id="forward"),
        pytest.param(KINDS[::-1], id="backward", marks=pytest.mark.slow),
    ],
)
def test_sweeps_run_by_the_engine_that_runs_them_on_the_host(pair: Any, order: Any) -> None:
    host, moved, device = pair
    for kind in order:
        expected, found = (
            sweep_of(model, kind).run(model, lambda x: x[:, -1, :40], dims=("batch", "token"))
            for model in (host, moved)
        )
        assert found.attrs["engine"].split()[0] == expected.attrs["engine"].split()[0], kind
        np.testing.assert_allclose(found.values, expected.values, atol=1e-4, rtol=1e-4)
    assert not device.refused


@pytest.mark.parametrize("order", [("final token", "strips"), ("strips", "final token")])
def test_the_kernel_makes_rows_in_either_order(
    pair: Any, order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What agreed once for a kind of step is not tried again: its maps must be on the device."""
    _, moved, device = pair
    calls: list[Any] = []
    true = fused.patched_rows

    def counted(*args: Any, **how: Any) -> Tensor:
        calls.append(args[2])
        return true(*args, **how)

    monkeypatch.setattr(fused, "patched_rows", counted)
    for kind in order:
        calls.clear()
        found = sweep_of(moved, kind).run(moved, lambda x: x[:, -1, 0])
        assert found.attrs["engine"].startswith("growing"), kind
        # Rows join before each block and after all; the last token itself is the source's, too.
        assert len(calls) >= moved.cfg.n_layers and all(isinstance(x, OnDevice) for x in calls)
    assert not device.refused


@pytest.mark.parametrize("kind", ["strips", "final token", "ablated", "vision"])
def test_attribution_is_that_of_the_host(pair: Any, kind: str) -> None:
    host, moved, device = pair
    with torch.enable_grad():
        expected, found = (
            sweep_of(model, kind).attribution(model, lambda logits: logits[:, -1, 0])
            for model in (host, moved)
        )
    np.testing.assert_allclose(found.values, expected.values, atol=1e-4, rtol=1e-3)
    assert not device.refused


def test_runs_caches_and_answers_are_those_of_the_host(pair: Any) -> None:
    host, moved, device = pair
    inputs, own = prepared(host), prepared(moved)
    close(moved(own), host(inputs))
    names = [name for name in host.hook_names if not name.endswith(("pattern", "attn_scores"))]
    _, cache = moved.run_with_cache(own, names)
    _, expected = host.run_with_cache(inputs, names)
    assert set(cache) == set(expected)
    for name in names:
        close(cache[name], expected[name])
    grid = host.grids(inputs)[0][0]
    for edit in (
        Ablate(2, at=LastToken()),
        Ablate("vision_encoder.blocks.1.hook_resid_pre", at=grid.all()),
        Steer(1, at=LastToken(), directions=torch.ones(host.cfg.d_model), alpha=2.0),
    ):
        close(moved.run_with_hooks(own, [edit]), host.run_with_hooks(inputs, [edit]))
    answers = [
        model.generate(
            given, max_new_tokens=2, do_sample=False, fwd_hooks=[Ablate(2, at=grid.all())]
        )
        for model, given in ((host, inputs), (moved, own))
    ]
    assert answers[0].tolist() == answers[1].tolist()
    assert not device.refused


def test_shared_runs(pair: Any) -> None:
    host, moved, device = pair
    tables = []
    for model in (host, moved):
        with shared_runs(model):
            tables.append(
                [
                    sweep_of(model, kind).run(model, lambda x: x[:, -1, 0])
                    for kind in ("final token", "strips")
                ]
            )
    for one, other in zip(*tables, strict=True):
        np.testing.assert_allclose(one.values, other.values, atol=1e-4, rtol=1e-4)
    assert not device.refused


@pytest.mark.parametrize("kind", KINDS)
def test_how_often_a_sweep_waits_does_not_depend_on_its_cells(pair: Any, kind: str) -> None:
    _, moved, device = pair
    whole = sweep_of(moved, kind)
    (name, values), *_ = whole.axes.items()
    few = Sweep(whole.inputs, {name: list(values)[-2:]}, make=whole.make)
    waits = []
    for sweep in (few, whole):
        sweep.run(moved, lambda x: x[:, -1, 0])  # what is found out once for each model
        device.syncs.clear()
        found = sweep.run(moved, lambda x: x[:, -1, 0])
        assert found.attrs["engine"].startswith("growing")
        # What transformers' own forward waits for is not in our hands, and what the kernel's
        # definition waits for, the kernel does not.
        others = ("transformers", "engine/kernels/reference.py")
        own = {
            line: n for (_, line), n in device.syncs.items() if line.partition(":")[0] not in others
        }
        waits.append(sum(own.values()))
        # Four are for what prompts share: asked of the clean run and of the source.
        assert waits[-1] <= 16 + moved.cfg.n_layers, own
    # In the encoder, by where cells start; elsewhere their number changes nothing.
    assert waits[1] <= waits[0] + (moved.cfg.n_layers if kind == "vision" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [final_token, strip_swap])
def test_experiments_conclude_what_they_do_on_the_host(pair: Any, experiment: Any) -> None:
    host, moved, device = pair
    config = experiment.Config(pairs=2, batch_size=4)
    expected, found = (experiment.run(m, config, lambda *_: None) for m in (host, moved))
    assert found.verdict == expected.verdict
    np.testing.assert_allclose(found.table["value"], expected.table["value"], atol=1e-4)
    assert not device.refused

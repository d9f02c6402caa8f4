"""Sweeps that share runs give the same numbers, and nothing stale is ever taken."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm import HookedVLM, LastToken, Patch, Sweep, shared_runs
from hooked_vlm.anatomy.weights import Weights
from hooked_vlm.engine import fingerprints, growing
from hooked_vlm.engine.fingerprints import content_of
from hooked_vlm.engine.proofs import forget
from hooked_vlm.engine.shared import RunStore, open_runs


def sweep_of(family: str, at: Any = None, *, seed: int = 1, site: str | None = None) -> Sweep:
    """A sweep over slots; its inputs are made anew each time, so that content counts."""
    source = make_inputs(family, 2, seed=7)
    return Sweep(
        make_inputs(family, 2, seed=seed),
        {"slot": [0, 1, 2, 3]},
        lambda slot: Patch(slot if site is None else site.format(slot % 2), at=at, source=source),
    )


def run(model: HookedVLM, sweep: Sweep) -> Any:
    return sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"), logits_to_keep=1)


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[None]]:
    """Counts how often a module really runs."""
    found: list[None] = []
    handle = module.register_forward_hook(lambda *_: found.append(None))
    try:
        yield found
    finally:
        handle.remove()


def first_block(model: HookedVLM) -> nn.Module:
    assert model.anatomy.vision is not None
    return model.hf_model.get_submodule(model.anatomy.vision.blocks[0].path)


def test_j2_a_store_counts_what_it_found_and_keeps_no_more_than_its_memory():
    store = RunStore(tiny("llava"), memory=100)
    assert (store.reused, store.taken, store.get("a")) == (0, 0, None)
    for key in "ab":
        store.keep(key, torch.zeros(12))  # 48 bytes each
    store.keep("a", torch.ones(12))  # in place of the first
    assert store.taken == 96 and store.get("a").sum() == 12 and store.reused == 1
    store.keep("c", torch.zeros(12))
    assert store.taken == 96 and store.get("b") is None  # used longest ago
    store.keep("all", torch.zeros(25))  # exactly the memory
    assert store.taken == 100 and store.get("all") is not None and store.get("a") is None
    store.keep("more", torch.zeros(26))
    assert store.taken == 100 and store.get("more") is None and store.get("all") is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_made_once(family: str) -> None:
    model = tiny(family)
    hf_model: Any = model.hf_model
    embedding = hf_model.get_input_embeddings()  # not a block: there hooks see rows of cells
    # Around both: what was proved without a torch hook of others says nothing about with one.
    with calls_of(embedding) as calls:
        alone = [run(model, sweep_of(family, at)) for at in (None, LastToken())]
        calls.clear()
        with shared_runs(model) as runs:
            shared = [run(model, sweep_of(family, None))]
            first = len(calls)
            shared.append(run(model, sweep_of(family, LastToken())))
            assert len(calls) - first < first  # no source run any more
            other = run(model, sweep_of(family, LastToken(), seed=3))
            assert runs.reused > 2
    for one, both in zip(alone, shared, strict=True):
        assert (abs(one - both) <= 5e-6 * abs(one).max()).all()
    assert not other.equals(shared[1])
    assert open_runs(model) is None


def test_j2_a_clean_run_is_kept_for_the_next_growing_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, true = tiny("llava"), [], growing.run_clean

    def counting(*args: Any, **options: Any) -> Any:
        made.append(args)
        return true(*args, **options)

    monkeypatch.setattr(growing, "run_clean", counting)
    with shared_runs(model):
        for _ in range(3):
            assert "growing" in run(model, sweep_of("llava")).attrs["engine"]
    assert len(made) == 1
    run(model, sweep_of("llava"))
    assert len(made) == 2


def test_sweeps_that_alternate_between_blocks_share_one_clean_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, made, true = tiny("llava"), [], growing.run_clean

    def counting(*args: Any, **options: Any) -> Any:
        made.append(args)
        return true(*args, **options)

    monkeypatch.setattr(growing, "run_clean", counting)
    inputs, source = make_inputs("llava", 2, seed=1), make_inputs("llava", 2, seed=7)

    def scores(slots: list[int], at: Any) -> Any:
        sweep = Sweep(inputs, {"slot": slots}, lambda slot: Patch(slot, at=at, source=source))
        return run(model, sweep)

    asked: list[tuple[list[int], Any]] = [([0, 1], LastToken()), ([2, 3], None)]
    alone = [scores(*each) for each in asked]
    made.clear()
    with shared_runs(model):
        for _ in range(3):
            for each, true_scores in zip(asked, alone, strict=True):
                found = scores(*each)
                assert abs(found - true_scores).max() <= 5e-6 * abs(true_scores).max()
    assert len(made) == 2  # one for each; the second has what the first needs, too


def test_what_is_kept_is_forgotten_with_the_weights() -> None:
    model = HookedVLM(deepcopy(tiny("llava").hf_model))
    sweep = sweep_of("llava")
    with shared_runs(model):
        before = run(model, sweep)
        with torch.no_grad():
            next(first_block(model).parameters()).mul_(1.5)
        after = run(model, sweep)
    again = run(model, sweep)  # images encoded together: on some processors, other last bits
    largest = float(abs(again).max())
    assert float(abs(after - again).max()) <= 5e-6 * largest
    assert float(abs(after - before).max()) > 1e-3 * largest


def _through_data(model: HookedVLM) -> None:
    """Gives the weight no new version."""
    next(first_block(model).parameters()).data.mul_(3)


def _by_another(model: HookedVLM) -> None:
    layer: Any = model.hf_model.get_submodule(model.anatomy.lm.blocks[0].path)
    layer.mlp.up_proj.weight = nn.Parameter(3 * layer.mlp.up_proj.weight.detach())


def _moved(model: HookedVLM) -> None:
    weight = next(first_block(model).parameters())
    weight.data = 3 * weight.data


def _by_buffer(model: HookedVLM) -> None:
    rotary: Any = next(m for m in model.hf_model.modules() if hasattr(m, "inv_freq"))
    rotary.inv_freq.mul_(0.5)


@pytest.mark.parametrize("change", [_through_data, _by_another, _moved, _by_buffer])
@torch.no_grad()
def test_what_is_kept_is_forgotten_however_weights_change(
    change: Callable[[HookedVLM], None],
) -> None:
    model = HookedVLM(deepcopy(tiny("qwen2-vl").hf_model))
    sweep = sweep_of("qwen2-vl", LastToken())
    with shared_runs(model):
        before = run(model, sweep)
        change(model)
        after = run(model, sweep)
    again = run(model, sweep)
    largest = float(abs(again).max())
    assert float(abs(after - again).max()) <= 5e-6 * largest
    assert float(abs(after - before).max()) > 1e-3 * largest


def test_weights_that_come_and_go_are_never_taken_for_one_another() -> None:
    layer = nn.Linear(4, 4, bias=False).to("meta")  # neither values nor an address
    weights, states = Weights(layer), set()
    for _ in range(20):
        layer.weight = nn.Parameter(torch.zeros(4, 4, device="meta"))
        states.add(weights.state())
        assert weights.state() in states
    assert len(states) == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_have_a_state(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 5).to(dtype)
    layer.register_buffer("none", torch.zeros(0))
    layer.register_buffer("turned", torch.zeros(3, 5).T)
    weights = Weights(layer)
    before = weights.state()
    assert weights.state() == before
    layer.bias.data[0] += 1
    assert weights.state() != before


def test_what_is_kept_is_of_one_adapter_one_dtype_and_one_precision() -> None:
    model = HookedVLM(deepcopy(tiny("llava").hf_model))
    layer: Any = first_block(model)
    inputs = make_inputs("llava", 2)
    with shared_runs(model) as runs, torch.no_grad():

        def reused() -> int:
            before = runs.reused
            model(inputs)
            return runs.reused - before

        reused()  # tries out whether images may be taken apart
        assert reused() == 2
        layer._disable_adapters, layer._active_adapter = False, ["one"]
        reused()  # tries out whether images may be taken apart
        assert reused() == 2
        layer._disable_adapters = True
        assert (reused(), reused()) == (0, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert (reused(), reused()) == (0, 2)
        model.hf_model.double()  # the pixels stay as they are
        shared = model(inputs)
    with torch.no_grad():
        assert torch.allclose(shared, model(inputs), atol=0, rtol=1e-9)


def test_vision_sites_and_open_hooks_are_not_shared() -> None:
    model = tiny("qwen2-vl")
    sweep = sweep_of("qwen2-vl", site="vision_encoder.blocks.{}.hook_resid_post")
    alone = run(model, sweep)
    with shared_runs(model):
        run(model, sweep_of("qwen2-vl"))
        assert run(model, sweep).equals(alone)
        with model.hooks([("hook_merged_embed", lambda x, hook: x * 2)]):
            assert open_runs(model) is None


def test_a_budget_is_kept_to_and_blocks_may_be_nested() -> None:
    model = tiny("gemma-3")
    forget(model)
    with shared_runs(model, memory=2**16) as runs:
        for seed in range(4):
            run(model, sweep_of("gemma-3", seed=seed))
            assert runs.taken <= 2**16
        with shared_runs(model) as inner:
            assert inner is runs
        assert open_runs(model) is runs


def test_content_is_told_apart() -> None:
    x = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    same = content_of({"x": x})
    assert same == content_of({"x": x.clone()})
    assert same != content_of({"x": x.T.contiguous()})
    assert same != content_of({"y": x}) and same != content_of({"x": x.float()})
    assert content_of({"x": x.T}) == content_of({"x": x.T.contiguous()})
    changed = x.clone()
    changed[1, 2] += 1
    assert same != content_of({"x": changed})


def test_arrays_are_told_apart_in_their_middle() -> None:
    x = np.zeros(3000)
    changed = x.copy()
    changed[1500] = 1
    assert content_of({"x": x}) == content_of({"x": x.copy()}) != content_of({"x": changed})
    assert content_of({"x": x}) != content_of({"x": x.astype(np.float32)})
    words, others = (np.array(["a", *["b"] * 3000, end], dtype=object) for end in "cd")
    assert content_of(words) == content_of(words.copy()) != content_of(others)


def test_positions_that_differ_in_the_middle_are_of_another_clean_run() -> None:
    """As text, both are the same: torch leaves out the middle of a long tensor."""
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", 2, seed=1, text=165)
    source = make_inputs("qwen2-vl", 2, seed=7, text=165)
    sweep = Sweep(
        inputs, {"slot": [1, 2, 3]}, lambda slot: Patch(slot, at=LastToken(), source=source)
    )
    length = inputs["input_ids"].shape[1]
    positions = torch.arange(length).repeat(3, 2, 1)
    moved = positions.clone()
    moved[..., length // 3 : length // 2] += 40
    assert repr(positions) == repr(moved)

    def scores(engine: str, given: torch.Tensor) -> Any:
        options: Any = {"dims": ("batch", "token"), "logits_to_keep": 1, "engine": engine}
        return sweep.run(model, lambda x: x[:, -1], position_ids=given, **options)

    with shared_runs(model):
        found = [scores("growing", given) for given in (positions, moved)]
    for one, given in zip(found, (positions, moved), strict=True):
        plain = scores("plain", given)
        assert abs(one - plain).max() <= 5e-6 * abs(plain).max()


@contextmanager
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Notes how many values each tensor has that is read whole."""
    found: list[int] = []
    true = fingerprints._hashed

    def note(x: torch.Tensor) -> str:
        found.append(x.numel())
        return true(x)

    with monkeypatch.context() as patched:
        patched.setattr(fingerprints, "_hashed", note)
        yield found


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_read_once_however_many_sweeps_share_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sweep = tiny(family), sweep_of(family)
    with shared_runs(model), hashed(monkeypatch) as found:
        first = run(model, sweep)
        found.clear()
        again = run(model, sweep)
    assert again.equals(first)
    # Small things that the model's forward makes anew, such as the sizes of images, are not known.
    assert sum(found) < sweep.inputs["pixel_values"].numel() / 100


def test_a_tensor_that_was_written_to_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3, 1000)
    numbers = x.numpy()
    with hashed(monkeypatch) as found:
        made = [content_of(x), content_of(x), content_of(x[1]), content_of(x[1])]
        assert found == [3000, 1000] and made[0] == made[1] and made[2] == made[3]
        x[1, 5] = 2
        made += [content_of(x), content_of(x[1])]
        assert len(found) == 4
        numbers[:] = 3  # gives the tensor no new version
        made += [content_of(x), content_of(x[1])]
        with torch.inference_mode():
            bare = torch.zeros(3, 1000)
        assert content_of(bare) == content_of(bare) == made[0]
    assert len(set(made)) == 6 and found[-2:] == [3000, 3000]


def test_runs_are_shared_on_meta_where_sweeps_are_planned() -> None:
    model = HookedVLM(build("llava").to("meta"))
    inputs = make_inputs("llava", 2)
    inputs["pixel_values"] = inputs["pixel_values"].to("meta")
    with shared_runs(model), torch.no_grad():
        # All of the model asks for values of tensors (is a mask full?), its encoder does not.
        path = model.anatomy.vision and model.anatomy.vision.path
        encoded = model.hf_model.get_submodule(str(path))(inputs["pixel_values"])
        assert encoded.last_hidden_state.is_meta
        made = [content_of(x) for x in (inputs, inputs, {**inputs})]
        assert made[0] == made[1] == made[2]
        other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        assert content_of(other) != made[0]  # nobody knows whether it holds the same

"""One model in several threads and tasks: hooks of one never act in another."""

import asyncio
import pickle  # noqa: TID251 - what a user does, on a model of our own
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.tiny_models import build, make_inputs, tiny
from hooked_vlm import Ablate, HookedVLM, Sweep
from hooked_vlm.errors import HookError


def in_threads(n: int, work: Callable[[int], None]) -> list[BaseException]:
    """Runs `work(i)` in n threads at once, and returns what they raised."""
    raised: list[BaseException] = []
    start = threading.Barrier(n)

    def run(i: int) -> None:
        start.wait()
        try:
            work(i)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            raised.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_d4_runs_in_threads_take_turns() -> None:
    model = tiny("llava")
    given = [make_inputs("llava", 1, seed=seed) for seed in range(3)]
    site = "blocks.1.hook_resid_post"
    with torch.no_grad():
        caches = [model.run_with_cache(inputs, site)[1][site] for inputs in given]
        clean = [model(inputs) for inputs in given]
        edit = (site, lambda x, hook: x * 0.5)
        edited = [model.run_with_hooks(inputs, [edit]) for inputs in given]
        swept = [sweep(inputs).run(model, lambda logits: logits[:, -1, 0]) for inputs in given]
    wrong: list[str] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found = model.run_with_cache(given[i], site)[1][site]
                wrong.extend([] if torch.allclose(found, caches[i]) else ["cache"])
                found = model.run_with_hooks(given[i], [edit])
                wrong.extend([] if torch.allclose(found, edited[i]) else ["hooks"])
                wrong.extend([] if torch.allclose(model(given[i]), clean[i]) else ["plain"])
            scores = sweep(given[i]).run(model, lambda logits: logits[:, -1, 0])
            wrong.extend([] if abs(scores - swept[i]).max() < 1e-5 else ["sweep"])

    assert in_threads(3, work) == []
    assert wrong == [] and not model.is_hooked


def sweep(inputs: Any) -> Sweep:
    return Sweep(inputs, {"slot": [0, 1, 2]}, make=lambda slot: Ablate(slot))


def test_d4_a_block_of_another_thread_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    hook = ("blocks.1.hook_resid_post", lambda x, hook: x * 0.5)

    def opened() -> None:
        with model.hooks([hook]):
            model(inputs)

    with model.hooks([hook]):
        expected = model(inputs)
        works: list[Any] = [
            lambda i: model(inputs),
            lambda i: model.hf_model(**inputs),
            lambda i: model.run_with_cache(inputs, "hook_embed"),
            lambda i: model.generate(inputs, max_new_tokens=1),
            lambda i: opened(),
        ]
        for work in works:
            (raised,) = in_threads(1, work)
            assert isinstance(raised, HookError) and "another thread" in str(raised)
        assert torch.equal(model(inputs), expected)
    assert not torch.equal(model(inputs), expected) and not model.is_hooked


def test_d4_a_block_of_another_task_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    hook = ("blocks.1.hook_resid_post", lambda x, hook: x * 0.5)
    clean = model(inputs)

    async def holds(opened: asyncio.Event, tried: asyncio.Event) -> bool:
        with model.hooks([hook]):
            opened.set()
            await tried.wait()
            return torch.equal(model(inputs), clean)

    async def tries(opened: asyncio.Event, tried: asyncio.Event) -> None:
        await opened.wait()
        with pytest.raises(HookError, match="asyncio task"):
            model(inputs)
        tried.set()

    async def main() -> bool:
        opened, tried = asyncio.Event(), asyncio.Event()
        same, _ = await asyncio.gather(holds(opened, tried), tries(opened, tried))
        return same

    assert asyncio.run(main()) is False
    assert torch.equal(model(inputs), clean)


def test_d4_a_block_of_a_task_that_is_done_is_still_ours() -> None:
    """A notebook runs each cell as a task; a block may be opened in one and used in the next."""
    model, inputs = tiny("llava"), make_inputs("llava")
    clean = model(inputs)
    block = model.hooks([("blocks.1.hook_resid_post", lambda x, hook: x * 0.5)])

    async def opens() -> None:
        block.__enter__()

    async def runs() -> torch.Tensor:
        return model(inputs)

    async def main() -> torch.Tensor:
        await asyncio.create_task(opens())
        return await asyncio.create_task(runs())

    edited = asyncio.run(main())
    block.__exit__(None, None, None)
    assert not torch.equal(edited, clean) and torch.equal(model(inputs), clean)


def test_e4_a_wrapped_model_can_be_pickled() -> None:
    model, inputs = HookedVLM(build("llava")), make_inputs("llava")
    # transformers itself leaves hooks that cannot be pickled once a forward pass has run.
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(inputs), model(inputs))
    site = "blocks.1.hook_resid_post"
    found = [m.run_with_cache(inputs, site)[1][site] for m in (model, twin)]
    assert torch.equal(*found)


def test_e4_a_shipped_model_can_be_pickled_with_its_processor() -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    picture = Image.new("RGB", (96, 64), "red")
    inputs = model.prepare(picture, "What is this?")
    twin = pickle.loads(pickle.dumps(model))
    again = twin.prepare(picture, "What is this?")
    assert torch.equal(again["pixel_values"], inputs["pixel_values"])
    assert torch.equal(twin(again), model(inputs)) and again.grids[0][0].shape == (4, 6)


def test_d4_nothing_is_measured_while_another_threads_block_is_open() -> None:
    """A measurement is without hooks, and the block's thread may run the wrapped model in it."""
    model, inputs = HookedVLM(build("llava")), make_inputs("llava")
    hook = ("blocks.1.hook_resid_post", lambda x, hook: x * 0.5)

    def measures(i: int) -> None:
        with model.without_hooks():
            pass

    with model.hooks([hook]):
        expected = model.hf_model(**inputs).logits
        (raised,) = in_threads(1, measures)
        assert isinstance(raised, HookError) and "another thread" in str(raised)
        assert torch.equal(model.hf_model(**inputs).logits, expected)
        with model.without_hooks():  # its own thread may
            assert not torch.equal(model.hf_model(**inputs).logits, expected)
        assert torch.equal(model.hf_model(**inputs).logits, expected)
    assert in_threads(1, measures) == []


def test_d4_a_grid_that_another_thread_could_not_measure_is_measured_later() -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    picture = Image.new("RGB", (96, 64), "red")

    def prepares(i: int) -> None:
        model.prepare(picture, "What is this?")

    with model.hooks([("hook_embed", lambda x, hook: x)]):
        (raised,) = in_threads(1, prepares)
        assert isinstance(raised, HookError)
    assert model.prepare(picture, "What is this?").grid.shape == (4, 6)

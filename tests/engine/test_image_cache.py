"""An image is encoded once, whatever batches it comes in, and what comes of it stays the same."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import HookedVLM, shared_runs
from hooked_vlm.engine import image_cache
from hooked_vlm.engine.image_cache import Kept, axes_of, encoding_once, joined
from hooked_vlm.engine.noise import BOUNDS
from hooked_vlm.engine.proofs import forget
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.hooks.stand_ins import encoder_of


PATCHES = 36


@contextmanager
def counted(model: HookedVLM) -> Iterator[list[int]]:
    """Notes how many images pass the encoder's first block, call by call.

    On the block's class: a hook on the block itself would be seen, and respected.
    """
    assert model.anatomy.vision is not None
    block = model.hf_model.get_submodule(model.anatomy.vision.blocks[0].path)
    found: list[int] = []
    own = type(block).forward

    def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self is block:
            found.append(hidden.shape[0] if hidden.ndim == 3 else hidden.shape[0] // PATCHES)
        return own(self, hidden, *args, **kwargs)

    type(block).forward = forward  # type: ignore[method-assign]
    try:
        yield found
    finally:
        type(block).forward = own  # type: ignore[method-assign]


def batch_of(family: str, *seeds: int) -> dict[str, Tensor]:
    """Inputs with one image for each seed, under the same prompts."""
    each = [make_inputs(family, seed=seed) for seed in seeds]
    together = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    ids = make_inputs(family, len(seeds))["input_ids"]
    return {**together, "input_ids": ids}


def fresh(family: str) -> HookedVLM:
    model = tiny(family)
    forget(model)
    return model


@torch.no_grad()
def logits(model: HookedVLM, inputs: Mapping[str, Any]) -> Tensor:
    return model(inputs)


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 5e-6 * other.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_image_is_encoded_once(family: str) -> None:
    model = fresh(family)
    batches = [batch_of(family, *seeds) for seeds in ((1, 2), (2, 1), (3, 1, 2), (1,))]
    plain = [logits(model, batch) for batch in batches]
    with shared_runs(model), counted(model) as images:
        shared = [logits(model, batch) for batch in batches]
        assert sorted(images) == [1, 1, 1, 2]  # the first batch is tried out whole
        images.clear()
        again = [logits(model, batch) for batch in batches]
        assert not images
    for one, two, three in zip(plain, shared, again, strict=True):
        assert near(two, one) and torch.equal(two, three)
    assert torch.equal(logits(model, batches[0]), plain[0])
    assert "forward" not in vars(encoder_of(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_is_there_twice_is_encoded_once(family: str) -> None:
    """Also where no batch of different images has come before."""
    model, batch = fresh(family), batch_of(family, 1, 1)
    plain = logits(model, batch)
    with encoding_once(model, Kept(), repeated_only=True):
        assert near(logits(model, batch), plain)
    with encoding_once(model, Kept(), repeated_only=True), counted(model) as images:
        found = logits(model, batch)
    assert images == [1]
    assert near(found, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_came_before_does_not_show(family: str) -> None:
    model = fresh(family)
    wanted = batch_of(family, 1, 2, 3)
    with shared_runs(model):
        at_once = logits(model, wanted)
    with shared_runs(model):
        for seeds in ((3, 4), (5, 2)):
            logits(model, batch_of(family, *seeds))
        assert torch.equal(logits(model, wanted), at_once)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model = HookedVLM(deepcopy(tiny(family).hf_model).to(dtype))
    inputs = batch_of(family, 1, 2)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    plain = logits(model, inputs)
    with shared_runs(model) as runs:
        for _ in range(2):
            shared = logits(model, inputs)
        assert runs.reused >= 4
    assert bool((shared - plain).abs().max() <= BOUNDS[dtype] * plain.abs().max())


def test_images_of_several_sizes() -> None:
    model = fresh("qwen2-vl")
    grid = torch.tensor([[1, 6, 6], [1, 4, 8]])
    ids = torch.randint(2, 290, (1, 40), generator=torch.Generator().manual_seed(0))
    ids[0, 3:12], ids[0, 15:23] = 300, 300
    one = make_inputs("qwen2-vl")
    image_token = one["input_ids"][0, 3]
    ids[ids == 300] = image_token
    pixels = torch.randn(36 + 32, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(1))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == image_token).int(),
    }
    plain = logits(model, inputs)
    with shared_runs(model) as runs:
        assert near(logits(model, inputs), plain)
        before = runs.reused
        assert near(logits(model, inputs), plain)
        assert runs.reused == before + 2


def test_images_that_see_each_other_are_encoded_together() -> None:
    model = HookedVLM(deepcopy(tiny("llava").hf_model))
    encoder: Any = encoder_of(model)
    own = encoder.forward

    def mixed(*args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        mean = made.hidden_states[-2].mean(0, keepdim=True)
        made.hidden_states = (*made.hidden_states[:-2], made.hidden_states[-2] - mean, mean)
        return made

    encoder.forward = mixed
    batches = [batch_of("llava", *seeds) for seeds in ((1, 2), (1, 3), (1, 2))]
    plain = [logits(model, batch) for batch in batches]
    with shared_runs(model) as runs:
        shared = [logits(model, batch) for batch in batches]
        assert runs.reused > 0  # the third batch is the first one
    assert all(map(torch.equal, shared, plain))
    assert vars(encoder)["forward"] is mixed


def test_an_encoder_that_takes_no_single_image_gets_the_batch() -> None:
    model = HookedVLM(deepcopy(tiny("gemma-3").hf_model))
    encoder: Any = encoder_of(model)
    own = encoder.forward

    def two_at_least(*args: Any, **kwargs: Any) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        if len(pixels) < 2:
            raise ValueError("two images at least")
        return own(*args, **kwargs)

    encoder.forward = two_at_least
    inputs = batch_of("gemma-3", 1, 2)
    plain = logits(model, inputs)
    with shared_runs(model) as runs:
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(logits(model, inputs), plain)
        assert runs.reused == 1
        with pytest.raises(ValueError, match="two images at least"):
            logits(model, batch_of("gemma-3", 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_attached_inside_an_encoder_sees_every_pass(family: str) -> None:
    model = fresh(family)
    inputs = batch_of(family, 1, 2)
    plain = logits(model, inputs)
    assert model.anatomy.vision is not None
    block = model.hf_model.get_submodule(model.anatomy.vision.blocks[1].path)
    calls: list[None] = []
    with shared_runs(model), torch.no_grad():
        logits(model, inputs)
        handle = block.register_forward_hook(lambda *_: calls.append(None))
        assert torch.equal(logits(model, inputs), plain)
        handle.remove()
        assert len(calls) == 1
        site = "vision_encoder.blocks.0.hook_resid_post"
        changed = model.run_with_hooks(inputs, [(site, lambda x, hook: x * 0)])
        assert not near(changed, plain)
        _, cache = model.run_with_cache(inputs, [site])
        assert site in cache
        assert near(logits(model, inputs), plain)
    with model.hooks([("hook_merged_embed", lambda x, hook: x * 2)]):
        doubled = logits(model, inputs)
        with shared_runs(model) as runs:
            logits(model, inputs)
            assert near(logits(model, inputs), doubled)
            assert runs.reused == 2


def test_gradients_reach_pixels() -> None:
    model = fresh("llava")
    inputs = batch_of("llava", 1, 2)
    with shared_runs(model):
        logits(model, inputs)
        pixels = inputs["pixel_values"].clone().requires_grad_()
        model({**inputs, "pixel_values": pixels})[:, -1].sum().backward()
    assert pixels.grad is not None and bool(pixels.grad.abs().sum() > 0)


def test_a_failed_pass_leaves_the_encoder_as_it_was() -> None:
    model = fresh("gemma-3")
    with pytest.raises(KeyError), shared_runs(model):
        logits(model, batch_of("gemma-3", 1, 2))
        raise KeyError
    assert "forward" not in vars(encoder_of(model))


@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    axis=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_outputs_are_put_together_along_the_axis_of_images(
    sizes: list[int], axis: int, seed: int
) -> None:
    dice = torch.Generator().manual_seed(seed)
    shape = [4, 5, 6]
    parts = []
    for size in sizes:
        shape[axis] = size
        parts.append({"x": [torch.randn(*shape, generator=dice)], "n": 7, "none": None})
    whole = {"x": [torch.cat([part["x"][0] for part in parts], axis)], "n": 7, "none": None}
    axes = axes_of(whole, parts)
    assert axes is not None
    made = joined(parts, axes)
    assert torch.equal(made["x"][0], whole["x"][0]) and made["n"] == 7 and made["none"] is None
    whole["x"][0].select(axis, 0).add_(1.0)
    assert axes_of(whole, parts) is None
    assert axes_of({**whole, "n": 8}, parts) is None
    assert axes_of(whole["x"], parts) is None


def test_a_mistake_of_ours_turns_encoding_once_off_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = fresh("llava"), batch_of("llava", 1, 2)
    plain = logits(model, batch)
    monkeypatch.setattr(image_cache, "axes_of", lambda: None)  # takes no argument
    with shared_runs(model):
        with pytest.warns(HookedVLMWarning, match="images.*TypeError.*a mistake in hooked_vlm"):
            found = logits(model, batch)
        assert near(found, plain) and near(logits(model, batch), plain)
    forget(model)

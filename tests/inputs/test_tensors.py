"""Inputs that no model can run end in an error of ours, at every way in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.tiny_encoders import encoder, pictures
from helpers.tiny_models import make_inputs, tiny
from hooked_vlm import Ablate, LastToken, Patch, Sweep
from hooked_vlm.errors import HookError, InterventionError
from hooked_vlm.interventions.recording import record
from hooked_vlm.interventions.steer import Steer


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "model": lambda m, i: m(i),
    "run_with_hooks": lambda m, i: m.run_with_hooks(i, [Ablate(1, at=LastToken())]),
    "run_with_cache": lambda m, i: m.run_with_cache(i),
    "generate": lambda m, i: m.generate(i, max_new_tokens=1),
    "grids": lambda m, i: m.grids(i),
    "hooks": lambda m, i: m.hooks([Ablate(1)], inputs=i).__enter__(),
    "check": lambda m, i: Ablate(1).check(m, i),
    "record": lambda m, i: record(m, i, ["hook_embed"]),
    "source": lambda m, i: Patch(1, source=i).check(m, make_inputs("llava")),
    "sweep": lambda m, i: Sweep(i, {"slot": [0, 1]}, lambda slot: Ablate(slot)).plan(m),
}


def changed(name: str, change: Callable[[Tensor], Any]) -> dict[str, Any]:
    inputs = make_inputs("llava")
    return {**inputs, name: change(inputs[name])}


CASES: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "no prompt": ("input_ids", lambda x: x[:0], "expected token ids"),
    "no token": ("input_ids", lambda x: x[:, :0], "expected token ids"),
    "one axis": ("input_ids", lambda x: x[0], "expected token ids"),
    "three axes": ("input_ids", lambda x: x[None], "expected token ids"),
    "a scalar": ("input_ids", lambda x: x[0, 0], "expected token ids"),
    "floats": ("input_ids", lambda x: x.double(), "is a tensor of float64"),
    "complex ids": ("input_ids", lambda x: x.to(torch.complex64), "is a tensor of complex64"),
    "bools": ("input_ids", lambda x: x.bool(), "is a tensor of bool"),
    "no word": ("input_ids", lambda x: torch.full_like(x, 10**6), "holds 1000000, which is no"),
    "a negative token": ("input_ids", lambda x: -x, "which is no token: the model embeds 0 to 299"),
    "an array": ("input_ids", lambda x: x.numpy(), "expected a tensor"),
    "a list": ("input_ids", lambda x: x.tolist(), "expected a tensor"),
    "sparse ids": ("input_ids", lambda x: x.to_sparse(), "is sparse"),
    "ids on meta": ("input_ids", lambda x: x.to("meta"), "on the meta device"),
    "a mask of two": ("attention_mask", lambda x: x.repeat(2, 1), "there is 1 prompt of"),
    "a short mask": ("attention_mask", lambda x: x[:, :-1], r"of shape \(1, 44\)"),
    "a mask without prompts": ("attention_mask", lambda x: x[0], r"of shape \(45,\)"),
    "a mask of three axes": ("attention_mask", lambda x: x[None], r"of shape \(1, 1, 45\)"),
    "integers by key": ("attention_mask", lambda x: x[None, None], "int64 of shape"),
    "a mask of complex": ("attention_mask", lambda x: x.to(torch.complex64), "complex64"),
    "a mask as array": ("attention_mask", lambda x: x.numpy(), "expected a tensor"),
    "a mask as list": ("attention_mask", lambda x: x.tolist(), "expected a tensor"),
    "no masks": ("attention_mask", lambda x: {}, "expected a tensor"),
    "masks that are none": ("attention_mask", lambda x: {"full": 3}, "expected a tensor"),
    "a sparse mask": ("attention_mask", lambda x: x.to_sparse(), "is sparse"),
    "no image": ("pixel_values", lambda x: x[:0], "holds no image"),
    "pixels as a list": ("pixel_values", lambda x: x.tolist(), "expected a tensor"),
    "pixels as an array": ("pixel_values", lambda x: x.numpy(), "expected a tensor"),
    "a pixel": ("pixel_values", lambda x: x[0, 0, 0, 0], "holds no image"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_i4_tensors_that_no_model_runs_are_refused_before_the_run(way: str, case: str) -> None:
    name, change, says = CASES[case]
    with pytest.raises(HookError, match=says) as caught:
        WAYS[way](tiny("llava"), changed(name, change))
    assert name in str(caught.value) and len(str(caught.value)) <= 400


@pytest.mark.parametrize("way", ["model", "run_with_cache", "generate"])
def test_i4_a_mask_of_more_positions_needs_a_cache(way: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    shorter = {**inputs, "input_ids": inputs["input_ids"][:, :-1]}
    with pytest.raises(HookError, match=r"and there is 1 prompt of 44 positions"):
        WAYS[way](model, shorter)
    cache = model.hf_model(**inputs, use_cache=True).past_key_values
    more = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 46).long()}
    assert model({**more, "past_key_values": cache}).isfinite().all()


def test_i4_what_models_run_is_let_through() -> None:
    """Masks by key, of one row for all, or none; placeholders outside the vocabulary."""
    model, inputs = tiny("llava"), make_inputs("llava", 2)
    expected, n = model(inputs), inputs["input_ids"].shape[1]
    causal = torch.ones(n, n).tril().bool().expand(2, 1, n, n)
    for mask in (None, causal, torch.ones(1, n).long(), torch.ones(2, n), torch.ones(2, n).bool()):
        torch.testing.assert_close(model({**inputs, "attention_mask": mask}), expected)
    ids = inputs["input_ids"]
    assert torch.equal(model({**inputs, "input_ids": ids.int()}), expected)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:0], lambda x: x.tolist(), lambda x: x[0, 0, 0, 0], lambda x: x.numpy()],
)
def test_i4_an_encoders_pixels_too(change: Callable[[Tensor], Any]) -> None:
    model = encoder("vit")
    inputs = dict(model.prepare(pictures(1)))
    wrong = {**inputs, "pixel_values": change(inputs["pixel_values"])}
    for run in (model, model.run_with_hooks, model.run_with_cache, model.grids):
        with pytest.raises(HookError, match="pixel_values"):
            run(wrong)


@pytest.mark.parametrize("change", [lambda x: x.to_sparse(), lambda x: x.to("meta")])
def test_i4_what_is_written_has_values(change: Callable[[Tensor], Tensor]) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    given = change(torch.ones(48))
    for made in (lambda: Ablate(1, to=given), lambda: Steer(1, directions=given, alpha=1.0)):
        with pytest.raises(InterventionError, match=r"sparse|meta device"):
            made().check(model, inputs)


@pytest.mark.parametrize("axes", [{None: [0, 1]}, {"slot": np.array(3)}, {"slot": torch.tensor(1)}])
def test_i4_axes_of_a_sweep_have_names_and_values(axes: Any) -> None:
    sweep = Sweep(make_inputs("llava"), {"slot": [0, 1]}, lambda **_: None)
    object.__setattr__(sweep, "axes", axes)  # past the checks of types, which only tests have
    with pytest.raises(InterventionError, match="needs named axes with values"):
        sweep.plan(tiny("llava"))

"""Ordinary things that once gave a wrong number, or an error that did not help, without a word."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.prepared_models import prepared
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import Ablate, HookAt, HookedVLM, Region
from hooked_vlm.errors import DataError, HookError, InterventionError
from hooked_vlm.inputs.prepare import to_pil


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")


@pytest.mark.parametrize("family", FAMILIES)
def test_b2_the_encoders_calls_are_counted_anew_in_a_generation(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    side = 6 if family == "llava" else 3
    edit = Ablate("vision_projector.hook_out", at=Region.column_band((side, side), 0, 1))
    options: Any = {"max_new_tokens": 1, "do_sample": False}
    options["suppress_tokens"] = [model.cfg.image_token_id]
    model.run_with_hooks(inputs, [edit])
    for _ in range(2):
        model.generate(inputs, fwd_hooks=[edit], **options)
    with model.hooks([edit], inputs=inputs):
        model(inputs)
        model.generate(inputs, **options)
        model(inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["hook_rot_k", "hook_v"])
def test_b3_edits_in_place_of_cached_keys_and_values_do_not_compound(
    family: str, site: str
) -> None:
    model, inputs = tiny(family), make_inputs(family)

    def in_place(x: torch.Tensor, hook: Any) -> None:
        x[:, :8] *= 0.5

    def by_copy(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        x[:, :8] *= 0.5
        return x

    def logits(fn: Any) -> Any:
        with model.hooks([(f"blocks.*.attn.{site}", fn)]):
            return model.hf_model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=4,
                do_sample=False,
                suppress_tokens=[model.cfg.image_token_id],
                output_logits=True,
                return_dict_in_generate=True,
            ).logits

    for one, other in zip(logits(in_place), logits(by_copy), strict=True):
        torch.testing.assert_close(one, other)


def test_c2_pictures_of_more_than_eight_bits() -> None:
    deep = np.full((4, 4), 30000, dtype=np.uint16)
    assert np.asarray(to_pil(Image.fromarray(deep)))[0, 0].tolist() == [117] * 3
    assert np.asarray(to_pil(Image.fromarray(deep.astype(np.int32))))[0, 0].tolist() == [117] * 3
    halves = Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32))
    assert np.asarray(to_pil(halves))[0, 0].tolist() == [128] * 3
    with pytest.raises(DataError, match="mode I with values up to 200"):
        to_pil(Image.fromarray(np.full((4, 4), 200, dtype=np.int32)))


def test_d5_each_block_closes_its_own() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")

    def embedded() -> torch.Tensor:
        return model.run_with_cache(inputs, "hook_embed")[1]["hook_embed"]

    clean = embedded()
    one = model.hooks([("hook_embed", lambda x, hook: x + 1)])
    other = model.hooks([("hook_embed", lambda x, hook: x * 2)])
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    torch.testing.assert_close(embedded(), clean * 2)
    other.__exit__(None, None, None)
    assert torch.equal(embedded(), clean) and not model.is_hooked


@pytest.mark.parametrize("family", FAMILIES)
def test_e1_what_a_function_is_shown_flows_on(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    names = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_rot_q", "hook_rot_k")
    sites = [f"blocks.1.attn.{name}" for name in names]
    sites += ["vision_projector.hook_out", "vision_encoder.blocks.0.hook_resid_post"]
    plain = model(inputs)
    for site in sites:
        shown: list[torch.Tensor] = []

        def watch(x: torch.Tensor, hook: Any, shown: list[torch.Tensor] = shown) -> None:
            x.retain_grad()
            shown.append(x)

        logits = model.run_with_hooks(inputs, [(site, watch)])
        assert torch.equal(logits, plain)
        logits[0, -1].max().backward()
        assert shown[0].grad is not None and bool(shown[0].grad.any()), site


@pytest.mark.parametrize("family", FAMILIES)
def test_e2_cached_activations_are_independent(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    names = ["blocks.*.hook_resid_*", "*hook_logits", "*hook_out", "*hook_in", "*.hook_q"]
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names)
        _, kept = model.run_with_cache(inputs, names)
    logits.zero_()
    for name in cache:
        assert torch.equal(cache[name], kept[name]), name
        cache[name].zero_()


def test_e4_a_hooked_model_can_be_copied() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with model.hooks([("blocks.1.attn.hook_pattern", lambda x, hook: None)]):
        twin = copy.deepcopy(model.hf_model)
    plain = HookedVLM(twin)(inputs)
    torch.testing.assert_close(plain, model(inputs))


@pytest.mark.parametrize("given", ["hi", torch.zeros(1, 3, dtype=torch.int64)])
def test_f_inputs_that_are_none(given: Any) -> None:
    # What every function that runs a model asks first (here their types are checked before).
    with pytest.raises(HookError, match="expected what prepare returns") as caught:
        tiny("llava").require_call(given, ())
    assert len(str(caught.value)) <= 400


def no_hook(x: torch.Tensor) -> None: ...
def another_name(x: torch.Tensor, point: Any) -> None: ...
def one_more(x: torch.Tensor, hook: Any, layer: int) -> None: ...


@pytest.mark.parametrize("fn", [no_hook, another_name, one_more, partial(one_more, hook=1)])
def test_f_a_function_that_cannot_be_called_is_refused_before_the_run(fn: Any) -> None:
    model, inputs, site = tiny("llava"), make_inputs("llava"), "blocks.0.hook_resid_post"
    with pytest.raises(HookError, match=r"it is called as \w+\(activation, hook=hook\)"):
        model.run_with_hooks(inputs, [(site, fn)])
    with pytest.raises(HookError, match="it is called as"), model.hooks([("blocks.*", fn)]):
        pass
    with pytest.raises(InterventionError, match="it is called as"):
        HookAt(site, fn).check(model, inputs)
    for good in (partial(one_more, layer=1), lambda x, **_: None, lambda *_, **__: None):
        assert torch.equal(model.run_with_hooks(inputs, [(site, good)]), model(inputs))


def test_f_an_output_without_logits() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with pytest.raises(HookError, match=r"returned a tuple, .* Leave out return_dict"):
        model(inputs, return_dict=False)
    with pytest.raises(HookError, match=r"returned a tuple, .* Leave out return_dict"):
        model.run_with_cache(inputs, "hook_embed", return_dict=False)


def test_f_a_processors_own_refusal_of_a_value() -> None:
    model = prepared("qwen2_vl")
    picture = Image.new("RGB", (56, 56))
    with pytest.raises(DataError, match=r"refuses these inputs: .*image_mean.* any type"):
        model.prepare(picture, "a", image_mean=[0, 0, 0])

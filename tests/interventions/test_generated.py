"""Interventions on generated tokens: the same answers however an answer is generated."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import suite
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.errors import HookedVLMError, HookedVLMWarning, InterventionError, RegionError
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.generated import Generated
from hooked_vlm.regions.positions import LastToken, Positions
from hooked_vlm.sweeps.sweep import Sweep


SITE = "blocks.1.hook_resid_post"
D = 48


def direction(width: int = D) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


def answers(model: HookedVLM, inputs: Any, hooks: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "output_logits": True}
    given["suppress_tokens"] = [297, 298, 299, model.cfg.image_token_id]
    given["suppress_tokens"] = [t for t in given["suppress_tokens"] if t < model.cfg.d_vocab]
    return model.generate(
        inputs, fwd_hooks=hooks, return_dict_in_generate=True, **{**given, **options}
    )


def same(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    assert torch.equal(one.sequences, other.sequences)
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def by_hand(fn: Any, first: int, last: int, length: int) -> Any:
    """Returns a hook function that edits the new tokens number `first` to `last`."""

    def edit(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        for i, position in enumerate(hook.positions):
            if first <= position - length <= last:
                x[:, i] = fn(x[:, i])
        return x

    return edit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_it_is_what_a_hook_function_does_there(family: str, use_cache: bool) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    length, vector = inputs["input_ids"].shape[1], direction()
    source = make_inputs(family, batch=2, seed=5)
    taken = record(model, source, [SITE]).cache[SITE][:, -1]
    clean = answers(model, inputs, [], use_cache=use_cache)
    for intervention, fn, (first, last) in (
        (
            Steer(SITE, at=Generated(), directions=vector, alpha=3.0),
            lambda x: x + 3 * vector,
            (0, 9),
        ),
        (
            Steer(SITE, at=Generated(1, 2), directions=vector, alpha=3.0),
            lambda x: x + 3 * vector,
            (1, 2),
        ),
        (Ablate(SITE, at=Generated(2)), lambda x: 0 * x, (2, 9)),
        (Ablate(SITE, at=Generated(), to=vector), lambda x: vector.expand_as(x), (0, 9)),
        (
            Ablate(SITE, at=Generated(), to="mean", reference=source, reference_at=LastToken()),
            lambda x: taken.mean(0).expand_as(x),
            (0, 9),
        ),
        (
            Patch(SITE, at=Generated(), source=source, source_at=LastToken()),
            lambda x: taken,
            (0, 9),
        ),
    ):
        found = answers(model, inputs, [intervention], use_cache=use_cache)
        hook = by_hand(fn, first, last, length)
        same(found, answers(model, inputs, [(SITE, hook)], use_cache=use_cache))
        torch.testing.assert_close(found.logits[0], clean.logits[0])  # of the prompt alone
        assert not torch.allclose(found.logits[first + 1], clean.logits[first + 1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "leaf", ["hook_resid_post", "hook_resid_mid", "attn.hook_rot_k", "attn.hook_v", "attn.hook_z"]
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_key_value_cache_changes_nothing(family: str, leaf: str, options: dict[str, Any]) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    site = f"blocks.1.{leaf}"
    places = (Generated(), LastToken() | Generated(0, 1))
    for at in places:
        hooks = [Chain(Ablate(site, at=at), Ablate(site, at=Positions((3,))))]
        one, other = (answers(model, inputs, hooks, use_cache=c, **options) for c in (True, False))
        same(one, other)


def test_beams_and_samples_are_edited_alike() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", batch=2)
    source = make_inputs("qwen2-vl", batch=2, seed=5)
    patch = Patch(SITE, at=Generated(), source=source, source_at=LastToken())
    for use_cache in (True, False):
        torch.manual_seed(0)
        found = answers(
            model,
            inputs,
            [patch],
            use_cache=use_cache,
            do_sample=True,
            temperature=3.0,
            num_return_sequences=3,
        )
        # Each row is what its own prompt gives alone with the same tokens.
        _, cache = model.generate_with_cache(
            inputs,
            SITE,
            fwd_hooks=[patch],
            num_return_sequences=3,
            do_sample=True,
            max_new_tokens=3,
        )
        taken = record(model, source, [SITE]).cache[SITE][:, -1]
        new = cache[SITE][:, inputs["input_ids"].shape[1] :]
        assert len(new) == 6 and len(found.sequences) == 6
        torch.testing.assert_close(new, taken.repeat_interleave(3, 0)[:, None].expand_as(new))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["qwen3_vl", "mllama"])
def test_more_architectures(model_type: str) -> None:
    model = suite.build(model_type)
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    steer = Steer(
        SITE, at=LastToken() | Generated(), directions=direction(model.cfg.d_model), alpha=2.0
    )
    one, other = (answers(model, inputs, [steer], use_cache=c) for c in (True, False))
    same(one, other, 1e-3)
    clean = answers(model, inputs, [])
    assert not torch.allclose(one.logits[0], clean.logits[0])


def test_under_hooks_and_with_padding_the_result_is_the_same() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=2)
    for name, value in (("input_ids", 0), ("attention_mask", 0)):  # one prompt padded on the left
        padded = torch.full((2, 3), value)
        inputs[name] = torch.cat([padded, inputs[name]], dim=1)
    steer = Steer(SITE, at=Generated(1), directions=direction(), alpha=2.0)
    expected = answers(model, inputs, [steer])
    with model.hooks([steer], inputs=inputs):
        same(answers(model, inputs, []), expected)
        same(answers(model, inputs, [], use_cache=False), expected)
    # `prefill_only` is for functions; a place says itself where it is.
    same(answers(model, inputs, [steer], prefill_only=True), expected)
    same(answers(model, inputs, [steer], prefill_only=True, use_cache=False), expected)


def test_other_inputs_are_an_error() -> None:
    model = tiny("llava")
    inputs, other = make_inputs("llava"), make_inputs("llava", seed=3)
    steer = Steer(SITE, at=Generated(), directions=direction(), alpha=2.0)
    with (
        pytest.raises(InterventionError, match="other ones"),
        model.hooks([steer], inputs=inputs),
    ):
        answers(model, other, [])


def test_runs_that_generate_nothing_are_an_error() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    steer = Steer(SITE, at=LastToken() | Generated(), directions=direction(), alpha=2.0)
    residual = torch.zeros(1, inputs["input_ids"].shape[1], D)
    sweep = Sweep(inputs, {"slot": [0, 1]}, lambda slot: Ablate(slot, at=Generated()))
    for run in (
        lambda: model.run_with_hooks(inputs, [steer]),
        lambda: model.run_with_cache(inputs, SITE, fwd_hooks=[Chain(steer)]),
        lambda: model.run_from_layer(inputs, residual, 1, [steer]),
        lambda: model.run_from_layer(inputs, residual, 0, [Ablate("hook_embed", at=Generated())]),
        lambda: sweep.run(model, lambda logits: logits[:, -1, 0]),
        lambda: sweep.attribution(model, lambda logits: logits[:, -1, 0]),
    ):
        with pytest.raises(InterventionError, match="this run generates nothing") as caught:
            run()
        assert len(str(caught.value)) <= 400
    for run in (
        lambda: model.generate(inputs, fwd_hooks=[steer], max_new_tokens=1),
        lambda: model.generate(
            inputs, fwd_hooks=[Ablate(SITE, at=Generated(4))], max_new_tokens=4, do_sample=False
        ),
    ):
        with pytest.warns(HookedVLMWarning, match="did not act"):
            run()
    with pytest.warns(HookedVLMWarning, match="did not act"), model.hooks([steer], inputs=inputs):
        model(inputs)


def test_places_that_are_none() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    source = make_inputs("llava", seed=2)
    for intervention, said in (
        (Patch(SITE, at=Generated(), source=source), "source_at"),
        (Patch(SITE, at=LastToken() | Generated(), source=source, source_at=LastToken()), "own"),
        (Patch(SITE, at=Generated(), source=source, source_at=Positions((0, 1))), "one position"),
        (Ablate(SITE, at=Generated(), to="mean", reference=source), "reference_at"),
        (Ablate("vision_projector.hook_out", at=Generated()), "no part of an image"),
    ):
        with pytest.raises(HookedVLMError, match=said):
            answers(model, inputs, [intervention])
    with pytest.raises(RegionError, match="names no token"):
        Generated(3, 1)
    with pytest.raises(RegionError):
        Generated(-1)
    assert str(LastToken() | Generated(1)) == "last token | generated tokens from 1 on"


def test_a_source_that_is_not_recorded_runs_once() -> None:
    model = HookedVLM(build("llava"))
    inputs, source = make_inputs("llava"), make_inputs("llava", seed=2)
    ran: list[int] = []
    model.hf_model.register_forward_pre_hook(lambda *_: ran.append(1))
    answers(model, inputs, [Patch(SITE, at=Generated(), source=source, source_at=LastToken())])
    assert len(ran) == 5 + 1

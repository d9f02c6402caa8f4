"""Gradients at sites: bwd_hooks and incl_bwd, against plain torch on the transformers model."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from conformance import suite
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.checks.backward import check_backward
from hooked_vlm.errors import HookedVLMWarning, HookError
from hooked_vlm.hooks.patch_order import listed
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.recording import record
from hooked_vlm.model.encoder import HookedVisionEncoder
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.sweeps.integrated import integrated_gradients
from hooked_vlm.sweeps.pixels import pixel_attribution
from hooked_vlm.sweeps.sweep import Sweep


MORE = ("qwen3_vl", "mllama")


@cache
def prepared(family: str) -> tuple[HookedVLM, Any]:
    if family in FAMILIES:
        return tiny(family), make_inputs(family, batch=2)
    model = suite.build(family)
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    return model, inputs


def score(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 7].square()).sum()


def by_hand(model: HookedVLM, inputs: Any, name: str) -> Tensor:
    """Returns the gradient at a site by torch's own hooks on the module that carries it."""
    site, kept = model.sites[name], []

    def keep(value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        tensor.retain_grad()
        kept.append(tensor)

    module = model.hf_model.get_submodule(site.module)
    handle = (
        module.register_forward_hook(lambda _, args, output: keep(output))
        if site.tap == "output"
        else module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    )
    try:
        score(model.hf_model(**inputs).logits).backward()
    finally:
        handle.remove()
        model.hf_model.zero_grad(set_to_none=True)
    return kept[0].grad


SITES = ("resid_pre", "resid_mid", "resid_post", "q", "z", "attn_out", "mlp_out", "post")


@pytest.mark.filterwarnings("ignore")  # of pictures that a processor resizes
@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_they_are_those_of_torchs_own_hooks(family: str) -> None:
    model, inputs = prepared(family)
    names = [f"blocks.{layer}.*hook_{site}" for layer in (0, 2) for site in SITES]
    names = [n for n in names if any(_like(n, name) for name in model.sites)]
    _, cached = model.run_with_cache(inputs, names, incl_bwd=True, metric=score)
    gradients: dict[str, Tensor] = {}
    see = [(n, lambda g, hook: gradients.update({hook.name: g})) for n in names]
    score(model.run_with_hooks(inputs, bwd_hooks=see, use_cache=False)).backward()
    model.hf_model.zero_grad(set_to_none=True)
    compared = [name for name in cached if not name.endswith("_grad") and "cross" not in name]
    assert len(compared) >= 12
    for name in compared:
        expected = by_hand(model, inputs, name).reshape(cached[name].shape)
        assert expected.abs().max() > 0
        torch.testing.assert_close(cached[f"{name}_grad"], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)


def _like(pattern: str, name: str) -> bool:
    before, after = pattern.split("*")
    return name.startswith(before) and name.endswith(after)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family",
    [
        *FAMILIES,
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in (*MORE, "qwen2_5_vl", "gemma3n", "llama4")
        ),
    ],
)
def test_the_law_holds(family: str) -> None:
    found = check_backward(*prepared(family))
    assert found.verdict == "yes", found.note


def test_names_and_layers_of_the_cache() -> None:
    model, inputs = prepared("llava")
    _, cached = model.run_with_cache(
        inputs,
        ["blocks.*.hook_resid*", "blocks.*.hook_q", "vision_projector.hook_out"],
        incl_bwd=True,
        metric=score,
    )
    full = cached["blocks.1.hook_resid_post_grad"]
    for key in (("resid_post_grad", 1), ("resid_post_grad", -2), "blocks.1.hook_out_grad"):
        assert cached[key] is full
    assert cached["q_grad", 1] is cached["blocks.1.attn.q.hook_out_grad"]
    assert cached["q_grad", 1].shape == cached["q", 1].shape
    assert cached.stack("resid_post_grad").shape[0] == model.cfg.n_layers
    assert cached["out_grad", None, "projector"].abs().max() > 0


def parameter_gradient(model: HookedVLM, run: Callable[[], Tensor]) -> Tensor:
    model.hf_model.zero_grad(set_to_none=True)
    score(run()).backward()
    block = model.hf_model.get_submodule(model.anatomy.lm.blocks[0].path)
    found = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
    model.hf_model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("leaf", ["hook_resid_post", "hook_resid_mid"])
def test_a_returned_tensor_takes_the_gradients_place(family: str, leaf: str) -> None:
    model, inputs = prepared(family)
    site = f"blocks.1.{leaf}"
    plain = parameter_gradient(model, lambda: model(inputs))

    def in_place(gradient: Tensor, hook: Any) -> None:
        gradient *= 3

    for fn, factor in (
        (lambda g, hook: 2 * g, 2),
        (lambda g, hook: (2 * g,), 2),  # as TransformerLens's functions may
        (lambda g, hook: None, 1),
        (in_place, 3),
    ):
        found = parameter_gradient(
            model, lambda fn=fn: model.run_with_hooks(inputs, bwd_hooks=[(site, fn)])
        )
        torch.testing.assert_close(found, factor * plain, rtol=1e-4, atol=1e-5)
    with model.hooks(bwd_hooks=[(site, lambda g, hook: 0 * g)]):
        assert parameter_gradient(model, lambda: model(inputs)).abs().max() == 0


def test_the_gradient_is_that_after_all_forward_functions() -> None:
    model, inputs = prepared("llava")
    site, seen = "blocks.1.hook_resid_post", []
    double = (site, lambda x, hook: 2 * x)
    _, plain = model.run_with_cache(
        inputs, [site, "hook_embed"], incl_bwd=True, metric=score, fwd_hooks=[double]
    )
    for fwd, bwd in (([double], []), ([], [double])):
        with model.hooks(fwd, bwd_hooks=[(site, lambda g, hook: seen.append(g))]):
            run = model.run_with_hooks(inputs, bwd) if bwd else model(inputs)
            score(run).backward()
    model.hf_model.zero_grad(set_to_none=True)
    assert len(seen) == 2
    for gradient in seen:
        torch.testing.assert_close(gradient, plain[f"{site}_grad"])


def test_functions_at_one_site_act_in_order_the_outer_first() -> None:
    model, inputs = prepared("llava")
    site, order = "blocks.0.hook_resid_post", []
    with model.hooks(bwd_hooks=[(site, lambda g, hook: order.append("outer"))]):
        hooks = [(site, lambda g, hook, i=i: order.append(i)) for i in (1, 2)]
        score(model.run_with_hooks(inputs, bwd_hooks=hooks)).backward()
    model.hf_model.zero_grad(set_to_none=True)
    assert order == ["outer", 1, 2]


def test_images_of_different_sizes_are_listed() -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    pictures = [suite.picture(96, 64), suite.picture(64, 64, seed=1)]
    inputs = model.prepare(pictures, ["What is this?", "What?"])
    site, shapes = "vision_encoder.blocks.0.hook_resid_post", []

    def half(gradient: list[Tensor], hook: Any) -> list[Tensor]:
        shapes.append([g.shape for g in gradient])
        return [g / 2 for g in gradient]

    names = [site, "vision_encoder.blocks.0.hook_resid_pre"]
    _, plain = model.run_with_cache(inputs, names, incl_bwd=True, metric=score)
    with model.hooks(bwd_hooks=[(site, half)]):
        _, halved = model.run_with_cache(inputs, names, incl_bwd=True, metric=score)
    assert shapes == [[g.shape for g in plain[site]]]
    for name in names:
        for found, full in zip(
            listed(halved[f"{name}_grad"]), listed(plain[f"{name}_grad"]), strict=True
        ):
            assert full.abs().max() > 0
            # As activations are cached after forward functions, gradients are after these.
            torch.testing.assert_close(found, full / 2)


def test_what_is_left_alone() -> None:
    model, inputs = HookedVLM(build("llava")), make_inputs("llava", batch=2)
    before = {n: p.requires_grad for n, p in model.hf_model.named_parameters()}
    with torch.no_grad():
        logits, cached = model.run_with_cache(
            inputs, "blocks.*.hook_resid_post", incl_bwd=True, metric=score, device="cpu"
        )
        plain, clean = model.run_with_cache(inputs, "blocks.*.hook_resid_post")
    assert torch.equal(logits, plain) and not logits.requires_grad
    assert all(torch.equal(cached[n], clean[n]) for n in clean)
    assert not any(t.requires_grad for t in cached.values())
    assert all(p.grad is None for p in model.hf_model.parameters())
    assert {n: p.requires_grad for n, p in model.hf_model.named_parameters()} == before
    assert not model.is_hooked


def test_frozen_parameters_and_a_cut_of_the_logits_have_gradients() -> None:
    model, inputs = HookedVLM(build("qwen2-vl")), make_inputs("qwen2-vl", batch=2)
    site, seen = "blocks.1.hook_resid_post", []
    _, cached = model.run_with_cache(inputs, site, incl_bwd=True, metric=score)
    model.hf_model.requires_grad_(False)
    hook = [(site, lambda g, hook: seen.append(g))]
    more: list[dict[str, Any]] = [{}, {"logits_to_keep": 1}]
    for kwargs in more:
        score(model.run_with_hooks(inputs, bwd_hooks=hook, **kwargs)).backward()
    assert len(seen) == 2
    for gradient in seen:
        torch.testing.assert_close(gradient, cached[f"{site}_grad"], rtol=1e-4, atol=1e-6)


def test_stopped_before_a_layer_the_metric_is_of_the_stream() -> None:
    model, inputs = prepared("llava")
    stream, cached = model.run_with_cache(
        inputs,
        "blocks.*.hook_resid_post",
        stop_at_layer=2,
        incl_bwd=True,
        metric=lambda stream: stream[:, -1, 0].sum(),
    )
    assert not stream.requires_grad
    expected = torch.zeros_like(stream)
    expected[:, -1, 0] = 1
    torch.testing.assert_close(cached["resid_post_grad", 1], expected)
    assert cached["resid_post_grad", 0].abs().max() > 0


def test_an_encoder_has_them_too() -> None:
    model = HookedVisionEncoder.from_pretrained("tiny-gemma-3")
    inputs = model.prepare(Image.new("RGB", (192, 192)))
    site, seen = "vision_encoder.blocks.0.hook_resid_post", []
    output, cached = model.run_with_cache(
        inputs, site, incl_bwd=True, metric=lambda o: o.last_hidden_state.square().sum()
    )
    assert not output.last_hidden_state.requires_grad
    hooked = model.run_with_hooks(inputs, bwd_hooks=[(site, lambda g, hook: seen.append(g))])
    hooked.last_hidden_state.square().sum().backward()
    model.hf_model.zero_grad(set_to_none=True)
    torch.testing.assert_close(seen[0], cached[f"{site}_grad"])


# --- never None without a word --------------------------------------------------------------


def test_a_site_that_the_metric_does_not_depend_on_gets_zeros_with_a_warning() -> None:
    model, inputs = HookedVLM(build("llava")), make_inputs("llava")
    projector = model.hf_model.get_submodule(model.sites["vision_projector.hook_out"].module)
    projector.register_forward_hook(lambda module, args, output: output.detach())
    names = ["vision_projector.hook_in", "vision_encoder.*.hook_resid_post", "*.1.hook_resid_post"]
    with pytest.warns(HookedVLMWarning, match=r"does not depend on 4 sites.*cached there are zero"):
        _, cached = model.run_with_cache(inputs, names, incl_bwd=True, metric=score)
    assert cached["resid_post_grad", 1].abs().max() > 0
    gradient = cached["resid_post_grad", 0, "vision"]
    assert gradient.shape == cached["resid_post", 0, "vision"].shape and not gradient.any()
    with pytest.warns(HookedVLMWarning, match=r"1 site,.*bwd_hooks there are not called"):
        model.run_with_hooks(inputs, bwd_hooks=[(names[0], lambda g, hook: None)])


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (None, "Give metric="),
        (lambda x: x[:, -1, 5], r"shape \(2,\)"),
        (lambda x: x[0, -1].argmax(), "int64"),
        (lambda x: x[0, -1, 5].item(), "a float"),
        (lambda x: x[0, -1, 5].detach(), "no gradient"),
        (lambda x: (x[0, -1] > 0).float().sum(), "no gradient"),
        ("logits", "metric="),
    ],
)
def test_metrics_that_are_none(metric: Any, said: str) -> None:
    model, inputs = prepared("llava")
    with pytest.raises(HookError, match=said) as caught:
        model.run_with_cache(inputs, "*resid_post", incl_bwd=True, metric=metric)
    assert len(str(caught.value)) <= 400 and not model.is_hooked
    with pytest.raises(HookError, match="incl_bwd"):
        model.run_with_cache(inputs, "*resid_post", metric=score)


def test_a_metric_that_writes_into_the_logits_is_an_error() -> None:
    model, inputs = prepared("llava")

    def writes(logits: Tensor) -> Tensor:
        kept = logits.exp()
        kept[:] = 0
        return logits.exp().sum() + kept.sum() * kept.detach().sum() + _used(kept)

    def _used(x: Tensor) -> Tensor:
        y = x.sigmoid()
        y.mul_(2)
        return y.sum()

    with pytest.raises(HookError, match="could not be differentiated"):
        model.run_with_cache(inputs, "*resid_post", incl_bwd=True, metric=writes)


def test_runs_that_keep_no_graph_are_refused() -> None:
    model, inputs = prepared("llava")
    hook: Any = [("blocks.1.hook_resid_post", lambda g, hook: None)]
    with torch.no_grad(), pytest.raises(HookError, match="keeps no graph"):
        model.run_with_hooks(inputs, bwd_hooks=hook)
    with torch.inference_mode():
        with pytest.raises(HookError, match="inference_mode"):
            model.run_with_hooks(inputs, bwd_hooks=hook)
        with pytest.raises(HookError, match="inference_mode"):
            model.run_with_cache(inputs, hook[0][0], incl_bwd=True, metric=score)
    with model.hooks(bwd_hooks=hook), pytest.raises(HookError, match="keeps no graph"):
        model.generate(inputs, max_new_tokens=2)
    assert not model.is_hooked


def test_checkpointed_models_are_refused() -> None:
    hf_model, inputs = build("llava"), make_inputs("llava")
    hf_model.gradient_checkpointing_enable()
    model = HookedVLM(hf_model).train()
    hook: Any = [("blocks.1.hook_resid_post", lambda g, hook: None)]
    with pytest.raises(HookError, match="checkpointing is on"):
        model.run_with_hooks(inputs, bwd_hooks=hook)
    with pytest.raises(HookError, match="checkpointing is on"), model.hooks(bwd_hooks=hook):
        pass
    with pytest.raises(HookError, match="checkpointing is on"):
        model.run_with_cache(inputs, hook[0][0], incl_bwd=True, metric=score)


def test_hooks_that_are_none() -> None:
    model, inputs = prepared("llava")  # its projector reads the last block but one
    unread = "vision_encoder.blocks.2.hook_resid_post"
    for hooks, said in (
        ([(unread, lambda g, hook: None)], "no gradient at"),
        ([("blocks.1.hook_resid_pots", lambda g, hook: None)], "Did you mean"),
        ([("blocks.1.hook_resid_post", lambda g: None)], "second one named hook"),
        (("blocks.1.hook_resid_post", lambda g, hook: None), "is not a hook"),
        ("blocks.1.hook_resid_post", "expected a list"),
    ):
        with pytest.raises((HookError, ValueError), match=said):
            model.run_with_hooks(inputs, bwd_hooks=hooks)
    wrong: Any = [("blocks.1.hook_resid_post", lambda g, hook: g[:, 0])]
    logits = model.run_with_hooks(inputs, bwd_hooks=wrong)
    with pytest.raises(HookError, match="expected"):
        score(logits).backward()
    model.hf_model.zero_grad(set_to_none=True)


def test_when_the_graph_is_kept() -> None:
    # As docs/guide/gradients.md has it.
    model, inputs = prepared("llava")
    site = "blocks.1.hook_resid_post"
    stream, cached = model.run_with_cache(inputs, site, stop_at_layer=2)
    assert stream.requires_grad and not cached[site].requires_grad
    streams = model.run_with_cache(inputs, "blocks.*resid*")[1]
    last = Sweep(inputs, {"slot": [0, 1, 2]}, lambda slot: Ablate(slot, at=LastToken()))
    kept: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        kept.append(logits)
        return logits[:, -1, 5]

    last.run(model, metric)
    cases: list[tuple[bool, list[Any]]] = [
        (True, [model(inputs), model.run_with_hooks(inputs), streams_of(model, inputs)]),
        (False, [streams.logit_lens(), *kept, *streams.values()]),
        (
            False,
            [record(model, inputs, site).cache[site], model.generate(inputs, max_new_tokens=1)],
        ),
        (False, [*model.generate_with_cache(inputs, site, max_new_tokens=2)[1].values()]),
        (False, [integrated_gradients(model, inputs, metric, 1, steps=1).values]),
        (False, [integrated_gradients(model, inputs, metric, 1, steps=1).gap]),
        (False, [pixel_attribution(model, inputs, metric, steps=1).values]),
    ]
    for has_graph, outputs in cases:
        assert all(x.requires_grad == has_graph for x in outputs)
    with torch.no_grad():
        assert not model(inputs).requires_grad
        assert not model.run_with_cache(inputs, site)[0].requires_grad


def streams_of(model: HookedVLM, inputs: Any) -> Tensor:
    stream = model.run_with_cache(inputs, "blocks.0.hook_resid_post")[1]["resid_post", 0]
    return model.run_from_layer(inputs, stream, 1)

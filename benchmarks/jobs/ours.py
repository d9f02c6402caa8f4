"""The jobs with this package."""

from typing import Any

import torch

import hooked_vlm
from benchmarks.jobs.world import World
from hooked_vlm import (
    Ablate,
    Attend,
    Generated,
    LastToken,
    Patch,
    Steer,
    Sweep,
    attention_maps,
    extract,
)


def residual_stream(w: World) -> Any:
    _, cache = w.model.run_with_cache(w.inputs, w.site)
    return cache["resid_post", w.layer]


def patch_last_token(w: World) -> Any:
    patch = Patch(w.site, at=LastToken(), source=w.other)
    return w.model.run_with_hooks(w.inputs, [patch])[:, -1]


def sweep_last_token(w: World) -> Any:
    slots = {"slot": range(w.model.cfg.n_layers)}
    sweep = Sweep(w.inputs, slots, lambda slot: Patch(slot, at=LastToken(), source=w.other))
    return torch.tensor(sweep.run(w.model, lambda logits: logits[:, -1, w.token]).values)


def patch_box(w: World) -> Any:
    patch = Patch(w.site, at=w.region, source=w.other)
    return w.model.run_with_hooks(w.inputs, [patch])[:, -1]


def ablate_head(w: World) -> Any:
    ablate = Ablate(f"blocks.{w.layer}.attn.hook_z", heads=(w.head,))
    return w.model.run_with_hooks(w.inputs, [ablate])[:, -1]


def logit_lens(w: World) -> Any:
    _, cache = w.model.run_with_cache(w.inputs, "blocks.*resid*")
    return cache.logit_lens(pos_slice=-1)


def logits_by_part(w: World) -> Any:
    _, cache = w.model.run_with_cache(w.inputs)
    return cache.logit_attrs(cache.decompose_resid(pos_slice=-1), w.token, w.wrong, pos_slice=-1)


def logits_by_head(w: World) -> Any:
    _, cache = w.model.run_with_cache(w.inputs)
    return cache.logit_attrs(cache.stack_head_results(pos_slice=-1), w.token, w.wrong, pos_slice=-1)


def attention_map(w: World) -> Any:
    return torch.tensor(attention_maps(w.model, w.inputs, layers=[w.layer]).values[0, 0])


def knockout(w: World) -> Any:
    image = w.inputs.grid.all()
    blind = Attend("blocks.0.attn", query=LastToken(), key=image, mask=True).at_layers(w.window)
    return w.model.run_with_hooks(w.inputs, [blind])[:, -1]


def gradient(w: World) -> Any:
    _, cache = w.model.run_with_cache(
        w.inputs, w.site, incl_bwd=True, metric=lambda logits: logits[0, -1, w.token]
    )
    return cache["resid_post_grad", w.layer]


def integrated_gradients(w: World) -> Any:
    found = hooked_vlm.integrated_gradients(
        w.model, w.inputs, lambda x: x[:, -1, w.token], w.site, baseline=w.other, steps=8
    )
    return found.by_position


def steer_generated(w: World) -> Any:
    steer = Steer(w.site, at=Generated(), directions=w.direction, alpha=4.0)
    how = {**w.greedy, "output_logits": True, "return_dict_in_generate": True}
    return torch.cat(w.model.generate(w.inputs, fwd_hooks=[steer], **how).logits)


def generation_activations(w: World) -> Any:
    _, cache = w.model.generate_with_cache(w.inputs, w.site, **w.greedy)
    return cache["resid_post", w.layer][0], cache.positions(("resid_post", w.layer))


def loss(w: World) -> Any:
    return w.model(w.inputs, return_type="loss")


def features(w: World) -> Any:
    found = extract(w.model, w.items, [w.site], at=LastToken(), out=w.folder, batch=2, pool="mean")
    return found[w.site]

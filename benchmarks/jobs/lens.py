"""The jobs with TransformerLens 4.3: `TransformerBridge`, its cache, its hooks, its analyses.

Its patching helpers and analyses run a model on tokens alone; those that take a cache are used.
A bridge is made for each job, since `enable_compatibility_mode` changes its weights.
"""

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformer_lens.tools.analysis import (  # type: ignore[import-not-found]
    direct_logit_attribution,
)

from benchmarks.jobs.world import World


def residual_stream(w: World) -> Any:
    _, cache = w.model.run_with_cache(w.ids, names_filter=w.site, **w.rest)
    return cache["resid_post", w.layer]


def patch_last_token(w: World) -> Any:
    _, there = w.model.run_with_cache(w.other_ids, names_filter=w.site, **w.other_rest)

    def write(resid: Any, hook: Any) -> Any:
        resid[:, -1] = there[hook.name][:, -1]
        return resid

    return w.model.run_with_hooks(w.ids, fwd_hooks=[(w.site, write)], **w.rest)[:, -1]


def sweep_last_token(w: World) -> Any:
    _, there = w.model.run_with_cache(w.other_ids, **w.other_rest)

    def write(resid: Any, hook: Any) -> Any:
        resid[:, -1] = there[hook.name][:, -1]
        return resid

    found = []
    for layer in range(w.model.cfg.n_layers):
        hooks = [(f"blocks.{layer}.hook_resid_pre", write)]
        logits = w.model.run_with_hooks(w.ids, fwd_hooks=hooks, **w.rest)
        found.append(logits[:, -1, w.token])
    return torch.stack(found)


def patch_box(w: World) -> Any:
    _, there = w.model.run_with_cache(w.other_ids, names_filter=w.site, **w.other_rest)

    def write(resid: Any, hook: Any) -> Any:
        resid[:, w.box] = there[hook.name][:, w.box]
        return resid

    return w.model.run_with_hooks(w.ids, fwd_hooks=[(w.site, write)], **w.rest)[:, -1]


def ablate_head(w: World) -> Any:
    def write(z: Any, hook: Any) -> Any:
        z[:, :, w.head] = 0
        return z

    hooks = [(f"blocks.{w.layer}.attn.hook_z", write)]
    return w.model.run_with_hooks(w.ids, fwd_hooks=hooks, **w.rest)[:, -1]


def logit_lens(w: World) -> Any:
    _, cache = w.model.run_with_cache(w.ids, **w.rest)
    return cache.logit_lens().values


def logits_by_part(w: World) -> Any:
    w.model.enable_compatibility_mode()
    _, cache = w.model.run_with_cache(w.ids, **w.rest)
    return direct_logit_attribution(
        w.model, answer_tokens=w.token, incorrect_tokens=w.wrong, cache=cache
    ).attribution


def logits_by_head(w: World) -> Any:
    w.model.enable_compatibility_mode()
    _, cache = w.model.run_with_cache(w.ids, **w.rest)
    return direct_logit_attribution(
        w.model, answer_tokens=w.token, incorrect_tokens=w.wrong, unit="head", cache=cache
    ).attribution[:-1]


def attention_map(w: World) -> Any:
    _, cache = w.model.run_with_cache(w.ids, **w.rest)
    return cache["pattern", w.layer][0, :, -1][:, w.cells]


def knockout(w: World) -> Any:
    def write(scores: Any, hook: Any) -> Any:
        scores[:, :, -1, w.cells.flatten()] = torch.finfo(scores.dtype).min
        return scores

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", write) for layer in w.window]
    return w.model.run_with_hooks(w.ids, fwd_hooks=hooks, **w.rest)[:, -1]


def gradient(w: World) -> Any:
    found = {}
    with w.model.hooks(bwd_hooks=[(w.site, lambda grad, hook: found.update(grad=grad))]):
        w.model(w.ids, **w.rest)[0, -1, w.token].backward()
    return found["grad"]


def integrated_gradients(w: World) -> Any:
    _, cache = w.model.run_with_cache(w.ids, names_filter=w.site, **w.rest)
    _, other = w.model.run_with_cache(w.other_ids, names_filter=w.site, **w.other_rest)
    here, base = cache[w.site].detach(), other[w.site].detach()
    total = torch.zeros_like(here)
    for step in range(8):
        value = (base + (step + 0.5) / 8 * (here - base)).requires_grad_()
        hooks = [(w.site, lambda _, hook, value=value: value)]
        logits = w.model.run_with_hooks(w.ids, fwd_hooks=hooks, **w.rest)
        total += torch.autograd.grad(logits[0, -1, w.token], value)[0] / 8
    return (total * (here - base)).sum(-1)


def steer_generated(w: World) -> Any:
    def write(resid: Any, hook: Any) -> Any:
        return resid + 4.0 * w.direction if resid.shape[1] == 1 else resid

    how = {**w.greedy, "output_logits": True, "return_dict_in_generate": True}
    with w.model.hooks(fwd_hooks=[(w.site, write)]):
        return torch.cat(w.model.hf_generate(w.ids, **w.rest, **how).logits)


def generation_activations(w: World) -> Any:
    found = []
    with w.model.hooks(fwd_hooks=[(w.site, lambda resid, hook: found.append(resid[0]))]):
        w.model.hf_generate(w.ids, **w.rest, **w.greedy)
    states = torch.cat(found)
    return states, torch.arange(len(states))


def loss(w: World) -> Any:
    by_token = w.model(w.ids, return_type="loss", loss_per_token=True, **w.rest)
    return by_token[w.ids[:, 1:] != w.image_token].mean()


def features(w: World) -> Any:
    for start in range(0, len(w.items), 2):
        batch = w.prepare(w.items[start : start + 2])
        _, cache = w.model.run_with_cache(batch.pop("input_ids"), names_filter=w.site, **batch)
        states = cache[w.site][:, -1].contiguous()
        save_file({"states": states}, w.folder / f"{start:06}.safetensors")
    return torch.cat([load_file(file)["states"] for file in sorted(w.folder.iterdir())])

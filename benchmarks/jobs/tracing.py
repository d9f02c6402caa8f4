"""The jobs with nnsight 0.8: `TransformersModel`, its traces and its generations.

It names no activations and has no analyses: its users write torch inside a trace.
"""

from typing import Any

import torch
from nnsight import save  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file

from benchmarks.jobs.world import World


def residual_stream(w: World) -> Any:
    with w.model.trace(**w.inputs):
        states = w.model.model.language_model.layers[w.layer].output.save()
    return states  # noqa: RET504 - not inside a trace


def patch_last_token(w: World) -> Any:
    block = w.model.model.language_model.layers[w.layer]
    with w.model.trace(**w.other):
        there = block.output.save()
    with w.model.trace(**w.inputs):
        block.output[:, -1] = there[:, -1]
        logits = w.model.output.logits.save()
    return logits[:, -1]


def sweep_last_token(w: World) -> Any:
    blocks, found = w.model.model.language_model.layers, []
    with w.model.trace(**w.other):
        there = save([block.input for block in blocks])
    for block, states in zip(blocks, there, strict=True):
        with w.model.trace(**w.inputs):
            block.input[:, -1] = states[:, -1]
            logits = w.model.output.logits.save()
        found.append(logits[:, -1, w.token])
    return torch.stack(found)


def patch_box(w: World) -> Any:
    block = w.model.model.language_model.layers[w.layer]
    with w.model.trace(**w.other):
        there = block.output.save()
    with w.model.trace(**w.inputs):
        block.output[:, w.box] = there[:, w.box]
        logits = w.model.output.logits.save()
    return logits[:, -1]


def ablate_head(w: World) -> Any:
    attention = w.model.model.language_model.layers[w.layer].self_attn
    with w.model.trace(**w.inputs):
        attention.o_proj.input.unflatten(-1, (-1, attention.head_dim))[:, :, w.head] = 0
        logits = w.model.output.logits.save()
    return logits[:, -1]


def logit_lens(w: World) -> Any:
    language = w.model.model.language_model
    with w.model.trace(**w.inputs):
        streams = [block.input[:, -1] for block in language.layers]
        streams.append(language.norm.input[:, -1])
        read = w.model.lm_head(language.norm(torch.stack(streams))).save()
    return read  # noqa: RET504 - not inside a trace


def logits_by_part(w: World) -> Any:
    language, parts = w.model.model.language_model, []
    with w.model.trace(**w.inputs):
        parts.append(language.layers[0].input[:, -1])
        for block in language.layers:
            if hasattr(block, "post_feedforward_layernorm"):
                parts.append(block.post_attention_layernorm.output[:, -1])
                parts.append(block.post_feedforward_layernorm.output[:, -1])
            else:
                parts.append(block.self_attn.output[0][:, -1])
                parts.append(block.mlp.output[:, -1])
        parts = save(parts)
        stream = language.norm.input
        factor = (language.norm.output / stream)[:, -1].save()
    unembed = w.model.lm_head.weight
    return (torch.stack(parts) * factor) @ (unembed[w.token] - unembed[w.wrong])


def logits_by_head(w: World) -> Any:
    language, results = w.model.model.language_model, []
    with w.model.trace(**w.inputs):
        for block in language.layers:
            output_map, d_head = block.self_attn.o_proj, block.self_attn.head_dim
            z = output_map.input[:, -1].unflatten(-1, (-1, d_head))
            weights = output_map.weight.unflatten(-1, (-1, d_head))
            heads = torch.einsum("bhe,dhe->hbd", z, weights)
            if hasattr(block, "post_feedforward_layernorm"):
                added = block.post_attention_layernorm.input
                heads = heads * (block.post_attention_layernorm.output / added)[:, -1]
            results.append(heads)
        results = save(results)
        stream = language.norm.input
        factor = (language.norm.output / stream)[:, -1].save()
    unembed = w.model.lm_head.weight
    return (torch.cat(results) * factor) @ (unembed[w.token] - unembed[w.wrong])


def attention_map(w: World) -> Any:
    with w.model.trace(**w.inputs):
        pattern = w.model.model.language_model.layers[w.layer].self_attn.output[1].save()
    return pattern[0, :, -1][:, w.cells]


def knockout(w: World) -> Any:
    with w.model.trace(**w.inputs):
        for layer in w.window:
            attention = w.model.model.language_model.layers[layer].self_attn
            args, kwargs = attention.inputs
            mask = kwargs["attention_mask"].clone()
            mask[:, :, -1, w.cells.flatten()] = torch.finfo(mask.dtype).min
            attention.inputs = (args, {**kwargs, "attention_mask": mask})
        logits = w.model.output.logits.save()
    return logits[:, -1]


def gradient(w: World) -> Any:
    with w.model.trace(**w.inputs):
        states = w.model.model.language_model.layers[w.layer].output
        logit = w.model.output.logits[0, -1, w.token]
        with logit.backward():
            found = states.grad.save()
    return found


def integrated_gradients(w: World) -> Any:
    block = w.model.model.language_model.layers[w.layer]
    with w.model.trace(**w.inputs):
        here = block.output.detach().save()
    with w.model.trace(**w.other):
        base = block.output.detach().save()
    total = torch.zeros_like(here)
    for step in range(8):
        value = (base + (step + 0.5) / 8 * (here - base)).requires_grad_()
        with w.model.trace(**w.inputs):
            block.output = value
            logits = w.model.output.logits.save()
        total += torch.autograd.grad(logits[0, -1, w.token], value)[0] / 8
    return (total * (here - base)).sum(-1)


def steer_generated(w: World) -> Any:
    how = {**w.greedy, "output_logits": True, "return_dict_in_generate": True}
    with w.model.generate(**w.inputs, **how) as tracer:
        for _ in tracer.iter[1:4]:
            w.model.model.language_model.layers[w.layer].output += 4.0 * w.direction
        answer = tracer.result.save()
    return torch.cat(answer.logits)


def generation_activations(w: World) -> Any:
    with w.model.generate(**w.inputs, **w.greedy) as tracer:
        found = save([])
        for _ in tracer.iter[:4]:
            found.append(w.model.model.language_model.layers[w.layer].output[0])
    states = torch.cat(found)
    return states, torch.arange(len(states))


def loss(w: World) -> Any:
    labels = w.ids.masked_fill(w.ids == w.image_token, -100)
    with w.model.trace(**w.inputs, labels=labels):
        found = w.model.output.loss.save()
    return found  # noqa: RET504 - not inside a trace


def features(w: World) -> Any:
    block = w.model.model.language_model.layers[w.layer]
    for start in range(0, len(w.items), 2):
        with w.model.trace(**w.prepare(w.items[start : start + 2])):
            states = block.output[:, -1].contiguous().save()
        save_file({"states": states}, w.folder / f"{start:06}.safetensors")
    return torch.cat([load_file(file)["states"] for file in sorted(w.folder.iterdir())])

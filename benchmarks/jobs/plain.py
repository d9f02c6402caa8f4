"""The jobs in torch and transformers alone: the values that the tools' are compared with.

`w.model` is the transformers model.  Norms here have no bias, so what one does to a position is a
factor for each of its entries: what it returned over what it was given.
"""

from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.jobs.world import World


def residual_stream(w: World) -> Any:
    found = []
    block = w.model.model.language_model.layers[w.layer]
    handle = block.register_forward_hook(lambda module, args, out: found.append(out))
    w.model(**w.inputs)
    handle.remove()
    return found[0]


def patch_last_token(w: World) -> Any:
    block = w.model.model.language_model.layers[w.layer]
    there = w.model(**w.other, output_hidden_states=True).hidden_states[w.layer + 1]

    def write(module: Any, args: Any, out: Any) -> None:
        out[:, -1] = there[:, -1]

    handle = block.register_forward_hook(write)
    logits = w.model(**w.inputs).logits
    handle.remove()
    return logits[:, -1]


def sweep_last_token(w: World) -> Any:
    there = w.model(**w.other, output_hidden_states=True).hidden_states
    found = []
    for layer, block in enumerate(w.model.model.language_model.layers):

        def write(module: Any, args: Any, layer: int = layer) -> None:
            args[0][:, -1] = there[layer][:, -1]

        handle = block.register_forward_pre_hook(write)
        found.append(w.model(**w.inputs).logits[:, -1, w.token])
        handle.remove()
    return torch.stack(found)


def patch_box(w: World) -> Any:
    block = w.model.model.language_model.layers[w.layer]
    there = w.model(**w.other, output_hidden_states=True).hidden_states[w.layer + 1]

    def write(module: Any, args: Any, out: Any) -> None:
        out[:, w.box] = there[:, w.box]

    handle = block.register_forward_hook(write)
    logits = w.model(**w.inputs).logits
    handle.remove()
    return logits[:, -1]


def ablate_head(w: World) -> Any:
    attention = w.model.model.language_model.layers[w.layer].self_attn

    def write(module: Any, args: Any) -> None:
        args[0].unflatten(-1, (-1, attention.head_dim))[:, :, w.head] = 0

    handle = attention.o_proj.register_forward_pre_hook(write)
    logits = w.model(**w.inputs).logits
    handle.remove()
    return logits[:, -1]


def logit_lens(w: World) -> Any:
    found = []
    language = w.model.model.language_model
    handles = [
        block.register_forward_pre_hook(lambda module, args: found.append(args[0][:, -1]))
        for block in [*language.layers, language.norm]
    ]
    w.model(**w.inputs)
    for handle in handles:
        handle.remove()
    return w.model.lm_head(language.norm(torch.stack(found)))


def logits_by_part(w: World) -> Any:
    parts, norm = [], {}
    language = w.model.model.language_model

    def note(module: Any, args: Any, out: Any) -> None:
        parts.append((out[0] if isinstance(out, tuple) else out)[:, -1])

    def note_norm(module: Any, args: Any, out: Any) -> None:
        norm["factor"] = (out / args[0])[:, -1]

    def note_first(module: Any, args: Any) -> None:
        parts.append(args[0][:, -1])

    handles = [
        language.layers[0].register_forward_pre_hook(note_first),
        language.norm.register_forward_hook(note_norm),
    ]
    for block in language.layers:
        normed = hasattr(block, "post_feedforward_layernorm")  # what is added comes from a norm
        attention = block.post_attention_layernorm if normed else block.self_attn
        mlp = block.post_feedforward_layernorm if normed else block.mlp
        handles += [part.register_forward_hook(note) for part in (attention, mlp)]
    w.model(**w.inputs)
    for handle in handles:
        handle.remove()
    unembed = w.model.lm_head.weight
    return (torch.stack(parts) * norm["factor"]) @ (unembed[w.token] - unembed[w.wrong])


def logits_by_head(w: World) -> Any:
    found, factors = [], []
    language = w.model.model.language_model
    handles = []

    def note(module: Any, args: Any) -> None:
        found.append(args[0][:, -1])

    def note_norm(module: Any, args: Any, out: Any) -> None:
        factors.append((out / args[0])[:, -1])

    for block in language.layers:
        handles.append(block.self_attn.o_proj.register_forward_pre_hook(note))
        if hasattr(block, "post_feedforward_layernorm"):
            handles.append(block.post_attention_layernorm.register_forward_hook(note_norm))
    handles.append(language.norm.register_forward_hook(note_norm))
    w.model(**w.inputs)
    for handle in handles:
        handle.remove()
    results = []
    for i, block in enumerate(language.layers):
        z = found[i].unflatten(-1, (-1, block.self_attn.head_dim))
        weights = block.self_attn.o_proj.weight.unflatten(-1, (-1, block.self_attn.head_dim))
        heads = torch.einsum("bhe,dhe->hbd", z, weights)
        results.append(heads * factors[i] if len(factors) > 1 else heads)
    unembed = w.model.lm_head.weight
    return (torch.cat(results) * factors[-1]) @ (unembed[w.token] - unembed[w.wrong])


def attention_map(w: World) -> Any:
    pattern = w.model(**w.inputs, output_attentions=True).attentions[w.layer]
    return pattern[0, :, -1][:, w.cells]


def knockout(w: World) -> Any:
    def write(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[:, :, -1, w.cells.flatten()] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    blocks = [w.model.model.language_model.layers[layer] for layer in w.window]
    handles = [
        block.self_attn.register_forward_pre_hook(write, with_kwargs=True) for block in blocks
    ]
    logits = w.model(**w.inputs).logits
    for handle in handles:
        handle.remove()
    return logits[:, -1]


def gradient(w: World) -> Any:
    found = []
    block = w.model.model.language_model.layers[w.layer]
    handle = block.register_forward_hook(lambda module, args, out: found.append(out))
    logits = w.model(**w.inputs).logits
    handle.remove()
    return torch.autograd.grad(logits[0, -1, w.token], found[0])[0]


def integrated_gradients(w: World) -> Any:
    block = w.model.model.language_model.layers[w.layer]
    with torch.no_grad():
        here = w.model(**w.inputs, output_hidden_states=True).hidden_states[w.layer + 1]
        base = w.model(**w.other, output_hidden_states=True).hidden_states[w.layer + 1]
    total = torch.zeros_like(here)
    for step in range(8):
        value = (base + (step + 0.5) / 8 * (here - base)).requires_grad_()
        handle = block.register_forward_hook(lambda module, args, _, value=value: value)
        logits = w.model(**w.inputs).logits
        handle.remove()
        total += torch.autograd.grad(logits[0, -1, w.token], value)[0] / 8
    return (total * (here - base)).sum(-1)


def steer_generated(w: World) -> Any:
    def write(module: Any, args: Any, out: Any) -> Any:
        return out + 4.0 * w.direction if out.shape[1] == 1 else out

    handle = w.model.model.language_model.layers[w.layer].register_forward_hook(write)
    how = {**w.greedy, "output_logits": True, "return_dict_in_generate": True}
    logits = w.model.generate(**w.inputs, **how).logits
    handle.remove()
    return torch.cat(logits)


def generation_activations(w: World) -> Any:
    found = []
    block = w.model.model.language_model.layers[w.layer]
    handle = block.register_forward_hook(lambda module, args, out: found.append(out[0]))
    w.model.generate(**w.inputs, **w.greedy)
    handle.remove()
    states = torch.cat(found)
    return states, torch.arange(len(states))


def loss(w: World) -> Any:
    labels = w.ids.masked_fill(w.ids == w.image_token, -100)
    return w.model(**w.inputs, labels=labels).loss


def features(w: World) -> Any:
    block = w.model.model.language_model.layers[w.layer]
    found = []
    handle = block.register_forward_hook(lambda module, args, out: found.append(out[:, -1]))
    for start in range(0, len(w.items), 2):
        w.model(**w.prepare(w.items[start : start + 2]))
        save_file({"states": found.pop().contiguous()}, w.folder / f"{start:06}.safetensors")
    handle.remove()
    return torch.cat([load_file(file)["states"] for file in sorted(w.folder.iterdir())])

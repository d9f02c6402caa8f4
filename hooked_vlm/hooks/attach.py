"""Attaches functions to a model and removes them; no other module does so for sites.

PyTorch handles exist only while a `with attach(...)` block is open and are removed in its
`finally`, also after an error.  Only the requested sites get a hook.  Our forward hooks run
before the hooks with which transformers collects hidden states: after them, an edit of the
layer that a projector reads would be lost.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hooked_vlm.anatomy.caches import cached_positions, caches_among, prompts_among
from hooked_vlm.anatomy.source import carrier, signature_of
from hooked_vlm.anatomy.vision import Vision
from hooked_vlm.anatomy.wrappers import wrapped_by
from hooked_vlm.errors import HookError
from hooked_vlm.hooks.attention import Edits, tapped_config
from hooked_vlm.hooks.compiled import eager
from hooked_vlm.hooks.dispatch import HookFunction, SiteDispatch, is_watched
from hooked_vlm.hooks.generation import at_each_pass, count_steps
from hooked_vlm.hooks.gradients import last
from hooked_vlm.hooks.hook_point import CallContext, HookPoint, PassCounter
from hooked_vlm.hooks.on_request import computed
from hooked_vlm.hooks.patch_order import PackedLayout, layout_of_call
from hooked_vlm.hooks.prompts import (
    OnGenerated,
    OnPrompt,
    acts_on_prompt,
    match,
    refuse_mixed,
)
from hooked_vlm.hooks.sites import Site


@contextmanager
def attach(
    model: nn.Module,
    sites: dict[str, Site],
    points: dict[str, HookPoint],
    layers: Sequence[tuple[Sequence[tuple[str, HookFunction]], PassCounter]],
    vision: Vision | None = None,
    entries: Sequence[nn.Module] = (),
) -> Iterator[None]:
    """Attaches functions to sites of a model for the duration of a `with` block.

    `layers` are the open blocks, outermost first: pairs of a site's name and a function, and
    the counter that decides in which passes they run.  Functions at one site run in this order.
    `entries` are the modules that may begin a pass, from the outside (see `at_each_pass`).
    """
    entries = entries or (model,)
    # 1. Collect the functions by site.
    by_site: dict[str, list[tuple[HookFunction, PassCounter]]] = {}
    for pairs, run in layers:
        for name, fn in pairs:
            by_site.setdefault(name, []).append((fn, run))
    packing = CallContext()
    every = (*sites, *getattr(sites, "more", ()))
    fired = [
        SiteDispatch(sites[n], points[n], last(by_site[n]), packing) for n in every if n in by_site
    ]
    # 2. Register hooks that track passes and calls, then those of the sites.
    with ExitStack() as stack:
        stack.enter_context(eager(entries[0]))
        for _, run in layers:
            stack.enter_context(count_steps(entries, run))
        if vision is not None and any(f.site.by_image for f in fired):
            _note_call(model, vision, packing, stack)
        # A generation may call the encoder before the first pass: its calls count from 0 too.
        forget = _reset_calls(fired)
        forget()
        restart = _reset_counters(fired, packing)
        stack.enter_context(at_each_pass(entries, restart, _forgetting(forget, packing)))
        handles: list[torch.utils.hooks.RemovableHandle] = []
        stack.callback(_remove, handles)
        # Prepended hooks run in reverse order of registration, and at one module the sites must
        # run in the order of the model.
        for item in reversed([f for f in fired if f.site.tap != "attention"]):
            handles.append(_attach_one(_module_at(model, item.site.module), item))
        # 3. Sites inside attention share one tap per attention module.
        taps: dict[str, list[SiteDispatch]] = {}
        for item in fired:
            if item.site.tap == "attention":
                taps.setdefault(item.site.module, []).append(item)
        for path, items in taps.items():
            stack.enter_context(_tap_attention(_module_at(model, path), items))
        yield


def _remove(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns `model.get_submodule(path)` in a fifth of the time; called per run and site.

    Nothing is cached between runs, so a module that the user replaces is found.
    """
    found: nn.Module | None = model
    for name in path.split("."):
        found = found._modules.get(name)
        if found is None:  # the whole model, or a path that a wrapper resolves
            found = model.get_submodule(path)
            break
    if wrapped_by(found) is not None:
        raise HookError(
            f"{path} is now a {type(found).__name__}: it was compiled, checkpointed or sharded "
            "after HookedVLM read the model. Wrap the model again, or compile in place, "
            "module.compile()."
        )
    return found


def _note_call(model: nn.Module, vision: Vision, packing: CallContext, stack: ExitStack) -> None:
    """Records the layout or the number of images of each encoder call, before the encoder runs."""
    owner = model.get_submodule(vision.path)
    signature = signature_of(type(owner).forward)

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = signature.bind(module, *args, **kwargs).arguments
        if vision.packed:
            packing.layout = layout_of_call(module, arguments, vision)
            return
        tensors = (v for v in arguments.values() if isinstance(v, Tensor))
        packing.n_images = next((len(t) for t in tensors if t.is_floating_point()), 1)

    stack.callback(owner.register_forward_pre_hook(note, with_kwargs=True, prepend=True).remove)


def _reset_calls(fired: Sequence[SiteDispatch]) -> Callable[..., None]:
    """Returns a function that sets the counts of calls to zero."""

    def forget(*_: Any) -> None:
        for item in fired:
            item.point.call = -1

    return forget


def _forgetting(forget: Callable[..., None], packing: CallContext) -> Callable[..., None]:
    """Returns a function for the end of a pass; its arguments are not kept alive."""

    def end(*_: Any) -> None:
        forget()
        packing.given, packing.prompt = {}, None

    return end


def _reset_counters(fired: Sequence[SiteDispatch], packing: CallContext) -> Callable[..., None]:
    """Returns a function that resets the counts of calls and prompts before each pass."""

    forget = _reset_calls(fired)
    functions = [pair for item in fired for pair in item.fns]
    made_for = [(fn, run) for fn, run in functions if isinstance(fn, OnPrompt | OnGenerated)]

    def restart(args: tuple, kwargs: dict) -> None:
        forget()
        prompts = prompts_among(args, kwargs)
        packing.n_prompts = 0 if prompts is None else len(prompts)
        packing.given, packing.prompt = kwargs, prompts
        packing.start = cached_positions(caches_among(args, kwargs))
        packing.matches.clear()
        for fn, run in made_for:  # also where only the encoder has them, which may have run before
            match(fn, packing, run)

    return restart


def _attach_one(module: nn.Module, item: SiteDispatch) -> torch.utils.hooks.RemovableHandle:
    if item.site.tap == "output":
        return module.register_forward_hook(_output_hook(item), prepend=True)
    key = "inputs_embeds" if item.site.tap == "inputs_embeds" else ""
    return module.register_forward_pre_hook(_input_hook(item, key), with_kwargs=True, prepend=True)


def _output_hook(item: SiteDispatch) -> Callable:
    on_image = item.site.by_image

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if on_image and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            return None  # an embedding table called with ids, not with image features
        if isinstance(output, ModelOutput):
            changed = item.run_on_module_value(output[0])
            if changed is not None:
                output[next(iter(output))] = changed
            return output
        if not isinstance(output, tuple):
            return item.run_on_module_value(output)
        changed = item.run_on_module_value(output[0])
        return None if changed is None else (changed, *output[1:])

    return hook


def _input_hook(item: SiteDispatch, key: str) -> Callable:
    """Returns a hook on the first positional input, or on the keyword argument in its place."""
    in_place = item.site.tap == "residual"
    on_image = item.site.by_image

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        name = key if kwargs.get(key) is not None else carrier(module, args, kwargs)
        raw = args[0] if name is None else kwargs[name]
        if item.site.computed:
            if not item.inactive:
                item.on_value(computed(item.site, module, raw))
            return None
        if on_image and isinstance(raw, Tensor) and not raw.is_floating_point():
            return None  # an embedding table called with ids, not with image features
        changed = item.run_on_module_value(raw)
        if changed is None:
            return None
        if in_place:  # the skip connection must see the change too
            if changed is not raw:
                raw.copy_(changed)
            return None
        if name is None:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, name: changed}

    return hook


@contextmanager
def _tap_attention(module: nn.Module, items: list[SiteDispatch]) -> Iterator[None]:
    """Gives an attention module a config with a tap, and restores its own config at the end."""
    tapped: Any = module
    config = tapped.config
    packed = bool(items[0].site.order)
    edits: Edits = {part: _attention_edit(item) for item in items if (part := item.site.part)}
    tapped.config = tapped_config(module, edits, packed)
    try:
        yield
    finally:
        tapped.config = config


def _attention_edit(item: SiteDispatch) -> Callable[[Any], Any]:
    square = item.site.part in ("attn_scores", "pattern")

    def edit(raw: Any) -> Any:
        if square and isinstance(raw, list):
            return _edit_chunks(item, raw)
        if square:
            if item.inactive:
                return raw
            value, changed = item.on_value(raw)
            return value if changed else raw
        # Keys and values may be the cache's own memory, which later steps read: an edit in place
        # acts on a copy, as one that returns a copy does.
        is_cached = item.site.part in ("rot_k", "v")
        shown = raw.clone() if is_cached and item.editing else raw
        changed = item.run_on_module_value(shown)
        if changed is None:
            return shown if is_watched(shown) else raw
        if is_cached and any(acts_on_prompt(fn, run) for fn, run in item.fns):
            # The key-value cache holds this tensor, and later steps, in which the functions are
            # inactive, read it.  Written in place, the edit lasts.
            others = [fn for fn, run in item.editing if not acts_on_prompt(fn, run)]
            if item.packing.start and others:
                # Generated tokens are none of the prompt's: there the order does not matter.
                if all(isinstance(fn, OnGenerated) for fn in others):
                    return changed
                raise refuse_mixed(item.point.name)
            return raw.copy_(changed)
        return changed

    return edit


def _edit_chunks(item: SiteDispatch, chunks: list[Tensor]) -> list[Tensor]:
    """Runs the functions on a packed encoder's square matrices, in raster order by image."""
    if item.inactive:
        return chunks
    # Reorder queries and keys, run the functions, then restore the order.
    layout = item.packing.layout
    assert layout is not None, "a packed encoder ran without its layout having been noted"
    orders, item.point.rows = _chunk_orders(layout, [c.shape[-1] for c in chunks], chunks[0].device)
    raster = [_reordered(c[0], o) for c, o in zip(chunks, orders, strict=True)]
    by_image = len(chunks) == len(layout.patches.rows) and layout.patches.even
    shown = torch.stack(raster) if by_image else raster
    value, changed = item.on_value(shown)
    if not changed and not is_watched(shown):
        return chunks
    inverses = [torch.argsort(order) for order in orders]
    return [_reordered(v, i)[None] for v, i in zip(value, inverses, strict=True)]


def _reordered(square: Tensor, order: Tensor) -> Tensor:
    """Returns `[head, query, key]` with both positions in another order."""
    # A gather takes half the time of a second index_select, whose access is strided.
    return square.index_select(1, order).gather(2, order.expand(square.shape))


def _chunk_orders(
    layout: PackedLayout, lengths: list[int], device: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns for each chunk of packed rows its rows in raster order, and where each is then.

    That is its image and its place in it.
    """
    order = layout.order("blocks", sum(lengths))
    parts = [part.sort() for part in order.places.split(lengths)]
    places = torch.cat(
        [
            torch.stack([torch.full_like(r, i), torch.arange(len(r))], 1)
            for i, r in enumerate(order.rows)
        ]
    )
    return [part.indices.to(device) for part in parts], [places[part.values] for part in parts]

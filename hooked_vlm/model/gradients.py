"""Gradients of runs: functions that act in their backward pass, and caches that hold gradients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.arguments.checked import is_listed, shown
from hooked_vlm.errors import HookError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.dispatch import HookFunction
from hooked_vlm.hooks.gradients import (
    GradientStore,
    Probe,
    differentiate,
    explained,
    frozen,
    require_differentiable,
    warn_lost,
)
from hooked_vlm.hooks.names import GRADIENT, NamesFilter, select_names
from hooked_vlm.hooks.patch_order import each


Metric = Callable[[Any], Tensor]

_REMEDY = (
    "A metric must not write into the logits (take logits.clone()), nor a hook function into what "
    "the model needs for its backward pass: return a changed copy."
)


def backward_pairs(model: Any, bwd_hooks: Any) -> list[tuple[str, HookFunction]]:
    """Returns a probe for each function that is to see, or replace, a gradient at a site.

    Raises `HookError` for an intervention, a site that nothing reads, and a model whose backward
    pass would not run through the sites.
    """
    if not is_listed(bwd_hooks) or any(hasattr(item, "hooks_for") for item in bwd_hooks):
        raise HookError(
            f"bwd_hooks={shown(bwd_hooks)} was given; expected a list of (name, function), where "
            "function(gradient, hook) returns a gradient in its place, or None. Interventions act "
            "forward: give them as fwd_hooks."
        )
    pairs = [(name, Probe(fn)) for name, fn in model._pairs(bwd_hooks, None)]
    if pairs:
        require_differentiable(model.hf_model, "bwd_hooks")
    for name, _ in pairs:
        if reason := model.sites[name].read_only:
            raise HookError(f"There is no gradient at {name}: {reason}. Take a site that is read.")
    return list(pairs)


@contextmanager
def without_probes(model: Any) -> Iterator[None]:
    """Detaches what sees gradients for the length of a `with` block, for a run without a graph.

    An intervention makes such a run of its source while the run that reads it is being set up.
    All other functions of open blocks stay.
    """
    with model.turn():
        opened = model._open[:]
        rest = [(_without_probes(pairs), counter) for pairs, counter in opened]
        if all(
            len(pairs) == len(other) for (pairs, _), (other, _) in zip(opened, rest, strict=True)
        ):
            yield
            return
        model._open[:] = [(pairs, counter) for pairs, counter in rest if pairs]
        try:
            model._reattach()
            yield
        finally:
            model._open[:] = opened
            model._reattach()


def _without_probes(pairs: Iterable[tuple[str, HookFunction]]) -> list[tuple[str, HookFunction]]:
    return [(name, fn) for name, fn in pairs if not isinstance(fn, Probe)]


def require_metric(metric: Any, incl_bwd: bool) -> None:
    """Raises `HookError` for a metric that nobody would call."""
    if metric is not None and not incl_bwd:
        raise HookError("metric=… was given without incl_bwd=True, so nobody would call it.")


def run_cached_with_gradients(
    model: Any,
    run: Callable[[], Any],
    inputs: Any,
    names_filter: NamesFilter,
    fwd_hooks: Sequence[Any],
    metric: Metric | None,
    **options: Any,
) -> tuple[Any, ActivationCache]:
    """Returns the output of `run` without its graph, and the cache of activations and gradients.

    The gradient of a site has its name and `_grad` after it.  Sites that did not run have none.
    Sites on which the metric does not depend get zeros, with a warning.  Works under
    `torch.no_grad()`; no parameter gets a gradient.  Raises `HookError` for a metric that is not
    one number or has no gradient, and for a model that is checkpointed.
    """
    # 1. One forward pass with a probe at every site that something reads.
    require_differentiable(model.hf_model, "incl_bwd")
    names = select_names(names_filter, model.hook_names)
    read = [name for name in names if not model.sites[name].read_only]
    stores = {name: GradientStore() for name in read}
    with (
        torch.enable_grad(),
        model.turn(),
        frozen(model.hf_model),
        explained(HookError, _REMEDY),
        model._attached_to_sites(list(stores.items())),
    ):
        output, cache = model._run_cached(
            run, inputs, names_filter, fwd_hooks, n_copies=2, **options
        )
        score = _scalar(output, metric)
        # 2. One backward pass to the probes.
        if score.requires_grad:
            differentiate(score, stores.values())
        elif any(store.anchors for store in stores.values()):
            raise HookError(
                "The metric's value has no gradient: take no argmax, comparison, .detach(), "
                ".item() or torch.no_grad() in it. Where the model itself passes no gradient on "
                "(quantised layers), write to the site and compare two runs instead."
            )
    # 3. Gradients beside the activations, and a word on the sites that have none.
    device = options.get("device")
    found, lost = {}, []
    for name, value in cache.items():
        gradient = stores[name].gradient() if name in stores else None
        if gradient is None:
            lost.append(name)
            found[name + GRADIENT] = each(torch.zeros_like, value)
        else:
            found[name + GRADIENT] = each(lambda g: g if device is None else g.to(device), gradient)
    warn_lost(lost, "the gradients cached there are zero")
    return _detached(output), cache._with({**cache, **found})


def _scalar(output: Any, metric: Metric | None) -> Tensor:
    """Returns the one number that is differentiated, as a tensor without axes."""
    score = output if metric is None else metric(output)
    given = f"a {type(score).__name__}"
    if isinstance(score, Tensor):
        given = f"{str(score.dtype).removeprefix('torch.')} of shape {tuple(score.shape)}"
        if score.numel() == 1 and score.is_floating_point():
            return score.reshape(())
    if metric is None:
        raise HookError(
            f"incl_bwd=True needs one number to differentiate, and the run's output is {given}. "
            "Give metric=…, a function of the output, such as lambda logits: logits[0, -1, id]."
        )
    raise HookError(
        f"The metric returned {given}; expected a tensor of one number, computed from the output. "
        "For a batch give a sum over the prompts: none of them changes another's gradient."
    )


def _detached(output: Any) -> Any:
    """Returns an output whose graph the backward pass has used up, without that graph."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):  # logits and loss
        return tuple(map(_detached, output))
    for name, value in list(output.items()) if hasattr(output, "items") else ():
        if isinstance(value, Tensor):
            output[name] = value.detach()
        elif isinstance(value, tuple) and all(isinstance(x, Tensor) for x in value):
            output[name] = tuple(x.detach() for x in value)
    return output


def named_probes(pairs: Iterable[tuple[str, HookFunction]]) -> dict[str, Probe]:
    """Returns the probes among the functions of a run by site; of several at one, the last."""
    return {name: fn for name, fn in pairs if isinstance(fn, Probe)}

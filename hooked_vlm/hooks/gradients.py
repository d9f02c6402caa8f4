"""Gradients at sites: a node of the autograd graph through which a site's activation passes.

A `Probe` is a hook function that leaves the activation as it is.  Its node gets the activation's
gradient in the layout that hooks see, whatever the model makes of its own tensor after it (a
reshape, a write in place), and whether or not anything before it has a gradient.  Gradients for
hook functions (`bwd_hooks`), for caches (`incl_bwd`) and for estimates of sweeps all come from it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vlm.errors import HookedVLMError, HookedVLMWarning, HookError, callers_level, counted
from hooked_vlm.hooks.checkpointing import has_gradient, is_checkpointed
from hooked_vlm.hooks.dispatch import HookFunction, replacement
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.patch_order import VisionActivation, each, joined, listed


Receive = Callable[[list[Tensor]], Sequence[Tensor]]


class _Passed(torch.autograd.Function):
    """Copies tensors; its backward pass gives their gradients, all at once, to a function."""

    @staticmethod
    def forward(ctx: Any, receive: Receive, _anchor: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        # `_anchor` asks for a gradient where no part does.
        ctx.receive = receive
        # Copies: what the model, or a later hook, does in place must not reach the node's input.
        return tuple(part.clone() for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *ctx.receive(list(gradients))


class Probe:
    """A hook function that keeps an activation, and calls another with its gradient."""

    def __init__(self, function: HookFunction) -> None:
        self.function = function
        self.anchors: list[Tensor] = []
        """A tensor for each node, that leads to it and to nothing before it."""

    def __call__(self, activation: VisionActivation, hook: HookPoint) -> VisionActivation:
        parts = listed(activation)
        if not torch.is_grad_enabled():
            raise HookError(
                f"The gradient at {hook.name} was asked for, and this run keeps no graph: it is "
                "under torch.no_grad() or torch.inference_mode(), as generate() always is. Run "
                "outside of them."
            )
        is_list, point = isinstance(activation, list), copy(hook)  # a later call changes the hook

        def receive(gradients: list[Tensor]) -> list[Tensor]:
            gradient = gradients if is_list else gradients[0]
            return listed(self._received(gradient, point))

        anchor = torch.zeros((), device=parts[0].device, requires_grad=True)
        self.anchors = [*self._kept(), anchor]
        passed = list(_Passed.apply(receive, anchor, *parts))
        return passed if is_list else passed[0]

    def _kept(self) -> list[Tensor]:
        """Returns the anchors of earlier calls that are kept."""
        return []

    def _received(self, gradient: VisionActivation, hook: HookPoint) -> VisionActivation:
        # A function may write in place; another node may hold the same tensor.
        shown = each(torch.clone, gradient)
        result = self.function(shown, hook=hook)
        # TransformerLens's functions may return a tuple of one tensor, as torch's do.
        result = result[0] if isinstance(result, tuple) and len(result) == 1 else result
        return shown if result is None else replacement(result, gradient, self.function, hook)


class GradientStore(Probe):
    """A probe that keeps the gradients of its site, by call of the module."""

    def __init__(self) -> None:
        super().__init__(self._store)
        self.by_call: dict[int, VisionActivation] = {}

    def _kept(self) -> list[Tensor]:
        return self.anchors

    def _received(self, gradient: VisionActivation, hook: HookPoint) -> VisionActivation:
        self._store(gradient, hook)
        return gradient

    def _store(self, gradient: VisionActivation, hook: HookPoint) -> None:
        self.by_call[hook.call] = each(torch.detach, gradient)

    def gradient(self) -> VisionActivation | None:
        """Returns the gradient of all calls together; None before a backward pass."""
        found: VisionActivation | None = None
        for call in sorted(self.by_call):
            value = self.by_call[call]
            found = value if found is None else joined(found, value)
        return found


def differentiate(score: Tensor, probes: Iterable[Probe], retain_graph: bool = False) -> None:
    """Runs the backward pass of a score to the nodes of probes, and no further.

    No parameter and no input gets a gradient.
    """
    anchors = [anchor for probe in probes for anchor in probe.anchors]
    if anchors:
        torch.autograd.grad(score, anchors, retain_graph=retain_graph, allow_unused=True)


def last(fns: Sequence[tuple[HookFunction, Any]]) -> list[tuple[HookFunction, Any]]:
    """Returns the functions of a site with probes after all others: what they see flows on.

    A backward pass runs in reverse order, so probes are turned: outer ones act first.
    """
    probes = [pair for pair in fns if isinstance(pair[0], Probe)]
    return [pair for pair in fns if not isinstance(pair[0], Probe)] + probes[::-1]


# --- what is refused, and what is said ------------------------------------------------------


def require_differentiable(
    model: nn.Module, word: str, error: type[HookedVLMError] = HookError
) -> None:
    """Raises `error` for a state of a model in which gradients at sites cannot be had or trusted.

    `word` names what asks for them.
    """
    if is_checkpointed(model):
        raise error(
            f"Gradient checkpointing is on, and {word} cannot go with it: its backward pass "
            "would run blocks again without the hooks. Call "
            "model.hf_model.gradient_checkpointing_disable() first."
        )
    if torch.is_inference_mode_enabled():
        raise error(
            f"{word[0].upper()}{word[1:]} needs gradients, and torch.inference_mode() allows none. "
            "Leave it, or use torch.no_grad() where this works inside it."
        )


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Lets no parameter ask for a gradient for the length of a `with` block.

    What only weights' gradients would need is then not kept by the forward pass.
    """
    asked = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextmanager
def explained(error: type[HookedVLMError], remedy: str) -> Iterator[None]:
    """Turns torch's errors about gradients into ones that say what to do."""
    try:
        yield
    except RuntimeError as raised:
        text = str(raised)
        if not any(word in text for word in ("inplace", "in-place", "derivative", "Inference")):
            raise
        raise error(
            f"The score could not be differentiated: {text.splitlines()[0][:200]} {remedy}"
        ) from raised


def reached(output: Any, probes: Mapping[str, Probe]) -> set[str]:
    """Returns the names of the probes whose nodes the output of a run depends on."""
    owners = {id(a): name for name, probe in probes.items() for a in probe.anchors}
    found: set[str] = set()
    waiting: list[Any] = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if id(getattr(node, "variable", None)) in owners:
            found.add(owners[id(node.variable)])
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return found


def _tensors(output: Any) -> list[Tensor]:
    found = pytree.tree_leaves(dict(output) if hasattr(output, "items") else output)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def warn_unreached(output: Any, probes: Mapping[str, Probe]) -> None:
    """Warns about sites on which the output of a run does not depend: no gradient comes there."""
    ran = {name: probe for name, probe in probes.items() if probe.anchors}
    if ran and has_gradient(output):
        warn_lost(set(ran) - reached(output, ran), "the bwd_hooks there are not called")


def warn_lost(names: Iterable[str], consequence: str) -> None:
    """Warns about sites on which, as far as gradients tell, a score does not depend."""
    lost = sorted(names)
    if lost:
        shown = ", ".join(lost[:3]) + (" …" if len(lost) > 3 else "")
        warnings.warn(
            f"The output does not depend on {counted(len(lost), 'site')}, as far as gradients "
            f"tell, so {consequence}: {shown}. This is right for layers that nothing reads; a "
            "model may also pass no gradient on (quantised layers).",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )

"""Runs the hook functions of one site on the site's activation.

A hook function is `fn(activation, hook)`.  It returns a replacement of the same shape and
dtype, or None to keep the activation.  An edit in place counts as a replacement.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.errors import HookError
from hooked_vlm.hooks.hook_point import CallContext, HookPoint, PassCounter
from hooked_vlm.hooks.patch_order import VisionActivation
from hooked_vlm.hooks.prompts import OnPrompt, acts_on_prompt, match
from hooked_vlm.hooks.sites import Site, read, write


HookFunction = Callable[..., Any]
"""`fn(activation, hook)`, returning a replacement or None."""


class Reader:
    """A hook function of this library that only reads, such as the cache's."""

    def __init__(self, function: Callable[[VisionActivation, HookPoint], None]) -> None:
        self.function = function

    def __call__(self, activation: VisionActivation, hook: HookPoint) -> None:
        self.function(activation, hook)


def _parts(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


class SiteDispatch:
    """Runs the functions of one site on the site's activation."""

    def __init__(
        self,
        site: Site,
        point: HookPoint,
        fns: Sequence[tuple[HookFunction, PassCounter]],
        packing: CallContext,
    ) -> None:
        self.site, self.point, self.fns, self.packing = site, point, fns, packing

    @property
    def editing(self) -> list[tuple[HookFunction, PassCounter]]:
        """The functions that act in this pass and may edit what they are shown."""
        return [
            (fn, run)
            for fn, run in self.fns
            if not isinstance(fn, Reader) and not self._is_inactive(fn, run)
        ]

    @property
    def inactive(self) -> bool:
        """Whether no function acts in this pass."""
        return all(self._is_inactive(fn, run) for fn, run in self.fns)

    def _is_inactive(self, fn: HookFunction, run: PassCounter) -> bool:
        # The vision encoder runs only when there are images to encode: always in a prefill.
        if not self.site.by_prompt or not acts_on_prompt(fn, run):
            return False
        if isinstance(fn, OnPrompt):
            return match(fn, self.packing, run).n_copies == 0
        return run.is_after_prompt

    def run_on_module_value(self, raw: Any) -> Any:
        """Returns the replacement of the module's value `raw`, or None when nothing changed."""
        if self.inactive:
            return None
        if self.site.own:
            require_axes(self.site, raw, self.packing)
        if isinstance(raw, list):  # already split by image
            even = len({tensor.shape for tensor in raw}) == 1
            stacked = torch.stack(raw) if even else raw
            value, changed = self.on_value(stacked)
            return list(value) if changed or is_watched(stacked) else None
        given, shape = raw, raw.shape
        if not self.site.order:
            n_rows = self.packing.n_images if self.site.by_image else self.packing.n_prompts
            raw = _unfolded(raw, self.site, n_rows)
        shown = read(self.site, raw, self.packing.layout)
        value, changed = self.on_value(shown)
        # A gradient that a function asked for (`retain_grad`) comes only if what it was shown is
        # what flows on.
        if not changed and (shown is given or not is_watched(shown)):
            return None
        written = write(self.site, value, raw, self.packing.layout)
        # Reshape only if needed: a view loses the memory layout of axes of size one.
        return written if written.shape == shape else written.reshape(shape)

    def on_value(self, value: VisionActivation) -> tuple[VisionActivation, bool]:
        """Returns the value after all functions, and whether any function changed it."""
        any_changed = False
        self.point.call += 1
        if self.site.own and self.point.call and not self.site.by_image:
            raise HookError(
                f"{self.point.name} runs more than once in a pass, so that one activation cannot "
                "stand for it. Add a site at a module that runs once."
            )
        self._note_positions(value)
        for fn, run in self.fns:
            if self._is_inactive(fn, run):
                continue
            self.point.step = max(run.steps, 0)
            act, n_new = fn, run.n_new if acts_on_prompt(fn, run) else 0
            if isinstance(fn, OnPrompt):
                found = match(fn, self.packing, run)
                act, n_new = fn.on_copies(max(found.n_copies, 1)), found.n_new
            if not n_new or not self.site.by_prompt or isinstance(value, list):
                value, changed = self._apply(act, value)
            else:
                value, changed = self._apply_before(n_new, act, value)
            run.note(changed)
            any_changed |= changed
        return value, any_changed

    def _apply_before(
        self, n_new: int, fn: HookFunction, value: Tensor
    ) -> tuple[VisionActivation, bool]:
        """Applies a function to all but the last positions, which are no part of the prompt."""
        axes = self.site.axes.split()
        prompt = tuple(
            slice(0, -n_new) if axis in ("pos", "query", "key") else slice(None) for axis in axes
        )
        if not value[prompt].numel():  # such as logits of the last position alone
            return value, False
        self._note_positions(value[prompt], n_new)
        part, changed = self._apply(fn, value[prompt])
        self._note_positions(value)
        if not changed:
            return value, False
        assert isinstance(part, Tensor)
        value = value.clone()
        value[prompt] = part
        return value, True

    def _note_positions(self, value: VisionActivation, n_new: int = 0) -> None:
        """Notes which positions of the prompt and its answer the activation's axes hold."""
        axes, call = self.site.axes.split(), self.packing
        if not self.site.by_prompt or call.prompt is None or not isinstance(value, Tensor):
            return
        end = call.start + call.prompt.shape[1] - n_new
        sizes = dict(zip(axes, value.shape, strict=len(axes) == value.ndim))

        def last(axis: str) -> range:
            # The last ones: a layer whose window is full has dropped the first, and logits may be
            # of the last position alone.  A cache of fixed size has room after the last.
            return range(max(end - sizes[axis], 0), end) if axis in sizes else range(0)

        self.point.positions = last("pos" if "pos" in sizes else "query")
        self.point.key_positions = last("key")
        if sizes.get("pos", sizes.get("query", 0)) > end and self.site.tap != "attention":
            # The blocks run on other positions than the prompt's (on an image before it, say).
            self.point.positions = self.point.key_positions = range(0)

    def _apply(self, fn: HookFunction, value: VisionActivation) -> tuple[VisionActivation, bool]:
        if isinstance(fn, Reader):
            fn(value, self.point)
            return value, False
        before = _Snapshot(value)
        result = fn(value, hook=self.point)
        result = value if result is None else result
        if result is value and before.unchanged():
            return value, False
        if self.point.read_only:
            raise HookError(
                f"A hook function changed {self.point.name}, which cannot be written: "
                f"{self.point.read_only}."
            )
        return replacement(result, value, fn, self.point), True


def replacement(
    result: Any, value: VisionActivation, fn: HookFunction, point: HookPoint
) -> VisionActivation:
    """Returns a function's result; raises `HookError` if it cannot replace the value."""
    given, expected = _parts(result), _parts(value)
    ok = isinstance(result, Tensor) == isinstance(value, Tensor) and len(given) == len(expected)
    ok = ok and all(
        isinstance(g, Tensor) and (g.shape, g.dtype, g.device) == (e.shape, e.dtype, e.device)
        for g, e in zip(given, expected, strict=True)
    )
    if ok:
        return given if isinstance(value, list) else result
    raise HookError(
        f"The hook function {getattr(fn, '__name__', fn)!r} at {point.name} returned "
        f"{_describe(result)}; expected {_describe(value)} with axes [{point.axes}]. "
        "Return a tensor of the activation's shape, dtype and device, or None to keep it."
    )


def _unfolded(raw: Tensor, site: Site, n_rows: int) -> Tensor:
    """Returns an activation with its axis of images or prompts restored, if it was folded."""
    n_axes = len(site.axes.split()) - (1 if site.heads else 0)
    if raw.ndim != n_axes - 1 or site.tap == "attention" or not n_rows or len(raw) % n_rows:
        return raw
    return raw.unflatten(0, (n_rows, -1))


def require_axes(site: Site, raw: Any, call: CallContext) -> None:
    """Raises `HookError` for a module's value that does not have the axes of a user's site.

    Rows of prompts may be folded into one axis, if each has the positions of the prompt.
    """
    parts, n_axes = _parts(raw), len(site.axes.split())
    is_listed = isinstance(raw, list)
    wrong = not all(isinstance(x, Tensor) and x.is_floating_point() for x in parts)
    if not wrong and not site.order:
        missing = n_axes - is_listed - parts[0].ndim
        prompt = None if call.prompt is None else call.prompt.shape[:2].numel()
        folded = missing == 1 and (site.by_image or (site.by_position and len(raw) == prompt))
        grid = site.by_image and missing < 0
        wrong = bool(missing) and not folded and not grid
    if wrong:
        raise HookError(
            f"{site.name} is {_describe(raw)} in this model, and was added with the axes "
            f"[{site.axes}]. Give add_site(…, axes=…) its axes, or another module."
        )


def is_watched(value: VisionActivation) -> bool:
    """Whether somebody asked for a gradient of what a function was shown."""
    return any(x.requires_grad and (x.retains_grad or x._backward_hooks) for x in _parts(value))


class _Snapshot:
    """Detects in-place edits of a value, by torch's version counter where there is one.

    Inference tensors have no version counter, so they are copied and compared.
    """

    def __init__(self, value: VisionActivation) -> None:
        self.tensors: list[Tensor] = _parts(value)
        counted = not any(tensor.is_inference() for tensor in self.tensors)
        self.versions = [tensor._version for tensor in self.tensors] if counted else []
        self.copies = [] if counted else [tensor.clone() for tensor in self.tensors]

    def unchanged(self) -> bool:
        if self.versions:
            return all(t._version == v for t, v in zip(self.tensors, self.versions, strict=True))
        return all(torch.equal(t, c) for t, c in zip(self.tensors, self.copies, strict=True))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(map(_describe, value))})"
    return f"a {type(value).__name__}"

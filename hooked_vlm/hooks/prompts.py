"""What a forward pass is to the prompts for which an intervention was placed.

An intervention is placed on certain inputs.  It acts where the model runs on these, once for
each copy of a prompt that a generation makes (for beams, say), and not on the tokens that are
generated after them.  On any other inputs it raises: its indices would still fit somewhere.
All of this is read from the pass itself, its arguments and its key-value cache.

An intervention on generated tokens acts on these alone, in every row, wherever a pass computes
them: one token at a time with a key-value cache, all of them in each pass without.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.anatomy.caches import PROMPTS, caches_among
from hooked_vlm.errors import (
    HookedVLMWarning,
    HookError,
    InterventionError,
    callers_level,
    counted,
)
from hooked_vlm.hooks.hook_point import CallContext, HookPoint, PassCounter
from hooked_vlm.hooks.patch_order import VisionActivation
from hooked_vlm.regions.generated import Generated


class OnPrompt:
    """A hook function that was made for certain inputs, and acts on these alone."""

    def __init__(
        self,
        function: Callable[[Any, HookPoint], Any],
        inputs: Mapping[str, Any],
        n_images: int | None,
    ) -> None:
        """`n_images` is the number of images (None: some prompt has not exactly one)."""
        self.function, self.inputs, self.n_images = function, inputs, n_images
        self.__name__ = getattr(function, "__name__", "intervention")

    def __call__(self, activation: VisionActivation, hook: HookPoint) -> Any:
        return self.function(activation, hook)

    def on_copies(self, n_copies: int) -> Callable[..., Any]:
        """Returns the function for a pass in which each prompt (or image) is there several times.

        The copies of a prompt follow one another, as generation makes them.
        """
        if n_copies == 1:
            return self.function

        def fn(activation: VisionActivation, hook: HookPoint) -> VisionActivation:
            if not hook.axes.startswith("batch") and len(activation) != n_copies * (
                self.n_images or 0
            ):
                raise InterventionError(
                    f"{hook.name} has {counted(len(activation), 'row')} of images, and a "
                    f"generation made {n_copies} copies of each prompt, so an intervention there "
                    "cannot tell whose they are. Give prompts of one image each (in one tile), or "
                    "generate without beams and num_return_sequences."
                )
            parts = [self.function(activation[i::n_copies], hook) for i in range(n_copies)]
            in_turn = [row for rows in zip(*parts, strict=True) for row in rows]
            return torch.stack(in_turn) if isinstance(activation, Tensor) else in_turn

        return fn


class OnGenerated:
    """A hook function that acts on what is generated after certain inputs, and on nothing else."""

    def __init__(
        self,
        function: Callable[[Any, list[int]], Any],
        places: Sequence[Generated],
        inputs: Mapping[str, Any],
        name: str,
    ) -> None:
        """`function` takes an activation, and where on its axis of positions to act."""
        self.function, self.places, self.inputs = function, places, inputs
        self.acted = False
        self._end = 0
        self.__name__ = name

    def __call__(self, activation: VisionActivation, hook: HookPoint) -> Any:
        held = hook.positions
        if not held:
            raise InterventionError(
                f"{hook.name} runs on other positions than the prompt's, so generated tokens "
                "cannot be told apart there. Use a hook function, which acts at every step."
            )
        if not hook.step:
            self._end = held.stop
        index = sorted({i for place in self.places for i in place.index(held, self._end)})
        if not index:
            return None
        self.acted = True
        return self.function(activation, index)


def require_generation(pairs: Iterable[tuple[str, Any]]) -> None:
    """Raises `InterventionError` for functions on generated tokens, in a run that makes none."""
    fn = next((fn for _, fn in pairs if isinstance(fn, OnGenerated)), None)
    if fn is not None:
        raise InterventionError(
            f"{fn.__name__} acts on generated tokens, and this run generates nothing. Use "
            "model.generate(inputs, fwd_hooks=…), or a place of the prompt."
        )


def warn_ungenerated(pairs: Iterable[tuple[str, Any]]) -> None:
    """Warns about functions on generated tokens where none of these was computed."""
    idle = [fn for _, fn in pairs if isinstance(fn, OnGenerated) and not fn.acted]
    if idle:
        warnings.warn(
            f"{idle[0].__name__} did not act: no such token was computed. The last token that a "
            "generation returns is never run, so generate one more than the last to act on.",
            HookedVLMWarning,
            stacklevel=callers_level(),
        )


@dataclass(frozen=True)
class Match:
    """What a pass is to the inputs of an intervention."""

    n_copies: int = 1
    """How often each prompt is in the pass; 0: the pass comes after the prompt."""
    n_new: int = 0
    """Number of tokens after the prompt, where the pass repeats it."""


def match(fn: OnPrompt | OnGenerated, call: CallContext, run: PassCounter) -> Match:
    """Returns what the call in progress is to the inputs of an intervention; found once a call.

    Raises `InterventionError` for a call on other inputs, or on a part of a prompt.
    """
    key = id(fn.inputs), id(run)
    if key not in call.matches:
        call.matches[key] = _match(fn.inputs, call, run)
    return call.matches[key]


def _match(inputs: Mapping[str, Any], call: CallContext, run: PassCounter) -> Match:
    # 1. Which argument of the call is the prompt's; some calls have none to compare.
    given = call.prompt
    named = [n for n in PROMPTS if given is not None and call.given.get(n) is given]
    names = named or PROMPTS  # a positional argument has no name
    own = next((inputs[n] for n in names if isinstance(inputs.get(n), Tensor)), None)
    if given is None or own is None or own.shape[2:] != given.shape[2:]:
        _require_same_geometry(inputs, call)
        return Match(0 if run.is_after_prompt else 1, run.n_new)
    # 2. The whole prompt, once or in several copies.
    batch, length = own.shape[:2]
    continues = call.start > 0 and not caches_among((), inputs)
    n_copies = len(given) // batch if batch and len(given) % batch == 0 else 0
    if not continues and n_copies and given.shape[1] == length and _copies(given, own, n_copies):
        if n_copies == 1:
            _require_same_geometry(inputs, call)
        return Match(n_copies)
    # 3. A step of a generation, with a cache or with the prompt again.
    if run.is_after_prompt and call.start >= length:
        return Match(0)
    longer = not call.start and given.shape[1] > length
    if longer and n_copies and _copies(given[:, :length], own, n_copies):
        return Match(n_copies, given.shape[1] - length)
    # 4. Anything else.
    if given.shape[1] < length and (continues or _copies(given, own[:, : given.shape[1]], 1)):
        raise InterventionError(
            f"The model runs on {counted(given.shape[1], 'position')} of a prompt of {length} at "
            "a time, so an intervention on the prompt cannot act. Generate without "
            "prefill_chunk_size, or use a hook function, whose hook.positions says where it is."
        )
    raise InterventionError(
        f"An intervention was made for {_size(own)} and the model runs on "
        f"{'other ones' if given.shape == own.shape else _size(given)}. Give "
        "hooks(…, inputs=…) the inputs that you run. Where a model's blocks run on other positions "
        "than the prompt's, use a hook function there."
    )


def _size(prompts: Tensor) -> str:
    batch, length = prompts.shape[:2]
    return f"{counted(batch, 'prompt')} of {counted(length, 'position')}"


def _copies(given: Tensor, own: Tensor, n_copies: int) -> bool:
    """Whether a call's prompts are one's own, each `n_copies` times."""
    if given is own:
        return True
    expected = own if n_copies == 1 else own.repeat_interleave(n_copies, dim=0)
    if given.shape != expected.shape:
        return False
    return given.is_meta or own.is_meta or torch.equal(given, expected.to(given.device))


def _require_same_geometry(inputs: Mapping[str, Any], call: CallContext) -> None:
    """Raises `InterventionError` for other masks, sizes or grids of images than the inputs'."""
    for name, own in inputs.items():
        given = call.given.get(name)
        if given is own or not isinstance(own, Tensor) or not isinstance(given, Tensor):
            continue
        if given.is_meta or own.is_meta or own.dtype.is_floating_point:
            same = given.ndim != own.ndim or given.shape == own.shape
        else:
            same = given.shape != own.shape or torch.equal(given, own.to(given.device))
        if not same and name not in PROMPTS:
            raise InterventionError(
                f"An intervention was made for inputs with another {name!r} than those that the "
                "model runs on. Give hooks(…, inputs=…) the inputs that you run."
            )


def acts_on_prompt(fn: Any, run: PassCounter) -> bool:
    """Whether a hook function acts on the prompt alone, not on what is generated after it."""
    return isinstance(fn, OnPrompt) or (run.prefill_only and not isinstance(fn, OnGenerated))


def refuse_mixed(name: str) -> HookError:
    """Returns the error for keys or values that some functions edit once and some at each step."""
    return HookError(
        f"At {name}, in a step of a generation with a cache, some functions act on the prompt "
        "alone and others at every step. What the first wrote is in the cache already, so the "
        "order is lost. Use one kind of them there, or generate with use_cache=False."
    )

"""The context of a hook function: its site, the pass, and the call.

`HookPoint` is passed to the user's functions.  `PassCounter` decides in which passes the
functions of one `with` block act, and `CallContext` describes the images and prompts of the
forward pass in progress.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import HookedVLMError, HookError, UnknownHookError, UnknownNameError
from hooked_vlm.hooks.names import resolve_name, site_path
from hooked_vlm.hooks.patch_order import PackedLayout
from hooked_vlm.hooks.turns import Owner


_NO_HOOKS = (
    "A hook point keeps no hooks: use model.run_with_hooks(inputs, [(hook.name, function)]) or "
    "`with model.hooks([(hook.name, function)])`."
)
INSTEAD = {
    **dict.fromkeys(("add_hook", "add_perma_hook", "fwd_hooks", "has_hooks"), _NO_HOOKS),
    **dict.fromkeys(("remove_hooks", "forward"), _NO_HOOKS),
    "bwd_hooks": "Use model.run_with_hooks(inputs, bwd_hooks=[(hook.name, function)]).",
    "clear_context": "Use hook.ctx.clear().",
    "pos_dim": "hook.axes names the axes in order: hook.axes.split().index('pos').",
    **dict.fromkeys(
        ("hook_conversion", "enable_reshape", "backward_scale"),
        "Activations have the axes that hook.axes names, and are not converted.",
    ),
}
"""Names of TransformerLens's hook points, and what to do in their place."""


@dataclass(eq=False)
class HookPoint:
    """The site at which a hook function runs, passed to it as `hook`.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> def show(activation, hook):
    ...     print(hook.name, [hook.axes], "layer", hook.layer(), "step", hook.step)
    >>> logits = model.run_with_hooks(inputs, [("blocks.1.hook_resid_post", show)])
    blocks.1.hook_resid_post ['batch pos d_model'] layer 1 step 0
    """

    name: str
    axes: str
    """The names of the activation's axes, in order, separated by blanks."""
    read_only: str = ""
    """Why the site cannot be written; empty when it can."""
    ctx: dict = field(default_factory=dict)
    """A dict in which the user's functions can store values between calls."""
    step: int = 0
    """Number of the forward pass in a generation: 0 is the prefill.

    A pass continues the previous one when it gets a non-empty key-value cache or, without a
    cache, the same prompt followed by more tokens; any other pass is a new prefill."""
    call: int = -1
    """Number of the module's call in this pass: some projectors run once for each image."""
    positions: range = range(0)
    """The positions of the prompt and its answer, padding counted, that the axis `pos` (or
    `query`) holds in this pass: one, in a step of a generation with a cache.  Empty at sites of
    the vision encoder and projector."""
    key_positions: range = range(0)
    """The positions that the axis `key` holds: fewer than all where a layer's attention is to a
    window of them.  A cache of fixed size has unused keys after these."""

    rows: Sequence[Int[Tensor, "row 2"]] = ()
    """At scores and patterns of an encoder that packs its patches: the image and the place in it
    of each row of a matrix, for each matrix shown.  That is one for each image, window or frame."""

    def keys_at(self, positions: Int[Tensor, "*any"]) -> Int[Tensor, " key"]:
        """Returns where positions of the prompt and its answer are on the axis `key`, ascending.

        Positions that a sliding window no longer holds are left out: no query attends to them.
        `pattern[..., hook.keys_at(grid.positions)].sum(-1)` is the attention on an image, at
        every step of a generation and in every layer.
        """
        held = self.key_positions
        index = positions.flatten().unique() - held.start
        return index[(index >= 0) & (index < len(held))]

    def __getattr__(self, name: str) -> Any:
        hint = INSTEAD.get(name, "")
        raise UnknownNameError(f"A hook point has no attribute {name[:80]!r}. {hint}".strip())

    def layer(self) -> int:
        """Returns the number of the site's block; raises `HookError` when it is in no block."""
        layer = site_path(self.name).layer
        if layer is None:
            raise HookError(
                f"{self.name} is not inside a block, so it has no layer. Call layer() only at "
                "sites whose name contains 'blocks'."
            )
        return layer


Found = TypeVar("Found")


class ByName(dict[str, Found]):
    """A model's hook points or sites by name; other spellings that hooks accept are found too.

    `more` are the ones that run only where they are named: found by name, and not listed.

    Raises `UnknownNameError`, which is a `KeyError` as well, with the nearest names.
    """

    more: Mapping[str, Any] = MappingProxyType({})

    def __missing__(self, name: str) -> Found:
        if name in self.more:
            return self.more[name]
        try:
            return self[resolve_name(str(name), self)]
        except UnknownHookError as error:
            raise UnknownNameError(str(error)) from None


@dataclass(eq=False)
class PassCounter:
    """Counts passes, and decides in which of them the functions of one `with` block act."""

    prefill_only: bool = False
    is_generation: bool = False
    """Whether the block holds one generation, and so exactly one prefill."""
    owner: Owner = field(default_factory=Owner.current)
    """The thread and task that opened the block."""
    length: int | None = None
    """The length of the prompt, where it is known before the run: the prefill may come in
    several passes (chunks)."""
    steps: int = -1
    """Number of the forward pass in progress: 0 is the prefill."""
    prompt: Tensor | None = None
    """The token ids (or embeddings) of the prefill."""
    n_new: int = 0
    """Number of tokens after the prompt in the pass in progress, where it repeats the prompt, as
    a generation without a cache does; 0 elsewhere."""
    running: bool = False
    """Whether a pass is in progress; a backward pass that runs blocks again is none."""
    edited: bool = False
    """Whether a function edited an activation in a pass that no backward pass has run again."""
    has_gradient: bool = False
    """Whether the output of a pass can be differentiated."""

    def note(self, changed: bool) -> None:
        """Records that a function has run, and whether it changed its activation."""
        self.edited = self.running and (self.edited or changed)

    @property
    def is_after_prompt(self) -> bool:
        """Whether this pass comes after the prefill and does not repeat the prompt."""
        return self.steps > 0 and not self.n_new


@dataclass(eq=False)
class CallContext:
    """Images and prompts of the forward pass in progress."""

    layout: PackedLayout | None = None
    """The order of patches, where the encoder packs them."""
    n_images: int = 1
    """Number of images in the encoder's call, where it does not pack them."""
    n_prompts: int = 0
    """Number of prompts in the language model's call; 0 while unknown."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """The keyword arguments of the model's call."""
    prompt: Tensor | None = None
    """The token ids (or embeddings) of the model's call."""
    start: int = 0
    """Number of positions that a key-value cache held before the call."""
    matches: dict[tuple[int, int], Any] = field(default_factory=dict)
    """What the call is to the inputs of interventions, once it was asked (see `prompts`)."""


def require_hook_function(fn: Any, error: type[HookedVLMError]) -> None:
    """Raises `error` for a function that cannot be called as `fn(activation, hook=…)`.

    Otherwise Python raises a TypeError from inside the run.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(None, hook=None)
    except TypeError:
        name = getattr(fn, "__name__", type(fn).__name__)
        raise error(
            f"The hook function {name!r} takes {str(signature)[:120]}; it is called as "
            f"{name}(activation, hook=hook). Give it two arguments, the second one named hook."
        ) from None

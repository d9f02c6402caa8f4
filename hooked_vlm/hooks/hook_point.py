"""What a hook function is told: where it runs, in which pass, and on what.

`HookPoint` is the user's; `Run` says when the functions of one `with` block act, and
`Packing` what is known of the images and prompts of the forward pass in progress.
"""

from dataclasses import dataclass, field

from torch import Tensor

from hooked_vlm.errors import HookError
from hooked_vlm.hooks.patch_order import PackedLayout


@dataclass(eq=False)
class HookPoint:
    """What a hook function is told about where it runs."""

    name: str
    axes: str
    """The names of the activation's axes, in order, separated by blanks."""
    read_only: str = ""
    """Why a write here is refused; empty when it is allowed."""
    ctx: dict = field(default_factory=dict)
    """Room for a user's functions to keep things between calls."""
    step: int = 0
    """Which forward pass of a generation this is: 0 is the prefill.

    A pass continues one before it when it is given a key-value cache that holds something, or,
    without a cache, the same prompt and more; any other pass is a new prefill."""
    call: int = -1
    """Which call of its module in this pass: some projectors run once for each image."""

    def layer(self) -> int:
        """Returns the block this point is in; raises `HookError` when it is in none."""
        parts = self.name.split(".")
        if "blocks" not in parts:
            raise HookError(f"{self.name} is not inside a block, so it has no layer.")
        return int(parts[parts.index("blocks") + 1])


@dataclass(eq=False)
class PassCounter:
    """When the functions of one `with` block act during a generation."""

    prefill_only: bool = False
    is_generation: bool = False
    """Whether the block holds one generation, and so exactly one prefill."""
    steps: int = -1
    """Which forward pass of a generation is in progress: 0 is the prefill."""
    prompt: Tensor | None = None
    """The token ids (or embeddings) of the prefill."""
    repeats: bool = False
    """Whether the pass in progress repeats the prompt, as a generation without a cache does."""

    @property
    def inactive(self) -> bool:
        """Whether this pass is past the prefill, and holds no prompt to act on again."""
        return self.prefill_only and self.steps > 0 and not self.repeats

    def window(self, axes: str) -> tuple[slice, ...] | None:
        """Returns the slice of a repeated, uncached pass that is the prompt (None: all of it)."""
        names = axes.split()
        if not self.prefill_only or self.steps <= 0 or names[0] != "batch":
            return None
        assert self.prompt is not None, "a pass repeats a prompt that was noted before it"
        prompt = slice(0, self.prompt.shape[1])
        return tuple(prompt if axis in ("pos", "query", "key") else slice(None) for axis in names)


@dataclass(eq=False)
class CallContext:
    """What is known of the vision encoder's call in progress."""

    layout: PackedLayout | None = None
    """The order of patches, where the encoder packs them."""
    n_images: int = 1
    """How many images it was given, where it takes them one by one."""
    n_prompts: int = 0
    """How many prompts the language model was given; 0 before that is known."""

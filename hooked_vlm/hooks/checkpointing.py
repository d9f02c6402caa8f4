"""Gradient checkpointing, whose backward pass runs blocks again: with the hooks, or without.

A checkpointed block keeps no activations for its backward pass; that runs the block's forward
again.  An edit by a hook that is gone by then is missing there, and the gradients are those of
another model.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from hooked_vlm.anatomy.wrappers import modules_of
from hooked_vlm.errors import HookedVLMWarning, HookError
from hooked_vlm.hooks.hook_point import PassCounter


def is_checkpointed(model: nn.Module) -> bool:
    """Whether a backward pass through a model would run some of its modules again."""
    return any(
        (getattr(module, "gradient_checkpointing", False) is True and module.training)
        or "checkpoint_fn" in vars(module)  # torch's checkpoint_wrapper, in training or not
        for module in modules_of(model)
    )


def has_gradient(output: Any) -> bool:
    """Whether a module's output can be differentiated."""
    values = dict(output) if isinstance(output, ModelOutput) else output
    return any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(values))


_WITHOUT = (
    "gradient checkpointing is on, so a backward pass runs blocks again, then without these edits: "
    "its gradients would be another model's."
)
_INSTEAD = (
    "with model.hooks(…): around both the run and backward(), or switch it off: "
    "model.hf_model.gradient_checkpointing_disable()."
)


def require_repeatable(model: nn.Module, run: PassCounter, output: Any) -> None:
    """Raises `HookError` where a run that has ended edited what a backward pass makes again."""
    if run.edited and has_gradient(output) and is_checkpointed(model):
        raise HookError(
            f"Hook functions edited activations of a run that has ended, and {_WITHOUT} Use "
            f"{_INSTEAD} Without gradients, run under torch.no_grad()."
        )


def warn_unrepeated(model: nn.Module, run: PassCounter, stacklevel: int) -> bool:
    """Warns where a block of hooks ends before the backward pass of the runs that it edited."""
    if not (run.edited and run.has_gradient and is_checkpointed(model)):
        return False
    warnings.warn(
        f"A block of hooks ended after edits and before a backward pass, and {_WITHOUT} Put "
        f"{_INSTEAD} (Shown once per model.)",
        HookedVLMWarning,
        stacklevel=stacklevel + 1,
    )
    return True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation for a measurement, without dropout and checkpointing."""
    training = [module for module in modules_of(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

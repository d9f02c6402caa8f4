"""Cells of a sweep run from where they first differ from the clean run.

An intervention at block l of the language model leaves the vision encoder and all blocks
below l as they were.  So the clean pass runs once, its residual stream in front of the
blocks in question and the encoder's output are kept, and every cell runs from its first
changed block on.  The numbers are those of `engine.run_plain`, bit for bit: before a model
is trusted with it, clean passes run both ways and must agree exactly, and whatever cannot
be started this way (hooks that are open, a model whose blocks depend on more than their
input) runs plainly.  Cells that edit the vision encoder run
all of the language model, and of the encoder what is not below their edit.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vlm.engine import Cell, parts_of, run_plain
from hooked_vlm.errors import HookedVLMError, HookError
from hooked_vlm.interventions import site_of


FEWEST = 4
"""Cells from which on it pays to run the clean passes that prove it right."""
BUDGET = 2**30
"""Bytes of residual streams that may be kept."""

Metric = Callable[[Tensor], Tensor]
OnProgress = Callable[[int, int], None]


def run_cells(
    model: Any,
    inputs: Mapping[str, Any],
    cells: Sequence[Cell],
    metric: Metric,
    on_progress: OnProgress | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Returns the metric of every cell, as `run_plain` does, by the shortest way that is safe."""
    arguments = dict(forward_kwargs or {})
    with torch.no_grad():
        start = Restart.of(model, inputs, cells, arguments) or TowerRestart.of(
            model, inputs, cells, arguments
        )
        if start is None:
            return run_plain(model, inputs, cells, metric, on_progress, forward_kwargs)
        scores = []
        for done, cell in enumerate(cells, start=1):
            scores.append(metric(start.run(cell)))
            if on_progress is not None:
                on_progress(done, len(cells))
    return scores


@dataclass(frozen=True, eq=False)
class Restart:
    """A clean pass, kept where cells start from."""

    model: Any
    inputs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    base: Sequence[Any]
    """Interventions that every cell begins with."""
    residuals: Mapping[int, Tensor]
    """The residual stream in front of a block, by its index, under `base`."""
    encoded: Sequence[Any] | None
    """What each call of the vision encoder returned; None where it was not called."""
    plain: Tensor
    """The logits of the clean pass (under `base`)."""

    @classmethod
    def of(
        cls,
        model: Any,
        inputs: Mapping[str, Any],
        cells: Sequence[Cell],
        arguments: Mapping[str, Any],
    ) -> "Restart | None":
        """Returns a start that was proved exact on these inputs, or None where there is none."""
        if len(cells) < FEWEST or model.is_hooked or model.hf_model.training:
            return None
        base = cells[0].base
        touched = layers_of(model, base)
        layers = [first_layer(model, cell) for cell in cells]
        if touched is None or None in layers:
            return None
        # What the base does at a block must be behind the start.
        lowest = max(touched, default=-1)
        starts = {layer for layer in layers if layer is not None and layer > max(lowest, 0)}
        try:
            made = cls._recorded(model, inputs, arguments, base, starts)
            return made if made._is_exact() else None
        except (HookedVLMError, RuntimeError, KeyError, TypeError, ValueError):
            return None  # this model cannot be cut here: what is wrong, if it is, shows plainly

    @classmethod
    def _recorded(
        cls,
        model: Any,
        inputs: Mapping[str, Any],
        arguments: Mapping[str, Any],
        base: Sequence[Any],
        starts: set[int],
    ) -> "Restart":
        # A pass of its own, once a model: while the encoder replays, none may come between.
        model.block_outputs(lambda: model(inputs, **arguments))
        with recording(encoder_of(model)) as encoded:
            sites = [_site(layer) for layer in sorted(starts)]
            plain, cache = model.run_with_cache(inputs, sites, fwd_hooks=base, **arguments)
        each = max((cache[_site(layer)].nbytes for layer in starts), default=1)
        kept = spread(sorted(starts), max(1, BUDGET // each))
        residuals = {layer: cache[_site(layer)] for layer in kept}
        return cls(model, inputs, arguments, base, residuals, encoded or None, plain)

    def run(self, cell: Cell) -> Tensor:
        """Returns the logits of a cell."""
        layer = first_layer(self.model, cell)
        below = [start for start in self.residuals if layer is not None and start <= layer]
        with replaying(encoder_of(self.model), self.encoded):
            if not below:
                return self.model.run_with_hooks(self.inputs, cell.interventions, **self.arguments)
            start = max(below)
            return self.model.run_from_layer(
                self.inputs, self.residuals[start], start, cell.own, **self.arguments
            )

    def _is_exact(self) -> bool:
        """Whether clean passes from the first and the last start give the plain one's logits.

        The first one runs twice: what it is given must not wear out.
        """
        first, last = min(self.residuals, default=0), max(self.residuals, default=0)
        for layer in (first, last, first):
            with replaying(encoder_of(self.model), self.encoded):
                if layer:
                    residual = self.residuals[layer]
                    again = self.model.run_from_layer(
                        self.inputs, residual, layer, **self.arguments
                    )
                else:
                    again = self.model.run_with_hooks(self.inputs, self.base, **self.arguments)
            if not torch.equal(again, self.plain):
                return False
        return True


@dataclass(frozen=True, eq=False)
class TowerRestart:
    """A clean pass through the vision encoder, kept block by block.

    Every token sees all others there, so cells have only the blocks below their first change in
    common with it; those hand on what they did.
    """

    model: Any
    inputs: Mapping[str, Any]
    arguments: Mapping[str, Any]
    blocks: Sequence[nn.Module]
    outputs: Sequence[Sequence[Any]]
    """What each call of each block returned."""

    @classmethod
    def of(
        cls,
        model: Any,
        inputs: Mapping[str, Any],
        cells: Sequence[Cell],
        arguments: Mapping[str, Any],
    ) -> "TowerRestart | None":
        """Returns a start that was proved exact on these inputs, or None where there is none."""
        unready = len(cells) < FEWEST or model.is_hooked or model.hf_model.training
        if unready or model.anatomy.vision is None:
            return None
        depths = [tower_depth(model, cell.interventions) for cell in cells]
        if not any(depths):
            return None
        paths = [block.path for block in model.anatomy.vision.blocks[: max(depths)]]
        blocks = [model.hf_model.get_submodule(path) for path in paths]
        try:
            with ExitStack() as stack:
                outputs = [stack.enter_context(recording(block)) for block in blocks]
                encoded = cls._encoded(model, inputs)
            made = cls(model, inputs, arguments, blocks, outputs)
            with made._replaying(len(blocks)):
                again = cls._encoded(model, inputs)
        except (HookedVLMError, RuntimeError, KeyError, TypeError, ValueError):
            return None  # what is wrong, if it is, shows plainly
        alike = len(encoded) == len(again) and all(map(torch.equal, encoded, again))
        return made if encoded and alike else None

    @staticmethod
    def _encoded(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Returns all that the encoder hands on, from a pass that ends behind it."""
        with recording(encoder_of(model)) as found:
            site = "vision_encoder.blocks.0.hook_resid_pre"
            model.run_with_cache(inputs, [site], stop_at_layer=0)
        return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]

    def run(self, cell: Cell) -> Tensor:
        """Returns the logits of a cell."""
        with self._replaying(tower_depth(self.model, cell.interventions)):
            return self.model.run_with_hooks(self.inputs, cell.interventions, **self.arguments)

    @contextmanager
    def _replaying(self, depth: int) -> Iterator[None]:
        with ExitStack() as stack:
            for block, outputs in zip(self.blocks[:depth], self.outputs, strict=False):
                stack.enter_context(replaying(block, outputs))
            yield


def tower_depth(model: Any, interventions: Sequence[Any]) -> int:
    """Returns how many of the vision encoder's blocks lie below all changes; 0 for no changes."""
    depths = [model.cfg.vision.n_layers]
    for part in parts_of(interventions):
        if not hasattr(part, "site"):
            return 0
        name = site_of(model, part.site).name
        block = re.match(r"vision_encoder\.blocks\.(\d+)\.(.*)", name)
        if block is not None:
            depths.append(int(block[1]) + (block[2] == "hook_resid_post"))
        elif not name.startswith(BEHIND_BLOCKS):
            return 0
    return min(depths)


BEHIND_BLOCKS = ("vision_encoder.hook_out", "vision_projector.", "blocks.", "ln_final.", "hook_")
"""Where names begin that no block of the vision encoder comes behind."""


def first_layer(model: Any, cell: Cell) -> int | None:
    """Returns the first LM block that a cell changes something of, or None in front of them.

    0 stands for the embeddings too: all blocks run.  A cell without interventions of its own
    starts at the last block.
    """
    layers = layers_of(model, cell.own)
    return None if layers is None else min([*layers, model.cfg.n_layers - 1])


def layers_of(model: Any, interventions: Sequence[Any]) -> list[int] | None:
    """Returns the LM blocks that interventions change something of, or None for any other place.

    What is behind the last block counts as that block.
    """
    layers = []
    for part in parts_of(interventions):
        if not hasattr(part, "site"):
            return None  # a hook function of one's own, or an intervention unknown here
        name = site_of(model, part.site).name
        block = re.match(r"blocks\.(\d+)\.", name)
        if block is not None:
            layers.append(int(block[1]))
        elif name in ("hook_embed", "hook_merged_embed"):
            layers.append(0)
        elif name.startswith(("ln_final", "hook_logits")):
            layers.append(model.cfg.n_layers - 1)
        else:
            return None
    return layers


def spread(layers: Sequence[int], most: int) -> list[int]:
    """Returns at most so many of some layers, evenly spread, the first among them.

    >>> spread([1, 2, 3, 4, 5], 2)
    [1, 4]
    """
    step = -(-len(layers) // most) if layers else 1
    return list(layers[::step])


@contextmanager
def recording(module: nn.Module | None) -> Iterator[list[Any]]:
    """Collects what a module returns, call by call, for the length of a `with` block."""
    found: list[Any] = []
    if module is None:
        yield found
        return
    handle = module.register_forward_hook(lambda _, args, output: found.append(_copied(output)))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def replaying(module: nn.Module | None, outputs: Sequence[Any] | None) -> Iterator[None]:
    """Lets a module return recorded outputs, call by call, for the length of a `with` block.

    Raises `HookError` where it is called more often than was recorded.
    """
    if module is None or outputs is None:
        yield
        return
    waiting = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return _copied(next(waiting))
        except StopIteration:
            raise HookError(
                f"{type(module).__name__} was called more often than the {len(outputs)} times "
                "that were recorded."
            ) from None

    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own


def _copied(output: Any) -> Any:
    """A copy, so that what a model does to an encoder's output in place is not kept."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, output)


def encoder_of(model: Any) -> nn.Module | None:
    """Returns the vision encoder's module, if there is one."""
    vision = model.anatomy.vision
    return None if vision is None else model.hf_model.get_submodule(vision.path)


def _site(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_pre"

"""Runs that several sweeps have in common, made once: encoded images, sources, clean runs.

    with shared_runs(model):
        strips = strip_sweep.run(model, metric)
        tokens = token_sweep.run(model, metric)  # the same prompts: nothing is encoded again

What counts is what is in the inputs, not which object holds it.  Nothing is kept after the
`with` block, and nothing is taken from before a weight or a buffer was changed (`weights` says
which writes are not noticed: those through `.data` on a GPU).
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hooked_vlm.anatomy.weights import Weights
from hooked_vlm.anatomy.wrappers import modules_of
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Count, Model
from hooked_vlm.engine.clean_run import with_forwards
from hooked_vlm.engine.fingerprints import arithmetic, content_of, ways_of_attending
from hooked_vlm.engine.folded_run import Folding, is_separate, run_folded
from hooked_vlm.engine.image_cache import encoding_once
from hooked_vlm.engine.stages import IN_FRONT, stage_of
from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.interventions.recording import Recording, record


BUDGET = 2**31
"""Bytes kept where no other number is given; what was used longest ago goes first."""


class RunStore:
    """What is kept of a model's runs, within a number of bytes."""

    def __init__(self, model: Any, memory: int) -> None:
        self.memory, self.taken = memory, 0
        self.reused = 0
        """How often something was found here."""
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._model, self._weights = model, Weights(model.hf_model)

    def get(self, key: Hashable) -> Any:
        """Returns what was kept under a key, or None."""
        key = (key, self._state())
        if key not in self._found:
            return None
        self._found.move_to_end(key)
        self.reused += 1
        return self._found[key][0]

    def keep(self, key: Hashable, value: Any, tensors: Any = None) -> None:
        """Keeps a value (of these tensors, where it hides them), letting go of others for it."""
        leaves = pytree.tree_leaves(value if tensors is None else tensors)
        size = sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        if size > self.memory:
            return
        key = (key, self._state())
        self.taken += size - self._found.pop(key, (None, 0))[1]
        self._found[key] = value, size
        while self.taken > self.memory:
            _, (_, freed) = self._found.popitem(last=False)
            self.taken -= freed

    def _state(self) -> Hashable:
        """Returns what changes whenever a weight is written, or the model computes otherwise."""
        # Adapters (LoRA and the like) are turned on and off by flags of their layers.
        adapters = [
            (vars(layer)["_disable_adapters"], str(vars(layer).get("_active_adapter")))
            for layer in modules_of(self._model.hf_model)
            if "_disable_adapters" in vars(layer)
        ]
        return self._weights.state(), tuple(adapters), arithmetic(self._model.device)


_OPEN: dict[int, RunStore] = {}
"""By the `id` of the model, which lives as long as its `with` block."""


@checked(InterventionError)
@contextmanager
def shared_runs(model: Model, memory: Count = BUDGET) -> Iterator[RunStore]:
    """Lets sweeps on the same inputs share encoded images and source runs, within a `with` block.

    `memory` is in bytes.  Blocks may be nested: the outermost one counts.  Weights may be changed
    within the block, but on a GPU not through `.data`, which gives a tensor no new version.
    """
    if id(model) in _OPEN:
        yield _OPEN[id(model)]
        return
    runs = _OPEN[id(model)] = RunStore(model, memory)
    try:
        with model.eager(), encoding_once(model, runs):
            yield runs
    finally:
        del _OPEN[id(model)]


def recorded_once(model: Any, inputs: Mapping[str, Any], names: Sequence[str]) -> Recording:
    """Returns a run's named activations, from an earlier run where that had them all."""
    runs = open_runs(model)
    stages = [stage_of(name, model.cfg.n_layers)[0] for name in names]
    if runs is None or IN_FRONT in stages:
        return _record(model, inputs, names)
    key = ("source", content_of(inputs), ways_of_attending(model), is_separate(model))
    kept: dict[str, Any] = runs.get(key) or {}
    missing = [name for name in names if name not in kept]
    if missing:
        made = _record(model, inputs, missing).cache
        kept = {**kept, **{name: made[name] for name in missing}}
        runs.keep(key, kept)
    chosen = {name: kept[name] for name in names}
    return Recording(inputs, ActivationCache(chosen))


def _record(model: Any, inputs: Mapping[str, Any], names: Sequence[str]) -> Recording:
    """Records a run, with a row for several prompts where sites lie between blocks or before."""
    stages = [stage_of(name, model.cfg.n_layers) for name in names]
    inside = [name for name, (stage, between) in zip(names, stages, strict=True)
              if stage >= 0 and not between]  # fmt: skip
    if inside or model.is_hooked or model.hf_model.training:
        return record(model, inputs, names)

    def run(folding: Folding | None) -> Recording:
        with with_forwards(folding.blocks, folding.wrap) if folding else nullcontext():
            return record(model, inputs, names)

    with model.turn(), model.eager(), torch.no_grad():
        return run_folded(model, inputs, run, {}, kept=1)


def open_runs(model: Any) -> RunStore | None:
    """Returns a model's open store; none where hooks or dropout would change what is kept."""
    return None if model.is_hooked or model.hf_model.training else _OPEN.get(id(model))

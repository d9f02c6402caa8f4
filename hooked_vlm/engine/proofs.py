"""Facts measured once for each model, or for a model and a shape of inputs, and cached.

How rows are fitted to a block depends on the shapes of what the block is called with, on
where rows start, and on how attention is computed; not on what is in them, nor on how many
rows there are.  So a control that came out right speaks for all passes of that kind, and
later ones go without.  `forget` drops them all.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.engine.clean_run import Clean, run_clean
from hooked_vlm.engine.fingerprints import forget_known, remember, shapes_of, ways_of_attending
from hooked_vlm.hooks.stand_ins import uncached
from hooked_vlm.interventions.steer import Steer


_CALLED: WeakKeyDictionary[Any, dict[Hashable, tuple[Hashable, Tensor]]] = WeakKeyDictionary()
_PROVED: WeakKeyDictionary[Any, dict[Hashable, int]] = WeakKeyDictionary()


def is_proved(model: Any, kind: Hashable, stage: int) -> bool:
    """Whether a control came out right in a pass of this kind, through all blocks from `stage`."""
    return stage >= _PROVED.get(model, {}).get(kind, stage + 1)


def prove(model: Any, kind: Hashable, stage: int) -> None:
    """Notes that a control came out right in a pass of this kind, from block `stage` on."""
    lowest = _PROVED.setdefault(model, {})
    lowest[kind] = min(stage, lowest.get(kind, stage))


def forget(model: Any) -> None:
    """Forgets everything measured about a model, so that it is measured again."""
    forget_known(model)
    _PROVED.pop(model, None)
    _CALLED.pop(model, None)


def kind_of(model: Any, clean: Clean, start: int, is_trimmed: bool) -> Hashable:
    """Returns what passes have in common that one control speaks for."""
    attending = ways_of_attending(model)
    return (clean.signature, clean.logits.shape, start, is_trimmed, attending)


def note_called(model: Any, clean: Clean) -> None:
    """Notes how a clean run called the blocks, for sweeps that can do without one."""
    if not clean.added:
        logits = torch.empty_like(clean.logits, device="meta")
        asked_for = _asked_for(model, clean.inputs, clean.arguments)
        _CALLED.setdefault(model, {})[asked_for] = clean.signature, logits


def uncleaned(
    model: Any, inputs: Mapping[str, Any], arguments: Mapping[str, Any], encoded: Sequence[Any]
) -> Clean | None:
    """Returns what is known of a clean run on inputs of these shapes, or None if nothing is.

    It has neither activations nor logits: it is for rows that bring all of themselves along.
    """
    arguments = {**uncached(model.hf_model), **arguments}
    found = _CALLED.get(model, {}).get(_asked_for(model, inputs, arguments))
    if found is None:
        return None
    signature, logits = found
    size = tuple(inputs["input_ids"].shape)
    return Clean(inputs, arguments, logits, {}, {}, {}, (), (), encoded, signature, size)


def _asked_for(model: Any, inputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Hashable:
    return shapes_of(inputs), repr(sorted(arguments.items())), ways_of_attending(model)


def keeps_keys(
    model: Any, inputs: Mapping[str, Any], base: Sequence[Any], arguments: Mapping[str, Any]
) -> bool:
    """Whether a clean run can keep keys and values, and is then the run without."""

    def find_out() -> bool:
        keeping = partial(run_clean, model, inputs, base, set(), arguments, want_keys=True)
        try:
            kept = attempt(keeping, "a run that keeps keys failed")
        except GrowthError:
            return False  # blocks that keep something else, such as the state of a recurrence
        bare = run_clean(model, inputs, base, set(), arguments, want_keys=False)
        return bool(kept.keys) and torch.equal(bare.logits, kept.logits)

    return remember(model, "keeps keys", find_out)


def is_added(model: Any, clean: Clean, base: Sequence[Any]) -> bool:
    """Whether what changes between blocks is added, and the same whatever the stream holds."""

    def find_out() -> bool:
        stream = next(iter(clean.added.values()))
        noise = torch.randn(stream.shape[-1], generator=torch.Generator().manual_seed(0)).to(stream)
        steered = [*base, Steer(0, directions=noise, alpha=1.0)]
        other = run_clean(model, clean.inputs, steered, set(), clean.arguments, want_keys=False)
        return other.added.keys() == clean.added.keys() and all(
            _is_near(other.added[i], added) for i, added in clean.added.items()
        )

    return remember(model, "adds", find_out)


def _is_near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))

"""What is found out once for a model, or for a model and a shape of inputs, and kept.

How rows are fitted to a block depends on the shapes of what the block is called with, on
where rows start, and on how attention is computed; not on what is in them, nor on how many
rows there are.  So a control that came out right speaks for all passes of that kind, and
later ones go without.  `forget` lets everything be found out anew.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hooked_vlm.growing.clean import Clean, run_clean
from hooked_vlm.interventions import Steer


_KNOWN: WeakKeyDictionary[Any, dict[Hashable, bool]] = WeakKeyDictionary()
_PROVED: WeakKeyDictionary[Any, dict[Hashable, int]] = WeakKeyDictionary()


def known(model: Any, question: Hashable, find_out: Callable[[], bool]) -> bool:
    """Returns the answer to a question about a model, found out the first time."""
    answers = _KNOWN.setdefault(model, {})
    if question not in answers:
        answers[question] = find_out()
    return answers[question]


def is_proved(model: Any, kind: Hashable, stage: int) -> bool:
    """Whether a control came out right in a pass of this kind, through all blocks from `stage`."""
    return stage >= _PROVED.get(model, {}).get(kind, stage + 1)


def prove(model: Any, kind: Hashable, stage: int) -> None:
    """Notes that a control came out right in a pass of this kind, from block `stage` on."""
    lowest = _PROVED.setdefault(model, {})
    lowest[kind] = min(stage, lowest.get(kind, stage))


def forget(model: Any) -> None:
    """Lets everything about a model be found out anew."""
    _KNOWN.pop(model, None)
    _PROVED.pop(model, None)


def kind_of(model: Any, clean: Clean, start: int, is_trimmed: bool) -> Hashable:
    """Returns what passes have in common that one control speaks for."""
    # Of each tower, since a model's towers can attend in ways of their own.
    configs = [module.config for module in model.hf_model.modules() if hasattr(module, "config")]
    attention = tuple(getattr(config, "_attn_implementation", None) for config in configs)
    return (clean.signature, clean.logits.shape, start, is_trimmed, attention)


def keeps_keys(model: Any, clean: Clean, base: Sequence[Any]) -> bool:
    """Whether a clean run that keeps keys and values is the run without."""

    def find_out() -> bool:
        bare = run_clean(model, clean.inputs, base, set(), clean.arguments, want_keys=False)
        return bool(clean.keys) and torch.equal(bare.logits, clean.logits)

    return known(model, "keeps keys", find_out)


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

    return known(model, "adds", find_out)


def _is_near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))

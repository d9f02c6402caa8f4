"""Cells that act in front of the language model's blocks: on pixels' way, or on embeddings.

The vision encoder runs for each of them, from the first of its blocks that it changes; what
comes of it, the blocks' input, joins the growing batch in front of block 0.  That is right
where the blocks get nothing else that depends on the encoder (as in DeepStack or by
cross-attention they do), so it is tried out on noise, once for a model and a kind of inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.errors import HookedVLMError
from hooked_vlm.growing.cells import IN_FRONT, MERGED, Job
from hooked_vlm.growing.clean import Clean, asked
from hooked_vlm.hooks.stand_ins import encoder_of, replaying
from hooked_vlm.interventions.base import site_of
from hooked_vlm.known import known, shapes_of, ways_of_attending
from hooked_vlm.tower_restart import TowerRestart


FIRST = "blocks.0.hook_resid_pre"
ENCODER = "vision_encoder.blocks.0.hook_resid_pre"
APART = 20.0
"""How many times the bound noise must move the logits, if their agreement is to say anything."""


@dataclass(frozen=True, eq=False)
class Early:
    """Makes the blocks' input of jobs that act in front of them."""

    model: Any
    inputs: Mapping[str, Any]
    tower: TowerRestart | None

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Any], jobs: Sequence[Job]) -> "Early":
        """Records what the jobs' passes through the encoder have in common."""
        fronts = [job.front for job in jobs if job.front]
        tower = TowerRestart.of(model, inputs, fronts) if len(fronts) > 1 else None
        return cls(model, inputs, tower)

    def rows(self, front: Sequence[Any]) -> Tensor:
        """Returns the blocks' input `[batch, pos, d_model]` under some interventions."""
        with ExitStack() as stack:
            if not self._encodes(front):
                if self.tower is not None:
                    stack.enter_context(replaying(encoder_of(self.model), self.tower.encoded))
            elif self.tower is not None:
                stack.enter_context(self.tower.below(front))
            # Their hooks come first: the blocks' input is noted as they left it.
            stack.enter_context(self.model.hooks(front, inputs=self.inputs))
            return self.model.run_with_cache(asked(self.inputs), [FIRST], stop_at_layer=0)[0]

    def _encodes(self, front: Sequence[Any]) -> bool:
        """Whether any intervention is on pixels' way (some encoders hold their projector)."""
        names = [site_of(self.model, part.site).name for part in front]
        return any(name.startswith(IN_FRONT[:2]) for name in names)


def merges_first(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the merged embeddings are what the first block takes, bit for bit."""

    def find_out() -> bool:
        if MERGED not in model.sites or model.device.type == "meta":
            return True
        with torch.no_grad():
            _, cache = model.run_with_cache(asked(inputs), [MERGED, FIRST], stop_at_layer=1)
        return torch.equal(cache[MERGED], cache[FIRST])

    return known(model, "merged embeddings come first", find_out)


def carries_all(
    model: Any,
    clean: Clean,
    parts: Sequence[Any],
    grown: Callable[[Job, Early], Tensor],
    bound: float,
) -> bool:
    """Whether the blocks' input carries all that some interventions in front of them change.

    `grown` returns a job's logits by way of the growing batch.
    """
    names = {site_of(model, part.site).name for part in parts}
    sites = {ENCODER if name.startswith(IN_FRONT[:2]) else name for name in names}
    kind = (clean.signature, shapes_of(clean.inputs), ways_of_attending(model))

    def is_carried(site: str) -> bool:
        try:
            return _is_carried(model, clean, site, grown, bound)
        except (HookedVLMError, RuntimeError, TypeError, KeyError, ValueError):
            return False

    return all(
        known(model, ("is carried", site, kind), partial(is_carried, site))
        for site in sorted(sites)
    )


def _is_carried(
    model: Any, clean: Clean, site: str, grown: Callable[[Job, Early], Tensor], bound: float
) -> bool:
    """Whether noise at a site does the same to the logits by way of the growing batch."""

    def noisy(x: Tensor, hook: Any) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return x + noise.to(x) * x.float().std().to(x)

    inputs = asked(clean.inputs)
    without = model.run_with_hooks(inputs, [], **clean.arguments)
    plain = model.run_with_hooks(inputs, [(site, noisy)], **clean.arguments)
    job = Job(-1, 0, 0, front=(_Raw(site, noisy),))
    found = grown(job, Early(model, clean.inputs, None))
    largest = float(plain.abs().max())
    off, moved = (float((plain - x).abs().max()) / largest for x in (found, without))
    # Agreement says something only where there was something to carry.
    return off <= bound and moved >= min(APART * bound, 0.2)


@dataclass(frozen=True, eq=False)
class _Raw:
    """A hook function where an intervention is expected."""

    site: str
    fn: Callable[..., Any]

    def hooks_for(self, *_: Any) -> list[tuple[str, Callable[..., Any]]]:
        return [(self.site, self.fn)]

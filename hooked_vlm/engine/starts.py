"""Where rows start: the first position that they cannot do without, and which start together."""

from collections.abc import Mapping, Sequence
from typing import Any

from hooked_vlm.anatomy.caches import cache_parameter
from hooked_vlm.engine.arguments import is_closed
from hooked_vlm.engine.clean_run import Clean
from hooked_vlm.engine.stages import RowPlan, ids_of, last_kept


SHORT = 0.1
"""Share of the prompt below which leaving its front out saves less than a mask costs."""
NEAR = 0.15
"""Cells whose first changed positions differ by less than this share of the prompt go together."""


def whole_rows(model: Any) -> str:
    """Returns why rows have to carry all positions, as far as the blocks' signatures say it."""
    lm = model.anatomy.lm.blocks
    taking = [cache_parameter(model.hf_model.get_submodule(block.path)) for block in lm]
    missing = sum(name is None for name in taking)
    if not missing:
        return ""
    return f"{missing} of its {len(lm)} blocks take no key-value cache (a transformers.Cache)"


def starts_of(
    jobs: Sequence[RowPlan], arguments: Mapping[str, Any], inputs: Mapping[str, Any]
) -> list[int]:
    """Returns, by job, the first position that its rows carry."""
    length = _length(inputs)
    starts = firsts_of(jobs, arguments, inputs)
    starts = [start if start >= SHORT * length else 0 for start in starts]
    if all(job.front for job in jobs) and sum(starts) <= length:
        return [0] * len(jobs)  # less than the clean run that whole rows can do without
    return starts


def firsts_of(
    jobs: Sequence[RowPlan], arguments: Mapping[str, Any], inputs: Mapping[str, Any]
) -> list[int]:
    """Returns, by job, the first position that its rows cannot do without."""
    length = _length(inputs)
    keep = last_kept(arguments)
    if keep is None:
        return [0] * len(jobs)
    # All positions (0): those before are the clean run's.
    last = length - keep if keep else length - 1
    return [max(0, min(job.first, last, length - 1)) for job in jobs]


def groups_of(jobs: Sequence[RowPlan], starts: Sequence[int]) -> list[tuple[int, list[RowPlan]]]:
    """Returns jobs whose rows begin near one another together, with where they all begin."""
    order = sorted(range(len(jobs)), key=lambda i: starts[i])
    near = NEAR * max(starts, default=0)
    groups: list[tuple[int, list[RowPlan]]] = []
    for i in order:
        if not groups or starts[i] - groups[-1][0] > near:
            groups.append((starts[i], []))
        groups[-1][1].append(jobs[i])
    return [(start, sorted(group, key=lambda job: job.stage)) for start, group in groups]


def are_masks_closed(clean: Clean, start: int) -> bool:
    """Whether, by the clean run's masks, no position before `start` sees one from there on."""
    return all(is_closed(mask, start) for mask in {id(m): m for m in clean.masks}.values())


def _length(inputs: Mapping[str, Any]) -> int:
    ids = ids_of(inputs)
    assert ids is not None
    return ids.shape[1]

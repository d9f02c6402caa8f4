"""Facts measured once for each model, or for a model and a shape of inputs, and cached.

A growing pass is trusted after noise has gone through one of its kind: noise where its jobs first
change something must do to the logits what it does in a plain pass.  That shows whether rows are
fitted to the blocks' arguments, whether they see the clean keys and values of the positions before
them, whether what a model adds between blocks is the same whatever the stream holds, and whether
the blocks' input carries all that comes of the vision encoder.

How rows are fitted to a block depends on the shapes of what the block is called with, on
where rows start, and on how attention is computed; not on what is in them, nor on how many
rows there are.  So noise that came out right speaks for all passes of that kind, and
later ones go without.  `forget` drops them all.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hooked_vlm.anatomy.devices import sent
from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.engine.clean_run import Clean, asked, run_clean
from hooked_vlm.engine.fingerprints import (
    content_of,
    forget_known,
    remember,
    shapes_of,
    ways_of_attending,
)
from hooked_vlm.engine.folding import Layout
from hooked_vlm.engine.noise import apart, at_tokens, bound_for
from hooked_vlm.engine.stages import MERGED, RowPlan, ids_of, job_of, prompt_mask
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.names import site_path
from hooked_vlm.hooks.stand_ins import uncached
from hooked_vlm.interventions.chain import Cell, flattened
from hooked_vlm.interventions.hook_at import HookAt


ENCODER = "vision_encoder.blocks.0.hook_resid_pre"
STREAM = "the residual stream"
APART = 20.0
"""How many times the bound noise must move the logits, if their agreement is to say anything
(in half precision, where bounds are wide: a fifth of the largest logit)."""

_CALLED: WeakKeyDictionary[Any, dict[Hashable, tuple[Hashable, Tensor]]] = WeakKeyDictionary()
_PROVED: WeakKeyDictionary[Any, dict[Hashable, int]] = WeakKeyDictionary()


def forget(model: Any) -> None:
    """Forgets everything measured about a model, so that it is measured again."""
    forget_known(model)
    _PROVED.pop(model, None)
    _CALLED.pop(model, None)


def kind_of(
    model: Any, clean: Clean, start: int, layout: Layout | None, is_trimmed: bool
) -> Hashable:
    """Returns what passes have in common that one control speaks for."""
    attending = ways_of_attending(model)
    shape = clean.logits.shape
    # Blocks may get what a base changes before them by other ways than their input, too.
    rows = None if layout is None else ("common rows", layout.is_even)
    return (clean.signature, shape, start, rows, is_trimmed, attending, clean.base_sites)


def note_called(model: Any, clean: Clean) -> None:
    """Notes how a clean run called the blocks, for sweeps that can do without one."""
    if not clean.added:
        logits = torch.empty_like(clean.logits, device="meta")
        asked_for = _asked_for(model, clean.inputs, clean.arguments)
        _CALLED.setdefault(model, {})[asked_for] = clean.signature, logits


def uncleaned(model: Any, inputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Clean | None:
    """Returns what is known of a clean run on inputs of these shapes, or None if nothing is.

    It has neither activations nor logits: it is for rows that bring all of themselves along.
    """
    arguments = {**uncached(model.hf_model), **arguments}
    found = _CALLED.get(model, {}).get(_asked_for(model, inputs, arguments))
    if found is None:
        return None
    signature, logits = found
    ids = ids_of(inputs)
    size = (0, 0) if ids is None else (ids.shape[0], ids.shape[1])
    held = ({}, {}, {}, (), (), None)
    return Clean(inputs, arguments, logits, *held, signature, size, is_made=False)


def _asked_for(model: Any, inputs: Mapping[str, Any], arguments: Mapping[str, Any]) -> Hashable:
    # Where no prompt has padding, some models give their blocks no mask at all.
    mask = prompt_mask(inputs)
    is_padded = mask is not None and not bool(mask.all())
    return shapes_of(inputs), is_padded, content_of(arguments), ways_of_attending(model)


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

    # The base may hook what blocks do with a cache; arguments may turn such things on, too.
    sites = tuple(sorted(str(getattr(part, "site", part)) for part in flattened(base)))
    kind = ("keeps keys", shapes_of(arguments), sites, ways_of_attending(model))
    return remember(model, kind, find_out)


Grow = Callable[[Sequence[RowPlan]], Tensor]
"""Returns the logits `[job, batch, pos, d_vocab]` of a growing pass of jobs."""


def unproved(
    model: Any,
    clean: Clean,
    jobs: Sequence[RowPlan],
    start: int,
    layout: Layout | None,
    is_trimmed: bool,
) -> dict[str, int]:
    """Returns the sites where noise has yet to speak for a pass of some jobs, with their stages."""
    kind = kind_of(model, clean, start, layout, is_trimmed)
    known = _PROVED.get(model, {})
    lowest: dict[str, int] = {}
    for job in jobs:
        for site in _noise_sites(model, job):
            name = STREAM if site.startswith("blocks.") else site
            lowest[name] = min(job.stage, lowest.get(name, job.stage))
    # What is proved from a block on is proved from any later one on.
    return {
        _at_stage(model, stage) if name == STREAM else name: stage
        for name, stage in lowest.items()
        if stage < known.get((kind, name), stage + 1)
    }


def verify(
    model: Any,
    clean: Clean,
    base: Sequence[Any],
    beside: RowPlan | None,
    site: str,
    start: int,
    layout: Layout | None,
    grow: Grow,
    *,
    merged_first: bool,
) -> float:
    """Carries noise at a site through a growing pass and through a plain one.

    Returns how far the logits at tokens are apart, as a share of the largest.  Raises `GrowthError`
    where that is more than rounding explains (`bound_for`), and where noise does not move the
    logits: then their agreement would say nothing.  `beside` goes through the same pass.
    """
    noise = HookAt(site, noise_from(start, layout), start if site.startswith("blocks.") else 0)
    placed = noise.place(model, clean.inputs)
    cell = Cell((), (*base, placed), len(base))
    control = job_of(model, clean.inputs, cell, -1, merged_first=merged_first)
    if control is None:
        raise GrowthError("what all cells begin with lies in the way of its control")
    plain = model.run_with_hooks(asked(clean.inputs), cell.interventions, **clean.arguments)
    jobs = [control] if beside is None else sorted([control, beside], key=lambda job: job.stage)
    found = grow(jobs)[jobs.index(control)]
    found, plain, unmoved = (
        at_tokens(logits, clean.inputs, clean.arguments) for logits in (found, plain, clean.logits)
    )
    off, moved = apart(found, plain), apart(unmoved, plain)
    bound = bound_for(model, clean.inputs, clean.arguments, plain.dtype, off)
    where = "" if site.startswith("blocks.") else f" under noise at {site}"
    if not off <= bound:
        raise GrowthError(
            f"the control's logits are off by {off:.2g} of the largest{where} (at most {bound:.2g} "
            "is rounding)"
        )
    if not moved >= min(APART * bound, 0.2):  # NaN moves nothing
        raise GrowthError(f"noise at {site} does not move the logits, so that nothing is proved")
    return off


def prove(
    model: Any,
    clean: Clean,
    site: str,
    stage: int,
    start: int,
    layout: Layout | None,
    is_trimmed: bool,
) -> None:
    """Notes that a pass of this kind came out right, from block `stage` on."""
    name = STREAM if site.startswith("blocks.") else site
    lowest = _PROVED.setdefault(model, {})
    key = kind_of(model, clean, start, layout, is_trimmed), name
    lowest[key] = min(stage, lowest.get(key, stage))


def noise_from(start: int, layout: Layout | None = None) -> Callable[..., Any]:
    """Returns a hook function that adds noise as large as each token, from a position on.

    By `layout`, tokens that prompts share get the same noise in each.
    """

    def noisy(x: Any, hook: HookPoint) -> Any:
        if isinstance(x, list):
            return [noisy(image, hook) for image in x]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        # By token, so that a suffix of a prompt gets what it gets within the whole.
        noise = noise * x.float().std(-1, keepdim=True).to(x)
        if hook.axes.startswith("batch pos"):
            noise[:, :start] = 0
            if layout is not None:
                noise[sent(torch.from_numpy(layout.fold.frozen(start)), noise.device)] = 0
                noise = layout.fold.alike(noise)
        return x + noise

    return noisy


def _noise_sites(model: Any, job: RowPlan) -> set[str]:
    """Returns where noise has to go in for all that a job changes: as early as the job does."""
    # Some encoders have no blocks (convolutional ones): there noise starts where the job does.
    encodes = ENCODER in model.sites
    sites = {
        ENCODER if encodes and site_path(part.site).is_vision else part.site for part in job.front
    }
    # What is written to merged embeddings may reach blocks by other ways than their input, too.
    sites |= {MERGED for step in job.steps if step.site == MERGED}
    return sites or {_at_stage(model, job.stage)}


def _at_stage(model: Any, stage: int) -> str:
    """Returns the site of the residual stream before a block, or after all."""
    last = model.cfg.n_layers - 1
    if stage > last:
        return f"blocks.{last}.hook_resid_post"
    return f"blocks.{stage}.hook_resid_pre"

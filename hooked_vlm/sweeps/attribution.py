"""Attribution patching: what a sweep would give, estimated to first order by one backward pass.

A cell edits activations of the clean run.  For a small edit the score changes by the score's
gradient there times the change, so one forward pass that keeps the activations, and one
backward pass, give an estimate of every cell of a sweep, whatever their number:

    score(cell)  ≈  clean score + Σ over positions of <d score / d activation, edited − clean>

It is exact where the score is linear in what is edited, and only there: attention, norms and
gates bend it, and a probability near 0 or 1 has no slope left to go by.  `attribution_error`
says how far off it was on some sweep; cells that matter are worth their exact pass.

An edit is what the cell's own hook functions make of the clean run's activation, so every
intervention works.  Edits at one site are carried out one after another; at two sites each is
made of the clean activation, and their effects add up, where in the exact run the later one
sees what the earlier one did.

Prompts of a batch do not see one another, so the batch's scores are summed and differentiated
at once.  A metric that compares prompts with one another breaks that.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Model
from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks.names import select_names
from hooked_vlm.hooks.of_interventions import hooks_of
from hooked_vlm.interventions.attend import Attend
from hooked_vlm.interventions.base import site_of
from hooked_vlm.interventions.chain import Cell, flattened
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import Recording, Source, record
from hooked_vlm.sweeps.gradients import Metric, clean_run, one_score, wide


Edits = dict[str, list[Callable[..., Any]]]
"""Hook functions by site, in the order in which they act."""


def first_order(
    model: Any,
    inputs: Mapping[str, Any],
    cells: Sequence[Cell],
    metric: Metric,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Tensor], str]:
    """Returns every cell's estimated metric `[batch, ...]`, and a word on what was run.

    One forward pass, and one backward pass for each entry of the metric after the batch.  Kept
    besides are the activations at the sites that cells edit, and the gradients there of one
    entry at a time.

    Raises `InterventionError` for a metric that has no gradient, for a model in training or with
    hooks open, and for values that were changed in place where the gradient needs them.
    """
    _refuse_masks(cells)
    edits = [_edits(model, inputs, cell.own) for cell in cells]
    touched = {name for own in edits for name in own}
    run = clean_run(
        model,
        inputs,
        [name for name in model.sites if name in touched],
        cells[0].base if cells else (),
        metric,
        forward_kwargs or {},
    )
    clean = wide(run.score.detach())
    changes = [torch.zeros_like(clean).reshape(len(clean), -1) for _ in cells]
    n_backward = 0
    for entry, gradients in enumerate(run.gradients()):
        n_backward += 1
        for change, own in zip(changes, edits, strict=True):
            for name, functions in own.items():
                if name not in gradients:
                    continue  # it never ran, or the score does not depend on it
                delta = run.change(name, functions)
                listed = run.probes[name].listed
                effects = _by_row(gradients[name], delta, listed).to(change)
                owners = owners_of(model, inputs, model.sites[name].axes, len(effects), len(clean))
                change[:, entry].index_add_(0, owners.to(change.device), effects)
    word = (
        f"first-order estimate: 1 forward and {n_backward} backward passes, gradients at "
        f"{len(run.probes)} sites"
    )
    return [clean + change.reshape(clean.shape) for change in changes], word


@checked(InterventionError, but=("source",))
def attribution_patch(
    model: Model,
    inputs: Mapping[str, Any],
    source: Source,
    metric: Metric,
    sites: Sequence[str | int] | None = None,
    **forward_kwargs: Any,
) -> xr.DataArray:
    """Returns what patching each position from `source` would change, estimated to first order.

    The result has dimensions `(slot, batch, pos)`, in the metric's units, of all residual slots
    of the language model, or of `sites`, names or slots (the first dimension is then `site`
    unless all are slots).  One forward pass of each run and one backward pass.  Positions are
    written from the source's in order, padding left out; heads and features are summed over.
    The coordinate `clean` is the metric of the unpatched run, so `clean + effects.sum("pos")`
    estimates a patch of everything.  The metric takes logits and returns a score `[batch]`.

    Raises `InterventionError` as `first_order` does, for sites without prompt positions, and for
    a metric of more axes; and what `Patch` raises for a source that does not fit.
    """
    given = list(range(model.cfg.n_layers + 1)) if sites is None else list(sites)
    if not given:
        raise InterventionError("There are no sites to patch: sites is empty.")
    names = [site_of(model, site).name for site in given]
    for name in names:
        if not model.sites[name].axes.startswith("batch pos"):
            raise InterventionError(
                f"{name} has axes [{model.sites[name].axes}], and effects by position need "
                "[batch pos …]. Use Sweep(…).attribution(…) with a Patch there."
            )
        Patch(name, source=source).check(model, inputs)
    if not isinstance(source, Recording):
        source = record(model, source, list(dict.fromkeys(names)))
    edits = {n: _edits(model, inputs, [Patch(n, source=source)])[n] for n in names}

    scored = one_score(metric, "For several use Sweep(…).attribution(…, dims=…).")
    run = clean_run(model, inputs, list(edits), (), scored, forward_kwargs)
    gradients = next(run.gradients(), {})
    effects = {}
    for name in edits:
        (clean,) = run.probes[name].values
        (delta,) = run.change(name, edits[name])
        (gradient,) = gradients.get(name, [torch.zeros_like(clean)])
        effects[name] = (wide(gradient) * delta).flatten(2).sum(-1).cpu()
    first = "slot" if all(isinstance(site, int) for site in given) else "site"
    return xr.DataArray(
        torch.stack([effects[name] for name in names]).numpy(),
        dims=(first, "batch", "pos"),
        coords={
            first: given,
            "clean": ("batch", wide(run.score.detach()).cpu().numpy()),
        },
        attrs={"engine": f"first-order estimate: gradients at {len(edits)} sites"},
    )


def _refuse_masks(cells: Sequence[Cell]) -> None:
    """Raises `InterventionError` for masked scores: there is no small step to minus infinity."""
    for part in (part for cell in cells for part in flattened(cell.own)):
        own = getattr(part, "part", part)
        if isinstance(own, Attend) and own.mask:  # a class of the user's may call a place so
            raise InterventionError(
                f"{part} masks scores, and a first-order estimate of that is the slope times the "
                "lowest number there is. Use scale=0.0 for an estimate, or Sweep.run, which is "
                "exact."
            )


def _edits(model: Any, inputs: Mapping[str, Any], interventions: Sequence[Any]) -> Edits:
    """Returns the hook functions of interventions by site; sources not recorded yet are run."""
    edits: Edits = {}
    for intervention in interventions:
        for given, function in hooks_of(intervention, model, inputs):
            for name in select_names(given, model.hook_names):
                edits.setdefault(name, []).append(function)
    return edits


def _by_row(
    gradients: Sequence[Tensor], deltas: Sequence[Tensor], listed: bool
) -> Float[Tensor, " row"]:
    """Returns the first-order change for each row of a site's first axis, or each image listed."""
    products = [wide(g) * d for g, d in zip(gradients, deltas, strict=True)]
    if listed:
        return torch.stack([product.sum() for product in products])
    return products[0].flatten(1).sum(1)


def owners_of(model: Any, inputs: Mapping[str, Any], axes: str, rows: int, batch: int) -> Tensor:
    """Returns which prompt each row of a site belongs to: itself, or the one that has the image."""
    if rows == batch and (axes.startswith("batch") or batch == 1 or "input_ids" not in inputs):
        return torch.arange(batch)
    if not axes.startswith("image"):
        raise InterventionError(
            f"A site with axes [{axes}] has {rows} rows, and the metric returned {batch} scores, "
            "so effects there cannot be told apart by prompt. Return one score for each prompt, "
            "batch first; where all prompts share a site, run one prompt at a time."
        )
    if batch == 1:
        return torch.zeros(rows, dtype=torch.long)
    # An image that is cut into tiles has them all after its first row.
    grids = [(grid, b) for b, row in enumerate(model.grids(inputs)) for grid in row]
    grids += [(grid.overview, b) for grid, b in grids if grid.overview is not None]
    if not grids:
        raise InterventionError(
            f"A site with axes [{axes}] has a row for each image, and no image here has a grid, so "
            "effects cannot be told apart by prompt. Run one prompt at a time."
        )
    firsts = sorted((grid.image, b) for grid, b in grids)
    starts = [image for image, _ in firsts]
    return torch.tensor([firsts[max(bisect_right(starts, r) - 1, 0)][1] for r in range(rows)])

"""Attribution patching: what a sweep would give, estimated to first order by one backward pass.

A cell edits activations of the clean run.  For a small edit the score changes by the score's
gradient there times the change, so one forward pass that keeps the activations, and one
backward pass, give an estimate of every cell of a sweep, whatever their number:

    score(cell)  ≈  clean score + Σ over positions of <d score / d activation, edited − clean>

It is exact where the score is linear in what is edited, and only there: attention, norms and
gates bend it, and a probability near 0 or 1 has no slope left to go by.  `agreement` says how
far off it was on some sweep; cells that matter are worth their exact pass.

An edit is what the cell's own hook functions make of the clean run's activation, so every
intervention works.  Edits at one site are carried out one after another; at two sites each is
made of the clean activation, and their effects add up, where in the exact run the later one
sees what the earlier one did.

Prompts of a batch do not see one another, so the batch's scores are summed and differentiated
at once.  A metric that compares prompts with one another breaks that.
"""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.engine import Cell
from hooked_vlm.errors import HookedVLMWarning, InterventionError
from hooked_vlm.interventions import Patch, Recording, Source, record, site_of
from hooked_vlm.layout import Images
from hooked_vlm.naming import select_names
from hooked_vlm.partial import uncached
from hooked_vlm.points import HookPoint


Metric = Callable[[Tensor], Tensor]
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

    One forward pass, and one backward pass for each entry of the metric behind the batch.  Kept
    besides are the activations at the sites that cells edit, and the gradients there of one
    entry at a time.

    Raises `InterventionError` for a metric that has no gradient, for a model in training or with
    hooks open, and for values that were changed in place where the gradient needs them.
    """
    edits = [_edits(model, inputs, cell.own) for cell in cells]
    touched = {name for own in edits for name in own}
    run = _clean_run(
        model,
        inputs,
        [name for name in model.sites if name in touched],
        cells[0].base if cells else (),
        metric,
        forward_kwargs or {},
    )
    clean = _wide(run.score.detach())
    changes = [torch.zeros_like(clean).flatten(1) for _ in cells]
    n_backward = 0
    for entry, gradients in enumerate(run.gradients()):
        n_backward += 1
        for change, own in zip(changes, edits, strict=True):
            for name, functions in own.items():
                if name not in gradients:
                    continue  # it never ran, or the score does not depend on it
                delta = run.change(name, functions)
                rows = [_inner(g, d) for g, d in zip(gradients[name], delta, strict=True)]
                effects = torch.cat(rows).to(change)
                owners = _owners(model, inputs, model.sites[name].axes, len(effects), len(clean))
                change[:, entry].index_add_(0, owners.to(change.device), effects)
    said = (
        f"first-order estimate: 1 forward and {n_backward} backward passes, gradients at "
        f"{len(run.probes)} sites"
    )
    return [clean + change.reshape(clean.shape) for change in changes], said


def attribution_patch(
    model: Any,
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

    def scored(logits: Tensor) -> Tensor:
        score = metric(logits)
        if not isinstance(score, Tensor) or score.ndim != 1:
            raise InterventionError(
                f"The metric returned {_said(score)}; effects by position need one score for "
                "each prompt, [batch]. For several use Sweep(…).attribution(…, dims=…)."
            )
        return score

    run = _clean_run(model, inputs, list(edits), (), scored, forward_kwargs)
    gradients = next(run.gradients())
    effects = {}
    for name in edits:
        (clean,) = run.probes[name].values
        (delta,) = run.change(name, edits[name])
        (gradient,) = gradients.get(name, [torch.zeros_like(clean)])
        effects[name] = (_wide(gradient) * delta).flatten(2).sum(-1).cpu()
    first = "slot" if all(isinstance(site, int) for site in given) else "site"
    return xr.DataArray(
        torch.stack([effects[name] for name in names]).numpy(),
        dims=(first, "batch", "pos"),
        coords={
            first: given,
            "clean": ("batch", _wide(run.score.detach()).cpu().numpy()),
        },
        attrs={"engine": f"first-order estimate: gradients at {len(edits)} sites"},
    )


# --- the clean run, with a gradient at every site -------------------------------------------


@dataclass(eq=False)
class _Probe:
    """A hook function that keeps a site's activation and adds a zero to it.

    The gradient of the zero is that of the activation, in the layout that hooks see, whatever
    the model makes of its own tensor behind it, and whether or not anything in front of it has
    a gradient: so nothing below the first site is differentiated.
    """

    values: list[Tensor] = field(default_factory=list)
    """By image at sites where images differ in size; else one."""
    zeros: list[Tensor] = field(default_factory=list)
    listed: bool = False

    def __call__(self, activation: Images, hook: HookPoint) -> Images:
        if self.values:
            raise InterventionError(
                f"{hook.name} runs once for each image of these inputs, so an estimate there "
                "cannot tell them apart. Use hook_merged_embed (slot 0) at the same region, or "
                "one image at a time."
            )
        self.listed = isinstance(activation, list)
        parts = activation if isinstance(activation, list) else [activation]
        # A copy: what the model, or a later hook, does in place must not reach it.
        self.values = [part.detach().clone() for part in parts]
        # Expanded, so that the zero takes no memory; its gradient is as large as the activation.
        self.zeros = [
            torch.zeros((), dtype=p.dtype, device=p.device, requires_grad=True).expand(p.shape)
            for p in parts
        ]
        moved = [part + zero for part, zero in zip(parts, self.zeros, strict=True)]
        return moved if self.listed else moved[0]


@dataclass(frozen=True, eq=False)
class _Run:
    """A clean run that can be differentiated."""

    probes: Mapping[str, _Probe]
    """By site, of those that ran."""
    score: Tensor
    points: Mapping[str, HookPoint]

    def gradients(self) -> Iterator[dict[str, list[Tensor]]]:
        """Yields the gradients at all sites, for one entry of the metric after another.

        Sites that the score does not depend on are left out, with a warning.
        """
        named = [(name, zero) for name, probe in self.probes.items() for zero in probe.zeros]
        if not named:
            return
        entries = self.score.flatten(1).sum(0).unbind()
        for i, entry in enumerate(entries):
            with _explained():
                found = torch.autograd.grad(
                    entry,
                    [zero for _, zero in named],
                    retain_graph=i + 1 < len(entries),
                    allow_unused=True,
                )
            by_site: dict[str, list[Tensor]] = {}
            lost = []
            for (name, zero), gradient in zip(named, found, strict=True):
                if gradient is None:
                    lost.append(name)
                by_site.setdefault(name, []).append(
                    torch.zeros_like(zero) if gradient is None else gradient
                )
            if i == 0 and lost:
                _warn_lost(sorted(set(lost)))
            yield by_site

    def change(self, name: str, functions: Sequence[Callable[..., Any]]) -> list[Tensor]:
        """Returns what hook functions change in a site's clean activation, by image if listed."""
        probe = self.probes[name]
        with torch.no_grad():
            # Copies, for functions that write in place and return nothing.
            value: Any = [v.clone() for v in probe.values]
            value = value if probe.listed else value[0]
            for function in functions:
                made = function(value, hook=self.points[name])
                value = value if made is None else made
            parts = value if probe.listed else [value]
            for part, clean in zip(parts, probe.values, strict=True):
                if part.shape != clean.shape:
                    raise InterventionError(
                        f"An intervention at {name} made {tuple(part.shape)} of an activation of "
                        f"{tuple(clean.shape)}; return one of the same shape."
                    )
            return [_wide(p) - _wide(v) for p, v in zip(parts, probe.values, strict=True)]


def _clean_run(
    model: Any,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    base: Sequence[Any],
    metric: Metric,
    forward_kwargs: Mapping[str, Any],
) -> _Run:
    """Runs a model once under `base`, with a probe at every named site."""
    _refuse_state(model)
    probes = {name: _Probe() for name in names}
    arguments = {**uncached(model.hf_model), **forward_kwargs}
    with torch.enable_grad(), frozen(model.hf_model), _explained():
        logits = model.run_with_hooks(inputs, [*base, *probes.items()], **arguments)
        score = metric(logits)
    _check_score(score, logits, any(probe.values for probe in probes.values()))
    points = {name: HookPoint(name, model.sites[name].axes, call=0) for name in names}
    return _Run({n: p for n, p in probes.items() if p.values}, score, points)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Lets no parameter ask for a gradient for the length of a `with` block.

    What only weights' gradients would need is then not kept by the forward pass.
    """
    asked = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


# --- edits ----------------------------------------------------------------------------------


def _edits(model: Any, inputs: Mapping[str, Any], interventions: Sequence[Any]) -> Edits:
    """Returns the hook functions of interventions by site; sources not recorded yet are run."""
    edits: Edits = {}
    for intervention in interventions:
        for given, function in intervention.hooks_for(model, inputs):
            for name in select_names(given, model.hook_names):
                edits.setdefault(name, []).append(function)
    return edits


def _inner(gradient: Tensor, delta: Tensor) -> Float[Tensor, " row"]:
    """Returns the first-order change for each row of a site's first axis."""
    product = _wide(gradient) * delta
    return product.flatten(1).sum(1) if product.ndim > 1 else product


def _owners(model: Any, inputs: Mapping[str, Any], axes: str, rows: int, batch: int) -> Tensor:
    """Returns which prompt each row of a site belongs to: itself, or the one that has the image."""
    if rows == batch and (axes.startswith("batch") or batch == 1 or "input_ids" not in inputs):
        return torch.arange(batch)
    if not axes.startswith("image"):
        raise InterventionError(
            f"A site with axes [{axes}] has {rows} rows and the metric returned {batch} scores. "
            "Return one score for each prompt, batch first."
        )
    if batch == 1:
        return torch.zeros(rows, dtype=torch.long)
    # An image that is cut into tiles has them all behind its first row.
    grids = [(grid, b) for b, row in enumerate(model.grids(inputs)) for grid in row]
    grids += [(grid.overview, b) for grid, b in grids if grid.overview is not None]
    firsts = sorted((grid.image, b) for grid, b in grids)
    starts = [image for image, _ in firsts]
    return torch.tensor([firsts[max(bisect_right(starts, r) - 1, 0)][1] for r in range(rows)])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- what is refused ------------------------------------------------------------------------


def _refuse_state(model: Any) -> None:
    if model.is_hooked:
        raise InterventionError(
            "Hooks are open on this model, and an estimate cannot tell their work from the clean "
            "run's. Leave the `with model.hooks(…)` block, or give interventions as the sweep's "
            "base."
        )
    if model.hf_model.training:
        raise InterventionError(
            "The model is in training mode, where dropout makes every run another one. Call "
            "model.hf_model.eval() first."
        )
    if torch.is_inference_mode_enabled():
        raise InterventionError(
            "Attribution needs gradients, and torch.inference_mode() allows none. Leave it, or use "
            "torch.no_grad(), inside which this works."
        )


def _check_score(score: Any, logits: Tensor, ran: bool) -> None:
    if not isinstance(score, Tensor) or score.ndim == 0:
        raise InterventionError(
            f"The metric returned {_said(score)}; expected a tensor of one score or more for each "
            "prompt, [batch, …], computed from the logits (no .item(), no mean over prompts)."
        )
    if ran and logits.requires_grad and not score.requires_grad:
        raise InterventionError(
            f"The metric returned {_said(score)} without a gradient. An estimate needs one: take "
            "no argmax, comparison, .detach(), .item() or .numpy() in it, and no torch.no_grad(). "
            "For a metric that has no slope use Sweep.run, which is exact."
        )
    if ran and not logits.requires_grad:
        raise InterventionError(
            "No gradient gets from the edited sites to the logits: the model detaches them, runs "
            "under torch.no_grad(), or never uses these sites. Use Sweep.run, which is exact."
        )
    if not score.is_floating_point():
        raise InterventionError(f"The metric returned {_said(score)}; expected floating point.")


@contextmanager
def _explained() -> Iterator[None]:
    """Turns torch's errors about gradients into ones that say what to do."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(word in text for word in ("inplace", "in-place", "derivative", "Inference")):
            raise
        raise InterventionError(
            f"The score could not be differentiated: {text.splitlines()[0]} A metric must not "
            "write into its logits (take logits.clone()), nor a base intervention into what it is "
            "given; and where an operation has no derivative, use Sweep.run, which is exact."
        ) from error


def _warn_lost(names: Sequence[str]) -> None:
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    warnings.warn(
        f"The score does not depend on {len(names)} of the edited sites as far as gradients tell, "
        f"so edits there count as without effect: {shown}. That is right for layers that nothing "
        "reads; where a model passes no gradient on (quantised layers), use Sweep.run.",
        HookedVLMWarning,
        stacklevel=2,
    )


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"

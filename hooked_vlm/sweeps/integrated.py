"""Attribution of a score to the entries of one site's activation, by gradients.

Gradient attribution is the gradient times the activation (less a baseline): what the entry adds to
the score to first order.  Integrated gradients average the gradient over the straight line from
the baseline to the activation.  By the fundamental theorem of calculus the attributions then sum
to the difference of the two scores, up to the error of a sum of `steps` points; both functions
return that gap.

Source: Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, ICML 2017.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.displayed import OneLine
from hooked_vlm.arguments.kinds import Count, Model
from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks.patch_order import VisionActivation, each, listed
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.rows import rows_of
from hooked_vlm.interventions.placing import SiteName, site_of
from hooked_vlm.interventions.recording import Recording, record
from hooked_vlm.sweeps.attribution import owners_of
from hooked_vlm.sweeps.gradients import DifferentiableRun, Metric, clean_run, one_score, wide


Baseline = Any
"""`"zero"`, `"mean"`, a tensor, a `Recording`, or the inputs of a run to be recorded."""


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(OneLine):
    """What each entry of an activation adds to a score, over what its baseline gives."""

    values: VisionActivation
    """In the shape of the activation: a tensor, or a list by image where images differ in size."""
    score: Float[Tensor, " batch"]
    """The metric of the run."""
    baseline_score: Float[Tensor, " batch"]
    """The metric of the run with the baseline in the activation's place."""
    gap: Float[Tensor, " batch"]
    """What the values miss of the difference of the two scores, by prompt; 0 if complete."""
    site: str
    steps: int
    """Number of points on the line; 1 for gradient attribution, whose point is its end."""

    @property
    def by_position(self) -> VisionActivation:
        """The values summed over all but the first two axes: `[batch, pos]`, `[image, patch]`."""
        return each(lambda x: x.flatten(2 - isinstance(self.values, list)).sum(-1), self.values)


@checked(InterventionError, but=("site", "baseline"))
def integrated_gradients(
    model: Model,
    inputs: Mapping[str, Any],
    metric: Metric,
    site: SiteName,
    baseline: Baseline = "zero",
    steps: Count = 32,
    **forward_kwargs: Any,
) -> Attribution:
    """Returns integrated gradients of a score at a site, from a baseline.

    `metric` takes logits and returns a score `[batch]`.  A baseline is `"zero"`, `"mean"` (of the
    activation over all tokens, or over all rows of images), a tensor that broadcasts to the
    activation, or another run: a `Recording`, or inputs of equal shape.  It takes `steps` + 2
    forward passes and `steps` backward passes, at the midpoints of as many equal parts of the line.
    Prompts of a batch do not see one another, so all take part in each pass.

    Raises `InterventionError` for a baseline that does not fit, a metric without a gradient or of
    another shape, a site that cannot be written, and a model in training or under hooks.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> score = lambda logits: logits[:, -1, 5]
    >>> found = integrated_gradients(model, inputs, score, "vision_projector.hook_out", steps=4)
    >>> found.by_position.shape, found.gap.shape
    (torch.Size([1, 24]), torch.Size([1]))
    """
    line = _line(model, inputs, metric, site, baseline, forward_kwargs)
    points = [(step + 0.5) / steps for step in range(steps)]
    total = [torch.zeros_like(delta) for delta in line.deltas]
    for point in points:
        for sum_, gradient in zip(total, line.gradients(line.at(point)), strict=True):
            sum_ += wide(gradient)
    return line.attribution([gradient / steps for gradient in total], steps)


@checked(InterventionError, but=("site", "baseline"))
def gradient_attribution(
    model: Model,
    inputs: Mapping[str, Any],
    metric: Metric,
    site: SiteName,
    baseline: Baseline = "zero",
    **forward_kwargs: Any,
) -> Attribution:
    """Returns the gradient of a score at a site, times the activation less a baseline.

    It is one backward pass of the clean run, exact where the score is linear; `gap` is how far it
    is from the difference that the baseline makes.  Arguments and errors are those of
    `integrated_gradients`.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> score = lambda logits: logits[:, -1, 5]
    >>> gradient_attribution(model, inputs, score, "ln_final.hook_normalized").gap.abs() < 1e-4
    tensor([True])
    """
    line = _line(model, inputs, metric, site, baseline, forward_kwargs)
    return line.attribution([wide(g) for g in line.gradients(line.clean)], 1)


@dataclass(frozen=True, eq=False)
class _Line:
    """The straight line from a baseline to a run's activation at one site."""

    run: Callable[[Any], DifferentiableRun]
    """Runs with a value in the activation's place (None: as it is)."""
    site: Site
    clean: DifferentiableRun
    base: Sequence[Tensor]
    owners: Callable[[int, int], Tensor]

    @property
    def values(self) -> list[Tensor]:
        return self.clean.probes[self.site.name].values

    @property
    def is_list(self) -> bool:
        return self.clean.probes[self.site.name].listed

    @property
    def deltas(self) -> list[Tensor]:
        return [wide(v) - wide(b) for v, b in zip(self.values, self.base, strict=True)]

    def at(self, point: float) -> DifferentiableRun:
        """Returns a run with the value at a point of the line, from 0 (baseline) to 1."""
        made = [
            (wide(b) + point * delta).to(v.dtype)
            for b, delta, v in zip(self.base, self.deltas, self.values, strict=True)
        ]
        return self.run(made if self.is_list else made[0])

    def gradients(self, run: DifferentiableRun) -> list[Tensor]:
        return next(run.gradients())[self.site.name]

    def attribution(self, gradients: Sequence[Tensor], steps: int) -> Attribution:
        values = [g * delta for g, delta in zip(gradients, self.deltas, strict=True)]
        clean, base = (wide(run.score.detach()) for run in (self.clean, self.at(0.0)))
        sums = [x.sum() for x in values] if self.is_list else values[0].flatten(1).sum(1)
        rows = torch.stack(list(sums))
        owner = self.owners(len(rows), len(clean)).to(rows.device)
        total = torch.zeros_like(clean).index_add_(0, owner.to(clean.device), rows.to(clean))
        whole: VisionActivation = values if self.is_list else values[0]
        return Attribution(whole, clean, base, clean - base - total, self.site.name, steps)


def _line(
    model: Any,
    inputs: Mapping[str, Any],
    metric: Metric,
    site: SiteName,
    baseline: Baseline,
    forward_kwargs: Mapping[str, Any],
) -> _Line:
    where = site_of(model, site)

    def run(value: Any) -> DifferentiableRun:
        base = [] if value is None else [(where.name, lambda _, hook: each(torch.clone, value))]
        return clean_run(model, inputs, [where.name], base, one_score(metric), forward_kwargs)

    clean = run(None)
    if where.name not in clean.probes:
        raise InterventionError(
            f"{where.name} never ran on these inputs, so nothing can be attributed to it. Vision "
            "sites run only when the inputs have an image."
        )
    values = clean.probes[where.name].values
    base = _baseline(model, inputs, where, values, baseline)

    def owner(rows: int, batch: int) -> Tensor:
        return owners_of(model, inputs, where.axes, rows, batch)

    return _Line(run, where, clean, base, owner)


def _baseline(
    model: Any, inputs: Mapping[str, Any], site: Site, values: Sequence[Tensor], baseline: Baseline
) -> list[Tensor]:
    """Returns a baseline in the shape of an activation, by image if that is listed."""
    if isinstance(baseline, str) and baseline == "zero":
        return [torch.zeros_like(value) for value in values]
    if isinstance(baseline, str) and baseline == "mean":
        rows = _rows(inputs, site, values)
        mean = wide(torch.cat(rows)).mean(0)
        return [mean.to(value.dtype).expand_as(value) for value in values]
    given: Any = record(model, baseline, [site.name]) if isinstance(baseline, Mapping) else baseline
    parts: Any = listed(given.cache[site.name]) if isinstance(given, Recording) else given
    parts = [parts] * len(values) if isinstance(parts, Tensor) else parts
    fits = isinstance(parts, list) and len(parts) == len(values)
    if fits and all(broadcasts(p, v) for p, v in zip(parts, values, strict=True)):
        return [p.to(v.device, v.dtype).expand_as(v) for p, v in zip(parts, values, strict=True)]
    shapes = ", ".join(str(tuple(value.shape)) for value in values[:3])
    raise InterventionError(
        f"baseline={shown(baseline)} does not fit the activation at {site.name}, of shape "
        f"{shapes}. Give 'zero', 'mean', a tensor that broadcasts to it, or a run of equal shape."
    )


def broadcasts(part: Any, value: Tensor) -> bool:
    """Whether a baseline is a tensor that can be expanded to an activation, or to pixels."""
    if not isinstance(part, Tensor) or part.ndim > value.ndim or not part.is_floating_point():
        return False
    ends = value.shape[value.ndim - part.ndim :]
    return all(n in (1, m) for n, m in zip(part.shape, ends, strict=True))


def _rows(inputs: Mapping[str, Any], site: Site, values: Sequence[Tensor]) -> list[Tensor]:
    """Returns the rows `[row, ...]` of an activation that hold a token, or a part of an image."""
    if not site.by_position:
        listed_axes = len(site.axes.split()) - 1
        return [v if v.ndim == listed_axes else v.flatten(0, 1) for v in values]
    (value,) = values
    found = []
    for row, prompt in zip(value, rows_of(inputs, None, text=False), strict=True):
        real = prompt.real.to(row.device)
        found.append(row[real] if len(row) == len(prompt.attention_mask) else row)
    return found

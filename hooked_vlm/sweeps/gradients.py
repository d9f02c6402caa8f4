"""A clean run that can be differentiated: a probe at every site, and what torch would not say.

Nothing before the first probe is differentiated, no parameter gets a gradient, and all
that a parameter's gradient would need is not kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks.gradients import (
    GradientStore,
    differentiate,
    explained,
    frozen,
    require_differentiable,
    warn_lost,
)
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.patch_order import VisionActivation, listed
from hooked_vlm.hooks.stand_ins import uncached


Metric = Callable[[Tensor], Tensor]

_REMEDY = (
    "A metric must not write into its logits (take logits.clone()), nor a base intervention into "
    "what it is given; and where an operation has no derivative, use Sweep.run, which is exact."
)


class SiteProbe(GradientStore):
    """A probe that keeps a site's activation too, of a module that runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []
        """By image at sites where images differ in size; else one."""
        self.listed = False

    def __call__(self, activation: VisionActivation, hook: HookPoint) -> VisionActivation:
        if self.values:
            raise InterventionError(
                f"{hook.name} runs once for each image of these inputs, so an estimate there "
                "cannot tell them apart. Use hook_merged_embed (slot 0) at the same region, or "
                "one image at a time."
            )
        self.listed = isinstance(activation, list)
        # A copy: what the model, or a later hook, does in place must not reach it.
        self.values = [part.detach().clone() for part in listed(activation)]
        return super().__call__(activation, hook)

    def taken(self) -> list[Tensor] | None:
        """Returns the gradients of the last backward pass, by image if listed, and forgets them."""
        found = self.gradient()
        self.by_call.clear()
        return None if found is None else listed(found)


@dataclass(frozen=True, eq=False)
class DifferentiableRun:
    """A clean run that can be differentiated."""

    probes: Mapping[str, SiteProbe]
    """By site, of those that ran."""
    score: Tensor
    points: Mapping[str, HookPoint]

    def gradients(self) -> Iterator[dict[str, list[Tensor]]]:
        """Yields the gradients at all sites, for one entry of the metric after another.

        Sites that the score does not depend on are left out, with a warning.
        """
        if not self.probes:
            return
        with torch.enable_grad():
            score = self.score if self.score.ndim > 1 else self.score[:, None]
            entries = score.flatten(1).sum(0).unbind()
        for i, entry in enumerate(entries):
            with explained(InterventionError, _REMEDY):
                differentiate(entry, self.probes.values(), retain_graph=i + 1 < len(entries))
            found = {name: probe.taken() for name, probe in self.probes.items()}
            if i == 0:
                lost = [name for name, gradient in found.items() if gradient is None]
                warn_lost(lost, "edits there count as without effect (use Sweep.run there)")
            yield {
                name: [torch.zeros_like(v) for v in self.probes[name].values]
                if gradient is None
                else gradient
                for name, gradient in found.items()
            }

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
            return [wide(p) - wide(v) for p, v in zip(parts, probe.values, strict=True)]


def clean_run(
    model: Any,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    base: Sequence[Any],
    metric: Metric,
    forward_kwargs: Mapping[str, Any],
) -> DifferentiableRun:
    """Runs a model once under `base`, with a probe at every named site."""
    require_unhooked(model)
    require_differentiable(model.hf_model, "attribution", InterventionError)
    probes = {name: SiteProbe() for name in names}
    arguments = {**uncached(model.hf_model), **forward_kwargs}
    with (
        model.turn(),
        torch.enable_grad(),
        frozen(model.hf_model),
        explained(InterventionError, _REMEDY),
    ):
        logits = model.run_with_hooks(inputs, [*base, *probes.items()], **arguments)
        score = metric(logits)
    _check_score(score, logits, any(probe.values for probe in probes.values()))
    # As the run left them: they tell which positions and patches an activation holds.
    points = {name: replace(model.hook_dict[name], call=0) for name in names}
    return DifferentiableRun({n: p for n, p in probes.items() if p.values}, score, points)


def wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- what is refused ------------------------------------------------------------------------


def require_unhooked(model: Any) -> None:
    """Raises `InterventionError` for a model under hooks, or in training."""
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


def _check_score(score: Any, logits: Tensor, ran: bool) -> None:
    if not isinstance(score, Tensor) or score.ndim == 0:
        raise InterventionError(
            f"The metric returned {said(score)}; expected a tensor of one score or more for each "
            "prompt, [batch, …], computed from the logits (no .item(), no mean over prompts)."
        )
    if ran and logits.requires_grad and not score.requires_grad:
        raise InterventionError(
            f"The metric returned {said(score)} without a gradient. An estimate needs one: take "
            "no argmax, comparison, .detach(), .item() or .numpy() in it, and no torch.no_grad(). "
            "For a metric that has no slope use Sweep.run, which is exact."
        )
    if ran and not logits.requires_grad:
        raise InterventionError(
            "No gradient gets from the edited sites to the logits: the model detaches them, runs "
            "under torch.no_grad(), or never uses these sites. Use Sweep.run, which is exact."
        )
    if not score.is_floating_point():
        raise InterventionError(f"The metric returned {said(score)}; expected floating point.")


def said(value: Any) -> str:
    """Returns what a metric returned, in words."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


def one_score(metric: Metric, instead: str = "Give one function for each score.") -> Metric:
    """Returns a metric that raises `InterventionError` unless it gives one score by prompt."""

    def scored(logits: Tensor) -> Tensor:
        score = metric(logits)
        if not isinstance(score, Tensor) or score.ndim != 1:
            raise InterventionError(
                f"The metric returned {said(score)}; effects and attributions need one score for "
                f"each prompt, [batch], without an average over prompts. {instead}"
            )
        return score

    return scored

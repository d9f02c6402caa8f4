"""What a run will take, predicted before it: parts, operations, memory, and hours on a card.

The model is built from its configuration on the `meta` device, without weights.  Prompts are real
ones, of its own processor.  The cost of each kind of work is that of one batch, by the same counts
as `Sweep.plan`; how much of it there is, `experiments.work` says.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from hooked_vlm.errors import (
    DataError,
    HookedVLMWarning,
    UnsupportedModelError,
    counted,
    did_you_mean,
)
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.dual_mechanisms.swap_regions import SwapRegions
from hooked_vlm.experiments.further.encoder_depth import depths
from hooked_vlm.experiments.options import Config, check_options, common_at, limited, specialise
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.work import Depth, Work, totals, work_of
from hooked_vlm.inputs.without_torchvision import load_processor
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.loading import local_folder
from hooked_vlm.model.memory import size_text
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.report.cards import Card, card_of
from hooked_vlm.report.devices import DTYPES
from hooked_vlm.report.job import Job, check, setting_of
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.stimuli.settings import OWN
from hooked_vlm.sweeps.plan import Costs, costs_of
from hooked_vlm.sweeps.sweep import Sweep


UTILISATION = 0.3
"""Share of a card's highest rate that is assumed where none is given."""


class Unloaded(HookedVLM):
    """A model without weights, whose inputs are on the CPU: shapes and costs can be asked for."""

    place = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        """Where inputs belong; after `sized`, that of a card, for the sizes of passes."""
        return self.place


@dataclass(frozen=True)
class StepPlan:
    """One experiment on one setting."""

    name: str
    parts: int
    operations: float
    peak: int
    """Bytes of its largest pass beside the weights, about."""


@dataclass(frozen=True)
class RunPlan:
    """The prediction for a run; `print` it."""

    model: str
    suite: str
    card: Card
    workers: int
    dtype: str
    utilisation: float
    weights: int
    """Bytes of the weights."""
    steps: Sequence[StepPlan]
    unknown: Sequence[str] = field(default=())
    """Experiments whose work is not known."""

    @property
    def operations(self) -> float:
        """Operations of all steps."""
        return float(sum(step.operations for step in self.steps))

    @property
    def memory(self) -> int:
        """Bytes that each worker needs, about."""
        return self.weights + max((step.peak for step in self.steps), default=0)

    @property
    def hours(self) -> float:
        """Hours of one worker for all steps together."""
        return self.operations / (self.card.rate(self.dtype) * self.utilisation) / 3600

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        totals = {name: getattr(self, name) for name in ("operations", "memory", "hours")}
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        """Returns a table of the steps, and what they take together."""
        width = max([len(step.name) for step in self.steps] + [10])
        lines = [f"{'experiment':<{width}}  {'parts':>6}  {'TFLOP':>10}  {'memory':>8}"]
        for step in self.steps:
            memory = size_text(self.weights + step.peak)
            cost = f"{step.operations / 1e12:,.4g}"
            lines.append(f"{step.name:<{width}}  {step.parts:>6}  {cost:>10}  {memory:>8}")
        parts = sum(step.parts for step in self.steps)
        share = self.hours / min(self.workers, max(parts, 1))
        card, has = self.card, size_text(int(self.card.memory))
        fits = "fits into" if self.memory <= 0.9 * card.memory else "DOES NOT FIT into"
        rate = card.rate(self.dtype) / 1e12
        lines += [
            "",
            f"{self.suite} on {self.model} in {self.dtype}: {counted(parts, 'part')}, "
            f"{self.operations / 1e15:.3g} PFLOP.",
            f"Memory: about {size_text(self.memory)} for each worker, {size_text(self.weights)} of "
            f"it weights; it {fits} {card.name} ({has}, of which a tenth is left free).",
            f"Predicted time: {_time(self.hours)} of one {card.name}, "
            f"{_time(share)} with {counted(self.workers, 'worker')}, at {self.utilisation:.0%} of "
            f"{rate:g} TFLOP/s ({card.source}).",
            "All of this is predicted, nothing was measured. Not in it: loading the model, drawing "
            "pictures, fitting probes and statistics (on the CPU), and pairs that the model "
            "answers wrongly. The share of the rate is an assumption: give --utilisation what one "
            "experiment reached.",
        ]
        if self.unknown:
            lines.append(f"Of unknown size and not counted: {', '.join(self.unknown)}.")
        return "\n".join(lines)


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.3g} h"
    return f"{60 * hours:.2g} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"


def plan_run(
    suite: str,
    model: str,
    *,
    config: Config | None = None,
    setting: str | None = None,
    options: Mapping[str, str] | None = None,
    dtype: str = "float32",
    card: str = "H200",
    workers: int = 1,
    utilisation: float = UTILISATION,
    limit: int | None = None,
) -> RunPlan:
    """Returns the prediction for a suite, or for one experiment, on a model; no weight is read.

    `model` is a shipped model, a folder with a configuration and a processor, or a hub name.
    `config`, `setting`, `options` and `limit` are those of the run.  `utilisation` is the share of
    the card's highest rate that is reached.

    Raises `DataError` for arguments out of range, and `UnsupportedModelError` for a model whose
    configuration or processor cannot be read.
    """
    chosen = card_of(card)
    known = [name for name in DTYPES if name != "auto"]
    if dtype not in known:
        raise DataError(
            f"dtype={dtype!r} was given; expected one of {', '.join(known)}: a plan reads no "
            f"weights.{did_you_mean(dtype, known)}"
        )
    if workers < 1 or not 0 < utilisation <= 1:
        raise DataError(
            f"workers={workers} and utilisation={utilisation:g} were given; expected at least 1 "
            "worker, and a utilisation above 0 and at most 1."
        )
    steps = registry.steps(suite, setting)
    check_options([step.experiment.config for step in steps], options or {})
    loaded = unloaded(model, getattr(torch, dtype))
    weights = [*loaded.hf_model.parameters(), *loaded.hf_model.buffers()]
    found, unknown, batches = [], [], {}
    for step in steps:
        kind = step.experiment.config
        own = specialise(kind, config or Config(), options or {}, step.setting)
        own = limited(own, limit)
        if step.setting == OWN:  # how much there is depends on the table, and nothing is drawn
            unknown.append(step.name)
            continue
        shown = _Batch.key(own)
        batch = batches.get(shown) or _Batch.of(loaded, own)
        batches[shown] = batch
        work = work_of(step.experiment.name, own, batch.depth)
        if work is None:
            unknown.append(step.name)
            continue
        costs = [batch.cost(each) for each in work]
        parts = totals(work, own.batch_size)
        peak = max((peak for _, peak in costs), default=0)
        found.append(StepPlan(step.name, parts, sum(cost for cost, _ in costs), peak))
    return RunPlan(
        model=model,
        suite=suite,
        card=chosen,
        workers=workers,
        dtype=dtype,
        utilisation=utilisation,
        weights=sum(x.numel() * x.element_size() for x in weights),
        steps=found,
        unknown=unknown,
    )


def plan_job(job: Job, card: str) -> RunPlan:
    """Returns the prediction for a job, whose arguments are checked; no folder is made.

    With the dtype `"auto"`, that of the model's configuration is taken.

    Raises `DataError` for wrong arguments, and otherwise as `plan_run` does.
    """
    check(job, writes=False)
    dtype = job.dtype
    if dtype == "auto":
        dtype = str(_configuration(job.model)[1].dtype or "float32").removeprefix("torch.")
    return plan_run(
        job.experiment,
        job.model,
        config=job.config,
        setting=setting_of(job),
        options=job.options,
        dtype=dtype,
        card=card,
        limit=job.limit,
    )


def unloaded(name: str, dtype: torch.dtype) -> Unloaded:
    """Returns a model on the `meta` device with its processor.

    Raises `UnsupportedModelError` where its configuration or processor cannot be read.
    """
    place, config = _configuration(name)
    try:
        with torch.device("meta"):
            made = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        processor = load_processor(place)
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error
    return Unloaded(made.eval(), processor, name=name)


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _configuration(name: str) -> tuple[str, Any]:
    """Returns where a model is read from, and its configuration."""
    place = str(local_folder(name) or name)
    try:
        return place, AutoConfig.from_pretrained(place)
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The plan for {name!r} needs its configuration and its processor, and they cannot be "
        f"read: {str(error).strip()[:120]} Give a folder with config.json and the processor's "
        "files; weights are not needed."
    )


@dataclass(eq=False)
class _Batch:
    """One batch of a setting on a model, and what each kind of work on it costs."""

    setting: Setting
    pairs: list[tuple[Question, Question]]
    costs: Costs
    inputs: Any
    source: Any
    _known: dict[tuple[str, int], tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def key(cls, config: Config) -> Config:
        """Returns the options that a batch depends on: those of all, at the setting it shows."""
        return common_at(config, (*config.used_settings[:1], "squares")[0])

    @classmethod
    def of(cls, model: Unloaded, config: Config) -> "_Batch":
        """Prepares the first questions of a setting, and as their sources those after them."""
        model.place = torch.device("cpu")
        own = cls.key(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HookedVLMWarning)  # grids are not measured on meta
            setting = Setting.of(model, own)
            asked = setting.stimuli.items(setting.directions[:1])[: config.batch_size]
            inputs = setting.inputs(asked)
            source = setting.inputs([*asked[1:], asked[0]])
        model.place = torch.device("meta")  # passes have a card's sizes
        pairs = list(zip(asked, [*asked[1:], asked[0]], strict=True))
        return cls(setting, pairs, costs_of(model, inputs), inputs, source)

    @property
    def depth(self) -> Depth:
        """What the amount of work depends on."""
        model = self.setting.model
        regions = SwapRegions.of(self.setting.geometry, self.setting.axes)
        return Depth(model.anatomy.vision.last_read + 1, len(regions.kinds))

    def cost(self, work: Work) -> tuple[float, int]:
        """Returns the operations of some work, and the bytes of its largest pass."""
        key = work.kind, work.cells
        if key not in self._known:
            self._known[key] = self._of_batch(*key)
        each, peak = self._known[key]
        return each / len(self.pairs) * work.n, peak

    def _of_batch(self, kind: str, cells: int) -> tuple[float, int]:
        """Returns the operations of a batch without its pictures, and bytes."""
        n, length = self.inputs["input_ids"].shape
        costs = self.costs
        if kind == "picture":
            return float(costs.vision), 0
        if kind == "pass":
            return float(costs.rows(n, length, length, last_only=True) + n * costs.head), 0
        sweep, sources = self._sweep(kind, cells)
        plan = sweep.plan(self.setting.model).explain(logits_to_keep=1)
        if kind == "encoder sites":
            return plan.planned, plan.peak
        return plan.planned - costs.vision * (1 + sources), plan.peak

    def _sweep(self, kind: str, cells: int) -> tuple[Sweep, int]:
        """Returns a sweep that costs what those of an experiment do, and its number of sources."""
        model, geometry = self.setting.model, self.setting.geometry
        axis = AXIS_OF[self.setting.directions[0]]
        slots = range(model.cfg.n_layers + 1)
        if kind == "first slot":
            whole = self.inputs.grids[0][0].all()
            strengths = {"strength": range(cells)}
            return Sweep(self.inputs, strengths, lambda strength: Ablate(strength * 0, at=whole)), 0
        if kind == "final token":
            at: dict[str, Any] = {"last": LastToken()}
        else:
            regions = SwapRegions.of(geometry, self.setting.axes).pairs[axis]
            at = dict(list(regions.items())[:cells])
        sites = depths(model) if kind == "encoder sites" else list(slots)
        base = [Ablate(0, at=self.inputs.grids[0][0].all())] if "removed" in kind else []
        sweep = Sweep(
            self.inputs,
            {"kind": list(at), "site": sites},
            lambda kind, site: Patch(site, at=at[kind], source=self.source),
            base,
        )
        return sweep, 1

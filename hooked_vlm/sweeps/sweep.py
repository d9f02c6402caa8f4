"""Sweeps: one set of inputs, many interventions, one table of scores with named axes.

A sweep is data.  Its axes say what varies (slots, kinds of region, strengths), and
`make` says which intervention stands at each combination; planning it makes every
intervention and checks it, so that a mistake in the last cell is found before the first
forward pass.  How the cells are executed is the engine's business: whichever way it
goes about it, each cell's scores are those of one plain hooked forward pass.

    sweep = Sweep(inputs, {"kind": kinds, "slot": range(9)}, make=lambda kind, slot: …)
    scores = sweep.run(model, metric=lambda logits: …)   # xarray.DataArray
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.displayed import OneLine, brief, html_block, html_opened, html_table
from hooked_vlm.arguments.kinds import Count, Model, Name
from hooked_vlm.engine.budget import PASS_TOKENS
from hooked_vlm.engine.run import check_engine, run_cells
from hooked_vlm.engine.shared import recorded_once
from hooked_vlm.errors import InterventionError, counted, did_you_mean
from hooked_vlm.interventions.chain import Cell, flattened, source_of
from hooked_vlm.interventions.hook_at import HookAt
from hooked_vlm.interventions.placing import Places
from hooked_vlm.interventions.recording import Recording
from hooked_vlm.sweeps.attribution import first_order
from hooked_vlm.sweeps.plan import CheckedCells


Metric = Callable[[Tensor], Tensor]
"""From logits `[batch, pos, d_vocab]` to scores `[batch, ...]`."""

OnProgress = Callable[[int, int], None]
"""Called with the number of cells done and their total."""


@checked(InterventionError, but=("inputs", "axes", "make"))
@dataclass(frozen=True, eq=False, repr=False)
class Sweep(OneLine):
    """Interventions over named axes, all on the same inputs.

    `make` is called with one value of every axis, by name, and returns an intervention, a
    pair (site's name, hook function), a list of these, or None for the clean run.  `base` is
    what every cell begins with, before its own (a swap *under* an ablation).
    """

    inputs: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any] | np.ndarray]
    make: Callable[..., Any]
    base: Sequence[Any] = ()

    def _repr_html_(self) -> str:
        axes = self.axes if isinstance(self.axes, Mapping) else {}
        rows = [(name, len(v), brief(list(v))) for name, v in axes.items() if _has_values(v)]
        n_cells = counted(prod(size for _, size, _ in rows) if rows else 0, "cell")
        table = html_table(("axis", "values", "which"), rows)
        under = [html_opened(f"base {i}", each) for i, each in enumerate(self.base)]
        made = f"make: {brief(self.make)}"
        drawn = html_opened("inputs", self.inputs)
        return html_block(f"Sweep of {n_cells}; {made}", table, *under, drawn)

    def cells(self) -> Iterator[Cell]:
        """Yields the coordinates and interventions of every cell, the last axis fastest."""
        for values in product(*self.axes.values()):
            made = self.make(**dict(zip(self.axes, values, strict=True)))
            base, own = _interventions(self.base), _interventions([] if made is None else made)
            yield Cell(values, (*base, *own), len(base))

    @checked(InterventionError)
    def plan(self, model: Model) -> CheckedCells:
        """Returns every cell with everything checked; nothing runs.

        `plan.explain(logits_to_keep=1)` says what running it takes, on the `meta` device too.
        """
        self._check()
        model.require_call(self.inputs, ())
        places = Places(model)  # each distinct place is located once for the whole sweep
        cells = [cell.placed(model, self.inputs, places) for cell in self.cells()]
        return CheckedCells(model, self.inputs, cells)

    def recorded(self, model: Model) -> list[Cell]:
        """Returns every cell, checked, with its sources recorded.

        Nothing runs before all cells have been checked; then each distinct source is run
        once, and all the sites that any cell reads of it are recorded.
        """
        cells = self.plan(model)
        wanted: dict[int, tuple[Any, set[str]]] = {}
        for part in (part for cell in cells for part in flattened(cell.interventions)):
            _, source = source_of(part)
            if source is not None and not isinstance(source, Recording):
                wanted.setdefault(id(source), (source, set()))[1].add(
                    getattr(part, "read", part.site)
                )
        recorded = {
            key: recorded_once(model, inputs, sorted(n)) for key, (inputs, n) in wanted.items()
        }
        return [cell.with_sources(recorded) for cell in cells]

    @checked(InterventionError, but=("metric",))
    def run(
        self,
        model: Model,
        metric: Metric,
        *,
        dims: Sequence[Name] = ("batch",),
        coords: Mapping[str, Sequence[Any]] | None = None,
        on_progress: OnProgress | None = None,
        engine: str = "growing",
        pass_tokens: Count = PASS_TOKENS,
        memory: Count | None = None,
        **forward_kwargs: Any,
    ) -> xr.DataArray:
        """Returns the metric at every cell, with dimensions `(*axes, *dims)`.

        `dims` names the axes of what the metric returns, batch first; `coords` labels them.
        Forward keyword arguments (such as `logits_to_keep=1`) go to the wrapped model.  Logits at
        padding mean nothing: engines may differ there, and a metric must not read them.

        `engine` is the fastest way that may be taken: `"growing"`, all cells as one batch that
        grows from block to block; a control with noise in it, once for each kind of pass, must be a
        plain pass's within rounding, which is measured (`engine.noise`); `"restart"`, each cell
        from the first block that it changes, which gives the same bits as `"plain"`, one whole
        hooked forward pass for each.  Where a model or a cell does not allow one, the next is
        taken, with a warning; the result's attributes say which and why.
        `pass_tokens` is how many positions the rows of a growing batch have together; more cells
        than that go through in several passes.  The number is fixed, so that a sweep has the same
        passes, and with them the same bits, whatever memory is free.  On a CPU a pass has no more
        than its caches hold.  `memory` limits a pass in bytes, about, in addition.  A pass that
        does not fit into memory is halved, with a warning.

        Raises `InterventionError` for an unknown engine, and a metric of other axes than `dims`.
        """
        check_engine(engine)
        scored = self._scored(metric, dims, coords)
        model.require_call(self.inputs, forward_kwargs)
        cells = self.recorded(model)
        scores, said = run_cells(
            engine,
            model,
            self.inputs,
            cells,
            scored,
            on_progress,
            forward_kwargs,
            memory,
            pass_tokens,
        )
        return self._table([score.float() for score in scores], dims, coords, said)

    @checked(InterventionError, but=("metric",))
    def attribution(
        self,
        model: Model,
        metric: Metric,
        *,
        dims: Sequence[Name] = ("batch",),
        coords: Mapping[str, Sequence[Any]] | None = None,
        **forward_kwargs: Any,
    ) -> xr.DataArray:
        """Returns a first-order estimate of `run`, of the same dimensions and labels.

        The clean run (under `base`) is made and differentiated once for each entry of the metric
        after the batch, whatever the number of cells; see `attribution` for what that leaves
        out, and `attribution_error` for how far off it was.

        Raises what `run` raises, and `InterventionError` where there is no gradient to go by.
        """
        scored = self._scored(metric, dims, coords)
        model.require_call(self.inputs, forward_kwargs)
        scores, said = first_order(model, self.inputs, self.recorded(model), scored, forward_kwargs)
        return self._table(scores, dims, coords, said)

    def _check(self) -> None:
        """Raises `InterventionError` for inputs, axes or a function of another kind."""
        if not callable(self.make) or not isinstance(self.inputs, Mapping):
            raise InterventionError(
                f"Sweep(inputs, axes, make) was given a {type(self.inputs).__name__} as inputs and "
                f"a {type(self.make).__name__} as make; expected inputs of model.prepare, and a "
                "function of one value of each axis."
            )
        axes = self.axes if isinstance(self.axes, Mapping) else {}
        named = all(isinstance(name, str) for name in axes)
        if not axes or not named or not all(map(_has_values, axes.values())):
            raise InterventionError(
                f"A sweep needs named axes with values; given: {shown(self.axes)}. Give a "
                "mapping such as {'slot': range(9)}."
            )
        try:
            inspect.signature(self.make).bind(**dict.fromkeys(axes))
        except TypeError as error:
            raise InterventionError(
                f"make cannot be called with the axes {', '.join(axes)}: {error}. Give a function "
                "that takes each by its name."
            ) from None
        except ValueError:  # a built-in function without a signature
            pass

    def _scored(
        self, metric: Metric, dims: Sequence[str], coords: Mapping[str, Sequence[Any]] | None
    ) -> Metric:
        """Returns the metric with its axes checked; raises for axes of one name at once."""
        if not callable(metric):
            raise InterventionError(
                f"metric={shown(metric)} was given; expected a function of the logits."
            )
        self._check()
        known = (*self.axes, *dims)
        for name in coords or {}:
            if name not in known:
                raise InterventionError(
                    f"coords labels {name!r}, which is no axis of this sweep: it has "
                    f"{', '.join(map(str, known))}.{did_you_mean(name, map(str, known))}"
                )
        taken = sorted(set(self.axes) & set(dims))
        if taken:
            raise InterventionError(
                f"dims={tuple(dims)} and the sweep's axes {tuple(self.axes)} share {taken}. Give "
                "each axis a name of its own."
            )

        def scored(logits: Tensor) -> Tensor:
            score = metric(logits)
            _check_score(score, dims, coords or {})
            return score

        return scored

    def _table(
        self,
        scores: Sequence[Tensor],
        dims: Sequence[str],
        coords: Mapping[str, Sequence[Any]] | None,
        said: str,
    ) -> xr.DataArray:
        """Returns every cell's score as one array with named axes."""
        values = torch.stack(list(scores)).cpu().numpy()  # one copy from the device
        sizes = [len(values) for values in self.axes.values()]
        values = values.reshape(*sizes, *values.shape[1:])
        labels = {name: list(given) for name, given in self.axes.items()} | dict(coords or {})
        labels = {n: [_label(x) for x in v] for n, v in labels.items() if n in (*self.axes, *dims)}
        return xr.DataArray(values, dims=(*self.axes, *dims), coords=labels, attrs={"engine": said})


def _interventions(made: Any) -> tuple[Any, ...]:
    """Returns what `make` returned as interventions; pairs (name, function) become `HookAt`."""
    if _is_hook(made) or not isinstance(made, list | tuple):
        made = [made]
    return tuple(HookAt(*item) if _is_hook(item) else item for item in made)


def _is_hook(item: Any) -> bool:
    pair = isinstance(item, tuple) and len(item) == 2
    return pair and isinstance(item[0], str | int) and callable(item[1])


def _check_score(score: Any, dims: Sequence[str], coords: Mapping[str, Sequence[Any]]) -> None:
    """Raises `InterventionError` unless a score has the axes that `dims` and `coords` name."""
    if not isinstance(score, Tensor):
        raise InterventionError(
            f"The metric returned a {type(score).__name__}; expected a tensor of scores, batch "
            "first, computed from the logits (without .item())."
        )
    if score.ndim != len(dims):
        raise InterventionError(
            f"The metric returned {score.ndim} axes, of shape {tuple(score.shape)}; dims="
            f"{tuple(dims)} names {len(dims)}. Return one score for each prompt, batch first, "
            "without a mean over prompts; or name all axes in dims."
        )
    for name, size in zip(dims, score.shape, strict=True):
        if name in coords and len(coords[name]) != size:
            raise InterventionError(
                f"The metric returned {size} along {name!r}, and coords gives {len(coords[name])} "
                "labels for it."
            )


def _has_values(values: Any) -> bool:
    is_single = isinstance(values, np.ndarray | Tensor) and not values.ndim
    listed = hasattr(values, "__len__") and hasattr(values, "__iter__") and not is_single
    return listed and len(values) > 0


def _label(value: Any) -> Any:
    """Returns a coordinate as xarray can hold it: numbers and text as they are, all else named."""
    return value if isinstance(value, str | int | float | np.generic) else str(value)


@checked(InterventionError)
def final_logits(
    logits: Float[Tensor, "batch pos d_vocab"],
) -> Float[Tensor, "batch d_vocab"]:
    """Returns the last position's logits `[batch, d_vocab]` (prompts are padded on the left)."""
    return logits[:, -1].to(torch.float32)

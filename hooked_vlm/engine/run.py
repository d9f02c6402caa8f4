"""Executing a sweep's cells, by the fastest engine that is allowed and possible.

`plain`, one hooked forward pass for each cell, is the definition that the others are tested
against.  `restart` runs each cell from the first block that it changes, on what the clean run left
there; it must give the same bits.  `growing` runs cells as rows of one batch (`growing`).  Each is
proved on the model before it is trusted; where it cannot be, the next one runs, with a warning
that gives the reason, once for a model and reason.  There is none where a faster engine would save
nothing, and under hooks that the user opened.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.engine.attempts import GrowthError, NotFasterError, attempt, require_worth
from hooked_vlm.engine.budget import PASS_TOKENS
from hooked_vlm.engine.clean_run import Clean, Metric, OnProgress, run_clean
from hooked_vlm.engine.fingerprints import remember, ways_of_attending
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.stages import ids_of, start_layer
from hooked_vlm.engine.vision import TowerRestart
from hooked_vlm.errors import HookedVLMWarning, InterventionError, callers_level, did_you_mean
from hooked_vlm.hooks.stand_ins import encoder_of, replaying
from hooked_vlm.interventions.chain import Cell


ENGINES = ("growing", "restart", "plain")
"""Ways to execute a sweep, the fastest first."""
FEWEST = 4
"""Cells from which on it pays to run the clean passes that prove a restart right."""
BUDGET = 2**30
"""Bytes of residual streams that a restart may keep."""


def check_engine(engine: str) -> None:
    """Raises `InterventionError` for an unknown engine."""
    if engine not in ENGINES:
        raise InterventionError(
            f"There is no engine {engine!r} among {', '.join(ENGINES)}."
            f"{did_you_mean(engine, ENGINES)}"
        )


def run_cells(
    engine: str,
    model: Any,
    inputs: Mapping[str, Any],
    cells: Sequence[Cell],
    metric: Metric,
    on_progress: OnProgress | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    memory: int | None = None,
    pass_tokens: int = PASS_TOKENS,
) -> tuple[list[Tensor], str]:
    """Returns every cell's score, and which engine made them (and why no faster one did).

    `engine` is the fastest that may be taken.  Raises `InterventionError` for an unknown one.
    """
    check_engine(engine)
    given = (model, inputs, cells, metric, on_progress, forward_kwargs)
    with model.turn(), model.eager():  # engines replace forwards, which all threads share
        return _run_fastest(engine, given, {"memory": memory, "pass_tokens": pass_tokens})


def _run_fastest(
    engine: str, given: tuple[Any, ...], limits: Mapping[str, Any]
) -> tuple[list[Tensor], str]:
    why: list[str] = []
    if engine == "growing":
        try:
            scores, report = run_growing(*given, **limits)
        except GrowthError as reason:
            why.append(f"no growing batch: {reason}")
            _tell(given[0], "growing", reason)
        else:
            return scores, str(report)
    if engine != "plain":
        try:
            return run_restarted(*given), _said("restart", why)
        except GrowthError as reason:
            why.append(f"no restart: {reason}")
            _tell(given[0], "restart", reason)
    return run_plain(*given), _said("plain", why)


def _tell(model: Any, engine: str, reason: GrowthError) -> None:
    """Warns, once for a model and a kind of reason, that an engine could not be taken.

    Reasons that differ in their numbers alone are of one kind.
    """
    if not reason.is_news:
        return
    why = shorten(str(reason), 200, placeholder=" …")

    def warn() -> bool:
        warnings.warn(
            f"Sweeps on {model.cfg.model_name} cannot run by the engine {engine!r}: {why}. A "
            "slower engine runs instead. The scores are those of plain passes; "
            'scores.attrs["engine"] names the engine of each sweep.',
            HookedVLMWarning,
            stacklevel=callers_level(),
        )
        return True

    remember(model, ("slower engine", engine, re.sub(r"\d[\d.e+-]*", "0", why)), warn)


def _said(engine: str, why: Sequence[str]) -> str:
    return f"{engine} ({'; '.join(why)})" if why else engine


def run_plain(
    model: Any,
    inputs: Mapping[str, Any],
    cells: Sequence[Cell],
    metric: Metric,
    on_progress: OnProgress | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Returns the metric of every cell, from one forward pass under its hooks each."""
    arguments = forward_kwargs or {}

    def run(i: int) -> Tensor:
        return model.run_with_hooks(inputs, cells[i].interventions, **arguments)

    with torch.no_grad():
        return _scored(len(cells), run, metric, on_progress)


def _scored(
    n_cells: int, run: Callable[[int], Tensor], metric: Metric, on_progress: OnProgress | None
) -> list[Tensor]:
    """Returns the metric of the logits that `run` gives for each cell's number."""
    scores = []
    for i in range(n_cells):
        scores.append(metric(run(i)))
        if on_progress is not None:
            on_progress(i + 1, n_cells)
    return scores


def run_restarted(
    model: Any,
    inputs: Mapping[str, Any],
    cells: Sequence[Cell],
    metric: Metric,
    on_progress: OnProgress | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Returns what `run_plain` does, bit for bit, each cell from where it first differs.

    A cell that changes block l of the language model leaves the encoder and all blocks below
    as they were in the clean run.  One that edits the vision encoder runs all of the language
    model, and of the encoder what is not below its edit.

    Raises `GrowthError` where that is not possible or does not pay; nothing is returned then.
    """
    arguments = dict(forward_kwargs or {})
    require_worth(model, cells, FEWEST)
    with torch.no_grad():
        layers = [start_layer(model, inputs, cell) for cell in cells]
        clean = tower = None
        if any(layer is not None for layer in layers):
            try:
                clean = _clean(model, inputs, cells[0].base, layers, arguments)
            except GrowthError:
                if None not in layers:
                    raise  # else cells of the vision encoder may still start late
        if None in layers:
            tower = TowerRestart.of(model, inputs, [cell.interventions for cell in cells])
        if clean is None and tower is None:
            raise NotFasterError("no cell can start later than a whole pass does")

        def run(i: int) -> Tensor:
            layer = layers[i]
            if layer is not None and clean is not None:
                return _from_layer(model, clean, cells[i], layer, arguments)
            if tower is not None:
                return tower.run(cells[i], arguments)
            return model.run_with_hooks(inputs, cells[i].interventions, **arguments)

        return _scored(len(cells), run, metric, on_progress)


def _clean(
    model: Any,
    inputs: Mapping[str, Any],
    base: Sequence[Any],
    layers: Sequence[int | None],
    arguments: Mapping[str, Any],
) -> Clean:
    """Returns the clean run with the residual stream where cells start, proved exact."""
    starts = sorted({layer for layer in layers if layer})
    ids = ids_of(inputs)
    each = 1 if ids is None else ids.numel() * model.cfg.d_model * model.cfg.dtype.itemsize
    kept = spread(starts, max(1, BUDGET // each))
    # A pass of its own, once a model: while the encoder replays, none may come between.
    model.block_outputs(lambda: model(inputs, **arguments))
    clean = attempt(
        lambda: run_clean(model, inputs, base, set(kept), arguments, want_keys=False),
        "its clean run failed",
    )
    bare = Cell((), tuple(base), len(base))

    def is_exact() -> bool:
        plain = model.run_with_hooks(inputs, base, **arguments)
        # The first start twice, to catch a replay that changes what was recorded.
        first = 0 if 0 in layers else min(kept, default=0)
        return all(
            torch.equal(_from_layer(model, clean, bare, layer, arguments), plain)
            for layer in (first, max(kept, default=0), first)
        )

    kind = ("restarts", clean.signature, clean.logits.shape, *kept, 0 in layers)
    kind += (ways_of_attending(model), clean.base_sites)
    if not attempt(
        lambda: remember(model, kind, is_exact), "the model could not be restarted between blocks"
    ):
        raise GrowthError("passes that start between its blocks give other bits")
    return clean


def _from_layer(
    model: Any, clean: Clean, cell: Cell, layer: int, arguments: Mapping[str, Any]
) -> Tensor:
    """Returns a cell's logits by blocks `layer` and above, or from the nearest start below."""
    start = max((stage for stage in clean.residuals if stage <= layer), default=None)
    with replaying(encoder_of(model), clean.encoded):
        if start is None:
            return model.run_with_hooks(clean.inputs, cell.interventions, **arguments)
        residual = clean.residuals[start]
        return model.run_from_layer(clean.inputs, residual, start, cell.own, **arguments)


def spread(layers: Sequence[int], most: int) -> list[int]:
    """Returns at most so many of some layers, evenly spread, the first among them.

    >>> spread([1, 2, 3, 4, 5], 2)
    [1, 4]
    """
    step = -(-len(layers) // most) if layers else 1
    return list(layers[::step])

"""Sweeps over the pairs of an experiment, and items whose scores are not numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from hooked_vlm.errors import CannotRunError, counted
from hooked_vlm.experiments.answers import without_numbers
from hooked_vlm.experiments.loop import over_batches
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.setting import FEWEST_PAIRS, Setting
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.sweeps.sweep import Sweep, final_logits


LEFT_OUT = "Left out"
OBSERVATION = "observation"
"""The coordinate of scores that says which observation a pair or a question belongs to."""


def sweep_pairs(
    setting: Setting,
    pairs: Mapping[str, Sequence[Any]],
    sweep_of: Callable[[str, list[Any]], Sweep],
    scored: Callable[[Setting, Tensor, list[Any]], Tensor],
    quantities: Sequence[str],
    on_progress: OnProgress,
    cells: int,
) -> dict[str, xr.DataArray]:
    """Returns a sweep's scores on all pairs, by direction: its axes, then pair and quantity.

    `sweep_of(direction, batch)` has `cells` cells; `scored(setting, logits, batch)` returns
    `[pair, quantity]` from the final position's logits.  A cell whose logits are no numbers has
    NaN; see `numbers_only`.

    Directions of one axis are in the same batches, pairs of the same pictures beside one another:
    the sweep then carries their image once for all its questions.
    """

    def score(_: str, batch: list[Any], told: OnProgress) -> xr.DataArray:
        own = [pair for _, _, pair in batch]
        return sweep_of(batch[0][0], own).run(
            setting.model,
            lambda logits: scored_numbers(
                lambda rows: scored(setting, rows, own), final_logits(logits)
            ),
            dims=("pair", "quantity"),
            coords={"quantity": quantities},
            on_progress=told,
            logits_to_keep=1,
        )

    asked: dict[str, list[tuple[str, int, Any]]] = {}
    for direction, own in pairs.items():
        numbered = [(direction, i, pair) for i, pair in enumerate(own)]
        axis = own[0].questions[0].axis if own else AXIS_OF[direction]
        asked.setdefault(axis, []).extend(numbered)
    for own in asked.values():
        own.sort(key=lambda item: [question.entities for question in item[2].questions])
    scores = over_batches(
        "sweep", asked, setting.batch_size, score, on_progress, steps=cells, last=True
    )
    found: dict[str, xr.DataArray] = {}
    for axis, parts in scores.items():
        whole = xr.concat(parts, dim="pair")
        places = {(d, i): place for place, (d, i, _) in enumerate(asked[axis])}
        for direction in dict.fromkeys(d for d, _, _ in asked[axis]):
            order = [places[direction, i] for i in range(len(pairs[direction]))]
            found[direction] = whole.isel(pair=order)
    return {direction: found[direction] for direction in pairs}


def scored_numbers(score: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Returns `score(logits)` `[row, ...]`, with NaN in rows whose logits are no numbers.

    One intervention may overflow in one row; scores of the other rows are as they are.
    """
    wrong = without_numbers(logits)
    # Without asking whether there is one: on a GPU the answer is waited for, at each cell.
    found = score(logits.masked_fill(wrong[:, None], 0.0))
    rows = wrong.to(found.device).reshape(-1, *[1] * (found.ndim - 1))
    return found.masked_fill(rows, torch.nan)


def left_out(n: int, unit: str, where: str = "", what: str = "scores") -> list[str]:
    """Returns the sentence on what is left out of the numbers; none where nothing is.

    >>> left_out(2, "picture", "horizontal", "tokens")
    ['Left out, horizontal: 2 pictures with tokens that are not numbers.']
    """
    if not n:
        return []
    place = f", {where}" if where else ""
    return [f"{LEFT_OUT}{place}: {counted(n, unit)} with {what} that are not numbers."]


def said_left_out(verdict: str) -> list[str]:
    """Returns the sentences of a verdict, a line each, on what is left out."""
    return [line for line in verdict.splitlines() if line.startswith(LEFT_OUT)]


def none_left(unit: str, remedy: str = "") -> CannotRunError:
    """Returns the error for an experiment that has no numbers at all.

    `remedy` is another one than a wider dtype.
    """
    return CannotRunError(
        f"Too few {unit}s have scores that are all numbers. Load the model in float32 or "
        f"bfloat16{f', or {remedy}' if remedy else ''}."
    )


def numbers_only(
    by_direction: Mapping[str, xr.DataArray], unit: str = "pair", part: str = ""
) -> tuple[dict[str, xr.DataArray], list[str]]:
    """Returns the pairs all of whose scores are numbers, and sentences on those left out.

    A direction with fewer than two such pairs is left out (of scores with the coordinate
    `OBSERVATION`, fewer than two observations).  The sentences begin with `part`.  Raises
    `CannotRunError` where none is left.
    """
    kept, said = {}, []
    for direction, values in by_direction.items():
        others = [axis for axis in values.dims if axis != "pair"]
        whole = xr.apply_ufunc(np.isfinite, values).all(others).values
        where = ", ".join(filter(None, [part, direction]))
        said += left_out(int((~whole).sum()), unit, where)
        left = values.isel(pair=np.flatnonzero(whole))
        observed = left.coords.get(OBSERVATION)
        n = left.sizes["pair"] if observed is None else len({*observed.values.tolist()})
        if n >= FEWEST_PAIRS:
            kept[direction] = left
    if not kept:
        raise CannotRunError(
            f"In no direction do two {unit}s have scores that are all numbers. Load the model in "
            "float32 or bfloat16."
        )
    return kept, said


def items_of_numbers(
    by_direction: Mapping[str, np.ndarray], asked: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, np.ndarray], dict[str, list[Any]], list[str]]:
    """Returns scores `[kind, item, quantity]` and questions without those that are no numbers.

    As `numbers_only`, for questions instead of pairs.
    """
    arrays = {
        d: xr.DataArray(values, dims=("kind", "pair", "quantity")).assign_coords(
            pair=np.arange(values.shape[1])
        )
        for d, values in by_direction.items()
    }
    kept, said = numbers_only(arrays, "question")
    questions = {d: [asked[d][i] for i in values["pair"].values] for d, values in kept.items()}
    return {d: values.values for d, values in kept.items()}, questions, said

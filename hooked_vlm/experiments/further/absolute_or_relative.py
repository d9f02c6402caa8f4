"""Q7, absolute or relative: does the order code hold a place in the picture or among the objects?

The probe of E3 is fitted to the usual pictures, in which the first object always lies in the
first strip, the second in the middle one and the last in the last.  It is then applied to pictures
whose three objects stand close together at one edge, where the two meanings differ: at the left
edge the last object lies in the middle strip.  The answer can depend on how close they stand, so
several gaps are measured, and each has its own outcome.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from hooked_vlm.analysis.probes import mean_of_shares
from hooked_vlm.errors import DataError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import left_out, none_left
from hooked_vlm.experiments.dual_mechanisms.order_reading import (
    PROBES,
    is_read,
    places_read,
)
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import (
    CHANCE,
    SEEDS,
    projected_scenes,
)
from hooked_vlm.experiments.further.close_objects import (
    EDGES,
    READINGS,
    Moved,
    Read,
    agreeing,
    close_together,
    moved,
    shares_read,
)
from hooked_vlm.experiments.further.gap_verdicts import (
    ACCURACY,
    BOTH,
    CONTROL,
    DIFFERENCE,
    MOSTLY,
    NAMES,
    SURPLUS,
    adjusted,
    apart,
    verdict,
)
from hooked_vlm.experiments.further.held_out_halves import Halves
from hooked_vlm.experiments.loop import over, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting, of_config
from hooked_vlm.experiments.tables import format_names, interval_rows
from hooked_vlm.experiments.verdicts import claim_rows, claims_over_probes
from hooked_vlm.stimuli.geometry import Layout, Shifted
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.stimuli.settings import SETTINGS


ABOUT = About(
    id="Q7",
    name="absolute-or-relative",
    section="open question on 5.2",
    title="Is the order code a place in the picture, or a place among the objects?",
    claim=(
        "The paper's objects always lie in the strips of their order, so that its probes cannot "
        "tell a place in the picture from a place among the objects."
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`images` pictures of each axis; `gaps`: tokens between the objects at an edge.

    Gaps at which the pictures show nothing are named in the verdict.

    `probe` is the `"paper"`'s recipe, or a logistic regression fitted until it has `"converged"`.
    """

    settings_allowed = SETTINGS  # What'sUp's photographs cannot be moved
    ranges: ClassVar = {"images": (8, 10**6), "gaps": (0, 100)}  # probes need held-out pictures
    choices: ClassVar = {"probe": PROBES}

    images: int = 120
    gaps: tuple[int, ...] = (0, 1, 2)
    probe: str = "paper"


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Fits E3's probe to usual pictures, and applies it to objects close together.

    Raises `DataError` where no gap shows anything.
    """
    setting = Setting(model, data, config.batch_size)
    layouts = _at_gaps(setting.geometry, config.gaps)
    # 1. The probes of each axis, fitted to one half of its pictures.
    halves = {axis: Halves.of(setting, axis, config.images, config.seed) for axis in setting.axes}
    probes = {axis: own.fitted.read_by(config.probe) for axis, own in halves.items()}

    # 2. What they read on the other half, in each layout.
    def score(unit: Shown, _: OnProgress) -> Read:
        grids = projected_scenes(setting, halves[unit.axis].asked, unit.entities, unit.layout)
        return places_read(probes[unit.axis][0], grids)

    shown = {str(one): one for axis in setting.axes for one in _shown(axis, layouts)}
    read = over("readings", shown, score, on_progress, last=True)
    # 3. The table.
    rows, readings, pictures = [], [], {}
    missing: list[str] = []
    for axis in setting.axes:
        _, accuracies = probes[axis]
        found = _read_axis(setting, axis, layouts, halves[axis], accuracies, read, config.seed)
        rows += [{**row, "axis": axis} for row in found["rows"]]
        readings.append(found["readings"])
        missing += found["left_out"]
        pictures |= found["pictures"]
    table = adjusted(pd.DataFrame(rows))
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={
            "readings": xr.concat(readings, pd.Index(setting.axes, name="axis"))  # pyright: ignore
        },
        images=pictures,
        verdict="\n".join([verdict(table, config.gaps), *missing]),
        config={
            "images": config.images,
            "gaps": list(layouts),
            "probe": config.probe,
            "seed": config.seed,
        },
        notes=(
            "E3's probe, fitted to object tokens of half of the usual pictures, labelled by place, "
            f"and applied to the other triples. Numbers are means over {SEEDS} probes with "
            "other initialisations, with intervals over pictures. probe='converged' is one "
            "logistic regression on the same tokens instead.",
            "Counted are objects of which no token lies in the strip of their order: "
            f"{_counted_objects(layouts)}. 'relative' is the share of their tokens read as their "
            "place among the objects, 'absolute' that read as their strip, 'other' the rest. "
            "Objects weigh the same, and so do the edges.",
            "Each gap has its own outcome, and no outcome holds for other gaps. The tests of "
            f"'{DIFFERENCE}' over both edges, at every axis and gap, are one family (Holm). The "
            "other tests can only withhold an outcome and are not adjusted.",
            f"'{CONTROL}': of the objects close together in the centre, the tokens whose order and "
            "strip agree, with equal weight for each place. Both meanings give them one reading; "
            "where the probe has another, its readings at the edges say nothing.",
            "'alone' shows one of the objects at the same cells without the others. A place among "
            "objects needs other objects, so a code is called relative only if three objects give "
            "more of this reading than one.",
        ),
    )


run = of_config(run_on)


def _at_gaps(geometry: Layout, gaps: Sequence[int]) -> dict[int, dict[str, Shifted]]:
    """Returns the layouts of each gap at which objects at an edge show something.

    Raises `DataError` where there is no such gap.
    """
    found, refused = {}, []
    for gap in sorted(set(gaps)):
        try:
            found[gap] = close_together(geometry, gap)
        except DataError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return found


def _counted_objects(layouts: Mapping[int, Mapping[str, Layout]]) -> str:
    """Returns which objects count at each gap, in words."""
    ordinals = ("first", "second", "third")
    at_gaps = []
    for gap, own in layouts.items():
        edges = (
            f"the {format_names([ordinals[o.place] for o in moved(own[edge], 'horizontal')])} at "
            f"the {label}"
            for edge, label in EDGES.items()
        )
        at_gaps.append(f"{apart(gap)}, {' and '.join(edges)}")
    return "; ".join(at_gaps)


@dataclass(frozen=True)
class Shown:
    """The pictures of an axis in one layout."""

    axis: str
    gap: int
    place: str
    """Where the objects stand: an edge, or `"centre"`."""
    layout: Layout
    alone: int | None = None
    """The only object that is shown; None: all three."""

    def entities(self, question: Question) -> tuple[str | None, ...]:
        """Returns what is shown of a question's entities, by place."""
        return tuple(
            name if self.alone in (None, i) else None for i, name in enumerate(question.entities)
        )

    def __str__(self) -> str:
        return _shown_name(self.axis, self.gap, self.place, self.alone)


def _shown_name(axis: str, gap: int, place: str, alone: int | None = None) -> str:
    which = "" if alone is None else f", {alone} alone"
    return f"{axis}, gap {gap}, {place}{which}"


def _shown(axis: str, layouts: Mapping[int, Mapping[str, Layout]]) -> list[Shown]:
    """Returns all kinds of pictures of an axis."""
    found = []
    for gap, own in layouts.items():
        found += [Shown(axis, gap, place, layout) for place, layout in own.items()]
        for edge in EDGES:
            each = moved(own[edge], axis)
            found += [Shown(axis, gap, edge, own[edge], one.place) for one in each]
    return found


def _read_axis(
    setting: Setting,
    axis: str,
    layouts: Mapping[int, Mapping[str, Layout]],
    halves: Halves,
    accuracies: np.ndarray,
    read: Mapping[str, Read],
    seed: int,
) -> dict[str, Any]:
    """Returns an axis's rows, readings `[gap, edge, image, reading]` and pictures."""
    rows = [*halves.rows, *_accuracy_claim(accuracies, seed)]
    readings, pictures, missing = [], {}, [*halves.left_out]
    for gap, own in layouts.items():
        found, by_edge, whole = _read_gap(axis, gap, own, read, seed)
        rows += [{**row, "gap": gap} for row in found]
        missing += left_out(int((~whole).sum()), "picture", f"{axis}, {apart(gap)}", "tokens")
        every = np.full((len(EDGES), len(whole), len(READINGS)), np.nan)
        every[:, whole] = by_edge.mean(1)
        readings.append(every)
        for edge, label in EDGES.items():
            first = halves.asked[0]
            pictures[f"{axis}, {NAMES[axis][label]}, {apart(gap)}"] = setting.stimuli.scene(
                first.entities, axis, own[edge], setting.stimuli.ground_of(first)
            )
    found = xr.DataArray(
        np.stack(readings),
        dims=("gap", "kind", "image", "reading"),
        coords={
            "gap": list(layouts),
            "kind": list(EDGES.values()),
            "image": halves.fitted.test,
            "reading": list(READINGS),
        },
    )
    return {"rows": rows, "readings": found, "pictures": pictures, "left_out": missing}


def _read_gap(
    axis: str, gap: int, layouts: Mapping[str, Layout], every_read: Mapping[str, Read], seed: int
) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Returns the rows of one gap, its shares `[edge, probe, image, reading]`, and their images.

    Images any of whose pictures has tokens that are not numbers are left out.
    """
    # 1. The pictures that are whole.
    read = {place: every_read[_shown_name(axis, gap, place)] for place in layouts}
    objects = {edge: moved(layouts[edge], axis) for edge in EDGES}
    alone = {
        edge: [every_read[_shown_name(axis, gap, edge, one.place)] for one in objects[edge]]
        for edge in EDGES
    }
    every = [*read.values(), *(seen for each in alone.values() for seen in each)]
    whole = np.all([is_read(seen) for seen in every], axis=0)
    if not whole.any():
        raise none_left("picture")
    # 2. Count the tokens of those that are whole.
    rows, three, one = [], [], []
    for edge, moved_ones in objects.items():
        three.append(shares_read(read[edge][:, whole], moved_ones))
        each = zip(alone[edge], moved_ones, strict=True)
        one.append(np.concatenate([shares_read(seen[:, whole], [o]) for seen, o in each]))
        rows += _object_rows(EDGES[edge], moved_ones, three[-1], seed)
    by_edge = np.stack([found.mean(0) for found in three])  # [edge, probe, image, reading]
    alone_by_edge = np.stack([found.mean(0) for found in one])
    rows += _share_rows(by_edge, seed, shown="three")
    rows += _share_rows(alone_by_edge, seed, shown="alone")
    control = agreeing(read["centre"][:, whole], layouts["centre"], axis)
    return [*rows, *_claims(by_edge, alone_by_edge, control, seed)], by_edge, whole


# --- rows -----------------------------------------------------------------------------------


def _object_rows(edge: str, objects: Sequence[Moved], shares: np.ndarray, seed: int) -> list[dict]:
    """Returns the rows of single objects at an edge."""
    rows = []
    for one, found in zip(objects, shares.mean(1), strict=True):
        for i, reading in enumerate(READINGS):
            about = {"quantity": reading, "kind": edge, "place": one.place}
            rows += interval_rows(
                mean_of_shares(found[:, i], seed=seed), {}, shown="three", **about
            )
    return rows


def _share_rows(by_edge: np.ndarray, seed: int, **columns: Any) -> list[dict]:
    """Returns the shares of each reading, at each edge and at both."""
    rows = []
    means = by_edge.mean(1)  # over probes
    for kind, shares in zip((*EDGES.values(), BOTH), (*means, means.mean(0)), strict=True):
        for i, reading in enumerate(READINGS):
            interval = mean_of_shares(shares[:, i], seed=seed)
            rows += interval_rows(interval, {}, quantity=reading, kind=kind, **columns)
    return rows


def _accuracy_claim(accuracies: np.ndarray, seed: int) -> list[dict]:
    """Returns the row of the claim that the probe reads the order of usual pictures."""
    values = accuracies.mean(0)
    bounds: Any = {"null": CHANCE, "low": 0.0, "high": 1.0, "quantity": ACCURACY}
    return claim_rows(values, {}, range(len(values)), seed, **bounds)


def _claims(three: np.ndarray, one: np.ndarray, control: np.ndarray, seed: int) -> list[dict]:
    """Returns the rows that the verdict on one gap is about, before `gap_verdicts.adjusted`.

    `three` and `one` are shares `[edge, probe, image, reading]`.
    """
    units = range(three.shape[2])
    difference = three[..., 0] - three[..., 1]
    rows = []
    for values, bounds, about in (
        ((three - one)[..., 0].mean((0, 1)), {}, {"quantity": SURPLUS, "kind": BOTH}),
        (control.mean(0), {"null": MOSTLY, "low": 0.0, "high": 1.0}, {"quantity": CONTROL}),
    ):
        rows += claim_rows(values, {}, units, seed, **bounds, **about)  # pyright: ignore
    for label, values in zip(EDGES.values(), difference.mean(1), strict=True):
        rows += claim_rows(values, {}, units, seed, quantity=DIFFERENCE, kind=label)
    main: Any = {"quantity": DIFFERENCE, "kind": BOTH}
    return rows + claims_over_probes(difference.mean(0), {}, seed, **main)

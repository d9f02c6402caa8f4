"""Q7, absolute or relative: does the order code hold a place in the picture or among the objects?

The probe of E3 is fitted to the usual pictures, in which the first object always lies in the
first strip, the second in the middle one and the last in the last.  It is then applied to pictures
whose three objects stand close together at one edge, where the two meanings differ: at the left
edge the last object lies in the middle strip.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from hooked_vlm.analysis.probes import mean_of_shares
from hooked_vlm.errors import counted
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.dual_mechanisms.order_reading import (
    PROBES,
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
from hooked_vlm.experiments.further.held_out_halves import Halves
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.experiments.verdicts import Judgement, claim_rows, judge, sentence
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.pairs import Question
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
BOTH = "both edges"
DIFFERENCE, SURPLUS = "relative - absolute", "relative, three - one"
CONTROL = "control, centre"
MOSTLY = 0.5
"""The share of the control's tokens that must be read as their place."""
NAMES = {
    "horizontal": {EDGES["start"]: "left edge", EDGES["end"]: "right edge"},
    "vertical": {EDGES["start"]: "top edge", EDGES["end"]: "bottom edge"},
}


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`images` pictures of each axis; `gap` tokens between the objects at an edge.

    `probe` is the `"paper"`'s recipe, or a logistic regression fitted until it has `"converged"`.
    """

    settings_allowed = SETTINGS  # What'sUp's photographs cannot be moved
    ranges: ClassVar = {"images": (8, 10**6), "gap": (0, 100)}  # probes need held-out pictures
    choices: ClassVar = {"probe": PROBES}

    images: int = 120
    gap: int = 0
    probe: str = "paper"


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Fits E3's probe to usual pictures, and applies it to objects close together."""
    setting = Setting.of(model, config)
    layouts = close_together(setting.geometry, config.gap)
    steps = sum(1 + len(layouts) + _n_alone(layouts, axis) for axis in setting.axes)
    done, rows, readings, pictures = 0, [], [], {}

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, steps)

    on_progress(0, steps)
    for axis in setting.axes:
        found = _read_axis(setting, axis, layouts, config, step)
        rows += [{**row, "axis": axis} for row in found["rows"]]
        readings.append(found["readings"])
        pictures |= found["pictures"]
    table = pd.DataFrame(rows)
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={
            "readings": xr.DataArray(
                np.stack(readings),
                dims=("axis", "kind", "image", "reading"),
                coords={
                    "axis": list(setting.axes),
                    "kind": list(EDGES.values()),
                    "reading": list(READINGS),
                },
            )
        },
        images=pictures,
        verdict=_verdict(table, config.gap),
        config={
            "images": config.images,
            "gap": config.gap,
            "probe": config.probe,
            "seed": config.seed,
        },
        notes=(
            "E3's probe, fitted to object tokens of half of the usual pictures, labelled by place, "
            f"and applied to the other triples. Numbers are means over {SEEDS} probes with "
            "other initialisations, with intervals over pictures. probe='converged' is one "
            "logistic regression on the same tokens instead.",
            "Counted are objects of which no token lies in the strip of their order. 'relative' is "
            "the share of their tokens read as their place among the objects, 'absolute' that read "
            "as their strip, 'other' the rest. Objects weigh the same, and so do the edges.",
            f"'{CONTROL}': of the objects close together in the centre, the tokens whose order and "
            "strip agree, with equal weight for each place. Both meanings give them one reading; "
            "where the probe has another, its readings at the edges say nothing.",
            "'alone' shows one of the objects at the same cells without the others. A place among "
            "objects needs other objects, so a code is called relative only if three objects give "
            "more of this reading than one.",
        ),
    )


def _n_alone(layouts: Mapping[str, Layout], axis: str) -> int:
    return sum(len(moved(layouts[edge], axis)) for edge in EDGES)


def _read_axis(
    setting: Setting,
    axis: str,
    layouts: Mapping[str, Layout],
    config: Config,
    step: Callable[[], None],
) -> dict[str, Any]:
    """Returns an axis's rows, readings `[edge, image, reading]` and pictures."""
    halves = Halves.of(setting, axis, config.images, config.seed)
    fitted, rows, asked = halves.fitted, halves.rows, halves.asked
    step()
    probes, accuracies = fitted.read_by(config.probe)

    def read_in(layout: Layout, shown: Callable[[Question], Any]) -> Read:
        grids = projected_scenes(setting, asked, shown, layout)
        step()
        return places_read(probes, grids)

    read = {name: read_in(layout, _all_three) for name, layout in layouts.items()}
    three, one = [], []
    for edge in EDGES:
        objects = moved(layouts[edge], axis)
        three.append(shares_read(read[edge], objects))
        alone = [(read_in(layouts[edge], partial(_only, o.place)), o) for o in objects]
        one.append(np.concatenate([shares_read(seen, [o]) for seen, o in alone]))
        rows += _object_rows(EDGES[edge], objects, three[-1], config.seed)
    by_edge = np.stack([found.mean(0) for found in three])  # [edge, probe, image, reading]
    alone_by_edge = np.stack([found.mean(0) for found in one])
    rows += _share_rows(by_edge, config.seed, shown="three")
    rows += _share_rows(alone_by_edge, config.seed, shown="alone")
    control = agreeing(read["centre"], layouts["centre"], axis)
    rows += _claims(accuracies, by_edge, alone_by_edge, control, config.seed)
    pictures = {
        f"{axis}, {NAMES[axis][label]}": setting.stimuli.scene(
            asked[0].entities, axis, layouts[edge], setting.stimuli.ground_of(asked[0])
        )
        for edge, label in EDGES.items()
    }
    return {"rows": rows, "readings": by_edge.mean(1), "pictures": pictures}


def _all_three(question: Question) -> tuple[str, ...]:
    return question.entities


def _only(place: int, question: Question) -> tuple[str | None, ...]:
    return tuple(name if i == place else None for i, name in enumerate(question.entities))


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


def _claims(
    accuracies: np.ndarray, three: np.ndarray, one: np.ndarray, control: np.ndarray, seed: int
) -> list[dict]:
    """Returns the rows that the verdict is about.

    `three` and `one` are shares `[edge, probe, image, reading]`.
    """
    units = range(three.shape[2])
    difference = three[..., 0] - three[..., 1]
    whole = {"low": 0.0, "high": 1.0}
    rows = []
    for values, bounds, about in (
        (difference.mean((0, 1)), {}, {"quantity": DIFFERENCE, "kind": BOTH}),
        ((three - one)[..., 0].mean((0, 1)), {}, {"quantity": SURPLUS, "kind": BOTH}),
        (control.mean(0), {"null": MOSTLY, **whole}, {"quantity": CONTROL}),
        (accuracies.mean(0), {"null": CHANCE, **whole}, {"quantity": "accuracy, claim"}),
    ):
        rows += claim_rows(values, {}, units, seed, **bounds, **about)  # pyright: ignore
    edges = {"kind": list(EDGES.values())}
    rows += claim_rows(difference.mean(1).T, edges, units, seed, quantity=DIFFERENCE)
    for probe in range(three.shape[1]):
        own = difference[:, probe].mean(0)
        rows += claim_rows(own, {}, units, seed, quantity=DIFFERENCE, kind=BOTH, probe=probe)
    return rows


# --- verdict --------------------------------------------------------------------------------


def _verdict(table: pd.DataFrame, gap: int) -> str:
    apart = f"objects {counted(gap, 'token')} apart"
    return "\n".join(
        sentence(f"{axis}, {apart}: {_of_axis(select(table, axis=axis), axis)}")
        for axis in dict.fromkeys(table["axis"])
    )


def _of_axis(here: pd.DataFrame, axis: str) -> str:
    means = here[here["probe"].isna() & here["place"].isna()]
    probes = here.dropna(subset="probe")
    shares = _shares_in_words(select(means, shown="three", kind=BOTH))
    edges = [
        f"{NAMES[axis][label]}: {_shares_in_words(select(means, shown='three', kind=label))}"
        for label in EDGES.values()
    ]
    alone = select(means, shown="alone", kind=BOTH, quantity="relative").iloc[0]
    control = select(means, quantity=CONTROL).iloc[0]
    finding = _found(means)
    agree = sum(judge(row).sign == finding.sign for _, row in probes.iterrows())
    words = {1: "mostly relative", -1: "mostly absolute"}.get(finding.sign, "")
    if finding.outcome == "not found":
        words = f"as much relative as absolute ({finding.reason})"
    if finding.outcome == "undecided":
        words = f"undecided whether relative or absolute: {finding.reason}"
    else:
        words = f"the code is {words}"
        if len(probes) > 1:
            words += f" ({agree} of {len(probes)} probes with other initialisations agree)"
    return (
        f"{words}. Where order and strip differ, tokens are read as {shares}; {'; '.join(edges)}. "
        f"Alone at the same cells, an object is read as the relative place in "
        f"{format_interval(alone)}; control in the centre {format_interval(control)}"
    )


def _shares_in_words(rows: pd.DataFrame) -> str:
    shares = rows.set_index("quantity")
    return ", ".join(f"{reading} {format_interval(shares.loc[reading])}" for reading in READINGS)


def _found(means: pd.DataFrame) -> Judgement:
    """Returns whether the relative reading outweighs the absolute one, or the reverse."""
    both = select(means, kind=BOTH)
    row = select(both, quantity=DIFFERENCE).iloc[0]
    reason = _unclean(means)
    found = judge(row, unless=reason)
    if not found.above:
        return found
    surplus = judge(select(both, quantity=SURPLUS).iloc[0])
    if surplus.above:
        return found
    return judge(row, unless=f"one object alone is read nearly so (three - one {surplus.reason})")


def _unclean(means: pd.DataFrame) -> str:
    """Returns the reason for which the readings at the edges say nothing, or ''."""
    accuracy = judge(select(means, quantity="accuracy, claim").iloc[0])
    if not accuracy.above:
        return f"the probe does not read the order of usual pictures ({accuracy.reason})"
    control = judge(select(means, quantity=CONTROL).iloc[0], least=0.0)
    if not control.above:
        return f"the control in the centre is not read correctly ({control.reason})"
    other = select(means, shown="three", kind=BOTH, quantity="other").iloc[0]
    if other["value"] > CHANCE:
        return f"many tokens are read as neither ({format_interval(other)})"
    edges = select(means, quantity=DIFFERENCE)
    signs = {label: judge(select(edges, kind=label).iloc[0]) for label in EDGES.values()}
    if {judgement.sign for judgement in signs.values()} == {1, -1}:
        sides = "; ".join(f"{label} {j.reason}" for label, j in signs.items())
        return f"the edges differ (relative - absolute: {sides})"
    return ""

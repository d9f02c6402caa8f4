"""E9, photographs: do the strips persist on natural backgrounds? (paper, App. C.8)

The same layouts on white and on photographs: what ordering probes read from the objects and
from the background (E3), and whose tokens flip the answer when they are swapped (E4).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pandas as pd

from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import said_left_out
from hooked_vlm.experiments.dual_mechanisms import ordering_probes, strip_swap
from hooked_vlm.experiments.further import compared
from hooked_vlm.experiments.loop import independent, part_of, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import of_config, stimuli_of
from hooked_vlm.experiments.tables import format_interval, select
from hooked_vlm.experiments.verdicts import judge
from hooked_vlm.stimuli.sets import StimulusSet


ABOUT = About(
    id="E9",
    name="photographs",
    section="App. C.8",
    title="Do the strips persist on photographs?",
    claim="With the same layouts over photographic backgrounds the strips persist.",
)
GROUNDS = {"white": "", "photographs": "-photos"}
BOTH = "photographs - white"
"""The ground of rows that compare the two on the same pictures or pairs."""
SHIFT = 0.1
"""The change in the background's share from which the verdict speaks of one."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`setting` is the one on white; its photographs are added."""

    settings_allowed = ("squares", "shapes", "objects")

    setting: str = "shapes"
    pairs: int = 24

    @property
    def used_settings(self) -> tuple[str, ...]:
        """The setting on white and on photographs."""
        return tuple(self.setting + ending for ending in GROUNDS.values())


def data_of(config: Config) -> dict[str, StimulusSet]:
    """Returns the stimuli on each ground."""
    return {
        ground: stimuli_of(replace(config, setting=config.setting + ending))
        for ground, ending in GROUNDS.items()
    }


def run_on(
    model, data: Mapping[str, StimulusSet], config: Config, on_progress: OnProgress = silent
) -> Result:
    """Runs the ordering probes and the strip swap on white and on photographs."""
    plain = config.setting
    each = list(product(GROUNDS.items(), (ordering_probes, strip_swap)))
    on_progress(0, 100 * len(each))
    tables, arrays, images, missing = [], {}, {}, []
    results: dict[str, dict[str, Result]] = {ground: {} for ground in GROUNDS}
    with independent() as parts:
        for index, ((ground, ending), experiment) in enumerate(each):
            name, own = experiment.ABOUT.name, replace(config, setting=plain + ending)
            told = part_of(on_progress, index, len(each))
            with parts.part(f"{ground}, {name}"):
                try:
                    found = experiment.run_on(model, data[ground], own, told)
                except CannotRunError as error:  # no pair is answered correctly there
                    missing.append(f"{experiment.ABOUT.title} on {ground}: {error}")
                    continue
                results[ground][name] = found
                missing += [f"On {ground}: {said}" for said in said_left_out(found.verdict)]
                tables.append(found.table.assign(ground=ground, part=name))
                if experiment is ordering_probes:
                    arrays[f"mean_maps_{ground}"] = found.arrays["mean_maps"]
                    arrays[f"object_cells_{ground}"] = found.arrays["object_cells"]
                    images |= {f"{n} ({ground})": shown for n, shown in found.images.items()}
    rows = compared.rows_between(results["white"], results["photographs"], config.seed)
    tables.append(pd.DataFrame(rows).assign(ground=BOTH))
    table = compared.over_sentences(pd.concat(tables, ignore_index=True))
    return Result(
        **vars(ABOUT),
        table=table,
        arrays=arrays,
        images=dict(list(images.items())[::3]),
        verdict="\n".join([_probes(table), _swaps(table), *missing]),
        config={"setting": plain, "pairs": config.pairs, "seed": config.seed},
        notes=(
            "Probes are fitted anew on each kind of background; pairs are drawn with one seed and "
            "kept where both pictures are answered correctly on that background, so they differ.",
            f"Rows of the ground '{BOTH}' compare the two on what they have in common: the same "
            "layouts held out of the probes, and the pairs that both keep (intervals and tests for "
            "bounded means over pictures, Holm's correction over axes, and over kinds and slots).",
            "A picture and its mirror image stand on one and the same photograph, which is not "
            "mirrored.",
            "See E3 and E4 for how each number is computed.",
        ),
    )


run = of_config(run_on, data_of)


def _probes(table: pd.DataFrame) -> str:
    parts = []
    for axis in dict.fromkeys(table["axis"].dropna()):
        here: dict[str, Any] = {
            ground: select(table, axis=axis, ground=ground).set_index("quantity")
            for ground in GROUNDS
        }
        background = [here[ground].loc["background"] for ground in GROUNDS]
        moved = select(table, axis=axis, ground=BOTH)
        finding, size = "not compared", "no picture in common"
        if len(moved):
            finding = _change(moved.iloc[0])
            size = f"difference {format_interval(moved.iloc[0])} on the same layouts"
        parts.append(
            f"{axis}: probe accuracy on objects {format_interval(here['white'].loc['accuracy'])} "
            f"on white, {format_interval(here['photographs'].loc['accuracy'])} on photographs; "
            f"the share of background tokens assigned to their strip: {finding}, from "
            f"{format_interval(background[0])} to {format_interval(background[1])} ({size})."
        )
    return "\n".join(part[0].upper() + part[1:] for part in parts)


def _change(moved: pd.Series) -> str:
    """Returns in words how the background's share changes on photographs."""
    judged = judge(moved, least=SHIFT)
    if judged.outcome == "found":
        return "it rises" if judged.above else "it falls"
    return "it changes little" if judged.outcome == "not found" else "undecided whether it changes"


def _swaps(table: pd.DataFrame) -> str:
    parts = []
    for direction in dict.fromkeys(table["direction"].dropna()):
        if direction == "all":
            continue
        words = []
        for ground in GROUNDS:
            here = select(table, direction=direction, ground=ground, quantity="swapped")
            if here.empty:
                words.append(f"{ground} no pairs")
                continue
            best = {
                kind: select(here, kind=kind).sort_values("value").iloc[-1]
                for kind in ("strip", "object")
            }
            words.append(
                f"{ground} {format_interval(best['strip'])} / {format_interval(best['object'])}"
            )
        parts.append(f"{direction}: " + ", ".join(words))
    return (
        "Answers flipped by strips / by objects alone, at their best slots: "
        + "; ".join(parts)
        + ".\nPhotographs minus white, on the same pairs: "
        + compared.said_swaps(table)
        + "."
    )

"""Q4, composite artefacts: are the results on composites an artefact of their seams?

The paper's What'sUp pictures are joined from the halves of two photographs.  Here whole
pictures of three objects are compared with joined ones: with the seam in the middle (as
published), moved, or blended, and with one half mirrored.  If strips or swaps were an artefact
of joining, they would follow the seam.

Without What'sUp's data the pictures are made from cut-outs on photographs: each half comes
from a picture of two objects on its own photograph, and the code that joins What'sUp's
pictures joins them.  With the data (`--setting whatsup-chair --data FOLDER`) the pictures are
What'sUp's own.  What'sUp has no whole picture of three objects, so the probes use its uncut
photographs of two objects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image, ImageOps

from hooked_vlm.errors import CannotRunError, DataError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import left_out, said_left_out
from hooked_vlm.experiments.dual_mechanisms import order_reading, ordering_probes, strip_swap
from hooked_vlm.experiments.dual_mechanisms.swap_regions import strips_of
from hooked_vlm.experiments.further import compared
from hooked_vlm.experiments.loop import independent, over_batches, part_of, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting, for_tokenizer, of_config
from hooked_vlm.experiments.tables import format_interval, select
from hooked_vlm.experiments.verdicts import judge
from hooked_vlm.stimuli import photographs
from hooked_vlm.stimuli.datasets import whatsup
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.sets import StimulusSet


ABOUT = About(
    id="Q4",
    name="composite-artefacts",
    section="open question on What'sUp composites",
    title="Are composites of two photographs an artefact?",
    claim=(
        "The paper joins halves of two photographs and does not measure what the seam does; v1's "
        "amplification and swaps on What'sUp rest on such pictures."
    ),
)
VARIANTS = ("whole", "joined", "seam moved", "seam blended", "half mirrored")
UNCUT = "uncut, two things"
APART = 0.1
"""The difference in the background's share from which the verdict speaks of one."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`setting` is one on white, whose entities are put on photographs, or one of What'sUp."""

    settings_allowed = ("squares", "shapes", "objects", *whatsup.SETTINGS)

    setting: str = "squares"
    pairs: int = 16


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Runs the ordering probes and the strip swap on every way to join pictures."""
    plain, _ = for_tokenizer(data, model.tokenizer)
    real = config.setting in whatsup.SETTINGS
    variants = VARIANTS[1:] if real else VARIANTS
    total = len(variants) * 2 + real
    on_progress(0, 100 * total)
    tables, images, missing = [], {}, []
    results: dict[str, dict[str, Result]] = {variant: {} for variant in variants}
    done = 0
    with independent() as parts:
        for variant, experiment in product(variants, (ordering_probes, strip_swap)):
            own = composites(plain, variant, config.data)
            setting = Setting(model, own, config.batch_size)
            images[variant] = setting.picture(setting.stimuli.items()[0])
            name, told = experiment.ABOUT.name, part_of(on_progress, done, total)
            done += 1
            with parts.part(f"{variant}, {name}"):
                try:
                    found = experiment.run_on(model, own, replace(config, setting="squares"), told)
                except CannotRunError as error:  # no pair is answered correctly there
                    missing.append(f"{variant}: {error}")
                    continue
                results[variant][name] = found
                missing += [f"{variant}: {said}" for said in said_left_out(found.verdict)]
                tables.append(found.table.assign(variant=variant, part=name))
        if real:
            own = composites(plain, variants[0], config.data)
            setting = Setting(model, own, config.batch_size)
            with parts.part(UNCUT):
                own = whatsup.load(_folder(config))
                rows, images[UNCUT], said = _uncut(setting, own, config.seed)
                missing += said
                name = ordering_probes.ABOUT.name
                tables.append(pd.DataFrame(rows).assign(variant=UNCUT, part=name))
            on_progress(100 * total, 100 * total)
    first, *others = results
    for variant in others:
        rows = compared.rows_between(results[first], results[variant], config.seed)
        tables += [pd.DataFrame(rows).assign(variant=variant)] if rows else []
    table = compared.over_sentences(pd.concat(tables, ignore_index=True))
    return Result(
        **vars(ABOUT),
        table=table,
        images=images,
        verdict="\n".join([_probes(table), _swaps(table, variants), *missing]),
        config={"setting": plain.name, "pairs": config.pairs, "seed": config.seed},
        notes=(
            "'whole' is one photograph with three things on it. 'joined' is the left half of a "
            "picture with the left and the middle thing beside the right half of one with the "
            "middle and the right thing, each on a photograph of its own; the seam is in the "
            "middle, as published. 'seam moved' shifts it by a visual token and a half, 'seam "
            "blended' draws it over four; 'half mirrored' takes the right half from the mirror "
            "image of a picture with its thing on the left, photograph and things alike.",
            "Left and right only: composites have no other axis. See E3 and E4 for how each number "
            "is computed; probes are fitted anew on each kind of picture.",
            f"Rows of the quantity '{compared.DIFFERENCE}' compare a variant with {variants[0]} "
            "pictures on the same held-out layouts and the pairs that both keep (intervals and "
            "tests for bounded means over pictures, Holm's correction over the variants, and for "
            "swaps over kinds and slots too).",
            f"'{UNCUT}': probes fitted to What'sUp's own photographs, their things labelled left, "
            "middle and right by What'sUp's boxes, and read on held-out ones. A swap of an uncut "
            "photograph has no second answer to flip to, so there is none."
            if real
            else "With --setting whatsup-chair (or -table, -armchair) --data FOLDER the same runs "
            "on What'sUp's own photographs, and the probes on its uncut ones too.",
        ),
    )


run = of_config(run_on)


def composites(plain: StimulusSet, variant: str, data: Path | None = None) -> StimulusSet:
    """Returns a setting whose pictures are whole or joined, left and right only.

    With What'sUp's folder, `plain` is one of its settings and the halves are its photographs.
    """
    if variant not in VARIANTS:
        raise DataError(f"There is no variant {variant!r}. Use one of: {', '.join(VARIANTS)}.")
    halves = partial(_drawn_halves, plain)
    if plain.name in whatsup.SETTINGS:
        halves = partial(_photographed_halves, whatsup.load(_folder(data)))
    return replace(
        plain,
        name=f"{plain.name}, {variant}",
        directions=("left", "right"),
        draw=partial(_draw, plain, halves, variant),
        grounds={},
    )


def _folder(given: "Config | Path | None") -> Path:
    folder = given.data if isinstance(given, Config) else given
    if folder is None:
        raise DataError("What'sUp's photographs need --data FOLDER; see docs/reference/data.md.")
    return folder


Halves = Callable[[Sequence[str | None], Layout, bool], tuple[Image.Image, Image.Image]]
"""(entities, layout, mirrored) -> whole pictures, of which the outer halves are taken."""


def _draw(
    plain: StimulusSet,
    halves: Halves,
    variant: str,
    entities: Sequence[str | None],
    axis: str,
    layout: Layout,
    _background: Image.Image | None = None,
) -> Image.Image:
    if variant == "whole":
        return plain.draw(entities, axis, layout, _ground(plain, entities, 0))
    token = layout.canvas // layout.shape[1]
    seam = {"seam moved": {"shift": 3 * token // 2}, "seam blended": {"blend": 4 * token}}
    left, right = halves(entities, layout, variant == "half mirrored")
    return whatsup.joined(left, right, layout.canvas, **seam.get(variant, {}))


def _ground(plain: StimulusSet, entities: Sequence[str | None], step: int) -> Image.Image:
    scenes = list(photographs.SCENES)
    # The photographs hang on the middle thing alone, as in the other settings on photographs.
    # An empty picture (a control of E3) has the first one.
    first = 0 if entities[1] is None else plain.names.index(entities[1])
    return photographs.shipped(scenes[(first + step) % len(scenes)])


def _drawn_halves(
    plain: StimulusSet, entities: Sequence[str | None], layout: Layout, mirrored: bool
) -> tuple[Image.Image, Image.Image]:
    left, middle, right = entities
    grounds = [_ground(plain, entities, step) for step in (0, 1)]
    first = plain.draw((left, middle, None), "horizontal", layout, grounds[0])
    if mirrored:
        facing = plain.draw((right, middle, None), "horizontal", layout, grounds[1])
        return first, ImageOps.mirror(facing)
    return first, plain.draw((None, middle, right), "horizontal", layout, grounds[1])


def _photographed_halves(
    data: whatsup.WhatsUp, entities: Sequence[str | None], _layout: Layout, mirrored: bool
) -> tuple[Image.Image, Image.Image]:
    left, middle, right = map(str, entities)
    first = whatsup.opened(data, left, "left_of", middle)
    if mirrored:
        return first, ImageOps.mirror(whatsup.opened(data, right, "left_of", middle))
    return first, whatsup.opened(data, right, "right_of", middle)


def _uncut(
    setting: Setting, data: whatsup.WhatsUp, seed: int
) -> tuple[list[dict[str, Any]], Image.Image, list[str]]:
    """Returns what probes read on uncut photographs of two things, and one of them.

    Then a sentence on photographs whose tokens are not numbers.
    """
    geometry, side = setting.geometry, setting.geometry.canvas
    reference = str(setting.stimuli.middle)
    shown = [(n, place) for n in data.satellites(reference) for place in (0, 2)]
    pictures = [
        whatsup.opened(data, name, "left_of" if place == 0 else "right_of", reference).resize(
            (side, side), Image.Resampling.BILINEAR
        )
        for name, place in shown
    ]
    question = setting.stimuli.items(("left",))[0]
    parts = over_batches(
        "features",
        {"uncut": range(len(pictures))},
        setting.batch_size,
        lambda _, batch, __: ordering_probes.projected_pictures(
            setting, [pictures[i] for i in batch], [question] * len(batch)
        ),
        last=True,
    )
    features = torch.cat(parts["uncut"])
    rows = order_reading.read_some(
        geometry, "horizontal", features, [(place, 1) for _, place in shown], seed
    )
    wrong = int((~order_reading.whole_pictures(features)).sum())
    return rows, pictures[0], left_out(wrong, "picture", UNCUT, "tokens")


def _probes(table: pd.DataFrame) -> str:
    words = []
    for variant in dict.fromkeys(table["variant"]):
        here = select(table, variant=variant, part=ordering_probes.ABOUT.name)
        found = {str(row["quantity"]): row for _, row in here.iterrows()}
        moved = found.get(compared.DIFFERENCE)
        words.append(
            f"{variant} {format_interval(found['accuracy'])} and "
            f"{format_interval(found['background'])}"
            + (f" (by {format_interval(moved)})" if moved is not None and _apart(moved) else "")
        )
    return (
        "Probe accuracy on objects, and share of background assigned to its strip: "
        + "; ".join(words)
        + f". In brackets: clear differences from {table['variant'].iloc[0]} pictures of at least "
        f"{APART}."
    )


def _apart(moved: pd.Series) -> bool:
    return judge(moved, least=APART).outcome == "found"


def _swaps(table: pd.DataFrame, variants: Sequence[str]) -> str:
    words, less = [], []
    for variant in variants:
        here = select(table, variant=variant, part=strip_swap.ABOUT.name, direction="all")
        swapped = select(here, quantity="swapped")
        if swapped.empty:
            continue
        kinds = (strips_of(list(swapped["kind"])), "object")
        best = [select(swapped, kind=kind).sort_values("value").iloc[-1] for kind in kinds]
        words.append(f"{variant} {format_interval(best[0])} / {format_interval(best[1])}")
        if variant != variants[0]:
            less.append(f"{variant}: {compared.said_swaps(here)}")
    if not words:
        return "No pair is answered correctly on any kind of picture, so no swap was measured."
    return (
        "Answers flipped by strips / by objects alone, at best: "
        + "; ".join(words)
        + f".\nDifference from {variants[0]} pictures, on the same pairs: "
        + ". ".join(less)
        + "."
    )

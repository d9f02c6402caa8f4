"""Q4, composite artefacts: is what is found on composites a matter of their seams?

The paper's What'sUp pictures are joined from the halves of two photographs.  Here whole
pictures of three things stand beside joined ones: with the seam in the middle, as
published, moved, and blended, and with one half mirrored.  If strips or swaps were an
artefact of joining, they would follow the seam.

Without What'sUp's data (which has no whole picture of three things) the pictures are made
of the same material: cut-outs on photographs, each half from a picture of two things on a
photograph of its own, joined by the code that joins What'sUp's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
from PIL import Image, ImageOps

from hooked_vlm.errors import DataError
from hooked_vlm.experiments import config as common
from hooked_vlm.experiments import ordering_probes, strip_swap
from hooked_vlm.experiments.config import OnProgress
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Setting, said, select
from hooked_vlm.stimuli import photographs
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.stimuli.settings import stimulus_set
from hooked_vlm.stimuli.whatsup import joined


ID, NAME, SECTION = "Q4", "composite-artefacts", "open question on What'sUp composites"
TITLE = "Are composites of two photographs an artefact?"
CLAIM = (
    "The paper joins halves of two photographs and does not measure what the seam does; v1's "
    "amplification and swaps on What'sUp rest on such pictures."
)
VARIANTS = ("whole", "joined", "seam moved", "seam blended", "half mirrored")
APART = 0.1


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`setting` is one on white; its entities are put on photographs."""

    setting: str = "squares"
    pairs: int = 16


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Runs the ordering probes and the strip swap on every way to join pictures."""
    plain = stimulus_set(config.setting, cutouts=config.cutouts)
    parts = [
        (variant, experiment)
        for variant in VARIANTS
        for experiment in (ordering_probes, strip_swap)
    ]
    on_progress(0, 100 * len(parts))
    tables, images, missing = [], {}, []
    for place, (variant, experiment) in enumerate(parts):
        setting = Setting(model, composites(plain, variant), config.batch_size)
        if experiment is ordering_probes:
            images[variant] = setting.picture(setting.stimuli.items()[0])

        def told(done: int, total: int, place: int = place) -> None:
            on_progress(100 * place + round(100 * done / max(total, 1)), 100 * len(parts))

        try:
            found = experiment.run_on(setting, replace(config, setting="squares"), told)
        except DataError as error:  # no pair is answered rightly there
            missing.append(f"{variant}: {error}")
            continue
        tables.append(found.table.assign(variant=variant, part=experiment.NAME))
    table = pd.concat(tables, ignore_index=True)
    return Result(
        id=ID,
        name=NAME,
        title=TITLE,
        claim=CLAIM,
        section=SECTION,
        table=table,
        images=images,
        verdict="\n".join([_probes(table), _swaps(table), *missing]),
        config={"setting": plain.name, "pairs": config.pairs, "seed": config.seed},
        notes=(
            "'whole' is one photograph with three things on it. 'joined' is the left half of a "
            "picture with the left and the middle thing beside the right half of one with the "
            "middle and the right thing, each on a photograph of its own; the seam is in the "
            "middle, as published. 'seam moved' shifts it by a visual token and a half, 'seam "
            "blended' draws it over four, 'half mirrored' mirrors the right half's photograph.",
            "Left and right only: composites have no other axis. See E3 and E4 for how each number "
            "is computed; probes are fitted anew on each kind of picture.",
            "With What'sUp's own photographs the same code joins them, and `run behaviour "
            "--setting whatsup-chair --data FOLDER` and its like run on them; whole pictures of "
            "three things are not in that data, so this comparison is on shipped material.",
        ),
    )


def composites(plain: StimulusSet, variant: str) -> StimulusSet:
    """Returns a setting whose pictures are whole or joined, left and right only."""
    if variant not in VARIANTS:
        raise DataError(f"There is no variant {variant!r} among {', '.join(VARIANTS)}.")
    return replace(
        plain,
        name=f"{plain.name}, {variant}",
        directions=("left", "right"),
        draw=partial(_draw, plain, variant),
        grounds={},
    )


def _draw(
    plain: StimulusSet,
    variant: str,
    entities: Sequence[str | None],
    axis: str,
    layout: Layout,
    _background: Image.Image | None = None,
) -> Image.Image:
    scenes = list(photographs.SCENES)
    # The photographs hang on the middle thing alone, as in the other settings on photographs.
    first = plain.names.index(str(entities[1])) % len(scenes)
    left, right = (photographs.shipped(scenes[(first + step) % len(scenes)]) for step in (0, 1))
    if variant == "whole":
        return plain.draw(entities, axis, layout, left)
    if variant == "half mirrored":
        right = ImageOps.mirror(right)
    token = layout.canvas // layout.shape[1]
    seam = {"seam moved": {"shift": 3 * token // 2}, "seam blended": {"blend": 4 * token}}
    return joined(
        plain.draw((entities[0], entities[1], None), axis, layout, left),
        plain.draw((None, entities[1], entities[2]), axis, layout, right),
        layout.canvas,
        **seam.get(variant, {}),
    )


def _probes(table: pd.DataFrame) -> str:
    rows = {}
    for variant in dict.fromkeys(table["variant"]):
        here = select(table, variant=variant, part=ordering_probes.NAME)
        rows[variant] = {str(row["quantity"]): row for _, row in here.iterrows()}
    whole = rows["whole"]["background"]
    words = []
    for variant, found in rows.items():
        background = found["background"]
        apart = background["low"] > whole["high"] or background["high"] < whole["low"]
        clear = apart and abs(background["value"] - whole["value"]) >= APART
        words.append(
            f"{variant} {said(found['accuracy'])} and {said(background)}"
            + (", unlike whole pictures" if clear else "")
        )
    return "Order read from objects, and background given to its strip: " + "; ".join(words) + "."


def _swaps(table: pd.DataFrame) -> str:
    words = []
    for variant in dict.fromkeys(table["variant"]):
        here = select(table, variant=variant, part=strip_swap.NAME, direction="all")
        if here.empty:
            continue
        best = {
            kind: select(here, kind=kind, quantity="swapped").sort_values("value").iloc[-1]
            for kind in ("strip", "object")
        }
        words.append(f"{variant} {said(best['strip'])} / {said(best['object'])}")
    return "Answers flipped by strips / by objects alone, at best: " + "; ".join(words) + "."

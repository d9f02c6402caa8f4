"""E8, grid probes: can column and row of a k x k grid be read from visual tokens? (App. C.6)

The ordering probes of E3 on two axes: pictures have k x k shapes of random form and colour.
One probe reads an object's column from its tokens at the projector's output, another probe
reads its row.  Both are then applied to the background.
"""

import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from PIL import Image

from hooked_vlm.analysis.probes import object_examples
from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.errors import DataError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import left_out
from hooked_vlm.experiments.dual_mechanisms.order_reading import (
    background_shares,
    fit_with_controls,
    whole_pictures,
)
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import SEEDS, in_raster
from hooked_vlm.experiments.loop import over_batches, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import of_config, system_of, token_grid
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.experiments.verdicts import adjusted, agreement, claims_over_probes, judge
from hooked_vlm.hooks.names import PROJECTOR
from hooked_vlm.stimuli.grids import GridLayout, draw, random_cells
from hooked_vlm.stimuli.prompts import SYSTEM_PROMPT


ABOUT = About(
    id="E8",
    name="grid-probes",
    section="App. C.6",
    title="Are column and row of a grid in the visual tokens?",
    claim="On grids of 2x2 and 3x3 shapes, both the column and the row of an object can be read.",
)
LABELS = ("column", "row")
CLAIM = "accuracy, claim"
"""Quantity: the accuracy by picture, with an interval that a verdict may use."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`images` pictures for each k."""

    settings_allowed = ("grids",)
    ranges: ClassVar = {"ks": (2, 8), "images": (8, 10**6)}  # probes need held-out pictures

    setting: str = "grids"
    ks: tuple[int, ...] = (2, 3)
    images: int = 120

    @property
    def used_settings(self) -> tuple[str, ...]:
        """None: the pictures of grids are the experiment's own."""
        return ()


def data_of(config: Config) -> None:
    """Returns nothing: the pictures of grids are drawn for the model's grid of tokens."""


def run_on(model, data: object, config: Config, on_progress: OnProgress = silent) -> Result:
    """Fits a probe of columns and one of rows for each k, and applies both to the background."""
    if data is not None:
        raise DataError(
            f"{ABOUT.name} was given {type(data).__name__} as its data; it draws pictures of its "
            "own. Give None."
        )
    model.require_vision()
    n_tokens, token_px = token_grid(model)
    layouts = {f"{k}x{k}": GridLayout(k, n_tokens, token_px) for k in dict.fromkeys(config.ks)}
    images = {}
    for name, layout in layouts.items():
        rng = random.Random(f"{config.seed}/{layout.k}")
        images[name] = [draw(random_cells(layout.k, rng), layout) for _ in range(config.images)]
    features = over_batches(
        "features",
        {name: range(config.images) for name in layouts},
        config.batch_size,
        lambda name, batch, _: _projected(model, [images[name][i] for i in batch]),
        on_progress,
        last=True,
    )
    rows, maps, objects, cells, pictures, left = [], [], [], [], {}, []
    for name, layout in layouts.items():
        k = layout.k
        pictures[name] = images[name][0]
        tokens = torch.cat(features[name])
        wrong = int((~whole_pictures(tokens)).sum())
        left += left_out(wrong, "picture", f"{k}x{k}", "tokens")
        for label in LABELS:
            found, mean = _fit(layout, tokens, label, config.seed)
            rows += found
            missing = ((0, max(config.ks) - k), (0, 0), (0, 0))
            maps.append(np.pad(mean, missing, constant_values=np.nan))
            objects.append(np.pad(_object_cells(layout, label), missing))
            cells.append(f"{k}x{k} {label}")
    table = over_sentences(pd.DataFrame(rows))
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={
            name: xr.DataArray(
                np.stack(values),
                dims=("probe", "class", "row", "col"),
                coords={"probe": cells, "class": list(range(max(config.ks)))},
            )
            for name, values in (("mean_maps", maps), ("object_cells", objects))
        },
        images=pictures,
        verdict="\n".join([_verdict(table), *left]),
        config={"ks": list(config.ks), "images": config.images, "seed": config.seed},
        notes=(
            "Features are the projector's output; each object token is an example, labelled by its "
            "object's column (or row). Pictures are split 75/25. Numbers are means over "
            f"{SEEDS} probes with other initialisations; the maps are those of the first.",
            "'background' is the share of background tokens that a probe gives to the column (row) "
            "of the grid that they lie in; without any signal the share is about 1/k. "
            "'shuffled' is fitted and scored on labels shuffled among each picture's objects, "
            "'converged' a logistic regression on the same tokens.",
            f"A label is read where '{CLAIM}' is clearly above 1/k, with p-values adjusted (Holm) "
            "over sizes and labels.",
            "Shapes and colours are drawn for each cell on its own, so that neither tells a place.",
        ),
    )


run = of_config(run_on, data_of)


def _projected(model, images: list[Image.Image]) -> torch.Tensor:
    site = f"{PROJECTOR}.hook_out"
    inputs = model.prepare(images, [""] * len(images), system=system_of(model, SYSTEM_PROMPT))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, site, stop_at_layer=0)
    return in_raster(cache[site].float().cpu(), inputs)


def _fit(
    layout: GridLayout, features: torch.Tensor, label: str, seed: int
) -> tuple[list[dict], np.ndarray]:
    k, n = layout.k, layout.n_tokens
    regions = [layout.object_region(row, col) for row in range(k) for col in range(k)]
    examples = object_examples(features, regions)
    examples = examples.of_images(np.flatnonzero(whole_pictures(features)))
    examples = replace(examples, y=examples.y % k if label == "column" else examples.y // k)
    fitted, rows = fit_with_controls(examples, len(features), seed, SEEDS)
    grids = features[torch.as_tensor(fitted.test)].unflatten(1, (n, n))
    band = np.array([layout.band(token) for token in range(n)])
    own = np.broadcast_to(band[None] if label == "column" else band[:, None], (n, n))
    background = ~np.any([region.mask for region in regions], axis=0)
    for quantity, some in (
        ("background", fitted.probes),
        ("background, shuffled", fitted.controls),
    ):
        maps = (probe.probability_map(grids) for probe in some)
        shares = np.mean([background_shares(m, own, background) for m in maps], axis=0)
        rows += interval_rows(bootstrap(shares, seed=seed), {}, quantity=quantity)
    mean = fitted.probes[0].probability_map(grids).mean(0).permute(2, 0, 1).numpy()
    rows += claims(fitted.accuracies, k, seed)
    return [{**row, "kind": f"{k}x{k}", "axis": label} for row in rows], mean


def claims(accuracies: Float[np.ndarray, "probe image"], k: int, seed: int) -> list[dict]:
    """Returns the claims that probes read one of k labels, by their mean and by each probe."""
    about: Any = {"quantity": CLAIM, "null": 1 / k, "low": 0.0, "high": 1.0}
    return claims_over_probes(accuracies, {}, seed, **about)


def over_sentences(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with p-values adjusted over sizes of grid and labels."""
    return adjusted(table, table["quantity"] == CLAIM, ["probe"])


def _object_cells(layout: GridLayout, label: str) -> np.ndarray:
    """Returns the cells of each column's (row's) objects, `[class, row, col]`."""
    masks = [
        [layout.object_region(row, col).mask for col in range(layout.k)] for row in range(layout.k)
    ]
    return np.any(masks, axis=0 if label == "column" else 1)


def _verdict(table: pd.DataFrame) -> str:
    parts = []
    for kind in dict.fromkeys(table["kind"]):
        for label in LABELS:
            own = select(table, kind=kind, axis=label)
            here: Any = own[own["probe"].isna()].set_index("quantity")
            chance = 1 / int(kind.split("x")[0])
            read = _read(here.loc[CLAIM])
            probes = own.dropna(subset="probe")
            same = agreement(read, [_read(row) for _, row in probes.iterrows()])
            parts.append(
                f"{kind}, {label}: {read} ({same}), "
                f"{format_interval(here.loc['accuracy'])} of held-out object tokens "
                f"({format_interval(here.loc['converged'])} if fitted to convergence, control "
                f"{here.loc['shuffled', 'value']:.2f}); background "
                f"{format_interval(here.loc['background'])} "
                f"(chance {chance:.2f})."
            )
    return "\n".join(parts)


def _read(claim: Any) -> str:
    """Returns whether a label is read, in words."""
    judged = judge(claim)
    if judged.above:
        return "read"
    return "not read" if judged.outcome == "not found" or judged.below else "undecided"

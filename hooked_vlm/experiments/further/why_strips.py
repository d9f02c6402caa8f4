"""Q8, why strips: which attention in the vision encoder writes the code of strips?

The paper finds strips in the background and leaves their origin open.  Here attention between
classes of patches is cut in the vision encoder, in all layers and layer by layer, and E3's probe,
fitted to uncut pictures, reads what is left.  Each cut is compared with random cuts of as many
keys for each query.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.probes import mean_of_shares
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import left_out, none_left
from hooked_vlm.experiments.dual_mechanisms.order_reading import (
    PROBES,
    is_read,
    places_read,
    probe_regions,
    strips,
)
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import CHANCE, SEEDS, projected
from hooked_vlm.experiments.further.cut_verdicts import (
    ALL,
    CUT,
    INTACT,
    QUANTITIES,
    RANDOM,
    claims,
    named,
    over_sentences,
    verdict,
)
from hooked_vlm.experiments.further.encoder_cuts import (
    CUTS,
    Encoder,
    cut_pairs,
    cutting,
    random_pairs,
    whole_attention,
)
from hooked_vlm.experiments.further.held_out_halves import Halves
from hooked_vlm.experiments.loop import over, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting, of_config
from hooked_vlm.experiments.tables import interval_rows
from hooked_vlm.experiments.verdicts import claims_over_probes
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.sets import StimulusSet


ABOUT = About(
    id="Q8",
    name="why-strips",
    section="open question on 5.2",
    title="Which attention in the vision encoder writes the code of strips?",
    claim="The paper finds strips in the projector's output and leaves their origin open.",
)


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`images` pictures of each axis; `random_cuts` controls of each cut.

    Beside the cut in all layers, attention is cut in each `"layer"` alone, in all layers
    `"up to"` each, or in no others (`"none"`).  `probe` is the `"paper"`'s recipe, or a logistic
    regression fitted until it has `"converged"`.
    """

    ranges: ClassVar = {
        "images": (8, 10**6),  # probes need held-out pictures
        "random_cuts": (1, 100),
    }
    choices: ClassVar = {"by": ("layer", "up to", "none"), "probe": PROBES}

    images: int = 120
    random_cuts: int = 3
    by: str = "layer"
    probe: str = "paper"


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Cuts attention between classes of patches, and reads the code with E3's probe."""
    setting = Setting(model, data, config.batch_size)
    encoder = whole_attention(setting)
    layers = _layers(len(encoder.sites), config.by)
    # 1. The probes of each axis, fitted to one half of its uncut pictures.
    halves = {axis: Halves.of(setting, axis, config.images, config.seed) for axis in setting.axes}
    readers = {axis: own.fitted.read_by(config.probe)[0] for axis, own in halves.items()}

    # 2. What they read on the other half, with each cut.
    def score(unit: tuple[str, str, int, int, Any], _: OnProgress) -> np.ndarray:
        axis, cut, c, i, chosen = unit
        sites = [encoder.sites[layer] for layer in chosen]
        rng = np.random.default_rng([config.seed, c, i])
        read = partial(_read, setting, axis, readers[axis])
        return _cut(setting, axis, encoder, cut, sites, halves[axis].asked, read, rng, config)

    units = {
        f"{axis}, {cut}, {named(layer)}": (axis, cut, c, i, chosen)
        for axis in setting.axes
        for c, cut in enumerate(CUTS)
        for i, (layer, chosen) in enumerate(layers.items())
    }
    found = over("cuts", units, score, on_progress, last=True)
    # 3. The table.
    rows, shares = [], []
    missing: list[str] = []
    for axis in setting.axes:
        intact = _read(setting, axis, readers[axis], halves[axis].usual)
        own = {unit[2:4]: found[name] for name, unit in units.items() if unit[0] == axis}
        kept, said = _shares_of(axis, halves[axis], layers, intact, own)
        made = _rows(kept, list(layers), config.seed)
        rows += [{**row, "axis": axis} for row in [*halves[axis].rows, *made]]
        shares.append(kept)
        missing += said
    table = over_sentences(pd.DataFrame(rows))
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={"shares": _joined(shares, setting.axes)},
        verdict="\n".join([verdict(table, config.by), *missing]),
        config={
            "images": config.images,
            "random_cuts": config.random_cuts,
            "by": config.by,
            "probe": config.probe,
            "sites": list(encoder.sites),
        },
        notes=(
            f"Probes are those of E3 ({SEEDS} initialisations), fitted to object tokens of half "
            "of the uncut pictures and applied to the others, cut and uncut. 'background' is the "
            "share of background tokens read as their strip, 'objects' that of object tokens read "
            "as their place. All differences are paired by picture. probe='converged' is one "
            "logistic regression on the same tokens instead.",
            "A cut masks attention scores in all heads. Class tokens and registers count as "
            "background, because they would pass on what is cut.",
            "A random cut removes as many keys of each query as the cut, drawn anew for each "
            "picture among the keys that the cut leaves, except the query itself; mean "
            f"over {config.random_cuts}. Where the cut leaves too few keys (of objects -> "
            "background) there is none. That of objects -> other objects is a cut of as many "
            "background keys.",
            "'writes' requires that the share falls below that of uncut pictures and below that of "
            "random cuts. Where the share of uncut pictures is not above 1/3, there is nothing to "
            "cut off. P-values of cuts in all layers are adjusted (Holm) over axes, cuts and both "
            "shares, those of single layers over layers.",
        ),
    )


run = of_config(run_on)


# --- shares ---------------------------------------------------------------------------------


def _layers(n: int, by: str) -> dict[int, range]:
    """Returns the layers that are cut together, by the number of the last; `ALL` for all."""
    every = {ALL: range(n)}
    if by == "none":
        return every
    return every | {layer: range(layer if by == "layer" else 0, layer + 1) for layer in range(n)}


def _has_random(pairs: np.ndarray) -> bool:
    return random_pairs(pairs, np.random.default_rng(0)) is not None


def _cut(
    setting: Setting,
    axis: str,
    encoder: Encoder,
    cut: str,
    sites: Sequence[str],
    asked: Sequence[Question],
    read: Callable[[Tensor], np.ndarray],
    rng: np.random.Generator,
    config: Config,
) -> Float[np.ndarray, "condition probe image 2"]:
    """Returns what probes read with a cut at some sites, and with random cuts (else NaN)."""
    pairs = cut_pairs(setting.geometry, axis, cut, encoder.prefix, encoder.side)
    own = read(_features(setting, asked, sites, lambda: pairs))
    values = np.full((2, *own.shape), np.nan)
    values[0] = own
    if _has_random(pairs):

        def draw() -> np.ndarray:
            found = random_pairs(pairs, rng)
            assert found is not None  # as `_has_random` found
            return found

        drawn = [read(_features(setting, asked, sites, draw)) for _ in range(config.random_cuts)]
        values[1] = np.mean(drawn, axis=0)
    return values


def _shares_of(
    axis: str,
    halves: Halves,
    layers: Mapping[int, range],
    intact: np.ndarray,
    cuts: Mapping[tuple[int, int], np.ndarray],
) -> tuple[xr.DataArray, list[str]]:
    """Returns an axis's shares `[cut, layer, condition, probe, image, quantity]`.

    Then sentences on pictures that are left out.
    """
    values = np.full((len(CUTS), len(layers), 3, *intact.shape), np.nan)
    values[:, :, 0] = intact
    for (c, i), own in cuts.items():
        values[c, i, 1:] = own
    coords = {
        "kind": list(CUTS),
        "layer": list(layers),
        "condition": [INTACT, CUT, RANDOM],
        "image": halves.fitted.test,
        "quantity": list(QUANTITIES),
    }
    dims = ("kind", "layer", "condition", "probe", "image", "quantity")
    shares = xr.DataArray(values, dims=dims, coords=coords)
    # A cut without random ones has NaN there for all images, which leaves out none of them.
    others = [dim for dim in dims if dim != "image"]
    made = shares.notnull().any(("probe", "image", "quantity"))
    whole = (shares.notnull() | ~made).all(others).values
    if not whole.any():
        raise none_left("picture")
    missing = left_out(int((~whole).sum()), "picture", f"{axis}, cut", "tokens")
    kept = shares.isel(image=np.flatnonzero(whole))
    return kept, [*halves.left_out, *missing]


def _features(
    setting: Setting,
    asked: Sequence[Question],
    sites: Sequence[str],
    pairs_of: Callable[[], np.ndarray],
) -> Tensor:
    """Returns the projector's output with the pairs of each picture cut at some sites."""
    parts = []
    for batch in setting.batches(asked):
        masks = np.stack([pairs_of() for _ in batch])
        parts.append(projected(setting, batch, cutting(dict.fromkeys(sites, masks))))
    return torch.cat(parts)


def _read(
    setting: Setting, axis: str, probes: Sequence[Any], features: Tensor
) -> Float[np.ndarray, "probe image 2"]:
    """Returns each picture's shares of `QUANTITIES`, by probe; NaN where tokens are no numbers."""
    layout = setting.geometry
    strip, background = strips(layout, axis)
    place = np.full(layout.shape, -1)
    for i, region in enumerate(probe_regions(layout, axis)):
        place[region.mask] = i
    read = places_read(probes, features.unflatten(1, layout.shape))
    given = (read == strip)[..., background].mean(-1), (read == place)[..., place >= 0].mean(-1)
    found = np.stack(given, axis=-1)
    found[:, ~is_read(read)] = np.nan
    return found


# --- rows and verdict -----------------------------------------------------------------------


def _rows(by_probe: xr.DataArray, layers: Sequence[int], seed: int) -> list[dict]:
    """Returns the shares of each condition, and the claims: cut - intact and cut - random cut."""
    rows, shares = [], by_probe.mean("probe")
    intact = shares.isel(kind=0, layer=0).sel(condition=INTACT).values  # [image, quantity]
    for q, quantity in enumerate(QUANTITIES):
        about = {"quantity": quantity, "condition": INTACT}
        rows += interval_rows(mean_of_shares(intact[:, q], seed=seed), {}, **about)
    bounds: Any = {"null": CHANCE, "low": 0.0, "high": 1.0, "condition": f"{INTACT}, claim"}
    each = by_probe.isel(kind=0, layer=0).sel(condition=INTACT).values
    rows += claims_over_probes(each, {"quantity": list(QUANTITIES)}, seed, **bounds)
    for kind in CUTS:
        for layer in layers:
            for condition in (CUT, RANDOM):
                own = shares.sel(kind=kind, layer=layer, condition=condition).values
                for q, quantity in enumerate(QUANTITIES):
                    if np.isfinite(own).all():
                        about = {"kind": kind, "quantity": quantity, "condition": condition}
                        interval = mean_of_shares(own[:, q], seed=seed)
                        rows += interval_rows(interval, {}, layer=named(layer), **about)
    rows += claims(by_probe.sel(layer=[ALL]), QUANTITIES, seed)
    single = [layer for layer in layers if layer != ALL]
    if single:
        for kind in CUTS:  # p-values are adjusted over layers
            for quantity in QUANTITIES:
                # With a probe axis of one: their mean.
                own = shares.sel(kind=[kind], layer=single, quantity=[quantity])
                rows += claims(own.expand_dims("probe"), [quantity], seed)
    return rows


def _joined(shares: Sequence[xr.DataArray], axes: Sequence[str]) -> xr.DataArray:
    """Returns the shares of all axes, averaged over probes."""
    means = [own.mean("probe") for own in shares]
    return xr.concat(means, dim=pd.Index(axes, name="axis"))  # pyright: ignore

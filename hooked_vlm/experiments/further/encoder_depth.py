"""Q5, encoder depth: at which depth of the vision encoder does the background hold the order?

The paper finds strips in the projector's output and leaves their origin open.  Three
measurements are made before the first block of the vision encoder, after every block, and
after the projector: the order that probes read from the objects and from the background (E3),
the patches whose swap flips the answer (E4), and the attention of the background to the
object of its own strip and to other objects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.analysis.statistics import simultaneous
from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.batches import left_out, numbers_only, scored_numbers
from hooked_vlm.experiments.dual_mechanisms.failed_pairs import HALF
from hooked_vlm.experiments.dual_mechanisms.order_reading import (
    places_read,
    read_order,
    strips,
    whole_pictures,
)
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import CHANCE, SEEDS, in_raster
from hooked_vlm.experiments.dual_mechanisms.strip_swap import name_of, pictures_of
from hooked_vlm.experiments.dual_mechanisms.swap_regions import cell_pairs
from hooked_vlm.experiments.further.encoder_attention import attention_rows
from hooked_vlm.experiments.loop import independent, over, over_batches, part_of, silent
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting, of_config, sampled
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.experiments.verdicts import (
    LEAST,
    adjusted,
    agreement,
    claim_rows,
    claims_over_probes,
    judge,
    not_tested,
    sentence,
)
from hooked_vlm.hooks.names import PROJECTOR, VISION
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.stimuli.pairs import Question, swap_pair
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.stimuli.sets import StimulusSet
from hooked_vlm.sweeps.sweep import Sweep, final_logits


ABOUT = About(
    id="Q5",
    name="encoder-depth",
    section="open question on 5.2",
    title="At which depth of the vision encoder does the background hold the order?",
    claim="The paper finds strips in the projector's output and leaves their origin open.",
)
KINDS = ("strip", "object")
READ = ("accuracy, claim", "background, claim", "background, middle strip")
"""Quantities that probes are judged by."""
FLIPS = "swapped, claim"
"""Quantity: the probability of the swapped answer, with intervals that a verdict may use."""
LOOKED_AT = 8
"""Number of pictures of each axis over which attention is averaged."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`images` pictures of each axis for the probes; `pairs` of each direction for swaps."""

    ranges: ClassVar = {"images": (8, 10**6)}  # probes need held-out pictures

    pairs: int = 16
    images: int = 120


def run_on(model, data: StimulusSet, config: Config, on_progress: OnProgress = silent) -> Result:
    """Runs probes, swaps and attention measurements at every depth of the vision encoder."""
    setting = Setting(model, data, config.batch_size)
    sites = depths(model)
    pairs = setting.pairs(swap_pair, 3, config)
    pairs_of = {d: [name_of(pair) for pair in found] for d, found in pairs.items()}
    rows, maps, scores = [], [], {}
    missing: list[str] = []
    n = len(setting.axes) + 1
    with independent() as parts:
        for index, axis in enumerate(setting.axes):
            told = part_of(on_progress, index, n)
            with parts.part(f"probes, {axis}"):
                read, wrong = _read_at(setting, axis, sites, config, told)
                rows += [row for found in read for row in found["rows"]]
                maps += [found["map"] for found in read]
                missing += left_out(wrong, "picture", axis, "tokens")
                shares = [found["read"] for found in read]
                rows += reading_claims(shares, _halves(setting, axis), config.seed, axis=axis)
            with parts.part(f"attention, {axis}"):
                shown = _questions(setting, axis, LOOKED_AT, config.seed)
                found, wrong = attention_rows(setting, axis, shown, config.seed)
                rows += found
                missing += left_out(wrong, "picture", f"{axis}, attention")
        with parts.part("swaps"):
            scores = over_batches(
                "swaps",
                pairs,
                config.batch_size,
                lambda _, batch, __: _swaps(setting, batch, sites),
                part_of(on_progress, n - 1, n),
                last=True,
            )
    joined = {
        direction: xr.concat(found, dim="pair").assign_coords(pair=pairs_of[direction])
        for direction, found in scores.items()
    }
    swapped, without = numbers_only(joined)
    for direction, own in swapped.items():
        found = swap_rows(own.transpose("pair", "kind", "site"), config.seed, direction=direction)
        rows += [{**row, "site": sites[row["layer"]]} for row in found]
    table = over_sentences(pd.DataFrame(rows))
    shape = (len(setting.axes), len(sites), *maps[0].shape)
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={
            "maps": xr.DataArray(
                np.stack(maps).reshape(shape),
                dims=("axis", "layer", "class", "row", "col"),
                coords={"axis": list(setting.axes), "layer": list(range(len(sites)))},
            )
        },
        verdict="\n".join(
            [
                _verdict(table, len(sites)),
                *not_tested(setting.directions, list(swapped)),
                *missing,
                *without,
            ]
        ),
        config={"sites": sites, "pairs": {d: len(p) for d, p in pairs.items()}},
        notes=(
            "Layer 0 is the input of the encoder's first block (positions added), layer l the "
            "output of block l-1, and the last the projector's output. The patches of one visual "
            "token are averaged, so that probes and maps have the same cells at every depth.",
            "Probes are those of E3, with their controls, fitted at each depth. Swaps are "
            "those of E4, written into the encoder.",
            "'attention' is the attention of a strip's background patches to the patches of its "
            "own object, or of the two other objects, as a multiple of uniform attention; mean "
            f"over heads and {LOOKED_AT} pictures of each axis.",
            f"The verdict gives the first layer from which on, up to the projector's output, "
            f"{SEEDS} probes with other initialisations read the order on average: objects above "
            "1/3; the background above what two halves reach, and its middle strip above 1/3. It "
            "says how many of the probes alone say the same. An answer flips where the claim's "
            "interval is above 1/2. These are intervals and tests for bounded means over pictures, "
            "adjusted by Holm over layers and axes (for swaps over layers, kinds and directions).",
        ),
    )


def depths(model) -> list[str]:
    """Returns the residual sites of the vision encoder that reach the answer, and the projector's.

    Raises `CannotRunError` where the encoder's blocks have no residual sites.
    """
    read = model.anatomy.vision.last_read
    blocks = [f"{VISION}.blocks.0.hook_resid_pre"]
    blocks += [f"{VISION}.blocks.{layer}.hook_resid_post" for layer in range(read + 1)]
    sites = [name for name in blocks if name in model.sites]
    if len(sites) < 2:
        raise CannotRunError(
            "This vision encoder's blocks have no residual sites, which this experiment needs. Use "
            "a model whose vision encoder is a transformer."
        )
    return [*sites, f"{PROJECTOR}.hook_out"]


run = of_config(run_on)


def _read_at(
    setting: Setting, axis: str, sites: Sequence[str], config: Config, on_progress: OnProgress
) -> tuple[list[dict[str, Any]], int]:
    """Returns what probes read at each site: rows, shares of `READ`, and the mean map.

    Then the number of pictures whose tokens are not numbers at some site.
    """
    features = _features(setting, axis, sites, config)
    wrong = _without_numbers(features)

    def read(unit: tuple[int, str], _: OnProgress) -> dict[str, Any]:
        layer, site = unit
        found = read_order(setting.geometry, axis, features[site], config.seed, SEEDS)
        return {
            "rows": [{**row, "layer": layer, "site": site} for row in found["rows"]],
            "read": _read(setting, axis, found),
            "map": found["maps"].mean(0),
        }

    units = {site: (layer, site) for layer, site in enumerate(sites)}
    return list(over("probes", units, read, on_progress, last=True).values()), wrong


def _features(
    setting: Setting, axis: str, sites: Sequence[str], config: Config
) -> dict[str, Tensor]:
    """Returns `[image, token, d]` at every site; the patches of a token are averaged."""
    questions = _questions(setting, axis, config.images, config.seed)
    side = setting.geometry.shape[0]

    def score(_: str, batch: list[Question], __: Any) -> dict[str, Tensor]:
        inputs = setting.inputs(batch)
        with torch.no_grad():
            _, cache = setting.model.run_with_cache(inputs, list(sites), stop_at_layer=0)
        found = {}
        for site in sites:
            values = cache[site].float().cpu()
            if site.startswith(PROJECTOR):
                values = in_raster(values, inputs)
            else:
                values = values[:, setting.model.anatomy.vision.n_prefix :]
            found[site] = pooled(values, side)
        return found

    parts = over_batches("features", {axis: questions}, setting.batch_size, score)[axis]
    return {site: torch.cat([part[site] for part in parts]) for site in sites}


def _without_numbers(features: Mapping[str, Tensor]) -> int:
    """Makes pictures that lack numbers at one site NaN at all of them, and returns how many.

    Layers are compared, so each must have the same pictures.
    """
    whole = np.all([whole_pictures(tokens) for tokens in features.values()], axis=0)
    for tokens in features.values():
        tokens[torch.from_numpy(~whole)] = torch.nan
    return int((~whole).sum())


def pooled(patches: Tensor, side: int) -> Tensor:
    """Returns `[image, side * side, d]` from `[image, patch, d]`: each token's patches averaged.

    Raises `CannotRunError` where patches do not divide into so many tokens.
    """
    n = round(patches.shape[1] ** 0.5)
    if n * n != patches.shape[1] or n % side:
        raise CannotRunError(
            f"{patches.shape[1]} patches do not divide into {side}x{side} tokens. This experiment "
            "needs a square grid of patches, a multiple of the tokens' grid."
        )
    m = n // side
    blocks = patches.unflatten(1, (side, m, side, m))
    return blocks.mean((2, 4)).flatten(1, 2)


def _questions(setting: Setting, axis: str, n: int, seed: int) -> list[Question]:
    return sampled(setting, "left" if axis == "horizontal" else "above", n, seed)


def _swaps(setting: Setting, pairs: list, sites: Sequence[str]) -> xr.DataArray:
    source = setting.inputs([pair.counterfactual for pair in pairs])
    axis = pairs[0].clean.axis
    regions = {kind: cell_pairs(setting.geometry, axis, kind) for kind in KINDS}
    sweep = Sweep(
        setting.inputs([pair.clean for pair in pairs]),
        {"kind": KINDS, "site": list(sites)},
        make=lambda kind, site: Patch(site, at=regions[kind], source=source),
    )
    answers = [(pair.swapped_answer,) for pair in pairs]
    return sweep.run(
        setting.model,
        lambda logits: scored_numbers(
            lambda rows: setting.probabilities(rows, answers)[:, 0], final_logits(logits)
        ),
        dims=("pair",),
        logits_to_keep=1,
    )


def swap_rows(values: xr.DataArray, seed: int, **columns: Any) -> list[dict]:
    """Returns the rows of swaps `[pair, kind, site]` in one direction, and the claims about them.

    The verdict picks the best layer: intervals of 'swapped' hold together, and p-values of the
    claims are adjusted over kinds and layers.
    """
    layers = {"kind": KINDS, "layer": range(values.sizes["site"])}
    units = pictures_of(values)
    together = simultaneous(values.values, within=(0.0, 1.0), seed=seed)
    rows = interval_rows(together, layers, quantity="swapped", **columns)
    about = {"null": HALF, "low": 0.0, "high": 1.0, "quantity": FLIPS}
    return rows + claim_rows(values.values, layers, units, seed, **about, **columns)


Read = Float[np.ndarray, "quantity probe image"]
"""Shares of `READ` at one depth."""


def _read(setting: Setting, axis: str, found: Mapping[str, Any]) -> Read:
    strip, background = strips(setting.geometry, axis)
    given = (places_read(found["fitted"].probes, found["grids"]) == strip)[..., background]
    middle = given[..., strip[background] == 1]
    return np.stack([found["fitted"].accuracies, given.mean(-1), middle.mean(-1)])


def _halves(setting: Setting, axis: str) -> float:
    """Returns the share of the background that a plain split into two halves reaches."""
    strip, background = strips(setting.geometry, axis)
    sizes = np.bincount(strip[background], minlength=3)
    return float((sizes.sum() - sizes.min()) / sizes.sum())


def reading_claims(read: Sequence[Read], halves: float, seed: int, **columns: Any) -> list[dict]:
    """Returns the claims about what probes read at each depth, by their mean and by each probe."""
    values = np.stack(read, axis=-1)  # [quantity, probe, image, layer]
    rows: list[dict] = []
    for own, quantity, null in zip(values, READ, (CHANCE, halves, CHANCE), strict=True):
        about: Any = {"quantity": quantity, "null": null, "low": 0.0, "high": 1.0, **columns}
        rows += claims_over_probes(own, {"layer": range(len(read))}, seed, **about)
    return rows


def over_sentences(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with p-values adjusted over all sentences: axes, or directions."""
    return adjusted(table, table["quantity"].isin([*READ, FLIPS]), ["quantity", "probe"])


def _verdict(table: pd.DataFrame, n_sites: int) -> str:
    parts = []
    for axis in dict.fromkeys(table["axis"].dropna()):
        parts.append(f"{axis}: {_of_axis(select(table, axis=axis), n_sites)}")
    for direction in dict.fromkeys(table["direction"].dropna()):
        here = select(table, direction=direction)
        words = [_flips(select(here, kind=kind), kind) for kind in KINDS]
        parts.append(f"{direction} ({AXIS_OF[direction]}): {'; '.join(words)}")
    return "\n".join(map(sentence, parts))


def _flips(here: pd.DataFrame, kind: str) -> str:
    """Returns whether swaps of a kind flip the answer at any layer, in words."""
    best = select(here, quantity="swapped").sort_values("value").iloc[-1]
    judged = [judge(row, least=0.0) for _, row in select(here, quantity=FLIPS).iterrows()]
    said = f"undecided whether {kind}s flip the answer"
    if any(found.above for found in judged):
        said = f"{kind}s flip the answer"
    elif all(found.below for found in judged):
        said = f"{kind}s do not flip the answer"
    return f"{said} (highest probability {format_interval(best)} at layer {best['layer']})"


def _of_axis(here: pd.DataFrame, n_sites: int) -> str:
    """Returns from where on the order is read, and how many probes alone say the same."""
    finding = _reads(*_firsts(here[here["probe"].isna()]), n_sites)
    each = [_reads(*_firsts(own), n_sites) for _, own in here.groupby("probe")]
    return f"{finding} ({agreement(finding, each)})"


def _firsts(here: pd.DataFrame) -> tuple[int | None, int | None]:
    """Returns the first layers from which on objects and background are read."""
    objects, background, middle = (
        [judge(row, least).above for _, row in select(here, quantity=quantity).iterrows()]
        for quantity, least in zip(READ, (LEAST, 0.0, LEAST), strict=True)
    )
    strips_read = [both and third for both, third in zip(background, middle, strict=True)]
    return _first(objects), _first(strips_read)


def _first(above: Sequence[bool]) -> int | None:
    """Returns the first layer from which on all are true."""
    found = None
    for layer in reversed(range(len(above))):
        if not above[layer]:
            break
        found = layer
    return found


def _reads(objects: int | None, background: int | None, n_sites: int) -> str:
    """Returns in words from which layer on a probe reads the order (None: not at the output)."""
    if objects is None and background is None:
        return (
            "at the projector's output a probe does not clearly read the order, neither from the "
            "objects nor from the background"
        )
    layers = {"objects": objects, "background": background}
    found = [f"from the {what} {_from(n, n_sites)}" for what, n in layers.items() if n is not None]
    missing = [what for what, layer in layers.items() if layer is None]
    text = f"a probe reads the order {' and '.join(found)}"
    return (
        f"{text}; at the projector's output not clearly from the {missing[0]}" if missing else text
    )


def _from(layer: int, n_sites: int) -> str:
    return "only at the projector's output" if layer == n_sites - 1 else f"from layer {layer} on"

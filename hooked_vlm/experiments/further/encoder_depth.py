"""Q5, encoder depth: where in the vision encoder does the order leave the objects' cells?

The paper shows strips behind the projector and does not ask how they came there.  At the
input and behind every block of the vision encoder, and behind the projector: what ordering
probes read from the objects and from the background (E3), whose patches flip the answer
when they are swapped (E4), and how much the background attends to the object of its own
strip, and to others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.errors import DataError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.dual_mechanisms.ordering_ablation import sampled
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import read_order
from hooked_vlm.experiments.dual_mechanisms.strip_swap import FLIPPED
from hooked_vlm.experiments.dual_mechanisms.swap_regions import cell_pairs
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import format_interval, interval_rows, select
from hooked_vlm.hooks.names import PROJECTOR, VISION
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.stimuli.pairs import Question, swap_pair
from hooked_vlm.stimuli.prompts import AXIS_OF
from hooked_vlm.sweeps.sweep import Sweep, final_logits


ID, NAME, SECTION = "Q5", "encoder-depth", "open question on 5.2"
TITLE = "Where in the vision encoder does the order leave the objects?"
CLAIM = "The paper finds strips behind the projector; why there are strips is left open."
KINDS = ("strip", "object")
LOOKED_AT = 8
"""Pictures of each axis whose attention is averaged."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`images` pictures of each axis for the probes; `pairs` of each direction for swaps."""

    pairs: int = 16
    images: int = 120


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Probes, swaps and attention at every depth of the vision encoder."""
    setting = Setting.of(model, config)
    sites = depths(model)
    pairs = setting.pairs(swap_pair, 3, config)
    batches = [(d, batch) for d, found in pairs.items() for batch in setting.batches(found)]
    total = len(setting.axes) * len(sites) + len(batches) * len(sites) * len(KINDS)
    on_progress(0, total)
    done, rows, maps = 0, [], []
    for axis in setting.axes:
        features = _features(setting, axis, sites, config)
        for layer, site in enumerate(sites):
            found = read_order(setting.geometry, axis, features[site], config.seed)
            rows += [{**row, "layer": layer, "site": site} for row in found["rows"]]
            maps.append(found["maps"].mean(0))
            done += 1
            on_progress(done, total)
        rows += _attention_rows(setting, axis, config)
    scores: dict[str, list[xr.DataArray]] = {direction: [] for direction in pairs}
    for direction, batch in batches:
        scores[direction].append(_swaps(setting, batch, sites))
        done += len(sites) * len(KINDS)
        on_progress(done, total)
    for direction, parts in scores.items():
        values = xr.concat(parts, dim="pair").transpose("pair", "kind", "site").values
        layers = {"kind": KINDS, "layer": range(len(sites))}
        found = interval_rows(bootstrap(values, seed=config.seed), layers, direction=direction)
        rows += [{**row, "quantity": "swapped", "site": sites[row["layer"]]} for row in found]
    table = pd.DataFrame(rows)
    shape = (len(setting.axes), len(sites), *maps[0].shape)
    return Result(
        id=ID,
        name=NAME,
        title=TITLE,
        claim=CLAIM,
        section=SECTION,
        table=table,
        arrays={
            "maps": xr.DataArray(
                np.stack(maps).reshape(shape),
                dims=("axis", "layer", "class", "row", "col"),
                coords={"axis": list(setting.axes), "layer": list(range(len(sites)))},
            )
        },
        verdict=_verdict(table, len(sites)),
        config={"sites": sites, "pairs": {d: len(p) for d, p in pairs.items()}},
        notes=(
            "Layer 0 is the input of the encoder's first block (positions added), layer l the "
            "output of block l-1, and the last the projector's output. The patches of one visual "
            "token are averaged, so that probes and maps have the same cells at every depth.",
            "Probes are those of E3, with their controls, fitted anew at each depth. Swaps are "
            "those of E4, written into the encoder itself.",
            "'attention' is what background patches of a strip give to the patches of its own "
            "object, or of the two others, as a multiple of what even attention would give; mean "
            f"over heads, {LOOKED_AT} pictures of each axis.",
        ),
    )


def depths(model) -> list[str]:
    """Returns the residual sites of the vision encoder that reach the answer, and the projector's.

    Raises `DataError` where the encoder's blocks have no residual sites.
    """
    read = model.anatomy.vision.last_read
    blocks = [f"{VISION}.blocks.0.hook_resid_pre"]
    blocks += [f"{VISION}.blocks.{layer}.hook_resid_post" for layer in range(read + 1)]
    sites = [name for name in blocks if name in model.sites]
    if len(sites) < 2:
        raise DataError("This vision encoder's blocks have no residual sites to look at.")
    return [*sites, f"{PROJECTOR}.hook_out"]


def _features(
    setting: Setting, axis: str, sites: Sequence[str], config: Config
) -> dict[str, Tensor]:
    """Returns `[image, token, d]` at every site; the patches of a token are averaged."""
    questions = _questions(setting, axis, config.images, config.seed)
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    side = setting.geometry.shape[0]
    for batch in setting.batches(questions):
        with torch.no_grad():
            _, cache = setting.model.run_with_cache(
                setting.inputs(batch), list(sites), stop_at_layer=0
            )
        for site in sites:
            prefix = 0 if site.startswith(PROJECTOR) else setting.model.anatomy.vision.n_prefix
            found[site].append(pooled(cache[site][:, prefix:].float().cpu(), side))
    return {site: torch.cat(parts) for site, parts in found.items()}


def pooled(patches: Tensor, side: int) -> Tensor:
    """Returns `[image, side * side, d]` from `[image, patch, d]`: each token's patches averaged.

    Raises `DataError` where patches do not divide into so many tokens.
    """
    n = round(patches.shape[1] ** 0.5)
    if n * n != patches.shape[1] or n % side:
        raise DataError(f"{patches.shape[1]} patches do not divide into {side}x{side} tokens.")
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
        lambda logits: setting.probabilities(final_logits(logits), answers)[:, 0],
        dims=("pair",),
        logits_to_keep=1,
    )


# --- attention ------------------------------------------------------------------------------


def _attention_rows(setting: Setting, axis: str, config: Config) -> list[dict]:
    names = [
        name
        for name in setting.model.sites
        if name.startswith(f"{VISION}.blocks.") and name.endswith("attn.hook_pattern")
    ]
    names = names[: setting.model.anatomy.vision.last_read + 1]
    questions = _questions(setting, axis, LOOKED_AT, config.seed)
    shares: dict[str, list[np.ndarray | None]] = {name: [] for name in names}
    for question in questions:
        with torch.no_grad():
            _, cache = setting.model.run_with_cache(
                setting.inputs([question]), names, stop_at_layer=0
            )
        for name in names:
            pattern = cache[name]
            whole = pattern[0] if isinstance(pattern, list) else pattern
            prefix = setting.model.anatomy.vision.n_prefix  # class tokens and registers
            whole = whole.flatten(0, -3).mean(0)[prefix:, prefix:]
            shares[name].append(attention_shares(setting, axis, whole))
    rows = []
    for layer, name in enumerate(names, start=1):
        whole = [share for share in shares[name] if share is not None]
        if len(whole) < len(shares[name]):
            continue  # windows: no background patch sees the whole picture
        found = interval_rows(
            bootstrap(np.stack(whole), seed=config.seed),
            {"kind": ("own object", "other objects")},
            axis=axis,
            quantity="attention",
        )
        rows += [{**row, "layer": layer, "site": name} for row in found]
    return rows


def attention_shares(setting: Setting, axis: str, pattern: Tensor) -> np.ndarray | None:
    """Returns what background patches attend to: own object, others, over even attention.

    `pattern` is `[query, key]` over a picture's patches, averaged over heads; None where it is
    not over all of them.
    """
    side = setting.geometry.shape[0]
    n = round(pattern.shape[-1] ** 0.5)
    if n * n != pattern.shape[-1] or n % side or pattern.shape[0] != pattern.shape[1]:
        return None
    m = n // side

    def patches(region) -> np.ndarray:
        return np.kron(region.mask, np.ones((m, m), dtype=bool)).ravel()

    objects = [patches(setting.geometry.object_region(axis, slot)) for slot in range(3)]
    background = patches(setting.geometry.background(axis))
    own, other = [], []
    weights = pattern.double().cpu().numpy()
    for slot in range(3):
        queries = patches(setting.geometry.strip_region(axis, slot)) & background
        given = np.array([weights[queries][:, cells].mean() for cells in objects]) * n * n
        own.append(given[slot])
        other.append(given[[s for s in range(3) if s != slot]].mean())
    return np.array([np.mean(own), np.mean(other)])


def _verdict(table: pd.DataFrame, n_sites: int) -> str:
    parts = []
    for axis in dict.fromkeys(table["axis"].dropna()):
        here = select(table, axis=axis)
        read, strips = (
            _first(select(here, quantity=q), select(here, quantity=control))
            for q, control in (("accuracy", "shuffled"), ("background", "background, shuffled"))
        )
        parts.append(
            f"{axis}: order is read from the objects {_from(read, n_sites)} and from the "
            f"background {_from(strips, n_sites)}"
        )
    for direction in dict.fromkeys(table["direction"].dropna()):
        words = []
        for kind in KINDS:
            swaps = select(table, direction=direction, kind=kind, quantity="swapped")
            best = swaps.sort_values("value").iloc[-1]
            flips = "flip" if best["value"] >= FLIPPED else "do not flip"
            words.append(
                f"{kind}s {flips} the answer, at best {format_interval(best)} at layer "
                f"{best['layer']}"
            )
        parts.append(f"{direction} ({AXIS_OF[direction]}): {'; '.join(words)}")
    return "\n".join(part[0].upper() + part[1:] + "." for part in parts)


def _first(read: pd.DataFrame, control: pd.DataFrame) -> int | None:
    """Returns the first layer from which on the interval lies above the control's, to the end."""
    above = read["low"].to_numpy() > np.maximum(control["high"].to_numpy(), 1 / 3) + 0.02
    layers = read["layer"].to_numpy()
    found = None
    for layer, clear in zip(layers[::-1], above[::-1], strict=True):
        if not clear:
            break
        found = int(layer)
    return found


def _from(layer: int | None, n_sites: int) -> str:
    if layer is None:
        return "not at the end"
    return "behind the projector alone" if layer == n_sites - 1 else f"from layer {layer} on"

"""Q8, why strips: which attention in the vision encoder writes the code of strips?

The paper finds strips in the background and leaves their origin open.  Here attention between
classes of patches is cut in the vision encoder, in all layers and layer by layer, and E3's probe,
fitted to uncut pictures, reads what is left.  Each cut is compared with random cuts of as many
keys for each query.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vlm.analysis.probes import LinearProbe, mean_of_shares, object_examples
from hooked_vlm.errors import CannotRunError
from hooked_vlm.experiments import options as common
from hooked_vlm.experiments.dual_mechanisms.order_reading import (
    fit_with_controls,
    probe_regions,
    strips,
)
from hooked_vlm.experiments.dual_mechanisms.ordering_ablation import sampled
from hooked_vlm.experiments.dual_mechanisms.ordering_probes import CHANCE, SEEDS, projected
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import format_interval, format_names, interval_rows, select
from hooked_vlm.experiments.verdicts import Judgement, claim_rows, judge, sentence
from hooked_vlm.hooks.names import VISION
from hooked_vlm.stimuli.geometry import Layout
from hooked_vlm.stimuli.pairs import Question


ABOUT = About(
    id="Q8",
    name="why-strips",
    section="open question on 5.2",
    title="Which attention in the vision encoder writes the code of strips?",
    claim="The paper finds strips in the projector's output and leaves their origin open.",
)
CUTS = {
    "background -> objects": "attention from background to objects",
    "objects -> other objects": "attention between objects",
    "objects -> background": "attention from objects to background",
}
"""Queries and the keys that they lose, and the same in words."""
BACKGROUND, OBJECTS = "background", "objects"
QUANTITIES = (BACKGROUND, OBJECTS)
"""Shares of background tokens read as their strip, and of object tokens read as their place."""
CODES = {BACKGROUND: "the background's code", OBJECTS: "the objects' code"}
INTACT, CUT, RANDOM = "intact", "cut", "random cut"
ALL = -1
"""The number of layers' cut in the code: all of them."""


@dataclass(frozen=True, kw_only=True)
class Config(common.Config):
    """`images` pictures of each axis; `random_cuts` controls of each cut.

    Beside the cut in all layers, attention is cut in each `"layer"` alone, in all layers
    `"up to"` each, or in no others (`"none"`).
    """

    ranges: ClassVar = {
        "images": (8, 10**6),  # probes need held-out pictures
        "random_cuts": (1, 100),
    }
    choices: ClassVar = {"by": ("layer", "up to", "none")}

    images: int = 120
    random_cuts: int = 3
    by: str = "layer"


@dataclass(frozen=True)
class Encoder:
    """The attention of a vision encoder over the patches of a picture."""

    sites: tuple[str, ...]
    """The attention scores of the blocks that reach the projector."""
    prefix: int
    """Class tokens and registers before the patches."""
    side: int
    """Patches on a side of a visual token."""


def run(model, config: Config, on_progress: OnProgress) -> Result:
    """Cuts attention between classes of patches, and reads the code with E3's probe."""
    setting = Setting.of(model, config)
    encoder = whole_attention(setting)
    layers = _layers(len(encoder.sites), config.by)
    conditions = list(_conditions(setting, encoder, config.random_cuts, layers))
    done, steps = 0, sum(1 + n for _, n in conditions)
    rows, shares = [], []

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, steps)

    on_progress(0, steps)
    for axis, _ in conditions:
        found = _shares_of(setting, axis, encoder, layers, config, step)
        made = _rows(found["shares"], list(layers), config.seed)
        rows += [{**row, "axis": axis} for row in [*found["rows"], *made]]
        shares.append(found["shares"])
    table = pd.DataFrame(rows)
    return Result(
        **vars(ABOUT),
        table=table,
        arrays={"shares": xr.concat(shares, dim=pd.Index(setting.axes, name="axis"))},
        verdict=_verdict(table, config.by),
        config={
            "images": config.images,
            "random_cuts": config.random_cuts,
            "by": config.by,
            "sites": list(encoder.sites),
        },
        notes=(
            f"Probes are those of E3 ({SEEDS} initialisations), fitted to object tokens of uncut "
            "pictures and applied to held-out pictures, cut and uncut. 'background' is the share "
            "of background tokens read as their strip, 'objects' that of object tokens read as "
            "their place. All differences are paired by picture.",
            "A cut masks attention scores in all heads. Class tokens and registers count as "
            "background, because they would pass on what is cut.",
            "A random cut removes as many keys of each query as the cut, drawn anew for each "
            "picture and layer among the keys that the cut leaves, except the query itself; mean "
            f"over {config.random_cuts}. Where the cut leaves too few keys (of objects -> "
            "background) there is none. That of objects -> other objects is a cut of as many "
            "background keys.",
            "'writes' requires that the share falls below that of uncut pictures and below that of "
            "random cuts. Where the share of uncut pictures is not above 1/3, there is nothing to "
            "cut off.",
        ),
    )


# --- the cut --------------------------------------------------------------------------------


def whole_attention(setting: Setting) -> Encoder:
    """Returns the attention of the setting's vision encoder.

    Raises `CannotRunError` where a block has no attention scores, or where they do not cover all
    patches of a picture (windows, tiles).
    """
    model = setting.model
    n_blocks = model.anatomy.vision.last_read + 1
    sites = [f"{VISION}.blocks.{layer}.attn.hook_attn_scores" for layer in range(n_blocks)]
    missing = [site for site in sites if site not in model.sites]
    if missing or not sites:
        raise CannotRunError(
            f"This vision encoder has no attention scores at {missing[0] if missing else VISION}, "
            "which this experiment cuts. Use a model whose vision encoder is a transformer with "
            "softmax attention."
        )
    seen: dict[str, list[tuple[int, ...]]] = {site: [] for site in sites}

    def note(scores: Any, hook: Any) -> None:
        parts = scores if isinstance(scores, list) else list(scores)
        seen[hook.name] += [tuple(part.shape[-2:]) for part in parts]

    question = setting.stimuli.items()[0]
    projected(setting, [question], [(site, note) for site in sites])
    prefix, tokens = model.anatomy.vision.n_prefix, setting.geometry.shape[0]
    side = round(max(0, (max(seen[sites[0]], default=(0,))[0] - prefix)) ** 0.5) // tokens
    n = prefix + (side * tokens) ** 2
    for site, shapes in seen.items():
        if shapes != [(n, n)] or side < 1:
            found = ", ".join(f"{q}x{k}" for q, k in shapes[:4]) or "none"
            raise CannotRunError(
                f"The attention scores at {site} are {found} for one picture; expected are those "
                f"of all its patches in one square, {tokens}x{tokens} visual tokens of whole "
                "patches. Use a model whose vision encoder attends without windows and tiles."
            )
    return Encoder(tuple(sites), prefix, side)


def cut_pairs(
    layout: Layout, axis: str, cut: str, prefix: int, side: int
) -> Bool[np.ndarray, "query key"]:
    """Returns which pairs of a query and a key a cut removes, over a picture's patches.

    >>> from hooked_vlm.stimuli.geometry import geometry_for
    >>> cut_pairs(geometry_for(6, 8), "horizontal", "background -> objects", 1, 2).sum(1).max()
    np.int64(12)
    """
    owner = _owners(layout, axis, prefix, side)
    query, key = owner[:, None], owner[None]
    if cut == "background -> objects":
        return (query < 0) & (key >= 0)
    if cut == "objects -> other objects":
        return (query >= 0) & (key >= 0) & (query != key)
    return (query >= 0) & (key < 0)


def _owners(layout: Layout, axis: str, prefix: int, side: int) -> np.ndarray:
    """Returns the place of each patch's object, -1 in the background and before the patches."""
    owner = np.full(layout.shape, -1)
    for place in range(3):
        owner[layout.object_region(axis, place).mask] = place
    return np.concatenate([np.full(prefix, -1), np.kron(owner, np.ones((side, side), int)).ravel()])


def random_pairs(
    cut: Bool[np.ndarray, "query key"], rng: np.random.Generator
) -> Bool[np.ndarray, "query key"] | None:
    """Returns as many pairs of each query as a cut has, among others; None where there are fewer.

    No pair is a query with itself.
    """
    others = ~cut & ~np.eye(len(cut), dtype=bool)
    n = cut.sum(1)
    if (others.sum(1) < n).any():
        return None
    drawn = np.where(others, rng.random(cut.shape), 2.0)
    rank = drawn.argsort(1).argsort(1)
    return rank < n[:, None]


def cutting(
    masks: Mapping[str, Bool[np.ndarray, "#image query key"]],
) -> list[tuple[str, Callable[[Any, Any], Any]]]:
    """Returns hooks that mask attention scores `[image, head, query, key]`, by site.

    Packed encoders may give a list of scores by image.
    """

    def cut(scores: Any, hook: Any) -> Any:
        mask = torch.from_numpy(masks[hook.name])[:, None]
        if isinstance(scores, list):
            each = mask.expand(len(scores), *mask.shape[1:])
            return [_masked(part, own) for part, own in zip(scores, each, strict=True)]
        return _masked(scores, mask)

    return [(site, cut) for site in masks]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask.to(scores.device), torch.finfo(scores.dtype).min)


# --- shares ---------------------------------------------------------------------------------


def _layers(n: int, by: str) -> dict[int, range]:
    """Returns the layers that are cut together, by the number of the last; `ALL` for all."""
    every = {ALL: range(n)}
    if by == "none":
        return every
    return every | {layer: range(layer if by == "layer" else 0, layer + 1) for layer in range(n)}


def _conditions(
    setting: Setting, encoder: Encoder, n_random: int, layers: Mapping[int, range]
) -> Iterator[tuple[str, int]]:
    """Yields each axis and its number of cuts."""
    for axis in setting.axes:
        n = 0
        for cut in CUTS:
            pairs = cut_pairs(setting.geometry, axis, cut, encoder.prefix, encoder.side)
            has_random = random_pairs(pairs, np.random.default_rng(0)) is not None
            n += len(layers) * (1 + n_random * has_random)
        yield axis, n


def _shares_of(
    setting: Setting,
    axis: str,
    encoder: Encoder,
    layers: Mapping[int, range],
    config: Config,
    step: Callable[[], None],
) -> dict[str, Any]:
    """Returns an axis's probe rows, and shares `[cut, layer, condition, image, quantity]`."""
    direction = "left" if axis == "horizontal" else "above"
    questions = sampled(setting, direction, config.images, config.seed)
    usual = torch.cat([projected(setting, batch) for batch in setting.batches(questions)])
    examples = object_examples(usual, probe_regions(setting.geometry, axis))
    fitted, rows = fit_with_controls(examples, len(usual), config.seed, SEEDS)
    step()
    asked = [questions[i] for i in fitted.test]
    intact = _read(setting, axis, fitted.probes, usual[torch.as_tensor(fitted.test)])
    values = np.full((len(CUTS), len(layers), 3, *intact.shape), np.nan)
    values[:, :, 0] = intact
    for c, cut in enumerate(CUTS):
        pairs = cut_pairs(setting.geometry, axis, cut, encoder.prefix, encoder.side)
        for i, chosen in enumerate(layers.values()):
            sites = [encoder.sites[layer] for layer in chosen]
            features = _cut_features(setting, asked, {site: pairs[None] for site in sites})
            values[c, i, 1] = _read(setting, axis, fitted.probes, features)
            step()
            drawn = []
            for repeat in range(config.random_cuts):
                rng = np.random.default_rng([config.seed, repeat, c, i])
                if random_pairs(pairs, rng) is None:
                    break
                features = _random_features(setting, asked, sites, pairs, rng)
                drawn.append(_read(setting, axis, fitted.probes, features))
                step()
            if drawn:
                values[c, i, 2] = np.mean(drawn, axis=0)
    coords = {
        "kind": list(CUTS),
        "layer": list(layers),
        "condition": [INTACT, CUT, RANDOM],
        "quantity": list(QUANTITIES),
    }
    dims = ("kind", "layer", "condition", "image", "quantity")
    return {"rows": rows, "shares": xr.DataArray(values, dims=dims, coords=coords)}


def _cut_features(
    setting: Setting, asked: Sequence[Question], masks: Mapping[str, np.ndarray]
) -> Tensor:
    return torch.cat([projected(setting, b, cutting(masks)) for b in setting.batches(asked)])


def _random_features(
    setting: Setting,
    asked: Sequence[Question],
    sites: Sequence[str],
    pairs: np.ndarray,
    rng: np.random.Generator,
) -> Tensor:
    parts = []
    for batch in setting.batches(asked):
        masks = {site: np.stack([random_pairs(pairs, rng) for _ in batch]) for site in sites}
        parts.append(projected(setting, batch, cutting(masks)))
    return torch.cat(parts)


def _read(
    setting: Setting, axis: str, probes: Sequence[LinearProbe], features: Tensor
) -> Float[np.ndarray, "image 2"]:
    """Returns each picture's shares of `QUANTITIES`, averaged over probes."""
    layout = setting.geometry
    strip, background = strips(layout, axis)
    place = np.full(layout.shape, -1)
    for i, region in enumerate(probe_regions(layout, axis)):
        place[region.mask] = i
    grids = features.unflatten(1, layout.shape)
    read = np.stack([p.probability_map(grids).argmax(-1).cpu().numpy() for p in probes])
    given = (read == strip)[..., background].mean(-1), (read == place)[..., place >= 0].mean(-1)
    return np.stack(given, axis=-1).mean(0)


# --- rows and verdict -----------------------------------------------------------------------


def _rows(shares: xr.DataArray, layers: Sequence[int], seed: int) -> list[dict]:
    """Returns the shares of each condition, and the claims: cut - intact and cut - random cut."""
    rows = []
    intact = shares.isel(kind=0, layer=0).sel(condition=INTACT).values  # [image, quantity]
    for q, quantity in enumerate(QUANTITIES):
        about = {"quantity": quantity, "condition": INTACT}
        rows += interval_rows(mean_of_shares(intact[:, q], seed=seed), {}, **about)
    units = range(len(intact))
    bounds = {"null": CHANCE, "low": 0.0, "high": 1.0, "condition": f"{INTACT}, claim"}
    rows += claim_rows(intact, {"quantity": list(QUANTITIES)}, units, seed, **bounds)
    for kind in CUTS:
        for layer in layers:
            for condition in (CUT, RANDOM):
                own = shares.sel(kind=kind, layer=layer, condition=condition).values
                for q, quantity in enumerate(QUANTITIES):
                    if np.isfinite(own).all():
                        about = {"kind": kind, "quantity": quantity, "condition": condition}
                        interval = mean_of_shares(own[:, q], seed=seed)
                        rows += interval_rows(interval, {}, layer=_named(layer), **about)
    single = [layer for layer in layers if layer != ALL]
    for chosen in ([ALL], single):  # p-values are adjusted over all layers, or for all together
        if chosen:
            rows += _claims(shares.sel(layer=chosen), units, seed)
    return rows


def _claims(shares: xr.DataArray, units: Sequence[int], seed: int) -> list[dict]:
    rows = []
    cut = shares.sel(condition=CUT)
    for other in (INTACT, RANDOM):
        difference = cut - shares.sel(condition=other)
        there = difference.notnull().all(("layer", "image", "quantity")).values
        difference = difference[there].transpose("image", "kind", "layer", "quantity")
        axes = {
            "kind": difference["kind"].values.tolist(),
            "layer": [_named(layer) for layer in difference["layer"].values.tolist()],
            "quantity": list(QUANTITIES),
        }
        values = difference.values
        rows += claim_rows(values, axes, units, seed, condition=f"{CUT} - {other}")
    return rows


def _named(layer: int) -> int | None:
    """Returns a layer for the table: none where all layers are cut."""
    return None if layer == ALL else layer


def _verdict(table: pd.DataFrame, by: str) -> str:
    parts = []
    for axis in dict.fromkeys(table["axis"]):
        for quantity in QUANTITIES:
            own = select(table, axis=axis, quantity=quantity)
            unread = _unread(own)
            if unread:
                parts.append(f"{axis}: undecided what writes {CODES[quantity]}: {unread}")
                continue
            parts += [f"{axis}: {_of_cut(own, cut, quantity, by)}" for cut in CUTS]
    return "\n".join(map(sentence, parts))


def _unread(own: pd.DataFrame) -> str:
    """Returns why nothing can be cut off, or ''."""
    intact = judge(select(own, condition=f"{INTACT}, claim").iloc[0])
    return "" if intact.above else f"the probe does not read it without cuts ({intact.reason})"


def _of_cut(own: pd.DataFrame, cut: str, quantity: str, by: str) -> str:
    """Returns in words what a cut does to one share."""
    code, here = CODES[quantity], select(own, kind=cut)
    whole, single = here[here["layer"].isna()], here.dropna(subset="layer")
    found = writes(whole)
    start = {
        "not found": f"{CUTS[cut]} does not write {code}",
        "undecided": f"undecided whether {CUTS[cut]} writes {code}",
    }.get(found.outcome, f"{CUTS[cut]} writes {code}")
    if found.above:
        start = f"without {CUTS[cut]} {code} is clearer"
    shares = [f"uncut {format_interval(select(own, condition=INTACT).iloc[0])}"]
    for condition in (CUT, RANDOM):
        rows = select(whole, condition=condition)
        shares += [f"{condition} {format_interval(row)}" for _, row in rows.iterrows()]
    text = f"{start} (difference {found.reason}; share {', '.join(shares)})"
    layers = [str(int(layer)) for layer, claims in single.groupby("layer") if writes(claims).below]
    if single.empty or not found.below:
        return text
    if by == "layer":
        return f"{text}; found in the single layers {format_names(layers) or 'none'}"
    return f"{text}; found for all layers up to {format_names(layers) or 'none'}"


def writes(claims: pd.DataFrame) -> Judgement:
    """Returns whether a cut lowers a share, and lowers it below that of random cuts."""
    row = select(claims, condition=f"{CUT} - {INTACT}").iloc[0]
    fall = judge(row)
    if not fall.below:
        return fall
    against = select(claims, condition=f"{CUT} - {RANDOM}")
    if against.empty:
        return judge(row, unless=f"{fall.reason}, and no random cut leaves so few keys apart")
    more = judge(against.iloc[0])
    if more.below:
        return fall
    if more.outcome == "not found" or more.above:
        return Judgement("not found", 0, f"{fall.reason}, but random cuts lower it as much")
    return judge(row, unless=f"{fall.reason}, and less random cuts {more.reason}")

"""What Q8's numbers allow to be said: which cut lowers a share, and more than random cuts do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hooked_vlm.experiments.further.encoder_cuts import CUTS
from hooked_vlm.experiments.tables import format_interval, format_names, select
from hooked_vlm.experiments.verdicts import (
    Judgement,
    adjusted,
    agreement,
    claims_over_probes,
    judge,
    sentence,
)


BACKGROUND, OBJECTS = "background", "objects"
QUANTITIES = (BACKGROUND, OBJECTS)
"""Shares of background tokens read as their strip, and of object tokens read as their place."""
CODES = {BACKGROUND: "the background's code", OBJECTS: "the objects' code"}
INTACT, CUT, RANDOM = "intact", "cut", "random cut"
ALL = -1
"""The number of layers' cut in the code: all of them."""


def claims(shares: xr.DataArray, quantities: Sequence[str], seed: int) -> list[dict]:
    """Returns the claims about what cuts do, by the mean over probes and by each probe."""
    rows = []
    cut = shares.sel(condition=CUT)
    for other in (INTACT, RANDOM):
        difference = cut - shares.sel(condition=other)
        there = difference.notnull().all(("layer", "probe", "image", "quantity")).values
        if not there.any():
            continue
        difference = difference.isel(kind=np.flatnonzero(there))
        difference = difference.transpose("probe", "image", "kind", "layer", "quantity")
        axes = {
            "kind": difference["kind"].values.tolist(),
            "layer": [named(layer) for layer in difference["layer"].values.tolist()],
            "quantity": list(quantities),
        }
        about: dict[str, Any] = {"condition": f"{CUT} - {other}"}
        found = claims_over_probes(difference.values, axes, seed, **about)
        several = difference.sizes["probe"] > 1
        rows += [row for row in found if several or "probe" not in row]
    return rows


def over_sentences(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with p-values adjusted over axes, cuts and quantities.

    A cut in single layers is only spoken of where the cut in all of them does something: there
    each cut and quantity is a family by itself.
    """
    whole = table["layer"].isna()
    table = adjusted(table, whole, ["condition", "probe"])
    return adjusted(table, ~whole, ["axis", "condition", "kind", "quantity"])


def named(layer: int) -> int | None:
    """Returns a layer for the table: none where all layers are cut."""
    return None if layer == ALL else layer


def verdict(table: pd.DataFrame, by: str) -> str:
    parts = []
    for axis in dict.fromkeys(table["axis"]):
        for quantity in QUANTITIES:
            own = select(table, axis=axis, quantity=quantity)
            unread = _unread(own[own["probe"].isna()])
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
    code, every = CODES[quantity], select(own, kind=cut)
    here = every[every["probe"].isna()]
    whole, single = here[here["layer"].isna()], here.dropna(subset="layer")
    found = writes(whole)
    probes = every.dropna(subset="probe").groupby("probe")
    same = agreement(found.finding, [writes(claims).finding for _, claims in probes])
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
    text = f"{start} (difference {found.reason}; share {', '.join(shares)}"
    text += f"; {same})" if same else ")"
    by_layer: Any = single.groupby("layer")
    layers = [str(int(layer)) for layer, claims in by_layer if writes(claims).below]
    if single.empty or not found.below:
        return text
    if not layers:
        return f"{text}; not found for {'any layer alone' if by == 'layer' else 'fewer layers'}"
    if by == "up to":
        return f"{text}; found up to layer {format_names(layers)}"
    return f"{text}; found for layer {format_names(layers)} alone"


def writes(claims: pd.DataFrame) -> Judgement:
    """Returns whether a cut lowers a share, and lowers it below that of random cuts."""
    row = select(claims, condition=f"{CUT} - {INTACT}").iloc[0]
    fall = judge(row)
    if not fall.below:
        return fall
    against = select(claims, condition=f"{CUT} - {RANDOM}")
    if against.empty:
        return judge(row, unless=f"{fall.reason}, and so many keys have no random cut")
    more = judge(against.iloc[0])
    if more.below:
        return fall
    if more.outcome == "not found" or more.above:
        return Judgement("not found", 0, f"{fall.reason}, but random cuts lower it as much")
    return judge(row, unless=f"{fall.reason}, and against random cuts {more.reason}")

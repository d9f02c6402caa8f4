"""Compares one experiment on two kinds of picture, on the items that both have."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from hooked_vlm.experiments.dual_mechanisms import ordering_probes, strip_swap
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.tables import format_interval, select
from hooked_vlm.experiments.verdicts import adjusted, claim_rows, judge


DIFFERENCE = "paired difference"
"""The quantity of comparing rows: the other kind of picture minus the first kind.

E4's "difference" is another quantity: strips minus objects on one kind of picture."""


def rows_between(first: Mapping[str, Result], other: Mapping[str, Result], seed: int) -> list[dict]:
    """Returns the rows that compare two kinds of picture, from results by experiment name."""
    rows = []
    for module, rows_of in ((ordering_probes, probe_rows), (strip_swap, swap_rows)):
        name = module.ABOUT.name
        if name in first and name in other:
            rows += rows_of(first[name], other[name], seed)
    return rows


def over_sentences(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with p-values of comparing rows adjusted over all sentences.

    They are over axes or over kinds of picture; probes are one family, and swaps another.
    """
    if "quantity" not in table:
        return table
    return adjusted(table, table["quantity"] == DIFFERENCE, ["part"])


def probe_rows(first: Result, other: Result, seed: int) -> list[dict]:
    """Returns, by axis, the difference of the background's share on the same held-out pictures."""
    a, b = (found.arrays["background_shares"] for found in (first, other))
    rows = []
    for axis in [str(axis) for axis in a["axis"].values if axis in b["axis"].values]:
        here, there = (shares.sel(axis=axis).dropna("image") for shares in (a, b))
        here, there = xr.align(here, there, join="inner")  # pictures by their number
        if here.size:
            about: Any = {
                "axis": axis,
                "quantity": DIFFERENCE,
                "part": ordering_probes.ABOUT.name,
            }
            difference = there.values - here.values
            rows += claim_rows(difference, {}, range(len(difference)), seed, **about)
    return rows


def swap_rows(first: Result, other: Result, seed: int) -> list[dict]:
    """Returns, by kind and slot, the difference of swaps on the pairs that both kept.

    All directions are combined, and pairs of the same two pictures are one observation.  P-values
    are Holm-adjusted over all kinds and slots, since the verdict names the largest difference.
    There are no rows when fewer than two pairs are common.
    """
    a, b = (_pairs(found.arrays) for found in (first, other))
    if a is None or b is None:
        return []
    common = [str(name) for name in a["pair"].values if name in set(b["pair"].values)]
    if len(common) < 2:
        return []
    kinds = [str(k) for k in a["kind"].values if k in b["kind"].values]
    here, there = (
        found.sel(pair=common, kind=kinds, quantity="swapped").transpose("pair", "kind", "slot")
        for found in (a, b)
    )
    axes = {"kind": kinds, "slot": [int(slot) for slot in a["slot"]]}
    about: Any = {"direction": "all", "quantity": DIFFERENCE, "part": strip_swap.ABOUT.name}
    units = strip_swap.pictures_of(here)
    return claim_rows(there.values - here.values, axes, units, seed, **about)


def said_swaps(table: pd.DataFrame) -> str:
    """Returns in words, by kind, the clear differences of swaps on the other kind of picture."""
    words = []
    rows = select(table, part=strip_swap.ABOUT.name, quantity=DIFFERENCE)
    for kind in dict.fromkeys(rows["kind"]):
        here = select(rows, kind=kind)
        clear = here[[judge(row).outcome == "found" for _, row in here.iterrows()]]
        if clear.empty:
            words.append(f"{kind}: no clear difference at any slot")
            continue
        most = clear.iloc[int(clear["value"].abs().to_numpy().argmax())]
        words.append(f"{kind}: up to {format_interval(most)} (slot {int(most['slot'])})")
    if not words:
        return "too few common pairs to compare swaps"
    return f"{'; '.join(words)} ({int(rows['n'].iloc[0])} common pairs)"


def _pairs(arrays: Mapping[str, xr.DataArray]) -> xr.DataArray | None:
    parts = [values for name, values in arrays.items() if name.startswith("pairs_")]
    if not parts:
        return None
    joined = xr.concat(parts, dim="pair")
    _, kept = np.unique(joined["pair"].values, return_index=True)
    return joined.isel(pair=np.sort(kept))

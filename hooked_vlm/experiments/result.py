"""The result of an experiment: numbers, arrays, pictures and a verdict.

Experiments compute and do not draw; the report draws and does not compute.  A `Result` is the
only interface between them.  Every number exists once, as one row of a tidy table with its
interval and its count, so a figure, a sentence of the verdict and a line of the CSV always
agree.
"""

import re
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd
import xarray as xr
from PIL import Image

from hooked_vlm.arguments.displayed import html_block
from hooked_vlm.errors import DataError, counted


@dataclass(frozen=True, kw_only=True)
class About:
    """What an experiment is about, in words: its module's `ABOUT`, and the head of its results."""

    id: str
    """Its id in the list of claims: `"E4"`."""
    name: str
    """Its name on the command line: `"strip-swap"`."""
    title: str
    claim: str
    """What the paper reports for its models, in one or two sentences."""
    section: str
    """The paper's section, table or figure."""


SHOWN_CASES = 8
"""At most so many failed cases have a picture in a result."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cases:
    """The single questions or pairs that a result is about, and which of them failed."""

    failed: str
    """What those have in common that failed: `"questions answered wrongly"`."""
    table: pd.DataFrame
    """One row per case: its name in the column case, whether it did not fail in the column ok,
    and what was found."""

    def __post_init__(self) -> None:
        if not {"case", "ok"} <= set(self.table):
            raise DataError(
                f"The table of cases has the columns {list(self.table)}; expected case and ok "
                "among them."
            )

    @property
    def failing(self) -> pd.DataFrame:
        """The rows of the cases that failed."""
        return self.table[~self.table["ok"].astype(bool)]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Result(About):
    """One experiment on one model."""

    table: pd.DataFrame
    """One row per number; columns among direction, axis, kind, slot, site, quantity, value,
    low, high, n.  `low` and `high` bound a 95 % interval."""
    arrays: dict[str, xr.DataArray] = field(default_factory=dict)
    """Labelled arrays too large for a table, such as probe maps by item, row and column."""
    images: dict[str, Image.Image] = field(default_factory=dict)
    """Stimuli, with regions drawn over them where they are relevant."""
    cases: Cases | None = None
    """Its questions or pairs one by one; `images` has pictures of some that failed, by name."""
    setting: str = ""
    """The setting of its stimuli: `"shapes"`; empty where there is no choice."""
    verdict: str
    """The finding on this model in sentences, computed from `table`, with intervals."""
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """How the numbers were computed, and what to know before using them."""

    def __repr__(self) -> str:
        numbers, arrays = counted(len(self.table), "number"), counted(len(self.arrays), "array")
        return f"Result({self.key!r}, {numbers}, {arrays})"

    def _repr_html_(self) -> str:
        verdict = "".join(f"<p>{escape(line)}</p>" for line in self.verdict.splitlines())
        numbers = self.table.to_html(
            index=False, max_rows=20, na_rep="", float_format="{:.3g}".format
        )
        return html_block(f"{self.id}: {self.title}", verdict, numbers)

    @property
    def key(self) -> str:
        """A unique name within a run: `"strip-swap-shapes"`."""
        return f"{self.name}-{self.setting}" if self.setting else self.name

    @property
    def anchor(self) -> str:
        """Its anchor on a page: `"E4-shapes"`."""
        return f"{self.id}-{self.setting}" if self.setting else self.id

    @property
    def headline(self) -> str:
        """The first sentence of its verdict; of a verdict about two axes, that of each."""
        lines = self.verdict.splitlines() or [""]
        axes = [line for line in lines if line.startswith(("Horizontal:", "Vertical:"))]
        first = [re.split(r"(?<=\.) (?=[A-Z])", line, maxsplit=1)[0] for line in lines]
        return " ".join(first if len(lines) == len(axes) == 2 else first[:1])

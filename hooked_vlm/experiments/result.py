"""What an experiment hands over: numbers, arrays and pictures, and what they say.

An experiment computes and does not draw; the report draws and does not compute.  A
`Result` is all that passes between them.  Every number stands once, as one row of a
tidy table with its interval and its count, so that a figure, a sentence of the verdict
and a line of the CSV can never disagree.
"""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import xarray as xr
from PIL import Image


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """One experiment on one model."""

    id: str
    """Where it stands in the paper's list of claims: `"E4"`."""
    name: str
    """What the command line calls it: `"strip-swap"`."""
    title: str
    claim: str
    """What the paper reports for its models, in one or two sentences."""
    section: str
    """The paper's section, table or figure."""
    table: pd.DataFrame
    """One row per number; columns among direction, axis, kind, slot, site, quantity, value,
    low, high, n.  `low` and `high` bound a 95 % interval."""
    arrays: dict[str, xr.DataArray] = field(default_factory=dict)
    """Labelled arrays too large for a table, such as probe maps by item, row and column."""
    images: dict[str, Image.Image] = field(default_factory=dict)
    """Stimuli, with the regions drawn over them where they matter."""
    setting: str = ""
    """The stimuli it ran on: `"shapes"`; empty where there is no choice."""
    verdict: str
    """What was found on this model, computed from `table`, with intervals."""
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """How it was computed, and what a reader should know before using the numbers."""

    @property
    def key(self) -> str:
        """A name that no other result of a run has: `"strip-swap-shapes"`."""
        return f"{self.name}-{self.setting}" if self.setting else self.name

    @property
    def anchor(self) -> str:
        """Where it stands on a page: `"E4-shapes"`."""
        return f"{self.id}-{self.setting}" if self.setting else self.id

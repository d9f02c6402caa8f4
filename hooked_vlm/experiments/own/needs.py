"""What an experiment needs of a user's own data: declared as data, checked before a model loads."""

from collections.abc import Callable
from dataclasses import dataclass

from hooked_vlm.errors import CannotRunError, counted
from hooked_vlm.stimuli.own import OwnData


@dataclass(frozen=True)
class Need:
    """One of some columns, in every row: the first that any row has."""

    columns: tuple[str, ...]

    def missing(self, data: OwnData) -> str:
        """Returns what is missing in words; an empty text where nothing is.

        >>> from PIL import Image
        >>> row = {"image": Image.new("RGB", (8, 8)), "question": "Its color is ", "answer": "red"}
        >>> data = OwnData.read([row])
        >>> Need(("counterfactual",)).missing(data)
        '`counterfactual` in every row; 1 of 1 row has none'
        """
        # The first column that any row has is the one that is read, so all rows need it.
        counts = [data.has(column) for column in self.columns]
        read = next((i for i, n in enumerate(counts) if n), len(counts) - 1)
        without = len(data) - counts[read]
        if not without:
            return ""
        names = " or ".join(f"`{column}`" for column in self.columns[: read + 1])
        verb = "has" if without == 1 else "have"
        return f"{names} in every row; {without} of {counted(len(data), 'row')} {verb} none"


@dataclass(frozen=True)
class Needs:
    """All that an experiment needs of own data."""

    each: tuple[Need, ...] = ()
    beyond: str = ""
    """What it needs and no table has, in words; empty: nothing."""
    further: Callable[[OwnData], object] | None = None
    """Raises `CannotRunError` for data that lack something else, without a model."""

    def check_possible(self, id_: str) -> None:
        """Raises `CannotRunError` for an experiment that no table has the data for."""
        if self.beyond:
            raise CannotRunError(
                f"{id_} needs {self.beyond}, for which own data have no column. Use one of the "
                "built-in settings."
            )

    def check(self, id_: str, data: OwnData) -> None:
        """Raises `CannotRunError`, in one line, for data that lack what the experiment needs."""
        self.check_possible(id_)
        missing = ", and ".join(filter(None, (need.missing(data) for need in self.each)))
        if missing:
            raise CannotRunError(
                f"{id_} needs {missing}. Complete the table (docs/guide/own-data.md)."
            )
        if self.further is not None:
            self.further(data)


PAIRS = (Need(("counterfactual",)), Need(("counterfactual_answer",)))
BOXES = (Need(("boxes",)),)
LABELS = (Need(("label", "boxes")),)
SINGLE = Needs(
    beyond="single-object pictures: each picture of three objects again with one of them alone"
)
LISTED = Needs(beyond="the list of a published data set (docs/reference/data.md)")
DRAWN = Needs(beyond="pictures that it draws itself, of objects at given places")

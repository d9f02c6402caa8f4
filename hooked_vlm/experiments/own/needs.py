"""What an experiment needs of a user's own data: declared as data, checked before a model loads."""

from dataclasses import dataclass

from hooked_vlm.errors import CannotRunError, counted
from hooked_vlm.stimuli.own import OwnData


@dataclass(frozen=True)
class Need:
    """One of some columns, in every row."""

    columns: tuple[str, ...]

    def missing(self, data: OwnData) -> str:
        """Returns what is missing in words; an empty text where nothing is.

        >>> data = OwnData.read([{"image": "x.png", "question": "Q", "answer": "a"}] * 0 or [
        ...     {"image": __import__("PIL.Image").Image.new("RGB", (8, 8)), "question": "Q ",
        ...      "answer": "red"}])
        >>> Need(("counterfactual",)).missing(data)
        '`counterfactual` in every row; 1 of 1 row has none'
        """
        # A row of any of the columns is enough, but all rows need the same one.
        best = max(data.has(column) for column in self.columns)
        without = len(data) - best
        if not without:
            return ""
        names = " or ".join(f"`{column}`" for column in self.columns)
        verb = "has" if without == 1 else "have"
        return f"{names} in every row; {without} of {counted(len(data), 'row')} {verb} none"


@dataclass(frozen=True)
class Needs:
    """All that an experiment needs of own data."""

    each: tuple[Need, ...] = ()
    beyond: str = ""
    """What it needs and no table has, in words; empty: nothing."""

    def missing(self, data: OwnData) -> str:
        """Returns what is missing in words, on one line."""
        if self.beyond:
            return f"{self.beyond}, for which own data have no column"
        return ", and ".join(filter(None, (need.missing(data) for need in self.each)))

    def check(self, id_: str, data: OwnData) -> None:
        """Raises `CannotRunError`, in one line, for data that lack what the experiment needs."""
        missing = self.missing(data)
        if missing:
            remedy = (
                "Use one of the built-in settings"
                if self.beyond
                else "Complete the table (docs/guide/own-data.md)"
            )
            raise CannotRunError(f"{id_} needs {missing}. {remedy}.")


PAIRS = (Need(("counterfactual",)), Need(("counterfactual_answer",)))
BOXES = (Need(("boxes",)),)
LABELS = (Need(("label", "boxes")),)
SINGLE = Needs(
    beyond="single-object pictures: each picture of three objects again with one of them alone"
)
DRAWN = Needs(beyond="pictures that it draws itself, of objects at given places")

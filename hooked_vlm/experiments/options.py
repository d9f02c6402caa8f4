"""The options of experiments, and the type of their progress callback."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hooked_vlm.errors import DataError, did_you_mean


OnProgress = Callable[[int, int], None]
"""Called with `(done, total)` in units of the experiment; the first call may be (0, n)."""

C = TypeVar("C", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of every experiment; an experiment may add its own fields."""

    pairs: int = 50
    """Clean/counterfactual pairs per direction (protocol 2.5)."""
    seed: int = 0
    batch_size: int = 16
    setting: str = "squares"
    """The stimuli: `squares`, `shapes`, `objects`, each also with `-photos`."""
    cutouts: Path | None = None
    """A folder of `<name>.png` to use instead of the shipped cut-outs."""
    backgrounds: Path | None = None
    """A folder of photographs to use instead of the shipped ones."""
    data: Path | None = None
    """The folder of What'sUp or COCO-spatial, for the settings that need it."""
    other_words: bool = False
    """Whether to ask in a second phrasing instead of the paper's."""


def specialise(kind: type[C], base: Config, options: Mapping[str, str], setting: str) -> C:
    """Returns an experiment's own configuration: common fields, options from text, a setting.

    Options without a field in the experiment are ignored.  Items of tuples are separated by
    commas.  Raises `DataError` for a value that is not of its field's type.
    """
    known = {field.name for field in fields(kind)}
    types = get_type_hints(kind)
    own = {name: parse(name, text, types[name]) for name, text in options.items() if name in known}
    common = {name: value for name, value in asdict(base).items() if name in known}
    return kind(**{**common, "setting": setting, **own})


def check_options(kinds: list[type[Config]], options: Mapping[str, str]) -> None:
    """Raises `DataError` for an option that none of some experiments has."""
    known = sorted({field.name for kind in kinds for field in fields(kind)})
    for name in options:
        if name not in known:
            raise DataError(
                f"There is no option {name!r} here.{did_you_mean(name, known)} Use one of: "
                f"{', '.join(known)}."
            )


def parse(name: str, text: str, kind: Any) -> Any:
    """Returns an option's value from its text, or raises `DataError`.

    >>> parse("alphas", "0,1.5", tuple[float, ...])
    (0.0, 1.5)
    """
    try:
        if get_origin(kind) is tuple:
            inner = get_args(kind)[0]
            return tuple(parse(name, part.strip(), inner) for part in text.split(",") if part)
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
                text.lower()
            ]
        if kind in (int, float, str):
            return kind(text)
        return None if text in ("", "none") else Path(text)
    except (ValueError, KeyError):
        shown = getattr(kind, "__name__", str(kind))
        raise DataError(
            f"Option {name}={text!r} is not of the type {shown}. Give a value of that type."
        ) from None

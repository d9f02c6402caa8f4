"""The options of experiments, and the type of their progress callback."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from hooked_vlm.arguments.checked import shown
from hooked_vlm.arguments.kinds import is_filled
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.extension import FOLDERS as FOLDERS
from hooked_vlm.stimuli.settings import (
    OWN,
    SCATTERED,
    files_of,
    own_data,
    require_known,
    stimulus_set,
)


OnProgress = Callable[[int, int], None]
"""Called with `(done, total)` in units of the experiment; the first call may be (0, n)."""

C = TypeVar("C", bound="Config")


MAX_SEED = 2**31 - 1
"""The highest seed that numpy, torch and scikit-learn all accept, with a few seeds above it."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of every experiment; an experiment may add its own fields.

    Raises `DataError` for a value outside its range, such as less than two pairs.
    """

    settings_allowed: ClassVar[tuple[str, ...]] = ()
    """The settings that the experiment runs on; empty: all of them."""
    ranges: ClassVar[Mapping[str, tuple[int, int]]] = {}
    """The lowest and the highest value of the experiment's own numbers."""
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The values of the experiment's own texts."""
    reads_cells: ClassVar[bool] = True
    """Whether cells of objects or strips are read or changed, which scattered objects lack."""
    in_float32: ClassVar[bool] = False
    """Whether the paper computes the experiment in float32 (Table 5)."""

    pairs: int = 50
    """Clean/counterfactual pairs per direction (protocol 2.5)."""
    seed: int = 0
    batch_size: int = 16
    setting: str = "squares"
    """The stimuli: `squares`, `shapes`, `objects`, each also with `-photos` or `-scattered`."""
    cutouts: Path | None = None
    """A folder of `<name>.png` to use instead of the shipped cut-outs."""
    backgrounds: Path | None = None
    """A folder of photographs to use instead of the shipped ones."""
    data: Path | None = None
    """The folder of What'sUp or COCO-spatial, for the settings that need it; of own data."""
    other_words: bool = False
    """Whether to ask in a second phrasing instead of the paper's."""
    leave_out_long_answers: bool = False
    """Of own data, whether to leave out items with answers of several tokens; else an error."""

    def __post_init__(self) -> None:
        ranges = {
            "pairs": (2, 10**6),  # an interval needs two
            "seed": (0, MAX_SEED),
            "batch_size": (1, 10**6),
            **self.ranges,
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, bool) or not isinstance(each, int) or not low <= each <= high:
                    raise DataError(
                        f"{_flag(name)} must be a whole number from {low} to {high} (got {each!r})."
                    )
        if getattr(self, "items", 0) == 1:
            raise DataError(
                "Option items must be 0 (all questions) or at least 2 (got 1): an interval over "
                "items needs two."
            )
        for field in fields(self):
            _require_finite(field.name, getattr(self, field.name))
        for name in FOLDERS:
            folder = getattr(self, name)
            if not (folder is None or isinstance(folder, Path)):
                raise DataError(
                    f"{_flag(name)} must be a pathlib.Path or None (got {shown(folder)})."
                )
        for name, known in self.choices.items():
            value = getattr(self, name)
            if value not in known:
                raise DataError(
                    f"Option {name} must be one of: {', '.join(known)} (got {value!r})."
                    f"{did_you_mean(str(value), known)}"
                )

    @classmethod
    def takes(cls, setting: str) -> bool:
        """Returns whether the experiment runs on a setting of this package."""
        if setting in SCATTERED and cls.reads_cells:
            return False
        return not cls.settings_allowed or setting in cls.settings_allowed

    @property
    def used_settings(self) -> tuple[str, ...]:
        """The settings whose stimuli the experiment shows; empty: it has stimuli of its own."""
        return (self.setting,)

    def files(self) -> dict[str, Path]:
        """Returns the user's files that the experiment reads, by a name that is free of folders.

        Raises `DataError` for an unusable folder.
        """
        found = {}
        for setting in self.used_settings:
            found |= files_of(
                setting, cutouts=self.cutouts, backgrounds=self.backgrounds, data=self.data
            )
        return found

    @classmethod
    def require_taken(cls, setting: str) -> None:
        """Raises `DataError` unless the experiment runs on a setting."""
        require_known(setting, cls.settings_allowed)
        if not cls.takes(setting):
            raise DataError(
                f"Setting {setting!r} was given; the experiment reads cells of objects or strips, "
                f"which scattered objects lack. Use {setting.removesuffix('-scattered')!r}."
            )

    def check(self) -> None:
        """Raises `DataError` for a setting or a folder that the experiment cannot use."""
        self.require_taken(self.setting)
        if self.setting == OWN:
            own_data(self.data)
            return
        for setting in self.used_settings:
            stimulus_set(
                setting, cutouts=self.cutouts, backgrounds=self.backgrounds, data=self.data
            )


def _flag(name: str) -> str:
    """Returns a field's name on the command line."""
    return f"--{name.replace('_', '-')}" if name in COMMON else f"Option {name}"


OF_OWN_DATA = ("leave_out_long_answers",)
"""The fields that only matter for own data: options, and no arguments of the command line."""
COMMON = tuple(field.name for field in fields(Config) if field.name not in OF_OWN_DATA)
"""The fields of every experiment: each is an argument of the command line."""


def _require_finite(name: str, value: Any) -> None:
    """Raises `DataError` for an empty tuple, and for a number that is not finite."""
    if isinstance(value, tuple) and not value:
        raise DataError(f"Option {name} is empty. Give at least one value.")
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, float) and not math.isfinite(each):
            raise DataError(f"Option {name} must be finite (got {each}).")


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


COUNTS = ("pairs", "items", "images", "tuples")
"""The fields that say how much is computed of each direction, axis or size."""


def limited(config: C, limit: int | None) -> C:
    """Returns a configuration with counts (`COUNTS`) of at most `limit`; None: as it is.

    Where an experiment needs more (probes need 8 pictures), it has as many as it needs.

    Raises `DataError` for a limit below 2.

    >>> limited(Config(pairs=50), 4).pairs, limited(Config(pairs=3), 4).pairs
    (4, 3)
    """
    if limit is None:
        return config
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 2:
        raise DataError(
            f"--limit must be a whole number of at least 2 (got {limit!r}): an interval needs two."
        )
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    for name in COUNTS:
        if name in found:
            least, _ = config.ranges.get(name, (2, 0))
            count = max(limit, least)
            found[name] = min(found[name] or count, count)  # items: 0 is all of them
    return type(config)(**found)


def common_at(config: Config, setting: str) -> Config:
    """Returns the options alone that all experiments have, at another setting."""
    return Config(**{**{name: getattr(config, name) for name in COMMON}, "setting": setting})


def check_options(kinds: list[type[Config]], options: Mapping[str, str]) -> None:
    """Raises `DataError` for an option that none of some experiments has.

    The fields that all experiments have are arguments of the command line and no options, so
    that a record never has two values of one field.
    """
    known = sorted({field.name for kind in kinds for field in fields(kind)} - {*COMMON})
    for name in options:
        if name in COMMON:
            raise DataError(
                f"--set {name}={options[name]} was given; {name} is no option of an experiment. "
                f"Use {_flag(name)}."
            )
        if name not in known:
            own = [one for one in known if one not in OF_OWN_DATA]
            raise DataError(
                f"There is no option {name!r} here.{did_you_mean(name, known)} "
                + (f"Use one of: {', '.join(own)}." if own else "The experiment has none.")
            )


def parse(name: str, text: str, kind: Any) -> Any:
    """Returns an option's value from its text, or raises `DataError`.

    >>> parse("alphas", "0,1.5", tuple[float, ...])
    (0.0, 1.5)
    """
    try:
        if get_origin(kind) is tuple:
            inner = get_args(kind)[0]
            parts = [part.strip() for part in text.split(",")]
            return tuple(parse(name, part, inner) for part in parts if part)
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
                text.lower()
            ]
        if kind in (int, float, str):
            return kind(text)
        if get_origin(kind) is Literal:
            if text not in get_args(kind):
                known = get_args(kind)
                raise DataError(
                    f"Option {name} must be one of: {', '.join(known)} (got {text[:80]!r})."
                    f"{did_you_mean(text, known)}"
                )
            return text
        if not is_filled(text):
            raise ValueError(text)
        return None if text == "none" else Path(text)
    except DataError:  # of an item of a tuple, or of a choice
        raise
    except (ValueError, KeyError):
        raise DataError(
            f"Option {name}={text[:80]!r} is no {_KINDS.get(kind, 'value of its type')}. Give "
            f"--set {name}=VALUE with one."
        ) from None


def from_words(given: Sequence[str]) -> dict[str, str]:
    """Returns the options of `--set NAME=VALUE` by name; raises `DataError` for another form."""
    options: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not is_filled(name):
            raise DataError(
                f"--set {text[:80]!r} was given; expected NAME=VALUE, as in --set alphas=0,4,8."
            )
        name = name.strip().replace("-", "_")
        if name in options:
            raise DataError(
                f"--set {name} was given twice, as {options[name][:80]!r} and {value[:80]!r}."
            )
        options[name] = value
    return options


_KINDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "yes or no (true, false, 1, 0)",
    Path | None: "path (or none)",
}

"""Options of experiments, from text."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from hooked_vlm.errors import DataError
from hooked_vlm.experiments.options import Config, check_options, parse, specialise


@dataclass(frozen=True, kw_only=True)
class Own(Config):
    alphas: tuple[float, ...] = (0.0, 1.0)
    items: int = 0
    formula: str = "add"


def test_an_experiment_gets_the_common_fields_and_its_own():
    base = Config(pairs=7)
    own = specialise(
        Own, base, {"alphas": "0, 2.5,4", "formula": "project", "unknown": "1"}, "shapes"
    )
    assert own == Own(pairs=7, setting="shapes", alphas=(0.0, 2.5, 4.0), formula="project")
    assert specialise(Config, base, {"alphas": "3"}, "squares") == base


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("yes", bool, True),
        ("False", bool, False),
        ("a b", str, "a b"),
        ("none", Path | None, None),
        ("here", Path | None, Path("here")),
        ("1,2", tuple[int, ...], (1, 2)),
    ],
)
def test_values_are_read_by_the_type_of_their_field(text, kind, value):
    assert parse("name", text, kind) == value


@pytest.mark.parametrize(("text", "kind"), [("x", int), ("maybe", bool), ("1,x", tuple[int, ...])])
def test_a_value_of_another_type_is_refused(text, kind):
    with pytest.raises(DataError, match="Option name="):
        parse("name", text, kind)


def test_an_option_that_no_experiment_has_is_refused_with_the_nearest():
    check_options([Config, Own], {"alphas": "1"})
    with pytest.raises(DataError, match="'alphas'"):
        check_options([Config, Own], {"alpha": "1"})
    with pytest.raises(DataError, match="no option 'alphas'"):
        check_options([Config], {"alphas": "1"})

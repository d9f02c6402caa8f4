"""What `checked` lets through and what it refuses, by kind of annotation."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.arguments.checked import checked, kind_of, shown
from hooked_vlm.arguments.kinds import Count, Finite, OptionalDevice, Seed, Share, one_of
from hooked_vlm.errors import DataError, HookedVLMWarning, callers_level


NAN, INF = float("nan"), float("inf")
CASES: list[tuple[Any, list[Any], list[Any]]] = [
    (int, [1, -1, np.int64(2)], [True, 1.0, "1", None, np.bool_(1), 2**64, -(10**30)]),
    (float, [1, 1.5, np.float32(1), NAN], [True, "1", 1j, None, Fraction(1, 3), 10**30]),
    (bool, [True, np.bool_(0)], [1, 0.0, None, "yes"]),
    (str, ["", "a", np.str_("a")], [b"a", 1, None, ["a"]]),
    (int | None, [1, None], ["1", 1.5]),
    (Sequence[int], [[], [1], (1, 2), range(3), np.arange(3), torch.arange(2)], ["12", {1: 1}, 3]),
    (Sequence[str], [["a"], (), np.array(["a"])], ["a", ["a", 1], {"a"}, None]),
    (Iterable[str], [["a"], {"a"}, (x for x in "a")], ["a", [1], 3, None]),
    (tuple[int, int], [(1, 2), [1, 2]], [(1,), (1, "2"), "12", None]),
    (tuple[int, ...], [(), (1,), [1]], [1, (1.5,)]),
    (Mapping[str, int], [{}, {"a": 1}], [{"a": "b"}, {1: 1}, [("a", 1)], None]),
    (Callable[[int], int], [len, int, lambda: 0], [3, None, "len"]),
    (Literal["a", "b"], ["a"], ["c", 1]),
    (Path, [Path("a"), "a"], [b"a", 3, None]),
    (Count, [1, np.int32(7)], [0, -1, True, 1.5]),
    (Seed, [0, 2**40], [-1, 2**64, 0.5]),
    (Finite, [0, -1.5], [NAN, INF, "1"]),
    (Share, [0.5], [0, 1, NAN, 95.0]),
    (OptionalDevice, ["cpu", "cuda:1", torch.device("cpu"), None], ["gpu", 0, ""]),
    (Annotated[str, one_of(("left", "right"))], ["left"], ["lfet", 1]),
    (Float[Tensor, "row col"], [torch.ones(2, 3)], [torch.ones(2), torch.eye(2).to_sparse()]),
    (Int[np.ndarray, " row"], [np.arange(3)], [np.ones(3), [1, 2], torch.arange(3)]),
]


@pytest.mark.parametrize(("hint", "right", "wrong"), CASES)
def test_f_i4_what_an_annotation_accepts(hint: Any, right: list[Any], wrong: list[Any]) -> None:
    kind = kind_of(hint)
    assert kind is not None
    for value in right:
        assert kind.accepts(value), value
    for value in wrong:
        assert not kind.accepts(value), value


@pytest.mark.parametrize("hint", [Any, object, Any | None])
def test_what_is_not_compared(hint: Any) -> None:
    assert kind_of(hint) is None


@checked(DataError, missing="Give both.")
def joined(h: Float[Tensor, "row d"], w: Float[Tensor, " d"], alpha: Finite = 1.0) -> Tensor:
    """Adds."""
    return h + alpha * w


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        joined(*args, **kwargs)
    assert len(str(caught.value)) <= 400
    return str(caught.value)


def test_f_i4_messages_say_what_was_given_and_what_was_expected() -> None:
    h, w = torch.ones(2, 3), torch.ones(3)
    assert joined(h, w=w).shape == (2, 3)
    assert joined.__name__ == "joined" and joined.__doc__ == "Adds."
    assert refused(h, w, alpha=NAN) == "joined was given alpha=nan; expected a finite number."
    assert "h=a tensor of int64 of shape (2,); expected a tensor [row d] of floats" in refused(
        torch.zeros(2, dtype=torch.long), w
    )
    assert "expected a tensor [d] of floats whose axes agree with the other" in refused(h, h[0, :2])
    assert refused(h, w, alhpa=3) == "joined takes no argument 'alhpa'. Did you mean 'alpha'?"
    assert refused(h) == "joined needs w, which was not given. Give both."
    assert refused(h, w, 1.0, 2) == "joined takes 3 arguments by place, not 4. Give both."


def test_f_i4_a_class_is_checked_where_it_is_made() -> None:
    @checked(DataError)
    @dataclass(frozen=True)
    class Pair:
        left: int
        right: "str | None" = None

    assert Pair(1) == Pair(left=1, right=None)
    with pytest.raises(DataError, match="Pair was given left='a'; expected a whole number"):
        Pair("a")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"Pair takes no argument 'lfet'.* Did you mean 'left'"):
        Pair(lfet=1)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("value", ["a" * 500, list(range(500)), {"a": "b" * 500}, object(), len])
def test_values_are_shown_in_short(value: Any) -> None:
    assert len(shown(value)) <= 100


def test_a_warning_names_the_line_that_called_the_package() -> None:
    code = compile(
        "import warnings\n"
        "def warn(kind, level):\n"
        "    warnings.warn('x', kind, stacklevel=level())\n",
        "ours.py",
        "exec",
    )
    names: dict[str, Any] = {"__name__": "hooked_vlm.of_a_test"}
    exec(code, names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names["warn"](HookedVLMWarning, callers_level)
    assert caught[0].filename == __file__

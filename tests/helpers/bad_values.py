"""Bad values by kind, drawn by hypothesis, and the kinds that each kind of argument takes."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st


def _unlike(text: str) -> str:
    return f"q{text}"  # no name of ours begins with q and one of these letters


KINDS: dict[str, st.SearchStrategy[Any]] = {
    "none": st.none(),
    "text": st.text("xyz_", min_size=1, max_size=6).map(_unlike),
    "empty": st.just(""),
    "blank": st.sampled_from([" ", "\t "]),
    "int": st.integers(3, 9),
    "zero": st.just(0),
    "negative": st.integers(-(10**6), -100),
    "bool": st.booleans(),
    "half": st.sampled_from([1.5, 2.5]),
    "nan": st.just(float("nan")),
    "infinite": st.sampled_from([float("inf"), float("-inf")]),
    "complex": st.just(1j),
    "bytes": st.just(b"x"),
    "list": st.just([]),
    "ints": st.lists(st.integers(50, 99), min_size=2, max_size=3),
    "texts": st.lists(st.text("xyz", min_size=1).map(_unlike), min_size=2, max_size=3),
    "nones": st.just([None, None]),
    "tuple": st.just(()),
    "set": st.just({1, 2}),
    "dict": st.just({}),
    "mapping": st.just({"a": 1}),
    "object": st.builds(object),
    "function": st.just(lambda *_args, **_kwargs: None),
    "class": st.just(int),
    "no tensor": st.just(torch.zeros(0)),
    "scalar": st.just(torch.tensor(1.0)),
    "integers": st.just(torch.zeros(2, 3, dtype=torch.long)),
    "deep": st.just(torch.zeros(1, 1, 1, 1, 1, 1)),
    "nans": st.just(torch.full((2, 3), float("nan"))),
    "array": st.just(np.array(["a", "b"])),
}
"""All are small: none makes a call run long or take memory."""

NEAR, KEYWORD = "near", "keyword"
"""Kinds that depend on the call: a name with two letters exchanged, and an unknown argument."""


def misspelt(name: str) -> str:
    """Returns a name with two different neighbouring letters exchanged."""
    for i in range(len(name) - 2, -1, -1):
        if name[i] != name[i + 1]:
            return name[:i] + name[i + 1] + name[i] + name[i + 2 :]
    return f"{name}x"


# The kinds that an argument takes.
NOTHING = frozenset[str]()
ANYTHING = frozenset([*KINDS, NEAR])
OPTIONAL = frozenset(["none"])
TEXT = frozenset(["text", "empty", "blank", NEAR])
NAMED = TEXT - {"empty", "blank"}
WHOLE = frozenset(["int", "zero"])
COUNT = frozenset(["int"])
INDEX = frozenset(["int", "zero", "negative"])
NUMBER = frozenset(["int", "zero", "negative", "half"])
POSITIVE = frozenset(["int", "half"])
FLAG = frozenset(["bool"])
FUNCTION = frozenset(["function", "class"])
NO_ITEMS = frozenset(["list", "tuple", "set", "dict", "no tensor"])
NO_KEYS = frozenset(["dict"])

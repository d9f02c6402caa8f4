"""Which calls are compared with the annotated shapes while tests run.

jaxtyping's import hook (`--jaxtyping-packages` in pyproject.toml) makes every function compare its
arguments and its result with its annotations.  Where everything is compared, the tests take twice
as long.  So, unless `--check-shapes=all` is given:

- only the first case of each test function is compared (a case that is run alone is the first);
- a function defined in another one is compared at its first call in each test file: comparing it
  means compiling its checks anew each time that the outer function runs.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jaxtyping
import pytest


_FIRST = pytest.StashKey[bool]()


class ShapeChecks:
    """Turns jaxtyping's comparisons on and off, test by test."""

    def __init__(self) -> None:
        self._compared: set[Any] = set()  # code of the inner functions of this test file
        self._file: Any = None
        self._decorator = jaxtyping.jaxtyped
        # The import hook looks this name up whenever it decorates a function.
        jaxtyping.jaxtyped = self._decorate_once  # pyright: ignore[reportAttributeAccessIssue]

    def mark_first_cases(self, items: Iterable[pytest.Item]) -> None:
        """Notes which collected tests are the first case of their function."""
        seen = set()
        for item in items:
            function = item.nodeid.partition("[")[0]
            item.stash[_FIRST] = function not in seen
            seen.add(function)

    def begin(self, item: pytest.Item) -> None:
        """Turns comparisons on for a first case, and off for others."""
        jaxtyping.config.update("jaxtyping_disable", not item.stash[_FIRST])
        if item.path != self._file:
            self._file = item.path
            self._compared.clear()

    def _decorate_once(self, *args: Any, **kwargs: Any) -> Any:
        decorated = self._decorator(*args, **kwargs)
        if args:  # used by hand, or as a context
            return decorated

        @functools.wraps(self._decorator)
        def decorate(function: Callable[..., Any]) -> Any:
            code = getattr(function, "__code__", None)
            if code is None or "<locals>" not in function.__qualname__:
                return decorated(function)
            if code in self._compared or jaxtyping.config.jaxtyping_disable:
                return function
            self._compared.add(code)
            return decorated(function)

        return decorate

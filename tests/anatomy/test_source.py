"""The order of calls, read from source: evaluation order, decorators, and what has no source."""

import functools
import importlib.util
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vlm.anatomy.source import (
    called_children,
    forward_parameters,
    forward_source,
    self_calls,
)


def wrapped(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Declared in another order than called, so that declaration cannot pass for evaluation.
        self.down = nn.Linear(4, 2)
        self.unused = nn.Linear(2, 2)
        self.up = nn.Linear(2, 4)
        self.act = nn.ReLU()
        self.gate = nn.Linear(2, 4)

    @wrapped
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x)) * scale


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(2, 2)
        self.early = nn.Linear(2, 2)
        self.inner: Any = nn.ModuleDict({"deep": nn.Linear(2, 2)})

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        if flip:
            x = self.early(x)
        for _ in range(2):
            x = self.late(input=self.early(x))
        return self.inner.deep(x.add(self.helper(x)))

    def helper(self, x: Tensor) -> Tensor:
        return x


def test_arguments_come_before_the_call_that_takes_them():
    assert self_calls(Gated.forward) == ("gate", "act", "up", "down")


def test_called_order_is_the_order_that_runs():
    ran = []
    module = Gated()
    for name, child in module.named_children():
        child.register_forward_hook(lambda *_, name=name: ran.append(name))
    module(torch.zeros(1, 2))
    assert called_children(module)[: len(ran)] == ran


def test_children_that_are_never_called_come_last():
    assert called_children(Gated()) == ["gate", "act", "up", "down", "unused"]


def test_branches_loops_keywords_and_nested_attributes():
    assert self_calls(Branching.forward) == ("early", "late", "helper", "inner.deep")


def test_parameters_are_those_under_the_decorators():
    assert forward_parameters(Gated()) == ["self", "x", "scale"]
    assert "return self.down" in forward_source(Gated.forward)


def test_no_source_leaves_the_order_of_declaration():
    made = type("Made", (Gated,), {"forward": eval("lambda self, x: self.up(x)")})
    assert forward_source(made.forward) == ""
    assert called_children(made()) == ["down", "unused", "up", "act", "gate"]


def test_a_file_edited_since_its_import_gives_no_source(tmp_path: Path):
    file = tmp_path / "edited.py"
    file.write_text("def forward(self, x):\n    return self.down(x)\n")
    spec = importlib.util.spec_from_file_location("edited", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    other = "def before(self, x):\n    return self.forward(self.up(x))\n\n"
    file.write_text(other + file.read_text())
    assert forward_source(module.forward) == ""
    assert self_calls(module.forward) == ()


def test_what_was_read_of_a_function_is_not_taken_for_anothers():
    class Pair(nn.Module):
        def forward(self: Any, x):
            return self.b(self.a(x))

    assert self_calls(Pair.forward) == ("a", "b")

    def forward(self, x, late=None):
        return self.a(self.b(x))

    Pair.forward = forward  # as a user's patch does
    assert self_calls(Pair.forward) == ("b", "a")
    assert forward_parameters(Pair()) == ["self", "x", "late"]


def test_what_was_read_is_forgotten_with_its_function_and_holds_no_module():
    module = Branching()
    gone = weakref.ref(module)
    assert "return x" in forward_source(module.helper)
    del module
    assert gone() is None

    def short_lived(self):
        return self.a(1)

    assert self_calls(short_lived) == ("a",)
    gone = weakref.ref(short_lived)
    del short_lived
    assert gone() is None


def test_a_callable_that_cannot_be_kept_is_read_each_time():
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x):
            return x

    assert forward_source(Unhashable()) == ""

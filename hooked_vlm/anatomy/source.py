"""The order in which a module's `forward` calls its children, read from its source.

A module tree says which parts a transformer block has, but not in which order they
run, and the order is what gives a layer norm its meaning: Gemma-3's
`post_attention_layernorm` comes before the residual addition, Qwen2's, of the same
name, after it.  The source of `forward` says so without a forward pass, for models on
the `meta` device and for a user's own modules alike.  Expressions are read in the
order Python evaluates them, so `self.down(self.act(self.gate(x)) * self.up(x))` gives
`act`'s argument first: gate, act, up, down.

All blocks of a model share one `forward`, so what is read of a function is kept for as
long as that function lives.  A class that is defined anew has another function.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn


Read = TypeVar("Read")


def once_per_function(read: Callable[[Callable], Read]) -> Callable[[Callable], Read]:
    """Makes `read` read each function once, and forget it when the function goes."""
    known: WeakKeyDictionary[Callable, Read] = WeakKeyDictionary()

    @wraps(read)
    def kept(function: Callable) -> Read:
        plain = getattr(function, "__func__", function)  # a bound method would hold its module
        try:
            return known[plain]
        except KeyError:
            known[plain] = found = read(plain)
            return found
        except TypeError:  # a callable that cannot be referred to weakly, or hashed
            return read(function)

    return kept


@once_per_function
def forward_source(function: Callable) -> str:
    """Returns the source of a function under all its decorators, or `""` if there is none."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""


class _SelfCalls(ast.NodeVisitor):
    """Collects `name` of every `self.name(...)` and `self.a.name(...)` in evaluation order.

    A loop over `self.name` counts as a call of it, before what the loop's body calls.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def visit_Call(self, node: ast.Call) -> None:
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.visit(argument)
        name = _self_path(node.func)
        if name is None:
            self.visit(node.func)
        elif name:
            self.names.append(name)

    def visit_For(self, node: ast.For) -> None:
        looped = (
            _self_path(part) for part in ast.walk(node.iter) if isinstance(part, ast.Attribute)
        )
        self.names += [name for name in looped if name and not name.startswith("config")]
        self.generic_visit(node)


def _self_path(node: ast.expr) -> str | None:
    """Returns `"a.b"` for the expression `self.a.b`, `None` for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return ".".join(reversed(parts))
    return None


@once_per_function
def self_calls(function: Callable) -> tuple[str, ...]:
    """Returns the dotted names called on `self` in a function, in evaluation order, once each.

    >>> import torch
    >>> class Gated(torch.nn.Module):
    ...     def forward(self, x):
    ...         return self.down(self.act(self.gate(x)) * self.up(x))
    >>> self_calls(Gated.forward)  # doctest: +SKIP
    ('gate', 'act', 'up', 'down')
    """
    source = forward_source(function)
    if not source:
        return ()
    collector = _SelfCalls()
    for statement in ast.parse(source).body:
        collector.visit(statement)
    return tuple(dict.fromkeys(collector.names))


POSITIONAL = "*"


def keywords_of(function: Callable, path: str) -> set[str] | None:
    """Returns the keywords (not None) with which a function calls `self.path`; None if never.

    `POSITIONAL` stands for arguments without a keyword, and for keywords that are unpacked.
    """
    source = forward_source(function)
    calls = [
        node
        for node in ast.walk(ast.parse(source) if source else ast.Module([], []))
        if isinstance(node, ast.Call) and _self_path(node.func) == path
    ]
    if not calls:
        return None
    named = {
        keyword.arg
        for call in calls
        for keyword in call.keywords
        if keyword.arg and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
    }
    return named | {POSITIONAL for call in calls if call.args}


def called_children(module: nn.Module) -> list[str]:
    """Returns the names of a module's children in the order its `forward` calls them.

    Children that the source does not name (or all, where there is no source) follow in
    the order in which they were declared.
    """
    children = dict(module.named_children())
    calls = (name.split(".")[0] for name in self_calls(type(module).forward))
    called = [name for name in dict.fromkeys(calls) if name in children]
    return called + [name for name in children if name not in called]


@once_per_function
def signature_of(function: Callable) -> inspect.Signature:
    """Returns the signature of a function under its decorators."""
    return inspect.signature(inspect.unwrap(function))


def forward_parameters(module: nn.Module) -> list[str]:
    """Returns the names of the parameters of a module's `forward`, under its decorators."""
    return list(signature_of(type(module).forward).parameters)


def carrier(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Returns the keyword under which a call gives a module's first argument (None: by position).

    A block's first argument is its residual stream, whatever it is called.
    """
    return None if args else next(name for name in forward_parameters(module) if name in kwargs)


def first_argument(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Returns what a call gives as a module's first argument."""
    name = carrier(module, args, kwargs)
    return args[0] if name is None else kwargs[name]

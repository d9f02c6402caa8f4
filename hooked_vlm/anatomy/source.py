"""Reads from source code in which order a module's `forward` calls its children.

A module tree has the parts of a transformer block, but not the order in which they run.
The order determines the role of a layer norm: Gemma-3's `post_attention_layernorm` runs
before the residual addition, Qwen2's norm of the same name after it.  The source of
`forward` gives the order without a forward pass, for models on the `meta` device and for
modules written by the user.  Expressions are read in Python's order of evaluation, so
`self.down(self.act(self.gate(x)) * self.up(x))` gives gate, act, up, down.

All blocks of a model share one `forward`, so results are cached for the lifetime of that
function.  A class that is defined again has another function.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn


Read = TypeVar("Read")


def once_per_function(read: Callable[[Callable], Read]) -> Callable[[Callable], Read]:
    """Decorates `read` to cache its result per function, for the lifetime of that function."""
    known: WeakKeyDictionary[Callable, Read] = WeakKeyDictionary()

    @wraps(read)
    def kept(function: Callable) -> Read:
        plain = getattr(function, "__func__", function)  # a bound method keeps its module
        try:
            return known[plain]
        except KeyError:
            known[plain] = found = read(plain)
            return found
        except TypeError:  # a callable that cannot be hashed or weakly referenced
            return read(function)

    return kept


@once_per_function
def forward_source(function: Callable) -> str:
    """Returns the source of a function without its decorators, or `""` if there is none."""
    bare = inspect.unwrap(function)
    code = getattr(bare, "__code__", None)
    # Python 3.13 gives code made by `exec` the source of the command that Python was started with.
    if code is not None and code.co_filename == "<string>":
        return ""
    try:
        source = textwrap.dedent(inspect.getsource(bare))
    except (OSError, TypeError):
        return ""
    # A file that was edited since it was imported has other lines where the function was.
    if code is None or code.co_name == "<lambda>" or re.search(rf"\bdef {code.co_name}\b", source):
        return source
    return ""


class _SelfCalls(ast.NodeVisitor):
    """Collects the dotted name of every `self.name(...)` and `self.a.name(...)`, in order.

    A loop over `self.name` counts as a call of `self.name` before the calls in the loop's body.
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

    `POSITIONAL` represents positional arguments.
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

    Children without a call in the source (or all, without source) follow in the order of
    their declaration.
    """
    children = dict(module.named_children())
    calls = (name.split(".")[0] for name in self_calls(type(module).forward))
    called = [name for name in dict.fromkeys(calls) if name in children]
    return called + [name for name in children if name not in called]


@once_per_function
def signature_of(function: Callable) -> inspect.Signature:
    """Returns the signature of a function without its decorators."""
    return inspect.signature(inspect.unwrap(function))


def forward_parameters(module: nn.Module) -> list[str]:
    """Returns the parameter names of a module's `forward`, without its decorators."""
    return list(signature_of(type(module).forward).parameters)


def carrier(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Returns the keyword under which a call gives a module's first argument (None: by position).

    A block's first argument is its residual stream, under any name.
    """
    return None if args else next(name for name in forward_parameters(module) if name in kwargs)


def first_argument(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Returns the value that a call gives as a module's first argument."""
    name = carrier(module, args, kwargs)
    return args[0] if name is None else kwargs[name]

"""Small faults for a module's source, one at a time: what `tests/mutants.py` tries.

Left out, because no result depends on them or the shape checks find them at once: annotations,
decorators, docstrings, what is inside `raise`, `assert`, a warning or an f-string, and the
classes of an `isinstance`.  `Mutant.is_fair` leaves out `strict` of a `zip` too.
"""

import ast
import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
FUNCTIONS = {
    "min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmin": "argmax",
    "argmax": "argmin", "any": "all", "all": "any", "sum": "mean", "mean": "sum",
    "triu": "tril", "tril": "triu",
}  # fmt: skip
EXCHANGED = {
    "row": "col", "rows": "cols", "patch_rows": "patch_cols", "tall": "wide", "width": "height",
    "x": "y", "targets": "sources", "inner": "outer",
}  # fmt: skip
EXCHANGED |= {new: old for old, new in EXCHANGED.items()}
METHODS_ONLY = {"sum", "mean"}  # there is no built-in mean
MESSAGES = {"warn", "isinstance", "issubclass", "counted", "did_you_mean", "cast"}


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes of a source from `start` to `stop` become `text`."""

    module: str
    """Path below the package's folder."""
    kind: str
    line: int
    start: int
    stop: int
    text: str

    @property
    def name(self) -> str:
        """What identifies the change as long as the module is the same."""
        return f"{self.module}:{self.line} @{self.start} {self.kind}: {self.text}"

    def applied(self, source: str) -> str:
        """Returns the source with the change made."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.stop :]).decode()

    def is_fair(self, source: str) -> bool:
        """Whether a test could notice: the source parses, and no mere second check is changed."""
        data = source.encode()
        old = data[self.start : self.stop].decode()
        # `zip(…, strict=True)` of what was made of one length.
        if data[: self.start].endswith(b"strict=") or old.count("strict=") > self.text.count(
            "strict="
        ):
            return False
        try:
            ast.parse(self.applied(source))  # `(x)` may not stand everywhere that `x` may
        except SyntaxError:
            return False
        return True

    def diff(self, source: str) -> str:
        """Returns the lines that change, without context."""
        one, two = source.splitlines(), self.applied(source).splitlines()
        lines = list(difflib.unified_diff(one, two, lineterm="", n=0))
        return "\n".join(line for line in lines[2:] if not line.startswith("@@"))


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Returns every change of a module that this file knows, in the order of the source."""
    finder = _Finder(module, source)
    finder.visit(ast.parse(source))
    return finder.found


class _Finder(ast.NodeVisitor):
    """Collects the changes of one module."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source
        self.found: list[Mutant] = []
        self.depth = 0
        starts = [0]
        for line in source.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        self.starts = starts

    def visit(self, node: ast.AST) -> None:
        for kind, old, new in _changes(node, self.depth):
            self._add(kind, old, new)
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        defaults = [default for default in node.args.kw_defaults if default is not None]
        for default in (*node.args.defaults, *defaults):
            self.visit(default)
        self.depth += 1
        for statement in node.body:
            self.visit(statement)
        self.depth -= 1

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if _called(node) not in MESSAGES:
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Messages are left alone."""

    visit_Assert = visit_JoinedStr = visit_Raise  # type: ignore[assignment]

    def _add(self, kind: str, old: Any, new: ast.AST | str) -> None:
        try:
            text = new if isinstance(new, str) else ast.unparse(new)
        except ValueError:  # quotes within quotes, before Python 3.12
            return
        if not isinstance(old, ast.Slice | ast.Return | ast.Constant | ast.Call):
            text = f"({text})"
        mutant = Mutant(
            self.module,
            kind,
            old.lineno,
            self.starts[old.lineno - 1] + old.col_offset,
            self.starts[old.end_lineno - 1] + old.end_col_offset,  # pyright: ignore
            text,
        )
        self.found.append(mutant)


def _changes(node: ast.AST, depth: int) -> Iterator[tuple[str, ast.AST, ast.AST | str]]:
    """Yields (kind, the node that is replaced, what replaces it) for one node."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                if type(op) in COMPARISONS:
                    ops = [*node.ops[:i], COMPARISONS[type(op)](), *node.ops[i + 1 :]]
                    yield "comparison", node, _with(node, ops=ops)
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            # Outside of functions `|` makes types.
            if depth or not isinstance(node.op, ast.BitOr):
                yield "arithmetic", node, _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.BoolOp():
            other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield "and/or", node, _with(node, op=other)
        case ast.UnaryOp(op=ast.Not()):
            yield "not removed", node, node.operand
        case ast.Constant(value=bool() as value):
            yield "constant", node, str(not value)
        case ast.Constant(value=int() | float()):
            number: Any = node.value
            yield "constant", node, repr(number + 1)
        case ast.Slice():
            yield from _slices(node)
        case ast.Call() if _called(node) not in MESSAGES:
            yield from _calls(node)
        case ast.Name(id=name, ctx=ast.Load()) if name in EXCHANGED:
            yield "exchanged", node, EXCHANGED[name]
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in EXCHANGED:
            yield "exchanged", node, _with(node, attr=EXCHANGED[name])
        case ast.Return(value=ast.expr() as value):
            if not (isinstance(value, ast.Constant) and value.value is None):
                yield "return None", node, "return None"
    tests = [getattr(node, "test", None), *getattr(node, "ifs", ())]
    for test in tests if not isinstance(node, ast.Assert) else ():
        if test is not None and not _has_opposite(test):
            yield "condition", test, ast.UnaryOp(ast.Not(), test)


def _has_opposite(test: ast.AST) -> bool:
    """Whether a change of the condition itself is its opposite already."""
    equal = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
    return (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)) or (
        isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], equal)
    )


def _slices(node: ast.Slice) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    if node.lower is None and node.upper is not None:
        yield "slice", node, _with(node, lower=ast.Constant(1))
    for name in ("lower", "upper"):
        bound = getattr(node, name)
        if bound is not None and not isinstance(bound, ast.Constant):
            more = ast.BinOp(bound, ast.Add(), ast.Constant(1))
            yield "slice", node, _with(node, **{name: more})


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    name, method = _called(node), isinstance(node.func, ast.Attribute)
    if name in FUNCTIONS and (method or name not in METHODS_ONLY):
        change = {"attr": FUNCTIONS[name]} if method else {"id": FUNCTIONS[name]}
        yield "function", node, _with(node, func=_with(node.func, **change))
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
            yield "argument dropped", node, _with(node, keywords=rest)


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _with(node: Any, **changed: Any) -> Any:
    new = copy.copy(node)
    for name, value in changed.items():
        setattr(new, name, value)
    return new

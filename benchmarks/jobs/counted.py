"""Lines of each job's function: what a user would write."""

import ast
from pathlib import Path

from benchmarks.jobs import JOBS


MODULES = {"plain": "plain", "ours": "ours", "transformer-lens": "lens", "nnsight": "tracing"}
"""The module of each tool; they are read here, not imported."""


def lines_of(source: str) -> dict[str, int]:
    """Returns the lines in each function's body, without blank ones, comments and docstrings.

    >>> lines_of("def a(w):\\n    'Says.'\\n\\n    x = f(\\n        w\\n    )\\n    # z\\n")
    {'a': 3}
    """
    rows = source.splitlines()
    return {
        node.name: sum(
            bool(row.strip()) and not row.strip().startswith("#")
            for statement in _statements(node)
            for row in rows[statement.lineno - 1 : statement.end_lineno]
        )
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }


def _statements(function: ast.FunctionDef) -> list[ast.stmt]:
    has_docstring = ast.get_docstring(function) is not None
    return function.body[has_docstring:]


def lines(tool: str) -> dict[str, int]:
    """Returns the lines of each job with a tool."""
    path = Path(__file__).with_name(f"{MODULES[tool]}.py")
    found = lines_of(path.read_text(encoding="utf-8"))
    return {job: found[job] for job in JOBS}

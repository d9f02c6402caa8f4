"""How objects show themselves: one line of text, and HTML in a notebook."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import Tensor


LONGEST = 60
"""Characters of one field of a line."""
_SHOWN = 9
"""Items of a list or dict; of more, an ellipsis says so."""
_CELL = 12
_SMALL = 'style="font-size: 90%; margin: 0.3em 0"'


class OneLine:
    """A dataclass (with `repr=False`) that shows itself in one line, without default values.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> @dataclass(repr=False)
    ... class Weighted(OneLine):
    ...     weights: Tensor
    ...     name: str = ""
    >>> Weighted(torch.zeros(3, 4))
    Weighted(weights=float32[3, 4])
    """

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={brief(value)}" for name, value in self._shown().items())
        return f"{type(self).__name__}({given})"

    def _repr_html_(self) -> str:
        given = self._shown()
        drawn = [html_opened(name, value) for name, value in given.items()]
        rows = [(name, brief(value)) for name, value in given.items()]
        return html_block(type(self).__name__, html_table(("field", "value"), rows), *drawn)

    def _shown(self) -> dict[str, Any]:
        """Returns the fields that are shown, without those that have their default value."""
        shown = ((f, getattr(self, f.name)) for f in fields(self) if f.repr)  # type: ignore[arg-type]
        return {f.name: value for f, value in shown if not _is_default(value, f.default)}


def _is_default(value: Any, default: Any) -> bool:
    plain = (bool, int, float, str, tuple, type(None))
    return isinstance(value, plain) and isinstance(default, plain) and value == default


def brief(value: Any) -> str:
    """Returns a value in at most `LONGEST` characters of one line: tensors by dtype and shape.

    >>> import torch
    >>> brief(list(range(10)))
    '[0, 1, 2, 3, 4, 5, 6, 7, 8, …]'
    >>> brief(torch.zeros(2, 3)), brief({"slot": range(7)}), brief("a\\nb")
    ('float32[2, 3]', "{'slot': range(0, 7)}", "'a\\\\nb'")
    """
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping) and type(value) is dict:
        inner = ", ".join(f"{key!r}: {brief(each)}" for key, each in list(value.items())[:_SHOWN])
        text = f"{{{inner}{', …' * (len(value) > _SHOWN)}}}"
    elif isinstance(value, tuple | list):
        inner = ", ".join(map(brief, value[:_SHOWN])) + ", …" * (len(value) > _SHOWN)
        text = f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    elif callable(value) and hasattr(value, "__name__"):
        text = value.__name__
    else:
        text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table whose cells are text.

    >>> html_table(["name"], [["a<b"]])
    '<table><tr><th>name</th></tr><tr><td>a&lt;b</td></tr></table>'
    """
    lines = ["".join(f"<th>{escape(name)}</th>" for name in header)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def html_folded(summary: str, text: str) -> str:
    """Returns text that opens under a summary."""
    body = f'<pre style="line-height: 1.3; overflow-x: auto">{escape(text)}</pre>'
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def html_opened(name: str, value: Any) -> str:
    """Returns how a notebook shows a value, under its name; empty for what it shows as text.

    Mappings (inputs, caches) are long, and open by a click.
    """
    if isinstance(value, type) or not hasattr(value, "_repr_html_"):
        return ""
    drawn = value._repr_html_()
    state = "" if isinstance(value, Mapping) else " open"
    return f"<details{state}><summary>{escape(name)}</summary>{drawn}</details>"


def html_block(title: str, *parts: str) -> str:
    """Returns a title, as code, and parts of HTML below it."""
    return f"<div><div {_SMALL}><code>{escape(title)}</code></div>{''.join(parts)}</div>"


def html_cells(
    mask: Bool[np.ndarray, "row col"], size: tuple[float | int, float | int] | None = None
) -> str:
    """Returns a drawing of a grid's cells, with those of a mask filled.

    `size` is (width, height) of the image, which gives the cells their shape.

    >>> html_cells(np.array([[True, False]])).count("<rect")
    2
    """
    rows, cols = mask.shape
    width, height = size or (cols, rows)
    tall = _CELL * (height / rows) / (width / cols)
    drawn = "".join(
        f'<rect x="{c * _CELL}" y="{r * tall:.4g}" width="{_CELL}" height="{tall:.4g}" '
        f'fill="{"#0072B2" if mask[r, c] else "none"}" stroke="#888" stroke-width="0.5">'
        f"<title>row {r}, column {c}</title></rect>"
        for r in range(rows)
        for c in range(cols)
    )
    box = f"0 0 {cols * _CELL} {rows * tall:.4g}"
    filled = int(mask.sum())
    return (
        f'<svg viewBox="{box}" width="{min(cols * _CELL, 320)}" role="img" '
        f'aria-label="{rows} x {cols} cells, {filled} filled">{drawn}</svg>'
    )

"""HTML of pages: tables, embedded pictures, and the templates."""

import base64
import html
import io

import jinja2
import pandas as pd
from PIL import Image


def table_of(table: pd.DataFrame, caption: str) -> str:
    """Returns the table as HTML, with each interval in one cell and three decimal places.

    It is empty for a table without rows.
    """
    if table.empty:
        return ""
    shown = table.drop(columns=["low", "high"], errors="ignore").copy()
    if {"low", "high"} <= set(table.columns):
        bounds = zip(table["low"], table["high"], strict=True)
        place = list(shown.columns).index("value") + 1
        shown.insert(place, "95 % interval", [interval(low, high) for low, high in bounds])
    head = "".join(
        f"<th scope=col{_kind(shown[name])}>{html.escape(str(name))}</th>" for name in shown
    )
    rows = "\n".join(
        "<tr>" + "".join(_cell(value) for value in row) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    top = f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
    return f"<table>{top}\n<tbody>{rows}</tbody></table>"


def interval(low: float, high: float) -> str:
    """Returns an interval in words, with three decimal places; empty where there is none."""
    return "" if pd.isna(low) or pd.isna(high) else f"{_three(low)} to {_three(high)}"


def _three(value: float) -> str:
    """Returns a number with three decimal places, and zero without a sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def _kind(column: pd.Series) -> str:
    return " class=number" if pd.api.types.is_numeric_dtype(column) else ""


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return "<td></td>"
    if isinstance(value, float):
        return f"<td class=number>{_three(value)}</td>"
    kind = "" if isinstance(value, str) else " class=number"
    return f"<td{kind}>{html.escape(str(value))}</td>"


def small_png(image: Image.Image, size: int = 336) -> bytes:
    """Returns a picture as PNG, at most `size` pixels wide and high."""
    image = image.convert("RGB")
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    """Returns the address of a picture that is embedded in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def template(name: str) -> jinja2.Template:
    """Returns a page's template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hooked_vlm", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)

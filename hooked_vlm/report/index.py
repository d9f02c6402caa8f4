"""Writes the page that shows the reports of several models side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hooked_vlm.disk.files import write_file
from hooked_vlm.experiments.result import Result
from hooked_vlm.report.figures import drawings
from hooked_vlm.report.look import to_png
from hooked_vlm.report.markup import template
from hooked_vlm.report.page import PAGE, facts_of, numbers_in_words, shown
from hooked_vlm.report.provenance import Provenance


INDEX = "index.html"


def write_index(
    reports: Mapping[str, tuple[Sequence[Result], Provenance]], out: Path, *, title: str
) -> Path:
    """Writes `out/index.html`, which shows the reports of several models side by side.

    `reports` maps each report's folder, relative to `out`, to its results and record.
    """
    models = [
        {"folder": folder, "provenance": provenance, "facts": facts_of(provenance)}
        for folder, (_, provenance) in reports.items()
    ]
    by_id: dict[str, dict[str, Any]] = {}
    for folder, (results, _) in reports.items():
        for result in results:
            row = by_id.setdefault(result.anchor, {"result": result, "cells": {}, "widest": 0})
            figures = [shown(d, to_png(d.figure)) for d in drawings(result) if d.headline]
            row["widest"] = max(row["widest"], *(figure["width"] for figure in figures), 0)
            told = {"result": result, "numbers": numbers_in_words(result), "figures": figures}
            row["cells"][folder] = told
    page = template("index.html.j2").render(
        title=title, models=models, rows=list(by_id.values()), page=PAGE
    )
    write_file(out / INDEX, page)
    return out / INDEX

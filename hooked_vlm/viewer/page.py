"""Writes a view as one HTML page with its data, its charts' library and its licences."""

import base64
import io
import json
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from hooked_vlm.viewer.quantised import COARSE, FINE, packed


ASSETS = files("hooked_vlm.viewer") / "assets"
LIBRARY = ("d3.min.js", "plot.umd.min.js")
"""The charts' library, in the order in which it is loaded."""
LICENCES = ("d3.LICENSE", "plot.LICENSE")
LARGEST_PX = 768
"""The picture's longer side on a page."""
LARGEST_PNG = 400_000


@cache
def asset(name: str) -> str:
    """Returns the text of a file of the page."""
    return (ASSETS / name).read_text(encoding="utf-8")


def json_for_script(data: Any) -> str:
    """Returns data as JSON that no text in it can end the script that it stands in."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


def page_of(view: Any) -> str:
    """Returns the page of a `View`."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    data = data_of(view)
    arrays = data["arrays"]
    return environment.from_string(asset("viewer.html.j2")).render(
        title=f"{view.facts['model']}: {view.facts['question'].strip()}",
        facts=view.facts,
        arrays=arrays,
        maps=_maps(view),
        notes=view.notes,
        probes=view.probes,
        sites=", ".join(dict.fromkeys(view.slots.values())),
        steps={name: one["step"] for name, one in arrays.items() if one["step"]},
        tokens=_chips(view),
        css=asset("viewer.css"),
        licences=[asset(name) for name in LICENCES],
        library=[asset(name) for name in LIBRARY],
        scripts=[asset(name) for name in ("numbers.js", "data.js", "charts.js", "viewer.js")],
        data=json_for_script(data),
    )


def data_of(view: Any) -> dict[str, Any]:
    """Returns what the page's scripts read."""
    grid, x, y = view.grid, *view.grid.edges
    width, height = grid.image_size
    return {
        "image": picture(view.image),
        "size": [width, height],
        "x": (x / width).tolist(),
        "y": (y / height).tolist(),
        "positions": grid.positions.flatten().tolist(),
        "tokens": list(view.tokens),
        "answers": list(view.answers),
        "slots": [{"slot": slot, "site": site} for slot, site in view.slots.items()],
        "layers": [{"layer": layer, "site": site} for layer, site in view.layers.items()],
        "words": {str(i): text for i, text in view.words.items()},
        "regions": [
            {"name": name, "cells": region.tokens.tolist()} for name, region in view.regions.items()
        ],
        "probes": [
            {
                "name": name,
                "classes": list(own.classes),
                "slots": list(own.by_slot),
                "accuracy": [own.accuracy.get(slot) for slot in own.by_slot],
            }
            for name, own in view.probes.items()
            if f"probes.{name}" in view.arrays
        ],
        "arrays": {
            name: packed(np.asarray(array.values), name, COARSE if name == "attention" else FINE)
            for name, array in view.arrays.items()
        },
    }


def picture(image: Image.Image) -> str:
    """Returns a picture as a data URL: PNG, or JPEG where that would be large."""
    shown = image.convert("RGB")
    shown.thumbnail((LARGEST_PX, LARGEST_PX))
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
        buffer = io.BytesIO()
        shown.save(buffer, format=kind, **options)
        if buffer.tell() <= LARGEST_PNG or kind == "jpeg":
            return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    raise AssertionError("the loop returns")


def _chips(view: Any) -> list[dict[str, Any]]:
    """Returns the prompt's tokens in order, with the picture's cells as one entry."""
    cells = set(view.grid.positions.flatten().tolist())
    chips: list[dict[str, Any]] = []
    for position, text in enumerate(view.tokens):
        if position not in cells:
            shown = text.replace("\n", "⏎").replace(" ", "␣")
            chips.append({"value": str(position), "text": shown or "∅", "position": position})
        elif not any(chip["value"] == "cell" for chip in chips):
            chips.append({"value": "cell", "text": "the chosen cell", "position": None})
    return chips


def _maps(view: Any) -> list[tuple[str, str]]:
    """Returns the maps that can be drawn over the picture: value and label."""
    names = {
        "attention": "attention of the token",
        "lens": "logit lens: probability of the answer",
        "patches": "patches: effect of each cell",
    }
    maps = [(name, label) for name, label in names.items() if name in view.arrays]
    for number, (name, own) in enumerate(view.probes.items()):
        if f"probes.{name}" in view.arrays:
            maps += [
                (f"probe {number} {i}", f"probe {name}: P({label})")
                for i, label in enumerate(own.classes)
            ]
    return maps

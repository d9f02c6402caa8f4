"""What objects look like: one short line as text, and HTML that parses in a notebook."""

from functools import cache
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import torch
from PIL import Image

from hooked_vlm import (
    Ablate,
    Attend,
    Chain,
    HookAt,
    HookedVLM,
    LastToken,
    Patch,
    Steer,
    Sweep,
    record,
)
from hooked_vlm.experiments.result import About, Result


@cache
def objects() -> dict[str, Any]:
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    grid = inputs.grid
    _, cache_ = model.run_with_cache(inputs, ["*hook_resid_post", "hook_embed"])
    source = record(model, inputs, ["blocks.1.hook_resid_pre"])
    patch = Patch(1, at=LastToken(), source=source)
    vectors = torch.randn(3, 4000)
    sweep = Sweep(inputs, {"slot": [0, 1]}, make=lambda slot: Ablate(slot, at=LastToken()))
    table = pd.DataFrame({"quantity": ["<share>"], "value": [0.123456]})
    about = About(id="E4", name="swap", section="5", title="A & B", claim="")
    return {
        "model": model,
        "inputs": inputs,
        "grid": grid,
        "region": grid.all(),
        "cache": cache_,
        "recording": source,
        "patch": patch,
        "ablate": Ablate(1, at=grid.all(), to=vectors[0]),
        "steer": Steer(1, at=LastToken(), directions=vectors, alpha=2.0, mode="project"),
        "attend": Attend("blocks.0.attn", query=LastToken(), key=grid.all(), mask=True),
        "chain": Chain(patch, patch),
        "hook": HookAt("hook_embed", lambda a, hook: a),
        "sweep": sweep,
        "plan": sweep.plan(model),
        "result": Result(table=table, verdict="One.\nTwo.", **vars(about)),
    }


def test_a_repr_is_one_short_line() -> None:
    for name, found in objects().items():
        text = repr(found)
        assert "\n" not in text and len(text) <= 300, text
        assert text.startswith(type(found).__name__) or name == "hook"


class Tags(HTMLParser):
    """Raises for a tag that is not closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("rect", "br") or tag == "rect":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(name: str) -> str:
    tags = Tags()
    tags.feed(objects()[name]._repr_html_())
    assert not tags.open
    return tags.text


def test_a_notebook_shows_what_is_inside() -> None:
    assert "hook_resid_post" in shown("model")
    assert "blocks.{l}.hook_resid_post" in shown("cache") and "0, 1, 2" in shown("cache")
    assert "pixel_values" in shown("inputs") and "image_pad" in shown("inputs")
    for name, inside in {
        "patch": ("LastToken", "Recording", "hook_resid_pre"),
        "ablate": ("float32[4000]", f"row 0, column {objects()['grid'].cols - 1}"),
        "steer": ("alpha", "project"),
        "attend": ("mask", "blocks.0.attn"),
        "chain": ("2 parts", "LastToken"),
        "sweep": ("2 cells", "slot", "[0, 1]", "pixel_values"),
        "plan": ("2 cells", "Ablate(1"),
        "recording": ("blocks.{l}.hook_resid_pre", "pixel_values"),
    }.items():
        for text in inside:
            assert text in shown(name), (name, text)
    assert "<share>" in shown("result") and "Two." in shown("result")
    grid = objects()["grid"]
    for name, filled in (("grid", 0), ("region", len(grid))):
        html = objects()[name]._repr_html_()
        assert html.count("<rect") == len(grid)
        assert html.count("#0072B2") == filled
        assert f"row 0, column {grid.cols - 1}" in shown(name)

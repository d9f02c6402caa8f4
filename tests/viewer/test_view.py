"""A view holds what the engine computes, its page is one small file, and mistakes are said."""

import json
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_vlm import (
    Ablate,
    HookedVLM,
    LinearProbe,
    Patch,
    SlotProbes,
    View,
    attention_maps,
    final_logits,
    order_probes,
    view,
)
from hooked_vlm.errors import DataError, HookedVLMError
from hooked_vlm.viewer.measured import log_odds
from hooked_vlm.viewer.page import ASSETS, LIBRARY, asset
from hooked_vlm.viewer.quantised import COARSE, FINE, packed, unpacked
from hooked_vlm.viewer.view import _named


QUESTION = "What is </script> this?"


@cache
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")


def picture(color: str = "red") -> Image.Image:
    image = Image.new("RGB", (64, 48), "white")
    image.paste(color, (16, 16, 48, 32))
    return image


@cache
def seen() -> View:
    d = model().cfg.d_model
    x = torch.randn(30, d, generator=torch.Generator().manual_seed(0))
    probe = LinearProbe(n_steps=5).fit(x, np.array(["a", "b", "c"] * 10))
    return view(
        model(),
        picture(),
        QUESTION,
        source=picture("blue"),
        answers=["red", "blue"],
        probes={"letters": SlotProbes({2: probe}, {2: 0.5}, "Fitted to noise.")},
    )


@cache
def page() -> str:
    return seen().to_html()


def data() -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page())
    assert found
    return json.loads(found[1])


def test_a_view_holds_what_the_engine_computes() -> None:
    made, inputs = seen(), model().prepare(picture(), QUESTION)
    maps = attention_maps(model(), inputs, None)
    np.testing.assert_array_equal(made.arrays["attention"], maps)
    with torch.no_grad():
        logits, cache_ = model().run_with_cache(inputs, "*resid*")
        ids = [model().to_single_token(word) for word in ("red", "blue")]
        read = cache_.logit_lens()[:, 0].softmax(-1)[..., ids]
        np.testing.assert_allclose(made.arrays["lens"], read, atol=1e-6)
        other = model().prepare(picture("blue"), QUESTION)
        cell = inputs.grid.cells([(1, 2)])
        edited = model().run_with_hooks(inputs, [Patch(3, at=cell, source=other)])
    change = log_odds(final_logits(edited), ids) - log_odds(final_logits(logits), ids)
    found = made.arrays["patches"].sel(slot=3, place=1 * 4 + 2)
    assert float(change.abs().max()) > 0.1
    np.testing.assert_allclose(found, change[0], atol=1e-3)  # sums of rows in another order


def test_without_another_picture_cells_get_the_mean_of_all_cells() -> None:
    made = view(model(), picture(), "What?", panels=["patches"], answers=["red"], slots=[1])
    inputs = model().prepare(picture(), "What?")
    every = inputs.grid.all()
    edit = Ablate(1, at=every, to="mean", reference=inputs, reference_at=every)
    ids = [model().to_single_token("red")]
    with torch.no_grad():
        both = [final_logits(model().run_with_hooks(inputs, hooks)) for hooks in ([edit], [])]
    change = log_odds(both[0], ids) - log_odds(both[1], ids)
    whole = 12 + list(made.regions).index("whole picture")
    np.testing.assert_allclose(
        made.arrays["patches"].sel(place=whole, slot=1), change[0], atol=1e-3
    )


def test_embedded_numbers_are_within_half_a_step() -> None:
    embedded = data()["arrays"]
    assert set(embedded) == set(seen().arrays)
    for name, array in seen().arrays.items():
        one = embedded[name]
        assert one["bits"] == (COARSE if name == "attention" else FINE)
        off = np.abs(unpacked(one) - array.values).max()
        assert off <= one["step"] * 0.5001, name


@pytest.mark.parametrize("values", [np.zeros(3), np.array([1, 70000]), np.array([-2.5, 1e3])])
@pytest.mark.parametrize("bits", [COARSE, FINE])
def test_packed_numbers_come_back(values: np.ndarray, bits: int) -> None:
    one = packed(values, "values", bits)
    np.testing.assert_allclose(unpacked(one), values, atol=one["step"] * 0.5001)


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="1 of the 2 numbers of shares are NaN"):
        packed(np.array([0.0, np.nan]), "shares")


class Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag in ("link", "script", "iframe", "img"):
            self.sources += [given[n] or "" for n in ("src", "href") if n in given]


def test_the_page_is_one_file_that_loads_nothing() -> None:
    loads = Loads()
    loads.feed(page())
    assert loads.sources == [] and len(loads.ids) == len(set(loads.ids))
    assert "default-src 'none'" in page()
    assert page().count("<script") == page().count("</script>") == 1 + len(LIBRARY) + 4
    for stated in ("tiny-qwen2-vl", "float32", "blocks.2.hook_resid_post", "ISC", "1.5e-05"):
        assert stated in page()


def test_the_charts_library_is_small_and_has_its_licences() -> None:
    sizes = {name: len((ASSETS / name).read_bytes()) for name in LIBRARY}
    assert sum(sizes.values()) < 500_000, sizes
    for licence in ("d3.LICENSE", "plot.LICENSE"):
        assert "Permission to use, copy, modify" in asset(licence)
    assert sum(len(path.read_bytes()) for path in ASSETS.iterdir()) < 560_000


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    html = seen()._repr_html_()
    assert html.startswith("<iframe") and "<script" not in html and "&lt;script&gt;" in html
    assert "\n" not in repr(seen()) and len(repr(seen())) < 200


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    assert seen().to_html(tmp_path / "v.html") == (tmp_path / "v.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["v.html"]
    with pytest.raises(DataError, match="page cannot be written"):
        seen().to_html(tmp_path / "absent" / "v.html")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"panels": ["atention"]}, "Did you mean 'attention'"),
    ({"panels": []}, "No panel was named"),
    ({"panels": ["probes"]}, "no probes were given"),
    ({"pannels": ["lens"]}, "Did you mean 'panels'"),
    ({"layers": [6]}, "some of 0 to 5"),
    ({"slots": [7]}, "some of 0 to 6"),
    ({"limit_mb": 0.01}, r"of which attention takes .* layers=range\(0, 6, 2\)"),
    ({"limit_mb": 1e-4, "panels": ["lens"]}, r"of which lens takes .* slots=range\(0, 7, 2\)"),
    ({"answers": ["red blue"]}, "red blue"),
    ({"answers": []}, "answers is empty"),
    ({"source": Image.new("RGB", (96, 96))}, "grid"),
    ({"regions": {"all": picture}}, "regions"),
]


@pytest.mark.parametrize(("given", "said"), WRONG, ids=[next(iter(g)) for g, _ in WRONG])
def test_mistakes_are_said_before_the_model_runs(
    given: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(model().hf_model, "forward", ran)
    with pytest.raises(HookedVLMError, match=said):
        view(model(), picture(), "What is this?", **given)


def test_progress_counts_every_unit_once() -> None:
    steps: list[tuple[int, int]] = []
    _view_with(lambda done, total: steps.append((done, total)))
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert len({total for _, total in steps}) == 1


def _view_with(on_progress: Callable[[int, int], None]) -> None:
    panels = ["attention", "lens", "patches"]
    view(model(), picture(), "What?", panels=panels, slots=[5], on_progress=on_progress)


def test_order_probes_read_the_order() -> None:
    found = order_probes(model(), pictures=16, slots=[4], batch_size=16)["horizontal"]
    assert found.classes == ("left", "middle", "right")
    assert found.accuracy[4] > 0.8  # chance: a third


@pytest.mark.parametrize("given", [{"pictures": 3}, {"slots": [9]}, {"setting": "squers"}])
def test_order_probes_refuse_mistakes(given: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        order_probes(model(), **given)


def test_slot_probes_need_classifiers() -> None:
    with pytest.raises(DataError, match="predict_proba"):
        SlotProbes({0: "probe"})


def test_answers_of_one_text_keep_their_columns() -> None:
    assert _named([3, 4, 5], {3: "a", 4: "b", 5: "a"}) == {"a [3]": 3, "b": 4, "a [5]": 5}

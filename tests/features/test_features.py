"""Features of a data set on disk: what is written, resumed, refused, and fitted to them."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from helpers.forward_counter import count_forwards
from helpers.prepared_models import prepared
from hooked_vlm import Ablate, Features, LastToken, Region, Span, dataset_means, extract, record
from hooked_vlm.errors import DataError, HookedVLMError, InterventionError, UnknownHookError
from hooked_vlm.features.identity import model_digest
from hooked_vlm.features.items import Columns, read_item
from hooked_vlm.features.shards import read_header, reopen
from hooked_vlm.features.sums import Sums


SITE, VISION = "blocks.0.hook_resid_post", "vision_encoder.blocks.0.hook_resid_post"
QUIET: dict[str, Any] = {"progress": False}
NEAR: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
"""Batches of another size do their sums in another order."""


def picture(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))


def items(n: int = 7) -> list[tuple[Image.Image, str, str]]:
    return [(picture(i), "yes" if i % 2 else "left or right", "ab"[i % 2]) for i in range(n)]


def plain(site: str, at: Any, given: list[Any]) -> list[torch.Tensor]:
    """The activations of each item alone."""
    model, found = prepared("llava"), []
    for image, text, _ in given:
        inputs = model.prepare(image, text)
        cache = record(model, inputs, [site]).cache
        found.append(cache[site][0, inputs.positions(at)[0]])
    return found


def test_features_are_those_of_each_item_alone(tmp_path: Path) -> None:
    model, data = prepared("llava"), items()
    said: list[Any] = []
    found = extract(
        model, data, SITE, at=LastToken(), out=tmp_path / "f", batch=3,
        progress=lambda done, total: said.append((done, total)),
    )  # fmt: skip
    assert said == [(3, 7), (6, 7), (7, 7)]
    assert list(found) == [SITE]
    assert (found.n_items, found.labels) == (7, list("abababa"))
    assert (found.indices, found.problems) == (list(range(7)), {})
    expected = torch.stack(plain(SITE, LastToken(), data))
    torch.testing.assert_close(found[SITE], expected, **NEAR)
    torch.testing.assert_close(found[1], expected, **NEAR)  # the slot
    pooled = extract(model, data, [1], at=LastToken(), out=tmp_path / "g", pool="mean", **QUIET)
    torch.testing.assert_close(pooled[SITE], expected[:, 0], **NEAR)
    with pytest.raises(UnknownHookError, match=r"No hook named 'blocks\.1"):
        found["blocks.1.hook_resid_post"]


def test_regions_of_vision_and_language_sites(tmp_path: Path) -> None:
    model, data = prepared("llava"), items(3)
    region = Region.rectangle((8, 8), (0, 2), (0, 3))
    found = extract(model, data, [VISION, SITE], at=region, out=tmp_path / "f", batch=2, **QUIET)
    assert found[VISION].shape[:2] == found[SITE].shape[:2] == (3, 6)
    inputs = model.prepare(data[2][0], data[2][1])
    cache = record(model, inputs, [VISION]).cache
    torch.testing.assert_close(
        found[VISION][2], cache[VISION][0, region.patches(inputs.grid)], **NEAR
    )
    with pytest.raises(InterventionError, match="is no part of an image"):
        extract(model, data, [VISION], at=LastToken(), out=tmp_path / "g", **QUIET)
    assert not (tmp_path / "g").exists()


def test_items_of_different_sizes_are_a_list(tmp_path: Path) -> None:
    model, data = (
        prepared("qwen2-vl"),
        [(picture(0), "left"), (picture(1).crop((0, 0, 32, 64)), "")],
    )
    data = [(image, "left or right") for image, _ in data]
    for batch in (1, 2):
        found = extract(
            model, data, [SITE, VISION], out=tmp_path / f"{batch}", batch=batch,
            at=lambda item, grids: grids[0].all(), **QUIET,
        )  # fmt: skip
        values = found[SITE]
        assert isinstance(values, list)
        assert [len(x) for x in values] == [16, 8]
        assert [len(x) for x in found[VISION]] == [64, 32]
        rows = torch.cat(values)
        torch.testing.assert_close(found.mean(SITE), rows.mean(0), **NEAR)
        assert sum(map(len, found.batches(SITE))) == 24


def test_an_interruption_costs_one_batch(tmp_path: Path) -> None:
    model, data, out = prepared("llava"), items(), tmp_path / "f"

    class Interrupted(list):
        def __getitem__(self, index: Any) -> Any:
            if index == 5:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    given: dict[str, Any] = {"at": LastToken(), "out": out, "batch": 2, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        extract(model, Interrupted(data), SITE, **given)
    assert sorted(p.name for p in out.glob("*.safetensors")) == [
        "shard-000000.safetensors",
        "shard-000001.safetensors",
    ]
    with pytest.raises(DataError, match="is not complete: it holds 2 batches"):
        Features(out)
    assert Features(out, partial=True).n_items == 4
    with count_forwards(model) as forwards:
        found = extract(model, data, SITE, **given)
    assert len(forwards) == 2
    whole = extract(model, data, SITE, **{**given, "out": tmp_path / "g"})
    assert torch.equal(found[SITE], whole[SITE])
    # A damaged batch is made again.
    (out / "shard-000001.safetensors").write_bytes(b"half of it")
    with pytest.raises(DataError, match="is damaged"):
        Features(out)
    again = extract(model, data, SITE, **given)
    assert torch.equal(again[SITE], whole[SITE])


@pytest.mark.slow
def test_a_killed_process_leaves_whole_batches(tmp_path: Path) -> None:
    """A process that is killed while it writes leaves no file under a batch's name."""
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from hooked_vlm.features import shards\n"
        "folder = Path(sys.argv[1]); folder.mkdir()\n"
        "s = lambda: shards.Shard([0], ['a'], ['t'], [{'x': torch.ones(2, 3)}], {}, 'd', 1)\n"
        "shards.write_shard(folder, 0, s())\n"
        "os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards.write_shard(folder, 1, s())\n"
    )
    out = tmp_path / "f"
    done = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in out.glob("shard-*")] == ["shard-000000.safetensors"]
    assert len(list(out.glob(".*.new"))) == 1

    assert read_header(out / "shard-000000.safetensors")
    reopen(out)
    assert not list(out.glob(".*.new"))


def test_a_folder_of_anything_else_is_refused(tmp_path: Path) -> None:
    model, data, out = prepared("llava"), items(4), tmp_path / "f"
    given: dict[str, Any] = {"at": LastToken(), "out": out, "batch": 2, **QUIET}
    extract(model, data, SITE, **given)
    for changed, said in (
        ({"at": Span("r")}, "another at"),
        ({"batch": 1}, "another batch"),
        ({"pool": "mean"}, "another pool"),
        ({"system": "x"}, "another prepare"),
        ({"at": lambda item, grids: LastToken()}, "another at"),
    ):
        with pytest.raises(DataError, match=said):
            extract(model, data, SITE, **{**given, **changed})
    with pytest.raises(DataError, match="another sites"):
        extract(model, data, VISION, **{**given, "at": None})
    with pytest.raises(DataError, match="another model"):
        extract(prepared("gemma-3"), data, SITE, **given)
    weight = model.hf_model.get_submodule(model.anatomy.lm.blocks[0].path)
    parameter = next(weight.parameters())
    with torch.no_grad():
        before = parameter.clone()
        parameter.add_(1)
        with pytest.raises(DataError, match="another weights"):
            extract(model, data, SITE, **given)
        parameter.copy_(before)
    with pytest.raises(DataError, match="another n_items"):
        extract(model, items(5), SITE, **given)
    with pytest.raises(DataError, match="item 2 has another picture, text or label"):
        extract(model, [*data[:2], data[3], data[2]], SITE, **given)
    with pytest.raises(DataError, match="features of 3 items, and this data set has more"):
        extract(model, iter(data[:3]), SITE, **{**given, "out": tmp_path / "i"})
        extract(model, iter(data), SITE, **{**given, "out": tmp_path / "i"})
    with pytest.raises(DataError, match="more items than this data set has"):
        extract(model, iter(data[:2]), SITE, **{**given, "out": tmp_path / "i"})
    about = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        Features(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    with pytest.raises(DataError, match="is not empty, and holds no features"):
        extract(model, data, SITE, **{**given, "out": tmp_path / "other"})


def test_features_of_other_settings_are_refused(tmp_path: Path) -> None:
    model, data, out = prepared("llava"), items(4), tmp_path / "f"
    given: dict[str, Any] = {"at": LastToken(), "out": out, "batch": 2, **QUIET}
    extract(model, data, SITE, **given)
    with pytest.raises(DataError, match="another picture, text or label"):
        extract(model, [(image, text, "c") for image, text, _ in data], SITE, **given)
    for changed in ((data[3][0], data[3][1], "c"), (data[3][0], "left", data[3][2])):
        with pytest.raises(DataError, match="item 3 has another picture, text or label"):
            extract(model, [*data[:3], changed], SITE, **given)
    images = model.processor.image_processor
    for name, value in (("image_mean", [0.1, 0.2, 0.3]), ("do_normalize", False)):
        before = getattr(images, name)
        setattr(images, name, value)
        try:
            with pytest.raises(DataError, match="another processor"):
                extract(model, data, SITE, **given)
        finally:
            setattr(images, name, before)
    block: Any = model.hf_model.get_submodule(model.anatomy.lm.blocks[0].path)
    block.register_buffer("scale", torch.ones(1))
    try:
        with pytest.raises(DataError, match="another weights"):
            extract(model, data, SITE, **given)
        block.active_adapters, block.disable_adapters = ["a"], False
        before = model_digest(model.hf_model)
        block.disable_adapters = True
        assert model_digest(model.hf_model) != before
    finally:
        del block.scale
        vars(block).pop("active_adapters", None)
        vars(block).pop("disable_adapters", None)
    extract(model, data, SITE, **given)


def test_bad_items_are_named_by_their_number(tmp_path: Path) -> None:
    model, data = prepared("llava"), items(6)
    file = tmp_path / "broken.png"
    file.write_bytes(b"no picture")
    bad = {
        1: ((str(file), "yes"), "Item 1: the picture .* cannot be read"),
        2: ((np.full((8, 8, 3), np.nan), "yes"), "Item 2: An image of float64 has values from nan"),
        3: ((picture(0), 7), "Item 3: its text is 7"),
        4: ("nothing", "Item 4: it is 'nothing'"),
    }
    for index, (item, said) in bad.items():
        broken: list[Any] = [*data[:index], item, *data[index + 1 :]]
        with pytest.raises(DataError, match=said):
            extract(
                model, broken, SITE, at=LastToken(), out=tmp_path / f"{index}", batch=2, **QUIET
            )
        assert len(list((tmp_path / f"{index}").glob("shard-*"))) == index // 2
    broken = [bad[i][0] if i in bad else item for i, item in enumerate(data)]
    given: dict[str, Any] = {"at": LastToken(), "out": tmp_path / "1", "batch": 2, **QUIET}
    found = extract(model, broken, SITE, on_error="skip", **given)
    assert (found.indices, found.labels) == ([0, 5], ["a", "b"])
    assert sorted(found.problems) == [1, 2, 3, 4]
    assert "cannot be read" in found.problems[1]
    assert "2 items, 4 left out" in repr(found)
    torch.testing.assert_close(
        found[SITE], torch.stack(plain(SITE, LastToken(), [data[0], data[5]])), **NEAR
    )
    for empty in ([], iter([])):
        with pytest.raises(DataError, match="data set is empty"):
            extract(model, empty, SITE, at=LastToken(), out=tmp_path / "e", **QUIET)
    with pytest.raises(DataError, match="expected a sequence or an iterable"):
        extract(model, "pictures", SITE, out=tmp_path / "e", **QUIET)
    with pytest.raises(HookedVLMError, match="lable_column"):
        extract(model, data, SITE, out=tmp_path / "e2", lable_column="x", **QUIET)


def test_an_item_of_a_batch_that_cannot_run_is_found(tmp_path: Path) -> None:
    model, data = prepared("llava"), items(4)
    weird: list[Any] = [*data[:2], (picture(2), "yes <image> <image>", "a"), data[3]]
    with pytest.raises(DataError, match="Item 2: Prompt 0 has 2 image placeholders"):
        extract(model, weird, SITE, at=LastToken(), out=tmp_path / "f", chat=False, **QUIET)
    found = extract(
        model, weird, SITE, at=LastToken(), out=tmp_path / "f", chat=False, on_error="skip", **QUIET
    )
    assert (found.indices, list(found.problems)) == ([0, 1, 3], [2])


def test_activations_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = prepared("llava")
    said = r"Item 0: the activations of .* are NaN or infinite"
    parameter = next(model.hf_model.get_submodule(model.anatomy.lm.blocks[0].path).parameters())
    with torch.no_grad():
        before = parameter.clone()
        parameter.fill_(torch.inf)
        with pytest.raises(DataError, match=said):
            extract(model, items(2), SITE, at=LastToken(), out=tmp_path / "f", **QUIET)
        parameter.copy_(before)


def test_open_hooks_are_refused(tmp_path: Path) -> None:
    """Their work would be in the folder, and a later call outside would go on with it."""
    model, out = prepared("llava"), tmp_path / "f"
    with model.hooks([("blocks.0.hook_mlp_out", lambda x, hook: x * 0)]):
        with pytest.raises(DataError, match=r"Leave the `with model\.hooks"):
            extract(model, items(2), SITE, at=LastToken(), out=out, **QUIET)
        with pytest.raises(DataError, match=r"Leave the `with model\.hooks"):
            dataset_means(model, items(2), [SITE], at=LastToken(), **QUIET)
    assert not out.exists()
    extract(model, items(2), SITE, at=LastToken(), out=out, **QUIET)


class Rows:
    """A data set as Hugging Face's: a sequence of mappings that is no list."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.read = rows, list[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return self.rows[index]


def test_columns_are_found_by_their_usual_names(tmp_path: Path) -> None:
    model = prepared("llava")
    file = tmp_path / "p.png"
    picture(0).save(file)
    rows = [{"image": str(file), "question": "yes", "kind": k, "where": k} for k in (0, 1, 0, 1)]
    data = Rows(rows)
    given: dict[str, Any] = {"out": tmp_path / "f", "batch": 2, "label_column": "kind", **QUIET}
    found = extract(model, data, SITE, at=LastToken(), **given)
    assert (found.labels, found.texts[0]) == ([0, 1, 0, 1], "yes")
    data.read.clear()
    extract(model, data, SITE, at=LastToken(), **given)
    assert data.read == [0, 2]  # nothing but the first item of each batch is read again
    with pytest.raises(DataError, match="has no text by one of the names"):
        read_item(3, {"image": picture(0)}, Columns(), None)
    assert read_item(3, {"image": picture(0)}, Columns(), "What?").text == "What?"
    with pytest.raises(DataError, match="Item 3: it has no entry 'pic'"):
        read_item(3, {"image": picture(0)}, Columns(image="pic"), "What?")
    assert read_item(0, picture(0), Columns(), "What?").images


# --- what is fitted to them -------------------------------------------------------------------


def test_means_are_an_ablations_reference(tmp_path: Path) -> None:
    model, data = prepared("llava"), items(5)
    found = extract(model, data, [SITE, "blocks.0.attn.hook_z"], out=tmp_path / "f", batch=2,
                    at=LastToken(), **QUIET)  # fmt: skip
    rows = torch.cat(plain(SITE, LastToken(), data))
    torch.testing.assert_close(found.mean(SITE), rows.mean(0), **NEAR)
    streamed = dataset_means(model, iter(data), [SITE], at=LastToken(), batch=2, **QUIET)
    torch.testing.assert_close(streamed[SITE], found.mean(SITE), **NEAR)
    inputs = model.prepare(data[0][0], data[0][1])
    for site in (SITE, "blocks.0.attn.hook_z"):
        mean = found.mean(site)
        edit = Ablate(site, at=LastToken(), to=mean)

        def by_hand(x: torch.Tensor, hook: Any, mean: torch.Tensor = mean) -> torch.Tensor:
            x = x.clone()
            x[0, -1] = mean
            return x

        expected = model.run_with_hooks(inputs, [(site, by_hand)])
        assert torch.equal(model.run_with_hooks(inputs, [edit]), expected)


def test_principal_axes_are_scikit_learns(tmp_path: Path) -> None:
    model = prepared("llava")
    found = extract(model, items(9), SITE, at=LastToken(), out=tmp_path / "f", batch=2,
                    pool="mean", **QUIET)  # fmt: skip
    rows = found[SITE].double().numpy()
    expected = PCA(3).fit(rows)
    components = found.pca(SITE, 3)
    np.testing.assert_allclose(components.variance, expected.explained_variance_, rtol=1e-4)
    np.testing.assert_allclose(components.share, expected.explained_variance_ratio_, rtol=1e-4)
    for mine, theirs in zip(components.axes.numpy(), np.array(expected.components_), strict=True):
        assert abs(mine @ theirs) > 1 - 1e-4
    np.testing.assert_allclose(
        components.project(found[SITE]).abs().numpy(), np.abs(expected.transform(rows)), atol=1e-3
    )
    with pytest.raises(DataError, match="9 rows of"):
        found.pca(SITE, 9)


def test_labels_give_directions_and_probes(tmp_path: Path) -> None:
    model = prepared("llava")
    found = extract(model, items(12), SITE, at=LastToken(), out=tmp_path / "f", batch=5,
                    pool="mean", **QUIET)  # fmt: skip
    rows = found[SITE]
    a = torch.tensor([label == "a" for label in found.labels])
    direction = found.difference_of_means(SITE, "a", "b")
    torch.testing.assert_close(direction.vector, rows[a].mean(0) - rows[~a].mean(0), **NEAR)
    torch.testing.assert_close(
        found.difference_of_means(SITE, "a").vector, direction.vector, **NEAR
    )
    with pytest.raises(DataError, match="No item has the label 'c'; there are a, b"):
        found.difference_of_means(SITE, "c")
    # The labels are the two questions, so the embedding of a word of each tells them apart.
    words = extract(model, items(12), "hook_embed", out=tmp_path / "w", **QUIET,
                    at=lambda item, grids: Span(item[1][:1], occurrence=-1))  # fmt: skip
    probed = words.probe("hook_embed", LogisticRegression(C=1e6, max_iter=1000))
    assert probed.classes == ("a", "b")
    assert probed.accuracy.estimate == 1.0
    assert len(probed.held_out) == 3
    unpooled = extract(model, items(12), SITE, at=LastToken(),
                       out=tmp_path / "g", batch=5, **QUIET)  # fmt: skip
    assert unpooled.probe(SITE).classes == ("a", "b")
    bare = [(image, text) for image, text, _ in items(4)]
    without = extract(model, bare, SITE, at=LastToken(), out=tmp_path / "h", **QUIET)
    with pytest.raises(DataError, match="have no label"):
        without.probe(SITE)


def test_sums_in_parts_are_those_of_the_whole() -> None:
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    sums = Sums(second=True)
    for part in rows.split([1, 30, 19]):
        sums.add(part)
    torch.testing.assert_close(sums.mean(), rows.double().mean(0))
    torch.testing.assert_close(sums.covariance(), rows.double().T.cov(), rtol=1e-9, atol=1e-9)
    with pytest.raises(DataError, match="no rows"):
        Sums().mean()

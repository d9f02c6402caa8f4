"""What is saved comes back exactly, under the same key alone, and never in half."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image
from safetensors.numpy import load, save

from helpers import synthetic_results as synthetic
from hooked_vlm.disk.files import writable_folder, write_file
from hooked_vlm.errors import DataError, HookedVLMWarning
from hooked_vlm.experiments.result import Cases, Result
from hooked_vlm.report import results
from hooked_vlm.report.results import load_result, read_result, save_result


@pytest.mark.parametrize("result", synthetic.all_results(), ids=lambda result: result.id)
def test_round_trip_is_exact(result: Result, tmp_path: Path) -> None:
    save_result(result, tmp_path, "key", seconds=1.5)
    saved = load_result(tmp_path, result.name, "key")
    assert saved is not None
    assert saved.seconds == 1.5
    back = saved.result
    pd.testing.assert_frame_equal(back.table, result.table, check_exact=True)
    assert set(back.arrays) == set(result.arrays)
    for name, array in result.arrays.items():
        xr.testing.assert_identical(back.arrays[name], array)
        assert back.arrays[name].dtype == array.dtype
    assert set(back.images) == set(result.images)
    for name, image in result.images.items():
        np.testing.assert_array_equal(np.asarray(back.images[name]), np.asarray(image))
    for word in ("id", "name", "title", "claim", "section", "verdict", "config", "notes"):
        assert getattr(back, word) == getattr(result, word)
    assert (back.cases is None) == (result.cases is None)
    if back.cases is not None and result.cases is not None:
        assert back.cases.failed == result.cases.failed
        pd.testing.assert_frame_equal(back.cases.table, result.cases.table, check_exact=True)


def test_cases_say_which_failed() -> None:
    cases = synthetic.e1().cases
    assert cases is not None
    assert list(cases.failing["case"]) == ["left of red", "left of <b>"]
    with pytest.raises(DataError, match=r"\['case'\]; expected case and ok"):
        Cases(failed="questions", table=pd.DataFrame({"case": ["left"]}))


def test_an_array_that_lies_transposed_in_memory_comes_back_as_it_was(tmp_path: Path) -> None:
    maps = xr.DataArray(np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1), dims=("a", "b", "c"))
    assert not maps.values.flags.c_contiguous
    save_result(dataclasses.replace(synthetic.e3(), arrays={"maps": maps}), tmp_path, "key")
    saved = load_result(tmp_path, "ordering-probes", "key")
    assert saved is not None
    xr.testing.assert_identical(saved.result.arrays["maps"], maps)


def test_missing_values_in_text_and_number_columns(tmp_path: Path) -> None:
    table = synthetic.e2().table
    table.loc[3, ["low", "high"]] = np.nan
    table["kind"] = ["strip", None] * (len(table) // 2)
    save_result(dataclasses.replace(synthetic.e2(), table=table), tmp_path, "key")
    saved = load_result(tmp_path, "final-token", "key")
    assert saved is not None
    back = saved.result
    assert back.table["low"].isna().sum() == 1
    assert back.table["kind"].isna().tolist() == table["kind"].isna().tolist()


def test_another_key_finds_nothing(tmp_path: Path) -> None:
    save_result(synthetic.e1(), tmp_path, "one key")
    assert load_result(tmp_path, "behaviour", "another key") is None
    assert load_result(tmp_path, "never-saved", "one key") is None


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    save_result(synthetic.e1(), tmp_path, "old")
    save_result(dataclasses.replace(synthetic.e1(), images={}), tmp_path, "new")
    assert load_result(tmp_path, "behaviour", "old") is None
    saved = load_result(tmp_path, "behaviour", "new")
    assert saved is not None
    assert saved.result.images == {}
    assert not list((tmp_path / "behaviour" / "images").iterdir())


def test_a_save_that_fails_leaves_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_result(synthetic.e3(), tmp_path, "old")

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(results, "write_synced", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_result(synthetic.e3(), tmp_path, "new")
    assert load_result(tmp_path, "ordering-probes", "old") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["ordering-probes"]


def test_a_file_cut_short_is_computed_again(tmp_path: Path) -> None:
    folder = save_result(synthetic.e1(), tmp_path, "key")
    about = folder / "result.json"
    about.write_text(about.read_text()[:50])
    with pytest.warns(HookedVLMWarning, match="is damaged.*It is computed again"):
        assert load_result(tmp_path, "behaviour", "key") is None


def test_write_file_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "numbers.csv"
    write_file(path, "a\n1\n")
    write_file(path, b"a\n2\n")
    assert path.read_text() == "a\n2\n"
    assert list(path.parent.iterdir()) == [path]


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match=r"Cannot write to the output folder .*taken"):
        writable_folder(tmp_path / "taken")
    with pytest.raises(DataError, match="Name a folder"):
        writable_folder(tmp_path / "taken" / "inside")


def test_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert not list(folder.iterdir())


def damaged(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def fewer_rows(data: bytes) -> bytes:
    return b"".join(data.splitlines(keepends=True)[:3])


def other_shape(data: bytes) -> bytes:
    return save({name: array[..., :1].copy() for name, array in load(data).items()})


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("table.csv", fewer_rows, "table.csv differs from its checksum"),
        ("table.csv", lambda data: data.replace(b"0.", b"1."), "table.csv differs"),
        ("arrays.safetensors", other_shape, "arrays.safetensors differs"),
        ("arrays.safetensors", lambda data: data[:-8], "arrays.safetensors differs"),
        ("images/000.png", lambda data: data[:-8], "images/000.png differs"),
        ("result.json", lambda data: data.replace(b'"E3"', b'"E4"'), "result.json does not have"),
        ("result.json", lambda data: b"[" * 100_000, "result.json cannot be read"),
        ("result.json", lambda data: b"\xff\xfe\x00", "result.json cannot be read"),
        ("result.json", lambda data: b"null", "result.json does not have"),
    ],
)
def test_g4_a_damaged_result_is_computed_again_and_that_is_said(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], says: str
) -> None:
    folder = save_result(synthetic.e3(), tmp_path, "key")
    damaged(folder, name, change)
    with pytest.warns(HookedVLMWarning, match=f"{says}.* It is computed again"):
        assert load_result(tmp_path, "ordering-probes", "key") is None
    with pytest.raises(DataError, match="is damaged"):
        read_result(folder)


@pytest.mark.parametrize("name", ["table.csv", "arrays.safetensors", "images/000.png"])
def test_g4_a_missing_file_is_damage(tmp_path: Path, name: str) -> None:
    (save_result(synthetic.e3(), tmp_path, "key") / name).unlink()
    with pytest.warns(HookedVLMWarning, match=f"{name} is missing"):
        assert load_result(tmp_path, "ordering-probes", "key") is None


def signed(about: dict) -> str:
    """Returns the text of a result.json whose own checksum is right."""
    return json.dumps({**about, "sha256": results._own_sha256(about)})


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "images/../../secret.png", 3])
def test_h7_a_result_names_no_picture_outside_its_folder(tmp_path: Path, name: object) -> None:
    folder = save_result(synthetic.e1(), tmp_path, "key")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    about = json.loads((folder / "result.json").read_text())
    about["images"] = dict.fromkeys(about["images"], name)
    (folder / "result.json").write_text(signed(about))
    with pytest.raises(DataError, match="which is no file of a result"):
        read_result(folder)


def test_h7_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = save_result(synthetic.e1(), tmp_path, "key")
    secret = tmp_path / "secret.png"
    (folder / "images/000.png").rename(secret)
    (folder / "images/000.png").symlink_to(secret)
    with pytest.raises(DataError, match="which is no file of a result"):
        read_result(folder)


def test_j2_what_a_signed_result_says_wrongly_is_named_from_its_first_letter(
    tmp_path: Path,
) -> None:
    folder = save_result(synthetic.e1(), tmp_path, "key")
    about = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(signed({**about, "rows": about["rows"] + 1}))
    says = r"is damaged: result\.json does not describe its files \(ValueError: \d+ rows in table"
    with pytest.raises(DataError, match=says):
        read_result(folder)

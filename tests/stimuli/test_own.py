"""A user's own data: what is read, and the message of each mistake."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hooked_vlm.errors import DataError, DataProblemsError, MissingExtraError
from hooked_vlm.stimuli import settings
from hooked_vlm.stimuli.own import OwnData, tables
from hooked_vlm.stimuli.own import data as own_data


GOOD = {"image": "a.png", "question": "Its color is ", "answer": "red"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("a", (96, 96)), ("b", (96, 96)), ("small", (64, 96))):
        color = "gray" if name == "b" else "white"  # files of equal bytes are one picture
        Image.new("RGB", size, color).save(tmp_path / f"{name}.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "list.txt").write_text("no picture")
    Image.new("L", (96, 96)).save(tmp_path / "black.png")
    mask = np.zeros((96, 96), dtype=np.uint8)
    mask[:16, :32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    text = "\n".join(json.dumps({**GOOD, **row}) for row in rows)
    (folder / "items.jsonl").write_text(text)
    return folder


WRONG = {
    "missing picture": ({"image": "x.png"}, "items.jsonl:1: image '…x.png' is missing"),
    "cut picture": ({"image": "cut.png"}, "image '…cut.png' cannot be read as a picture"),
    "no picture": ({"image": "list.txt"}, "image '…list.txt' cannot be read as a picture"),
    "outside": ({"image": "../a.png"}, "'../a.png' leads out of the table's folder"),
    "a box twice": ({"boxes": '{"cup": [0,0,9,9], "cup": [0,0,8,8]}'}, "'cup' is there twice"),
    "a box twice, with a space": (
        {"boxes": {"cup": [0, 0, 9, 9], " cup": [0, 0, 8, 8]}},
        "boxes has 'cup' twice",
    ),
    "itself": ({"counterfactual": "a.png"}, "counterfactual is the image itself"),
    "absolute": ({"image": "/a.png"}, "leads out of the table's folder"),
    "number as picture": ({"image": 3}, "image is 3; expected the path of a picture"),
    "empty answer": ({"answer": " "}, "answer is empty"),
    "answer of signs": ({"answer": "!"}, "answer is '!', which has no letter and no digit"),
    "empty question": ({"question": ""}, "question is empty"),
    "empty id": ({"id": ""}, "id is empty"),
    "question of numbers": ({"question": 3}, "question is 3; expected a text"),
    "wide box": ({"boxes": {"cup": [0, 0, 97, 9]}}, "box 'cup' is (0, 0, 97, 9); expected"),
    "empty box": ({"boxes": {"cup": [9, 0, 9, 9]}}, "inside the picture of 96x96 px"),
    "three numbers": ({"boxes": {"cup": [0, 0, 9]}}, "boxes has 'cup': [0, 0, 9]; expected four"),
    "boxes as list": ({"boxes": [[0, 0, 9, 9]]}, "expected values by name"),
    "nan": ({"boxes": {"cup": [0, 0, 9, True]}}, "expected four numbers"),
    "mask's size": ({"masks": {"cup": "small.png"}}, "cup '…small.png' has 64x96 px"),
    "black mask": ({"masks": {"cup": "black.png"}}, "mask 'cup' is black throughout"),
    "two of a name": (
        {"masks": {"cup": "mask.png"}, "boxes": {"cup": [0, 0, 9, 9]}},
        "'cup' is the name of a box and of a mask",
    ),
    "counterfactual's size": (
        {"counterfactual": "small.png", "counterfactual_answer": "blue"},
        "has 64x96 px and the picture 96x96",
    ),
    "same answer": (
        {"counterfactual": "b.png", "counterfactual_answer": "Red."},
        "counterfactual_answer is the answer itself",
    ),
    "answer of nothing": ({"counterfactual_answer": "blue"}, "without a counterfactual"),
    "wrong and right": ({"other_answers": ["blue", "red"]}, "is among other_answers too"),
    "split": ({"split": "tain"}, "expected train or test. Did you mean 'train'?"),
}


@pytest.mark.parametrize(("row", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_told_with_its_line(folder: Path, row: dict, said: str) -> None:
    with pytest.raises(
        DataProblemsError, match=r"1 problem in items.jsonl; nothing was run\."
    ) as e:
        OwnData.read(write(folder, row))
    first, _, last = said.partition("…")
    told = e.value.problems[0]
    assert told.startswith("items.jsonl:1: ")
    assert first in told
    assert last in told


def test_every_problem_is_listed_and_many_are_counted(folder: Path) -> None:
    rows = [{"id": "one", "question": str(i)} for i in range(30)]
    rows.append({"id": "two", "question": "0", "answer": "blue"})
    with pytest.raises(DataProblemsError) as e:
        OwnData.read(write(folder, *rows))
    lines = str(e.value).splitlines()
    assert lines[0] == "30 problems in items.jsonl; nothing was run."
    assert lines[1] == "  items.jsonl:2: id 'one' is that of items.jsonl:1 too"
    assert lines[-1] == "  and 10 more"
    assert len(lines) == 22
    assert e.value.problems[-1] == (
        "items.jsonl:31: answer 'blue', and items.jsonl:1 has 'red' for the same image and question"
    )
    assert str(copy.deepcopy(e.value)) == str(e.value)


CSV = {
    "Windows and a mark": "\ufeffimage,question,answer\r\na.png,Q,red\r\nb.png,Q,blue\r\n",
    "semicolons": "image;question;answer\na.png;Q;red\nb.png;Q;blue",
    "old Macintosh": "image,question,answer\ra.png,Q,red\rb.png,Q,blue\r",
    "blank lines": "\nimage,question,answer\n\na.png,Q,red\n,,\nb.png,Q,blue\n\n",
    "empty fields at the end": "image,question,answer,,\na.png,Q,red,,\nb.png,Q,blue\n",
    "notes": "image,question,answer,_note\na.png,Q,red,\nb.png,Q,blue,dark\n",
}


@pytest.mark.parametrize("text", CSV.values(), ids=CSV)
def test_tables_of_other_programs(folder: Path, text: str) -> None:
    (folder / "items.csv").write_bytes(text.encode())
    data = OwnData.read(str(folder))
    assert [(item.id, item.answer) for item in data.items] == [("1", "red"), ("2", "blue")]
    assert sorted(data.files()) == ["data", "data/a.png", "data/b.png"]


BROKEN = {
    "UTF-16": ("image,question,answer\n".encode("utf-16"), "UTF-16. Save it as UTF-8"),
    "Latin-1": ("image,question\nä".encode("latin-1"), "not UTF-8: byte 0xe4 in line 2"),
    "fields": (b"image,question,answer\na.png,Q,red,blue", "items.csv:2: 4 fields; the header"),
    "quotes": (b'image,question,answer\n"a.png,Q,red', "items.csv:2: no CSV"),
    "columns": (b"image,question,anwser\na.png,Q,red", "Did you mean 'answer'?"),
    "twice": (b"image,image,question,answer\n", "column 'image' is there 2 times"),
    "header alone": (b"image,question,answer\n", "no row"),
    "empty": (b"", "no row"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_tables(folder: Path, content: bytes, said: str) -> None:
    (folder / "items.csv").write_bytes(content)
    with pytest.raises(DataError) as e:
        OwnData.read(folder)
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "items.jsonl:1: no JSON object"),
        ("[]", "items.jsonl:1: []; expected an object"),
        ('{"image": NaN}', "NaN is no number"),
        ('{"image": "a.png", "image": "b.png"}', "'image' is there twice"),
    ],
)
def test_broken_lines(folder: Path, line: str, said: str) -> None:
    (folder / "items.jsonl").write_text(line)
    with pytest.raises(DataError) as e:
        OwnData.read(folder)
    assert said in str(e.value)


def test_what_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("image,question,answer\n")
    for source, said in (
        (tmp_path, "expected items.csv or items.jsonl. It has rows.csv."),
        (tmp_path / "x", "There is no folder or table"),
        ("", "An empty text"),
        (3, "expected a folder with items.csv"),
    ):
        with pytest.raises(DataError, match=said.replace(".", r"\.")):
            OwnData.read(source)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"hooked-vlm\[datasets\]"):
        OwnData.read(tmp_path)


def test_every_column_is_read(folder: Path) -> None:
    row = {
        "id": 7,
        "counterfactual": "b.png",
        "other_answers": "blue; green",
        "boxes": {"cup": [0, 0, 32, 16]},
        "masks": {"cat": "mask.png"},
        "split": "Test",
        "direction": "left",
        "label": 1,
    }
    (item,) = OwnData.read(write(folder, row)).items
    assert (item.id, item.split, item.label, item.direction) == ("7", "test", "1", "left")
    # The counterfactual's answer is the first other one where its own column is missing.
    assert item.answers == ("red", "blue", "green")
    other = item.on_counterfactual()
    assert (other.answer, other.other_answers, other.image) == (
        "blue",
        ("green",),
        item.counterfactual,
    )
    assert other.on_counterfactual().answer == "red"


def test_in_memory_and_by_other_names() -> None:
    picture = Image.new("RGB", (32, 32))
    rows = [{"picture": picture, "prompt": f"Q{i}", "answer": "red"} for i in range(3)]
    data = OwnData.read(rows, columns={"image": "picture", "question": "prompt"})
    assert len({item.image.key for item in data.items}) == 1
    assert data.files() == {}
    with pytest.raises(DataError, match="has no column 'img'"):
        OwnData.read(rows, columns={"image": "img"})


class FewRows:
    """A data set as Hugging Face's: rows by slice as lists by column."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, int):
            return self.rows[at]
        return {column: [row[column] for row in self.rows[at]] for column in self.column_names}


def test_a_data_set_keeps_its_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CHUNK", 2)
    encoded = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    rows = [{**GOOD, "image": encoded, "question": f"Q{i}"} for i in range(5)]
    data = OwnData.read(FewRows(rows))
    assert len({item.image.key for item in data.items}) == 1
    assert data.items[4].image.open().size == (96, 96)
    assert not any(isinstance(item.image.source, bytes) for item in data.items)
    with pytest.raises(DataProblemsError, match=r"row 4: image  ?cannot be read as a picture"):
        OwnData.read(FewRows([*rows[:4], {**rows[4], "image": {"bytes": b"no", "path": None}}]))


def test_a_saved_data_set(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list([{**GOOD, "image": str(folder / "a.png")}])
    saved = saved.cast_column("image", datasets.Image()).rename_column("question", "prompt")
    assert len(OwnData.read(saved, columns={"question": "prompt"})) == 1
    saved.rename_column("prompt", "question").save_to_disk(folder / "saved")
    labelled = saved.add_column("label", [1]).cast_column(
        "label", datasets.ClassLabel(names=["left", "right"])
    )
    numbers = labelled.with_format("torch")
    assert OwnData.read(numbers, columns={"question": "prompt"}).items[0].label == "right"
    data = OwnData.read(folder / "saved")
    assert data.items[0].image.open().size == (96, 96)
    assert "data/state.json" in data.files()
    with pytest.raises(DataError, match="data set of several parts was given \\(train\\)"):
        OwnData.read(datasets.DatasetDict({"train": saved}))


def test_pictures_are_opened_as_viewers_show_them(folder: Path) -> None:
    picture = Image.new("RGB", (96, 64), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(folder / "turned.jpg", exif=exif)
    cut = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    cut.paste((0, 0, 255, 255), (0, 0, 32, 16))
    cut.save(folder / "cut_out.png")
    Image.new("I;16", (96, 96)).save(folder / "deep.png")
    rows = [
        {"image": "turned.jpg", "boxes": {"cup": [0, 0, 64, 96]}},
        {"image": "cut_out.png", "masks": {"cup": "cut_out.png"}},
    ]
    turned, over = OwnData.read(write(folder, *rows)).items
    assert turned.image.open().size == (64, 96)
    assert over.image.open().getpixel((50, 50)) == (255, 255, 255)
    assert over.masks["cup"].pixels().sum() == 32 * 16
    with pytest.raises(DataProblemsError, match=r"deep.png' has values of more than 8 bits"):
        OwnData.read(write(folder, {"image": "deep.png"}))


def test_two_files_of_equal_bytes_are_one_picture(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "mask.png").read_bytes())
    rows = [{"image": "mask.png"}, {"image": "copy.png", "question": "Its size is "}]
    one, two = OwnData.read(write(folder, *rows)).items
    assert one.image.key == two.image.key and one.image.source != two.image.source
    with pytest.raises(DataProblemsError, match="jsonl:1: counterfactual is the image itself"):
        OwnData.read(write(folder, {"image": "mask.png", "counterfactual": "copy.png"}))


def test_a_counterfactual_contradicts_the_row_of_its_picture(folder: Path) -> None:
    pair = {"image": "mask.png", "counterfactual": "a.png", "counterfactual_answer": "blue"}
    said = "jsonl:2: answer 'tan', and items.jsonl:1 has 'blue' for the same image and question"
    with pytest.raises(DataProblemsError, match=said):
        OwnData.read(write(folder, pair, {"image": "a.png", "answer": "tan"}))


def test_numbers_of_other_packages(folder: Path) -> None:
    row = {
        **GOOD,
        "image": str(folder / "a.png"),
        "boxes": {"cup": np.array([0, 0, 9, 9]), "tin": [np.int64(0), 0, 9, np.float32(9.5)]},
        "label": np.int64(3),
        "split": pd.NA,
    }
    (item,) = OwnData.read([row]).items
    assert item.boxes == {"cup": (0, 0, 9, 9), "tin": (0, 0, 9, 9.5)}
    assert (item.label, item.split) == ("3", None)


class Saved(FewRows):
    """A data set that was saved in a folder, as its files have it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(json.loads((folder / "rows.arrow").read_text()))


def rewritten(path: Path, old: str, new: str) -> None:
    """Writes a file anew, in place, with the same size and the same time of modification."""
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_data_are_read_again_after_any_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, {})
    table = settings.own_data(folder)
    assert settings.own_data(folder) is table
    rewritten(folder / "items.jsonl", "red", "tan")
    assert settings.own_data(folder).items[0].answer == "tan"
    (folder / "a.png").write_bytes((folder / "cut.png").read_bytes())
    with pytest.raises(DataProblemsError, match="cannot be read as a picture"):
        settings.own_data(folder)
    # A saved data set: the folder itself does not change with the files in it.
    monkeypatch.setattr(tables, "_from_disk", Saved)
    saved = folder / "saved"
    saved.mkdir()
    (saved / "rows.arrow").write_text(json.dumps([{**GOOD, "image": str(folder / "b.png")}]))
    for name in ("state.json", "dataset_info.json"):
        (saved / name).write_text("{}")
    assert settings.own_data(saved) is settings.own_data(saved)
    rewritten(saved / "rows.arrow", "red", "tan")
    assert settings.own_data(saved).items[0].answer == "tan"


def test_a_picture_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, bool]] = []

    def size_of(path: Path, whole: bool = True) -> tuple[int, int]:
        opened.append((path.name, whole))
        return 96, 96

    monkeypatch.setattr(own_data, "size_of", size_of)
    monkeypatch.setattr(own_data, "DECODED", 2)
    rows = [{"question": str(i), "image": "ab"[i % 2] + ".png"} for i in range(6)]
    assert len(OwnData.read(write(folder, *rows))) == 6
    assert opened == [("a.png", False), ("b.png", False)]


@pytest.mark.slow
def test_many_rows_take_seconds(folder: Path) -> None:
    """As a user runs it: the tests check every annotation, which takes ten times as long."""
    rows = (f"i{i},a.png,Q {i},red" for i in range(100_000))
    (folder / "items.csv").write_text("\n".join(["id,image,question,answer", *rows]))
    code = (
        "import sys, time; from hooked_vlm.stimuli.own import OwnData; s = time.process_time();"
        "assert len(OwnData.read(sys.argv[1])) == 100_000; print(time.process_time() - s)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 30

"""What `hooked-vlm view` takes and writes; its page is tested in `tests/viewer`."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import ExifTags, Image

from hooked_vlm import cli, zoo
from hooked_vlm.errors import DataError
from hooked_vlm.experiments.loop import silent
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.report import viewing
from hooked_vlm.report.viewing import Asked, write


MODEL = "tiny-qwen2-vl"


def test_a_page_is_written_for_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "p.png")
    asked = Asked(
        image=tmp_path / "p.png", question="What?", answers="red, blue", panels="lens", slots="0,6"
    )
    line = write(MODEL, asked, tmp_path / "new" / "v.html", "cpu", "float32", silent)
    page = (tmp_path / "new" / "v.html").read_text(encoding="utf-8")
    assert line.startswith(f"page: {tmp_path / 'new' / 'v.html'} (0.")
    assert '"answers": ["red", "blue"]' in page and "blocks.5.hook_resid_post" in page
    assert "blocks.2.hook_resid_post" not in page


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"question": "What?"}, "--image and --question are given together"),
        ({"source": Path("p.png")}, "--source is another picture"),
        ({"panels": "lens,atention"}, "Did you mean 'attention'"),
        ({"layers": "0,x"}, "--layers was given '0,x'"),
        ({"slots": ","}, "--slots was given ','"),
        ({"answers": ","}, "--answers was given ','"),
        ({"limit_mb": float("nan")}, "--limit-mb must be at least 0"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Asked(**given)


@pytest.mark.parametrize(
    ("image", "out", "said"),
    [
        ("absent.png", "v.html", "absent.png' cannot be read as a picture"),
        ("text.png", "v.html", "text.png' cannot be read as a picture"),
        ("p.png", ".", "is a folder"),
    ],
)
def test_files_are_checked_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, out: str, said: str
) -> None:
    monkeypatch.setattr(viewing, "HookedVLM", None)
    Image.new("RGB", (64, 48)).save(tmp_path / "p.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=said):
        asked = Asked(image=tmp_path / image, question="What?")
        write(MODEL, asked, tmp_path / out, "cpu", "float32", silent)


def test_the_command_gives_its_options_on_and_prints_one_json_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def noted(*arguments: Any) -> str:
        *told, on_progress = arguments
        given.extend(told)
        on_progress(0, 2)
        return "page: v.html"

    monkeypatch.setattr(viewing, "write", noted)
    out = str(tmp_path / "v.html")
    words = "--panels lens --layers 0,2 --slots 1 --answers red --limit-mb 3 --device cpu --json"
    monkeypatch.setattr(sys, "argv", ["hooked-vlm", "view", MODEL, "--out", out, *words.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    said = capsys.readouterr()
    assert json.loads(said.out) == {"page": out}
    assert f"{MODEL}: view, 2 steps" in said.err
    asked = Asked(panels="lens", layers="0,2", slots="1", answers="red", limit_mb=3.0)
    assert given == [MODEL, asked, Path(out), "cpu", "auto"]


@pytest.mark.parametrize(("turned", "size"), [(1, (64, 48)), (6, (48, 64))])
def test_a_picture_is_opened_upright(
    turned: int,
    size: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes: list[tuple[int, int]] = []

    def made(_: Any, __: Any, images: list[Image.Image], ___: Any) -> Any:
        sizes.extend(image.size for image in images)
        return SimpleNamespace(to_html=lambda _: "")

    monkeypatch.setattr(viewing, "make", made)
    monkeypatch.setattr(viewing.HookedVLM, "from_pretrained", lambda *_, **__: None)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    Image.new("RGB", (64, 48)).save(tmp_path / "p.jpg", exif=exif)
    asked = Asked(image=tmp_path / "p.jpg", question="What?")
    write(MODEL, asked, tmp_path / "v.html", "cpu", "float32", silent)
    assert sizes == [size]
    assert capsys.readouterr().err == f"hooked-vlm: loading {MODEL} …\n"


def test_a_wrong_layer_is_refused_before_probes_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing, "order_probes", None)  # none are fitted
    with pytest.raises(DataError, match="expected some of 0 to 5"):
        viewing.make(HookedVLM.from_pretrained(MODEL), Asked(layers="9"), [], silent)
    with pytest.raises(DataError, match=r"limit_mb is 0\.01"):
        viewing.make(HookedVLM.from_pretrained(MODEL), Asked(limit_mb=0.01), [], silent)


@pytest.mark.slow
@pytest.mark.parametrize("model", zoo.available())
def test_the_page_of_a_shipped_model_is_small(model: str, tmp_path: Path) -> None:
    write(model, Asked(), tmp_path / "v.html", "cpu", "float32", silent)
    assert 500_000 < (tmp_path / "v.html").stat().st_size < 5_000_000

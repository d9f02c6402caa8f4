"""What a release needs: citation, issue forms, licences of all files, and packages that install."""

import contextlib
import fnmatch
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import hooked_vlm
from docs import set_repository
from hooked_vlm import zoo


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXT = {".py", ".md", ".pyc", ".txt"}
"""Files that are this project's own code and text."""


def rows(page: str) -> list[list[str]]:
    """The rows of a page's tables, without heads, as their cells."""
    lines = (ROOT / page).read_text().splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return [row for row in cells if not set("".join(row)) <= set("-: ")]


def test_the_citation_has_the_fields_of_its_format() -> None:
    """Of the Citation File Format 1.2.0, of whose fields five are required."""
    given = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    known = required | {"type", "abstract", "version", "license", "keywords", "repository-code"}
    assert required <= given.keys() <= known
    assert (given["cff-version"], given["type"]) == ("1.2.0", "software")
    assert [set(author) for author in given["authors"]] == [{"name"}]
    assert given["authors"] == PROJECT["authors"]
    assert given["abstract"] == PROJECT["description"]
    assert given["keywords"] == PROJECT["keywords"]
    assert (given["version"], given["license"]) == (PROJECT["version"], PROJECT["license"])
    assert given["title"].replace("_", r"\_") in (ROOT / "README.md").read_text()
    assert given.get("repository-code") == set_repository.address()


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_is_one(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)
    if name == "bug":
        needed = {f["id"] for f in fields if f.get("validations", {}).get("required")}
        assert {"model", "versions", "check"} <= needed


def test_the_line_of_the_bug_form_prints_versions() -> None:
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    (line,) = re.findall(r'python -c "(.*)"', form)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(line, {})
    assert {hooked_vlm.__version__, torch.__version__} <= set(printed.getvalue().split())


def shipped() -> list[str]:
    """Files that the repository or its packages have, but for code and text."""
    folders = ["hooked_vlm", "docs", "examples", "training", "tests", "benchmarks"]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in found if path.suffix not in TEXT]
    names = [name for name in names if "/." not in name]  # caches of tools, such as .hypothesis
    ignored = (ROOT / ".gitignore").read_text()
    assert "/training/runs/*-[0-9]/*" in ignored
    kept = ("training/runs/encoders/", "training/runs/specimen/")  # of runs, these weights alone
    return [
        name
        for name in names
        if not name.startswith("training/runs/") or name.startswith(kept)
        if not name.endswith((".toml", "checkpoint.safetensors"))
    ]


def test_every_file_has_a_licence_and_a_source() -> None:
    listed = [row for row in rows("docs/reference/files.md") if row[0].startswith("`")]
    assert all(len(row) == 4 and all(row) for row in listed)
    patterns = [row[0].strip("`") for row in listed]
    files = shipped()
    missing = [f for f in files if not any(fnmatch.fnmatchcase(f, p) for p in patterns)]
    assert not missing, "docs/reference/files.md lacks these files"
    assert not [p for p in patterns if not fnmatch.filter(files, p)], "no file has these names"


def test_the_notice_names_every_picture_of_the_package() -> None:
    assets = ROOT / "hooked_vlm" / "stimuli" / "assets"
    named = set(re.findall(r"^\| `(\S+)` \|", (assets / "NOTICE.md").read_text(), re.MULTILINE))
    assert named == {path.name for path in assets.glob("*/*")}


def test_what_is_public_is_what_the_reference_has() -> None:
    pages = (ROOT / "docs" / "reference" / "api").glob("*.md")
    shown = {n for p in pages for n in re.findall(r"^::: (\S+)$", p.read_text(), re.MULTILINE)}
    own = {f"{home}.{name}" for name, home in hooked_vlm._homes().items()}
    others = [row[0].strip("`") for row in rows("docs/reference/stability.md")]
    assert shown - own == {name for name in others if name.startswith("hooked_vlm.")} - {
        "hooked_vlm.__all__"
    }
    assert own - shown <= {f"hooked_vlm.errors.{name}" for name in hooked_vlm.__all__}


@pytest.mark.parametrize("page", ["README.md", "docs/contributing.md", "docs/notebooks/index.md"])
def test_no_line_to_install_has_a_placeholder(page: str) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    lines = "".join(code for language, code in blocks if language in ("", "bash"))
    assert not re.findall(r"<[^>]+>|YOUR|OWNER|example\.", lines)


def test_the_address_of_the_repository_is_written_everywhere(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "CITATION.cff", "mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs" / "notebooks", tmp_path / "docs" / "notebooks")
    for url in ("https://github.com/first/one.git", "https://github.com/second/other"):
        set_repository.main(url, tmp_path)
    texts = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".md"}
    texts[tmp_path / "README.md"] = (tmp_path / "README.md").read_text()
    assert not [path.name for path, text in texts.items() if "first/one" in text]
    assert not [path.name for path, text in texts.items() if text.count("second/other") < 1]
    assert tomllib.loads(texts[tmp_path / "pyproject.toml"])["project"]["urls"] == {
        "Repository": "https://github.com/second/other"
    }
    assert set_repository.address(tmp_path) == "https://github.com/second/other"
    assert "git clone https://github.com/second/other hooked_vlm" in texts[tmp_path / "README.md"]
    with pytest.raises(SystemExit, match="no address like"):
        set_repository.main("example.org", tmp_path)


# Wheel and source distribution, as `make wheel` makes them.


def hatchling(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", *arguments]
    built = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert not built.returncode, built.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the source distribution, and a wheel made from that."""
    pytest.importorskip("hatchling", reason="the extra test is not installed")
    folder = tmp_path_factory.mktemp("dist")
    hatchling("-d", str(folder), cwd=ROOT)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    hatchling("-t", "wheel", "-d", str(folder / "again"), cwd=unpacked)
    return folder


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.stat().st_size < 25e6
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"hooked_vlm-{PROJECT['version']}.dist-info"
    assert {n.split("/")[0] for n in names} == {"hooked_vlm", info}
    assert {n for n in names if n.startswith(f"{info}/licenses/")} == {
        f"{info}/licenses/LICENSE",
        f"{info}/licenses/hooked_vlm/stimuli/assets/NOTICE.md",
        f"{info}/licenses/hooked_vlm/viewer/assets/d3.LICENSE",
        f"{info}/licenses/hooked_vlm/viewer/assets/plot.LICENSE",
    }
    there = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "hooked_vlm").rglob("*") if p.is_file()
    }
    assert {n for n in there if "__pycache__" not in n} == {n for n in names if info not in n}
    (again,) = (dist / "again").glob("*.whl")  # the source distribution makes the same wheel
    assert set(zipfile.ZipFile(again).namelist()) == names


@pytest.mark.slow
def test_the_source_distribution_has_what_make_needs(dist: Path) -> None:
    (unpacked,) = (dist / "unpacked").iterdir()
    needed = "Makefile constraints.txt pyproject.toml mkdocs.yml README.md CITATION.cff LICENSE"
    assert not [name for name in needed.split() if not (unpacked / name).exists()]
    assert (unpacked / "tests" / "download_size.py").exists()
    assert not list(unpacked.rglob("checkpoint.safetensors"))


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(dist: Path, tmp_path: Path) -> None:
    """Without a network: dependencies are those of this environment, after the new one's own."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    if not python.exists():
        pytest.skip("the layout of environments is another on this system")
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--quiet", str(wheel)], check=True, timeout=300)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "zz_dependencies.pth").write_text(str(Path(torch.__file__).parent.parent))
    code = """
import importlib.metadata, pathlib, sys
import hooked_vlm
from hooked_vlm import HookedVLM, zoo
from PIL import Image
home = pathlib.Path(hooked_vlm.__file__).parent
assert home.is_relative_to(sys.prefix), home
assert (home / "py.typed").exists() and list(home.glob("report/templates/*.j2"))
assert importlib.metadata.metadata("hooked-vlm")["License-Expression"] == "MIT"
for name in zoo.available():
    model = HookedVLM.from_pretrained(name)
    side = model.require_vision().image_size or 96
    inputs = model.prepare(Image.new("RGB", (side, side)), "What is this?")
    print(name, tuple(model(inputs).shape))
"""
    ran = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True, check=False
    )
    assert ran.stdout.count("tiny-") == len(zoo.available()), ran.stderr
    help_ = subprocess.run([python.parent / "hooked-vlm", "--help"], capture_output=True, env={})
    assert not help_.returncode, help_.stderr

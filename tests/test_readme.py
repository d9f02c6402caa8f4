"""The code in the README and the documentation runs, page by page, and links lead somewhere."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from hooked_vlm.cli import app


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
OF_ALL = {"-h", "--help"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_code_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # pages may write files
    names: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in re.findall(r"hooked-vlm ([^`\n]+)", page.read_text().replace("\\\n", " ")):
        name, *words = line.partition(" # ")[0].split()
        options = {word.partition("=")[0].strip("'\"") for word in words if word[0] == "-"}
        if name[0] == "-":  # of the program itself
            options, known = {name, *options}, {"--version", "--install-completion"}
        else:
            assert name in COMMANDS, line
            known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert options <= known | OF_ALL, line

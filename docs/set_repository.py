"""Writes the public address of the repository wherever it is needed.

    python docs/set_repository.py https://github.com/OWNER/NAME

The address is kept in one place, `[project.urls]` of pyproject.toml.  Until it is there, nothing
names one: the README installs from a copy of the repository, and the notebooks from a wheel
beside them.  With it the README clones, CITATION.cff and the site name it, and the notebooks open
in Colab by their links and install from it.
"""

import argparse
import json
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com/"
GITHUB = re.compile(r"https://github\.com/(?P<path>[\w.-]+/[\w.-]+?)(?:\.git)?/?")
INSTALL = """\
import importlib.util

if importlib.util.find_spec("hooked_vlm") is None:  # on Colab
    %pip install --quiet {package}"""


def address(root: Path = ROOT) -> str | None:
    """Returns the address in pyproject.toml; None where there is none yet."""
    found = re.search(r'^Repository = "(.*)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    return found[1] if found else None


def colab(name: str, url: str | None) -> str:
    """Returns the line of a notebook that opens it in Colab.

    >>> colab("first-steps", "https://github.com/a/b")
    '[Open in Colab](https://colab.research.google.com/github/a/b/blob/main/docs/notebooks/first-steps.ipynb)'
    """
    path = f"docs/notebooks/{name}.ipynb"
    if url is None:
        return f"[Open in Colab]({COLAB}): upload `{path}` and the wheel that `make wheel` builds."
    return f"[Open in Colab]({COLAB}github/{GITHUB.fullmatch(url)['path']}/blob/main/{path})"


def install(url: str | None) -> str:
    """Returns the first code cell of a notebook."""
    return INSTALL.format(package="hooked_vlm-*.whl" if url is None else f"git+{url}")


def main(url: str, root: Path = ROOT) -> None:
    """Writes the address into all files of a copy of the repository."""
    if not GITHUB.fullmatch(url):
        raise SystemExit(f"'{url}' is no address like https://github.com/OWNER/NAME.")
    url = f"https://github.com/{GITHUB.fullmatch(url)['path']}"
    _replace(
        root / "pyproject.toml",
        r'(\[project\.urls\]\nRepository = ".*"\n\n)?(?=\[project\.optional)',
        f'[project.urls]\nRepository = "{url}"\n\n',
    )
    _replace(
        root / "CITATION.cff", r"(repository-code: .*\n)?(?=license: )", f"repository-code: {url}\n"
    )
    _replace(root / "mkdocs.yml", r"(repo_url: .*\n)?(?=theme:)", f"repo_url: {url}\n")
    _replace(
        root / "README.md",
        r"(?<=^```\n)(git clone .*\n)?(?=make demo$)",
        f"git clone {url} hooked_vlm && cd hooked_vlm\n",
    )
    for path in sorted((root / "docs" / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        title, code = notebook["cells"][:2]
        text = re.sub(
            r"^\[Open in Colab\].*$",
            colab(path.stem, url),
            "".join(title["source"]),
            flags=re.MULTILINE,
        )
        title["source"] = text.splitlines(keepends=True)
        code["source"] = install(url).splitlines(keepends=True)
        written = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True)
        path.write_text(f"{written}\n", encoding="utf-8")


def _replace(path: Path, pattern: str, text: str) -> None:
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(pattern, text.replace("\\", ""), old, count=1, flags=re.MULTILINE)
    if not count:
        raise SystemExit(f"{path.name} has no place for the address: {pattern}")
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("url", metavar="URL")
    main(parser.parse_args().url)

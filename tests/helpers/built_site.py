"""The documentation's site, built as `make docs` builds it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent.parent


def built_site(folder: Path) -> Path:
    """Builds the site strictly in an empty folder; returns the folder of its pages.

    Skips the test where the extra docs is not installed.
    """
    pytest.importorskip("zensical", reason="the extra docs is not installed")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    (folder / "hooked_vlm").symlink_to(ROOT / "hooked_vlm")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert not built.returncode, built.stdout + built.stderr
    return folder / "site"

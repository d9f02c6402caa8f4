"""The example package, installed into a folder, adds to the command line of another process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose path has the installed package; the installation needs no network."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("plugin") / "plugin"
    shutil.copytree(ROOT / "examples/plugin", source)  # a build may write beside the source
    how = ["--offline", "--no-deps", "--no-cache", "--quiet", "--python", sys.executable]
    subprocess.run([uv, "pip", "install", *how, "--target", folder, source], check=True)
    (folder / "broken.py").write_text("raise RuntimeError('out of order')")
    info = folder / "broken-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[hooked_vlm.experiments]\nhalting = broken\n")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def command(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hooked_vlm", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_it_is_listed_and_runs(environment: dict[str, str], tmp_path: Path) -> None:
    listed = command(environment, "list").stdout
    assert "P1  dimmed                 hooked-vlm-dimmed 0.1.0, this package: How much" in listed
    assert "three-squares              hooked-vlm-dimmed 0.1.0" in listed
    assert "experiment 'halting' of broken 2.0 cannot be used" in listed

    words = ["run", "dimmed", "--model", "tiny-qwen2-vl", "--setting", "three-squares"]
    words += ["--set", "factors=0,1", "--out", str(tmp_path)]
    ran = command(environment, *words)
    assert ran.returncode == 0, ran.stderr
    table = pd.read_csv(tmp_path / "numbers.csv")
    assert list(table["factor"]) == [0.0, 1.0] and table["value"].is_monotonic_increasing
    assert table["value"].iloc[1] == 1 and set(table["n"]) == {12}
    page = (tmp_path / "report.html").read_text()
    assert "accuracy without image tokens" in page and "The claim (this package)" in page
    assert (tmp_path / "figures/P1-three-squares-factors.png").exists()
    record = json.loads((tmp_path / "provenance.json").read_text())
    uses = ["experiment dimmed", "setting three-squares"]
    assert list(record["extensions"]) == [f"{use} of hooked-vlm-dimmed" for use in uses]
    assert all(said.startswith("0.1.0, source sha256 ") for said in record["extensions"].values())

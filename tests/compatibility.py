"""Runs the tests in this environment and writes a row of docs/measured/compatibility.md.

`python tests/compatibility.py LABEL [pytest's arguments]`, in any environment that has the
package with its test extra: `make test-newest` and `make test-oldest` call it.  A row is kept
until the same label is run again; the rows are in docs/measured/compatibility.json.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "measured"
PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "scikit-learn", "scipy", "pandas", "xarray"),
    *("matplotlib", "pillow", "einops", "jaxtyping", "beartype", "accelerate", "pytest"),
    "hypothesis",
)
SHOWN = ("torch", "triton", "transformers", "numpy", "scikit-learn")
SET = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS")
INTRO = """\
# Compatibility

Each row is one run of the test suite in one environment. `python tests/compatibility.py LABEL`
writes a row and this page; `make test-newest` and `make test-oldest` make the environments with
the newest version of everything and with the oldest versions that `pyproject.toml` allows. The
versions that the project is developed with are in `constraints.txt`.

Skipped tests need something that the environment lacks (CUDA, torchao, quanto, bitsandbytes).
"""


def installed(name: str) -> str:
    """Returns an installed version, or a dash."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "–"


def counted(report: Path) -> dict[str, Any]:
    """Returns how many tests passed, failed and were skipped, and which failed."""
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0, "failures": ["pytest did not run"]}
    cases = list(ET.parse(report).getroot().iter("testcase"))
    bad = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "failures": sorted(f"{case.get('classname')}::{case.get('name')}" for case in bad),
    }


def environment() -> dict[str, Any]:
    """Returns the versions, the processor and the settings of this environment."""
    import torch

    build = f" (CUDA {torch.version.cuda})" if torch.version.cuda else " (CPU)"
    return {
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "torch_build": torch.__version__.split("+")[0] + build,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "settings": {name: os.environ[name] for name in SET if name in os.environ},
    }


def page(rows: dict[str, dict[str, Any]]) -> str:
    """Returns the page in Markdown."""
    heads = ("environment", "Python", *SHOWN, "instructions", "passed", "failed", "skipped", "date")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    failures: list[str] = []
    for label, row in rows.items():
        settings = "".join(f", {name}={value}" for name, value in row["settings"].items())
        shown = {**row["versions"], "torch": row["torch_build"]}
        counts = (str(row[count]) for count in ("passed", "failed", "skipped"))
        cells = (
            label, row["python"], *(shown[name] for name in SHOWN),
            f"{row['machine']} {row['instructions']}{settings}", *counts, row["date"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        failures += [f"- {label}: `{name}`" for name in row["failures"]]
    failed = ["", "## Failed", "", *failures] if failures else []
    others = ["", "## All versions", "", f"| environment | {' | '.join(PACKAGES)} |"]
    others.append("|" + "---|" * (len(PACKAGES) + 1))
    for label, row in rows.items():
        others.append(f"| {label} | {' | '.join(row['versions'][name] for name in PACKAGES)} |")
    return "\n".join([INTRO, *lines, *failed, *others]) + "\n"


def main(label: str, arguments: list[str]) -> int:
    """Runs pytest, writes the row, and returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        row = environment() | counted(report) | {"date": datetime.now(UTC).date().isoformat()}
    table = DOCS / "compatibility.json"
    rows = json.loads(table.read_text()) if table.exists() else {}
    rows[label] = row
    table.write_text(json.dumps(rows, indent=1) + "\n")
    (DOCS / "compatibility.md").write_text(page(rows))
    print(f"{label}: {row['passed']} passed, {row['failed']} failed; {DOCS / 'compatibility.md'}")
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python tests/compatibility.py LABEL [pytest's arguments]")
    sys.exit(main(sys.argv[1], sys.argv[2:]))

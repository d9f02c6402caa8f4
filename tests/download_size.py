"""Says before an installation begins that torch's CUDA build will be downloaded, and how not to.

Run by the Makefile in the new environment, whose pip is asked what it would install.  Where
that fails pip's own error is shown, and the installation that follows will fail with it too.
"""

import json
import subprocess
import sys
from pathlib import Path


CUDA = """\
torch will be downloaded with CUDA: about 2.7 GiB, and 5 GiB on the disk.
  A machine without an NVIDIA GPU needs none of it.  Stop here (Ctrl-C), and give instead
      PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make {goals}
  which takes about 0.2 GiB."""


def planned() -> list[str]:
    """Returns the names of what pip would install for torch; empty if it is installed."""
    root = Path(__file__).resolve().parent.parent
    options = ["--dry-run", "--quiet", "--report", "-", "-c", str(root / "constraints.txt")]
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    found = subprocess.run([*pip, *options, "torch"], stdout=subprocess.PIPE, check=False)
    if found.returncode:
        return []
    report = json.loads(found.stdout)
    return [item["metadata"]["name"].lower() for item in report["install"]]


if __name__ == "__main__":
    if any(name.startswith("nvidia-") for name in planned()):
        print(CUDA.format(goals=" ".join(sys.argv[1:]) or "demo"), flush=True)

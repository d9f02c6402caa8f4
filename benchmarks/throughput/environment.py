"""An environment in which other tools stand beside this package, to be timed with it.

    python -m benchmarks.throughput.environment [--at .venv-rivals]

makes it with this Python, installs `rivals/requirements.txt` and this package (as an editable
install, so that the timed code is this checkout's), and prints how to run there.  Other tools
bring many packages along and pin some, so they have no place in the environment of the tests.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path("benchmarks", "throughput", "rivals", "requirements.txt")


def install(python: Path) -> list[str]:
    """Returns the command that installs everything for a Python."""
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    return [*pip, "-r", str(REQUIREMENTS), "-e", ".", "-c", "constraints.txt"]


def make(at: Path) -> Path:
    """Makes the environment, or brings an older one up to date; returns its Python."""
    python = at / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(at, with_pip=True)
    # Neither git nor the linter is to look into it, whatever it is called.
    (at / ".gitignore").write_text("*\n")
    subprocess.run(install(python), cwd=ROOT, check=True)
    return python


def main() -> None:
    """Makes the environment and says how to use it."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--at", type=Path, default=ROOT / ".venv-rivals")
    given = parser.parse_args()
    print(f"installing into {given.at} (minutes, and gigabytes where torch comes with CUDA)")
    python = make(given.at.absolute())
    names = "transformer-lens,nnsight,pyvene"
    print(f"{python} -m benchmarks.throughput --rivals hook-loop,{names}")


if __name__ == "__main__":
    main()

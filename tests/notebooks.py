"""Runs the notebooks of docs/notebooks and stores their outputs.

`python tests/notebooks.py [NAME …]` (`make notebooks`) runs each from top to bottom in a kernel
of its own, in an empty folder, and writes the outputs into the file.  The tests run the same
function and compare what comes out with what is stored.
"""

import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
TOLERANCE = 0.02
"""How far numbers in stored text may be from those of another processor or version."""
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
OF_THE_MACHINE = re.compile(
    r"\d+ pass(es)? of \d+ rows|from positions [\d, ]+|About \S+ \wB beside"
)
"""What a sweep says of its passes, whose size depends on the processor's caches."""
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> Any:
    """Returns a notebook as it is stored."""
    import nbformat

    return nbformat.read(path, as_version=4)


def executed(path: Path) -> Any:
    """Returns the notebook with the outputs of a run from top to bottom."""
    from nbclient import NotebookClient

    notebook = read(path)
    # The kernel imports what this process would, and draws no bars of progress.
    kept = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), *sys.path) if p)}
    kept |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    kept |= {"PYTHONWARNINGS": "ignore:IProgress not found"}  # of tqdm, where widgets are missing
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=kept)
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Returns the notebook without what differs from machine to machine."""
    notebook.metadata = KERNEL
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", {}):  # pictures come as JPEG too
                output.data.pop("image/jpeg", None)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    """Returns the cells with code, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: Any) -> str:
    """Returns what a cell printed, and the text of what it showed."""
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        shown = "" if "image/png" in data else data.get("text/plain", "")
        parts.append(output.get("text", "") or shown)
    return re.sub(r"0x[0-9A-Fa-f]+", "0x…", "\n".join(parts)).strip()


def differ(stored: str, found: str) -> bool:
    """Tells whether two texts differ in more than the last digits of their numbers.

    >>> differ("P = 0.51 of 30", "P = 0.52 of 30"), differ("P = 0.51", "P = 0.6")
    (False, True)
    """
    stored, found = (OF_THE_MACHINE.sub("…", text) for text in (stored, found))
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", found).split():
        return True
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(found), strict=True)
    near = (math.isclose(float(a), float(b), rel_tol=0.01, abs_tol=TOLERANCE) for a, b in pairs)
    return not all(near)


def main(names: list[str]) -> None:
    """Runs the named notebooks (without names: all) and stores them."""
    import nbformat

    unknown = sorted(set(names) - {path.stem for path in FILES})
    if unknown:
        known = ", ".join(path.stem for path in FILES)
        raise SystemExit(f"No notebook is called {', '.join(unknown)}; there are {known}.")
    for path in FILES:
        if not names or path.stem in names:
            nbformat.write(executed(path), path)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Puts small faults into the code, one at a time, and counts those that the tests notice.

`python tests/mutants.py --n 200 --seed 0 --out mutants.jsonl`, or `make mutants`.  Each verdict is
appended to the file at once, and a second call with the same file continues.  `--again` tries the
survivors in the file once more, after tests were added.  Whether a survivor matters is for the
reader to judge: some changes make no difference to any result.

Why no tool: mutmut 3 is well kept, but it changes undecorated functions alone and runs copies of
them that take any arguments, which the shape checks and our reading of signatures both see; it
takes no sample, and one core would need days for all.  cosmic-ray starts an interpreter for every
mutant, which here imports torch and transformers for longer than most tests take.  This script
imports them once and forks.  A mutant's tests are those of its module's own file and of a few
others, as far as they take no more than `--cap` seconds of the processor; a survivor whose tests
took longer is marked.  Nothing is written into the working tree: everything runs in a copy.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helpers.forked_tests import CUT, Watched, in_child, run_tests
from helpers.mutations import Mutant, mutants_of


ROOT = Path(__file__).resolve().parent.parent
COPIED = ("hooked_vlm", "tests", "training", "pyproject.toml")
MODULES = (
    "analysis/statistics.py",
    "engine/*.py",
    "hooks/*.py",
    "inputs/by_*.py",
    "inputs/grid_finder.py",
    "inputs/pixel_*.py",
    "interventions/*.py",
    "regions/*.py",
    "disk/files.py",
    "report/results.py",
)
OWN = {
    "engine": "engine/test_batch.py",
    "engine/fingerprints.py": "engine/test_image_cache.py",
    "hooks": "hooks/test_attach.py",
    "hooks/dispatch.py": "model/test_unusual_models.py",
    "hooks/generation.py": "model/test_generate.py",
    "hooks/hook_point.py": "hooks/test_windows.py",
    "hooks/prompts.py": "model/test_silent_generation.py",
    "interventions": "interventions/test_interventions.py",
    "interventions/hook_at.py": "interventions/test_placing.py",
}
"""By package or module, the tests of a module that has no file of that name."""
FURTHER = {
    "engine": ("engine/test_shared.py", "engine/test_restart.py", "sweeps/test_sweep.py"),
    "hooks": ("hooks/test_attach.py", "hooks/test_describe.py", "model/test_silent_cases.py"),
    "inputs": ("inputs/test_grid_finder.py",),
    "interventions": ("interventions/test_interventions.py", "interventions/test_placing.py"),
    "regions": ("regions/test_grid.py", "regions/test_region.py"),
    "report": ("report/test_results.py",),
}
"""By package, what is run after a module's own tests."""
FEWER = {"return None": 0.2, "condition": 0.5, "constant": 0.7}
"""Kinds of which a share is tried: most are noticed by anything that runs the line."""
# What the library imports from others; with a module missing here a mutant only starts later.
IMPORTED = (
    *("hypothesis", "jaxtyping", "beartype", "matplotlib.pyplot", "pandas", "xarray"),
    *("sklearn.linear_model", "scipy.stats", "torch", "transformers", "transformers.masking_utils"),
    *("transformers.models.gemma3.modeling_gemma3", "transformers.models.llava.modeling_llava"),
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
)
SURVIVED, KILLED, TIMEOUT = "survived", "killed", "timeout"

# --- the sample -----------------------------------------------------------------------------


def modules() -> list[str]:
    """Returns the paths of the modules below the package's folder."""
    package = ROOT / "hooked_vlm"
    found = {path for pattern in MODULES for path in package.glob(pattern)}
    return [str(path.relative_to(package)) for path in sorted(found) if path.name != "__init__.py"]


def sample(n: int, seed: int, only: str = "") -> list[Mutant]:
    """Returns `n` mutants, from every module in proportion to how many it has."""
    sources = {m: (ROOT / "hooked_vlm" / m).read_text() for m in modules() if m.startswith(only)}
    pools: dict[str, list[Mutant]] = {}
    for module, source in sources.items():
        draw = random.Random(f"{seed} {module}")
        pool = mutants_of(module, source)
        pool = [mutant for mutant in pool if draw.random() < FEWER.get(mutant.kind, 1.0)]
        draw.shuffle(pool)
        pools[module] = pool
    # Each in turn from the module that has the smallest share of its mutants in the sample.
    taken = dict.fromkeys(pools, 0)
    picked: list[Mutant] = []
    while len(picked) < n and (open_ := [m for m in pools if taken[m] < len(pools[m])]):
        module = min(open_, key=lambda m: (taken[m] + 0.5) / len(pools[m]))
        mutant = pools[module][taken[module]]
        taken[module] += 1
        if mutant.is_fair(sources[module]):
            picked.append(mutant)
    # Mixed, so that a run that is broken off has tried some of every package.
    random.Random(seed).shuffle(picked)
    return picked


# --- the copy ------------------------------------------------------------------------------


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """Yields a folder with a copy of what tests need, and removes it."""
    work = Path(tempfile.mkdtemp(prefix="mutants-")).resolve()
    try:
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, work / name, ignore=ignore)
            else:
                shutil.copy2(ROOT / name, work / name)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def prepare() -> None:
    """Imports what all processes share; nothing of this package, which differs between them."""
    # The copy's helpers are to be imported, not these.
    sys.path[:] = [path for path in sys.path if path != str(ROOT / "tests")]
    for name in [name for name in sys.modules if name.split(".")[0] == "helpers"]:
        del sys.modules[name]
    # As tests/conftest.py does, before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in IMPORTED:
        importlib.import_module(name)
    import hypothesis
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # The same examples for each mutant; one that fails is not made smaller.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile(
        "mutants", database=None, derandomize=True, deadline=None, phases=phases
    )
    hypothesis.settings.load_profile("mutants")


# --- the verdicts ---------------------------------------------------------------------------


def files_for(module: str) -> list[str]:
    """Returns the files whose tests may notice a fault in a module, its own first."""
    package, name = module.split("/")
    own = f"{package}/test_{name}"
    if not (ROOT / "tests" / own).exists():
        own = OWN.get(module, OWN.get(package, ""))
    files = dict.fromkeys([own, *FURTHER.get(package, ())])
    return [f"tests/{file}" for file in files if file]


def verdict(work: Path, mutant: Mutant, cap: int) -> dict[str, Any]:
    """Returns what became of one mutant."""
    target, noticed = work / "hooked_vlm" / mutant.module, work / "noticed.txt"
    source, times = target.read_text(), target.stat()
    noticed.unlink(missing_ok=True)
    began = time.monotonic()

    def run() -> int:
        sys.dont_write_bytecode = True
        return run_tests(work, files_for(mutant.module), [Watched(noticed, cap)])

    try:
        target.write_text(mutant.applied(source))
        # Bytecode is recognised by the time of the source, in whole seconds.
        os.utime(target, (began + 1e9, began + 1e9))
        status = in_child(work, run, 3 * cap + 60)
    finally:
        target.write_text(source)
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    by = noticed.read_text() if noticed.exists() else f"no test: pytest ended with {status}"
    outcome = SURVIVED if status in (0, CUT) else TIMEOUT if status < 0 else KILLED
    return {
        "name": mutant.name,
        "module": mutant.module,
        "verdict": outcome,
        "by": by if outcome == KILLED else "",
        "cut": status == CUT,
        "seconds": round(time.monotonic() - began, 1),
        "diff": mutant.diff(source),
    }


def report(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns killed ÷ tried by module, then the survivors."""
    lines = []
    for module in sorted({row["module"] for row in rows.values()}):
        own = [row["verdict"] != SURVIVED for row in rows.values() if row["module"] == module]
        lines.append(f"{module:32} {sum(own):4} / {len(own)}")
    survivors = [row for row in rows.values() if row["verdict"] == SURVIVED]
    n, left = len(rows), len(survivors)
    lines.append(f"{'all':32} {n - left:4} / {n} = {(n - left) / max(n, 1):.2f}")
    for row in survivors:
        cut = " (not all tests were run)" if row["cut"] else ""
        lines += ["", f"hooked_vlm/{row['name'].split(' @')[0]}{cut}", row["diff"]]
    return "\n".join(lines)


def main() -> None:
    """Tries the mutants that the file has no verdict for, and prints the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=200, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--out", type=Path, required=True, help="file for the verdicts")
    parser.add_argument("--only", default="", help="beginning of a module's path: hooks/attention")
    parser.add_argument("--cap", type=int, default=60, help="seconds of tests for a mutant")
    parser.add_argument("--again", action="store_true", help="try the file's survivors again")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy is removed
    out: Path = given.out.resolve()
    old = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    rows = {row["name"]: row for row in old}  # of one tried again, the last verdict
    picked = drawn = sample(given.n, given.seed, given.only)
    if given.again:
        picked = [m for m in picked if rows.get(m.name, {}).get("verdict") == SURVIVED]
    else:
        picked = [m for m in picked if m.name not in rows]
    if picked:
        prepare()
        with copied() as work, out.open("a") as file:
            # Compiles everything once, so that no mutant has to.
            files = sorted({file for module in modules() for file in files_for(module)})
            status = in_child(work, lambda: run_tests(work, files, [], "--collect-only"), 900)
            if status:
                sys.exit((work / "output.txt").read_text())
            for number, mutant in enumerate(picked, 1):
                row = verdict(work, mutant, given.cap)
                rows[row["name"]] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{number}/{len(picked)} {row['verdict']} {row['seconds']} s  {row['name']}")
    print(report({m.name: rows[m.name] for m in drawn}))


if __name__ == "__main__":
    main()

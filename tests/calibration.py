"""Measures how often verdicts claim what is not there; writes docs/measured/calibration.md.

`python tests/calibration.py [CASE ...]` draws the arrays that experiments measure, without an
effect, and passes them through the experiments' rows and verdicts (`helpers/simulated_cases.py`).
Without names it runs all cases, in about half an hour on one core.  Rows are kept in
docs/measured/calibration.json until their case is run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from statsmodels.stats.proportion import proportion_confint


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.simulated import SHAPES, fewer_resamples  # noqa: E402
from helpers.simulated_cases import CASES, LIMIT, SIZES, claimed, most  # noqa: E402


DOCS = ROOT / "docs" / "measured"
FIRST, ALL, PAIR = 75, 200, 20
"""Draws of each shape: all of them where one of the first claims an effect.  None of 75 already
excludes a rate of 5 % (95 % interval).  Of two pictures no test of the mean of bounded values
gives p <= 0.05, and fewer draws show that nothing else claims."""
PLANTED = 50
"""Draws and pictures of a planted effect."""
INTRO = f"""\
# How often verdicts claim what is not there

Each row simulates a whole experiment: the arrays that it measures are drawn at random, without
an effect, and pass through the experiment's own rows and verdict. A draw counts where *any*
sentence of the verdict claims an effect, in any direction, on any axis or setting. At most
{LIMIT:.0%} of draws may. `python tests/calibration.py` writes this page, in about half an hour on
one core; `make test-slow` asserts the same in {ALL} draws of each.

The values have six shapes: {", ".join(SHAPES)}.
(Binary is yes/no at 1/2, near 0 and near 1 yes/no at 0.05 and 0.95; of clustered values all of a
picture agree.) *n* is the number of pictures, for each direction or axis. Of the six shapes the
table shows the one with the most claims, or, where none has any, the draws of all six; every shape
is in `calibration.json`. A shape has {FIRST} draws, or as many as `--draws` says ({PAIR} of two
pictures, with which no test can reject), and {ALL} where one of these claims an effect. The
interval is the 95 % binomial one (Clopper and Pearson); the limit is {LIMIT:.0%} of draws and what
chance adds in all but one case of a thousand.
"""
EFFECTS = f"""\
## Planted effects

The same with an effect of the stated size, in {PLANTED} draws of {PLANTED} pictures (symmetric
values): the share of draws in which the verdict finds it.
"""


def interval(found: int, draws: int) -> str:
    """Returns a share of draws with its interval, as text."""
    low, high = proportion_confint(found, draws, alpha=0.05, method="beta")
    return f"{found / draws:.3f} [{low:.3f}, {high:.3f}]"


def measured(name: str, shape: str, n: int, first: int) -> dict[str, Any]:
    """Returns one row: the draws of a case without an effect, and those that claim one."""
    draws = first if n > 2 else min(first, PAIR)
    claims = claimed(name, shape, n, 0.0, draws)
    if claims:
        draws, claims = ALL, claimed(name, shape, n, 0.0, ALL)  # the first are among them
    return {"case": name, "shape": shape, "n": n, "effect": 0.0, "draws": draws, "claims": claims}


def planted(name: str) -> dict[str, Any]:
    """Returns the row of a case with its planted effect."""
    effect = CASES[name].effect
    claims = claimed(name, SHAPES[0], PLANTED, effect, PLANTED)
    about = {"case": name, "shape": SHAPES[0], "n": PLANTED, "effect": effect}
    return {**about, "draws": PLANTED, "claims": claims}


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the page of all rows, in the order of the cases."""
    lines = ["| verdict | without effect | n | most claims for | draws | claims | limit |"]
    lines.append("|---|---|---:|---|---:|---:|---:|")
    for name, case in CASES.items():
        for n in SIZES:
            own = [r for r in rows if (r["case"], r["n"], r["effect"]) == (name, n, 0.0)]
            if not own:
                continue
            worst = max(own, key=lambda row: row["claims"] / row["draws"])
            draws, claims, shape = worst["draws"], worst["claims"], worst["shape"]
            if not claims:
                shape, draws = "no shape", sum(row["draws"] for row in own)
            lines.append(
                f"| {name} | {case.null} | {n} | {shape} | {draws} | {interval(claims, draws)} | "
                f"{most(draws) / draws:.3f} |"
            )
    effects = ["| verdict | planted | found |", "|---|---|---:|"]
    for name, case in CASES.items():
        for row in (r for r in rows if r["case"] == name and r["effect"]):
            found = interval(row["claims"], row["draws"])
            effects.append(f"| {name} | {case.planted} | {found} |")
    return "\n".join([INTRO, *lines, "", EFFECTS, *effects]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("case", nargs="*", help=f"one of: {'; '.join(CASES)}")
    parser.add_argument("--draws", type=int, default=FIRST, help="the first draws of a shape")
    given = parser.parse_args()
    wanted = given.case or list(CASES)
    if unknown := set(wanted) - set(CASES):
        parser.error(f"there is no case {', '.join(unknown)}; use: {'; '.join(CASES)}")
    file = DOCS / "calibration.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    with fewer_resamples():
        for name in wanted:
            start = time.perf_counter()
            rows = [row for row in rows if row["case"] != name]
            rows += [measured(name, shape, n, given.draws) for shape in SHAPES for n in SIZES]
            rows.append(planted(name))
            file.write_text(json.dumps(rows, indent=0) + "\n")
            (DOCS / "calibration.md").write_text(page(rows))
            sys.stdout.write(f"{name}: {time.perf_counter() - start:.0f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

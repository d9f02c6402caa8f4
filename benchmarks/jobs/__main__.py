"""Lines and values of daily jobs, beside those of other tools.

    python -m benchmarks.jobs [--tools ours,transformer-lens,nnsight] [--write FILE]

prints the page; `--write` also writes it, with the numbers as JSON beside it.  The other tools are
in an environment of their own:

    python -m benchmarks.throughput.environment --at .venv-rivals
    .venv-rivals/bin/python -m benchmarks.jobs --tools ours,transformer-lens,nnsight
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.jobs.counted import lines
from benchmarks.jobs.page import NAMES, page
from benchmarks.jobs.tools import judgements
from benchmarks.jobs.world import MODELS
from benchmarks.throughput import rivals


TOOLS = ("ours", "transformer-lens", "nnsight")


def parsed() -> argparse.Namespace:
    """Returns what was asked for; ends the program where a tool is unknown or missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--tools", default="ours", help=", ".join(TOOLS))
    parser.add_argument("--write", type=Path, help="the page; its numbers go to a .json beside it")
    given = parser.parse_args()
    given.tools = given.tools.split(",")
    for tool in given.tools:
        if tool not in TOOLS:
            parser.error(f"no tool {tool!r}; there are {', '.join(TOOLS)}")
        if tool in rivals.RIVALS:
            try:
                rivals.require(tool, "benchmarks.jobs --tools")
            except rivals.MissingRivalError as error:
                raise SystemExit(str(error)) from error
    return given


def measured(tools: list[str]) -> dict[str, Any]:
    """Returns lines, verdicts and versions."""
    verdicts: dict[str, Any] = {model: {tool: {} for tool in tools} for model in MODELS}
    for model in MODELS:
        for tool, job, verdict in judgements(tools, model):
            verdicts[model][tool][job] = verdict
    here = machine()
    versions = {"hooked_vlm": version("hooked-vlm")}
    versions |= {NAMES[tool]: rivals.version(tool) for tool in tools if tool in rivals.RIVALS}
    versions |= {"torch": here["torch"], "transformers": here["transformers"]}
    versions["Python"] = here["python"]
    return {
        "tools": tools,
        "versions": versions,
        "lines": {tool: lines(tool) for tool in ("plain", *tools)},
        "verdicts": verdicts,
    }


def main() -> None:
    """Prints the page, and writes it where asked."""
    given = parsed()
    found = measured(given.tools)
    print(page(found))
    if given.write:
        given.write.write_text(page(found), encoding="utf-8")
        given.write.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

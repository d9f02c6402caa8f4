"""Writes the documentation's results pages from a finished `hooked-vlm reproduce`.

    hooked-vlm reproduce --out reproduced
    python docs/make_results.py reproduced

One page for each experiment, `docs/results/<id>.md`, with what was found on each model
and setting, its figures, and the numbers on top; and `docs/results/index.md`, the table of
all verdicts.  Nothing on these pages is written by hand.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from hooked_vlm.experiments.registry import EXPERIMENTS, steps
from hooked_vlm.experiments.result import Result
from hooked_vlm.report.figures import drawings
from hooked_vlm.report.files import write_file
from hooked_vlm.report.look import to_png
from hooked_vlm.report.page import key_numbers
from hooked_vlm.report.provenance import Provenance
from hooked_vlm.report.results import read_result


OUT = Path(__file__).parent / "results"
DPI = 100
Runs = dict[str, tuple[Provenance, dict[str, Result]]]
"""Model -> its record, and its results by key."""


def read(folder: Path) -> Runs:
    """Returns every model's results in a folder that `reproduce` wrote."""
    runs: Runs = {}
    for record in sorted(folder.glob("*/provenance.json")):
        provenance = Provenance.from_json(record.read_text())
        found = [read_result(path.parent) for path in record.parent.glob("results/*/result.json")]
        # Two checkpoints may have one title; their folders differ.
        title = provenance.title if provenance.title not in runs else record.parent.name
        runs[title] = (provenance, {result.key: result for result in found})
    if not runs:
        raise SystemExit(f"There is no finished run in '{folder}'.")
    return runs


def page(experiment_id: str, runs: Runs) -> str:
    """Returns the page of one experiment, and writes its figures."""
    own = [step for step in steps("reproduce") if step.experiment.id == experiment_id]
    experiment = own[0].experiment
    lines = [
        f"# {experiment.id}: {experiment.title}",
        f"Generated from a run of `hooked-vlm reproduce`; see [{experiment.name}]"
        f"(../experiments/{explained(experiment.name)}.md) for what is computed and how to read "
        "it. "
        f"{made(runs)}",
        f"*The paper ({experiment.section}):* {experiment.claim}",
    ]
    for step in own:
        lines.append(f"## On {step.setting}")
        for model, (_, results) in runs.items():
            if step.key not in results:
                continue
            result = results[step.key]
            lines += [f"### {model}", format_interval(result.verdict)]
            lines += tiles(result)
            for drawing in drawings(result):
                name = f"{result.anchor}-{drawing.name}-{model}.png".replace("/", "-")
                write_file(OUT / "figures" / name, to_png(drawing.figure, dpi=DPI))
                lines += [f"![{drawing.name}](figures/{name})", f"*{drawing.caption}*"]
    return "\n\n".join(lines) + "\n"


def explained(name: str) -> str:
    """Returns the page that explains an experiment."""
    path = Path(__file__).parent / "experiments" / f"{name}.md"
    return name if path.exists() else "dual-mechanisms"


def tiles(result: Result) -> Iterable[str]:
    """Returns a result's key numbers as one line, if it has any."""
    found = key_numbers([result])
    if found:
        yield "; ".join(f"**{tile.value}** {tile.label}" for tile in found) + "."


def format_interval(verdict: str) -> str:
    """Returns a verdict whose lines stay apart."""
    return verdict.replace("\n", "\n\n")


def made(runs: Runs) -> str:
    """Returns what a run was made with."""
    one = next(iter(runs.values()))[0]
    versions = ", ".join(f"{name} {one.packages[name]}" for name in ("torch", "transformers"))
    return f"Made with {versions}, {one.dtype} on {one.device}, seed {one.seed}."


def index(runs: Runs) -> str:
    """Returns the table of every verdict."""
    lines = [
        "# What was found",
        f"Generated from a run of `hooked-vlm reproduce` on the shipped models. {made(runs)} "
        "They are small models trained on these tasks: see "
        "[the small models](../reference/zoo.md).",
        "| | on | " + " | ".join(runs) + " |\n|---|---|" + "---|" * len(runs),
    ]
    for step in steps("reproduce"):
        cells = [
            results[step.key].verdict.replace("\n", "<br>") if step.key in results else "not run"
            for _, results in runs.values()
        ]
        experiment = step.experiment
        lines[-1] += (
            f"\n| [{experiment.id}]({experiment.id.lower()}.md) {experiment.name} | "
            f"{step.setting} | " + " | ".join(cells) + " |"
        )
    seconds = "; ".join(
        f"{model}: {sum(record.seconds.values()) / 60:.0f} minutes"
        for model, (record, _) in runs.items()
    )
    return "\n\n".join([*lines, f"Computing time: {seconds}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="what `hooked-vlm reproduce --out` wrote")
    runs = read(parser.parse_args().folder)
    for old in (OUT / "figures").glob("*.png"):
        old.unlink()
    for experiment in EXPERIMENTS.values():
        if any(step.experiment is experiment for step in steps("reproduce")):
            write_file(OUT / f"{experiment.id.lower()}.md", page(experiment.id, runs))
    write_file(OUT / "index.md", index(runs))
    print(f"wrote {len(list(OUT.glob('*.md')))} pages into {OUT}")


if __name__ == "__main__":
    main()

"""Writes the documentation's results pages from a finished `hooked-vlm reproduce`.

    hooked-vlm reproduce --out reproduced
    python docs/make_results.py reproduced

One page for each experiment, `docs/results/<id>.md`: for each setting a table of its key
numbers, the figures, and the verdicts in words, folded.  `docs/results/index.md` has the first
sentence of every verdict.  Nothing on these pages is written by hand.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from hooked_vlm.disk.files import write_file
from hooked_vlm.experiments.registry import EXPERIMENTS, steps
from hooked_vlm.experiments.result import Result
from hooked_vlm.report.figures import drawings
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
        found = {m: runs[m][1][step.key] for m in runs if step.key in runs[m][1]}
        lines += [f"## On {step.setting}", *numbers(found)]
        for model, result in found.items():
            for drawing in drawings(result):
                name = f"{result.anchor}-{drawing.name}-{model}.png".replace("/", "-")
                write_file(OUT / "figures" / name, to_png(drawing.figure, dpi=DPI))
                lines += [f"![{drawing.name}](figures/{name})", f"*{model}. {drawing.caption}*"]
        for model, result in found.items():
            words = result.verdict.replace("\n", "\n\n")
            lines.append(
                f"<details markdown><summary>{model}, in words: {result.headline}</summary>\n\n"
                f"{words}\n\n</details>"
            )
    return "\n\n".join(lines) + "\n"


def numbers(found: dict[str, Result]) -> Iterable[str]:
    """Returns the key numbers of a setting as one table, a column for each model."""
    tiles = {model: key_numbers([result]) for model, result in found.items()}
    labels = list(dict.fromkeys(tile.label for some in tiles.values() for tile in some))
    if labels:
        rows = [["quantity", *tiles], ["---", *["---:"] * len(tiles)]]
        for label in labels:
            values = [
                next((tile.value for tile in some if tile.label == label), "–")
                for some in tiles.values()
            ]
            rows.append([label, *values])
        yield "\n".join("| " + " | ".join(row) + " |" for row in rows)


def explained(name: str) -> str:
    """Returns the page that explains an experiment."""
    path = Path(__file__).parent / "experiments" / f"{name}.md"
    return name if path.exists() else "dual-mechanisms"


def made(runs: Runs) -> str:
    """Returns what a run was made with."""
    one = next(iter(runs.values()))[0]
    versions = ", ".join(f"{name} {one.packages[name]}" for name in ("torch", "transformers"))
    return f"Made with {versions}, {one.dtype} on {one.device}, seed {one.seed}."


def index(runs: Runs) -> str:
    """Returns the first sentence of every verdict, and the key numbers of every experiment."""
    models = " and ".join(f"`{name}`" for name in runs)
    lines = [
        "# What was found",
        f"Generated from a run of `hooked-vlm reproduce` on {models}. {made(runs)} "
        "They are small models trained on these tasks: see "
        "[the small models](../reference/zoo.md). Each page has the figures, the intervals and "
        "the full verdicts.",
    ]
    for experiment in EXPERIMENTS.values():
        own = [step for step in steps("reproduce") if step.experiment is experiment]
        if not own:
            continue
        lines.append(f"## [{experiment.id}]({experiment.id.lower()}.md): {experiment.title}")
        rows = [["on", *runs], ["---"] * (len(runs) + 1)]
        for step in own:
            cells = [
                results[step.key].headline if step.key in results else "not run"
                for _, results in runs.values()
            ]
            rows.append([step.setting, *cells])
        lines.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
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

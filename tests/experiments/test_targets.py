"""The paper's figures stand beside ours, each where it belongs."""

from pathlib import Path

from helpers import synthetic_results as synthetic
from hooked_vlm.experiments.registry import EXPERIMENTS
from hooked_vlm.experiments.targets import TARGETS, targets
from hooked_vlm.report.page import write_report


def test_every_figure_is_of_an_experiment_that_runs() -> None:
    ids = {experiment.id for experiment in EXPERIMENTS.values()}
    assert {target.id for target in TARGETS} <= ids
    assert len(set(TARGETS)) == len(TARGETS) == 32
    assert {t.value for t in targets("E1", "whatsup")} == {"0.73", "0.62"}
    assert {t.value for t in targets("R3", "whatsup")} == {"0.73", "0.62"}
    assert {t.value for t in targets("E5", "objects")} == {"0.43", "0.54"}
    assert targets("E5", "objects-photos") == targets("E5")  # none there: all of them
    assert targets("Q5") == []


def test_a_report_shows_them(tmp_path: Path) -> None:
    page = write_report([synthetic.e1()], synthetic.provenance(), tmp_path).read_text()
    assert "<td>Gemma-3-4b</td><td>whatsup</td><td>accuracy</td><td>0.62</td>" in page

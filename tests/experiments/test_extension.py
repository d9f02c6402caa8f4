"""What is needed of an experiment or a setting of another distribution, and how it is refused."""

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from hooked_vlm.errors import DataError, HookedVLMWarning
from hooked_vlm.experiments import registry
from hooked_vlm.experiments.options import Config
from hooked_vlm.experiments.result import About, Result
from hooked_vlm.report.figures import Drawing, drawings, headlines
from hooked_vlm.report.listing import listing
from hooked_vlm.stimuli import settings
from hooked_vlm.stimuli.settings import files_of, register_setting, stimulus_set


ABOUT = About(id="X1", name="mine", title="Mine?", claim="None.", section="mine")
TABLE = pd.DataFrame([{"quantity": "accuracy", "value": 0.5}])


def run(model: Any, config: Any, on_progress: Any) -> Result:
    return Result(**vars(ABOUT), table=TABLE, verdict=f"{config.pairs} pairs")


def module(**names: Any) -> types.SimpleNamespace:
    """A module with the names of an experiment, some of them changed."""
    return types.SimpleNamespace(**{"ABOUT": ABOUT, "run": run, **names})


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for extensions in (registry.EXTENSIONS, settings.EXTENSIONS):
        monkeypatch.setattr(extensions, "_registered", {})
    monkeypatch.setattr("hooked_vlm.experiments.registry.with_notes", lambda run: run)


def register(source: Any, **how: Any) -> registry.Experiment:
    registry.register_experiment(source, **how)
    return registry.select("mine")


def test_a_registered_experiment_is_found_by_its_name() -> None:
    found = register(module())
    (step,) = registry.steps("mine")
    assert step.experiment is found and step.key == "mine-squares"
    assert found.run(None, Config(pairs=7), print).verdict == "7 pairs"
    assert found.origin is not None and found.origin.module == __name__
    assert "X1  mine" in listing() and "Mine?" in listing()
    with pytest.raises(DataError, match="Did you mean 'mine'"):
        registry.select("mime")
    with pytest.raises(DataError, match="already"):
        register(module())
    assert register(module(ABOUT=ABOUT), replace=True) is not found


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoDefault(Config):
    strength: float


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"ABOUT": None}, "no ABOUT with a name"),
        ({"ABOUT": dataclasses.replace(ABOUT, name="behaviour")}, "taken by hooked_vlm"),
        ({"ABOUT": dataclasses.replace(ABOUT, name="e4")}, "taken by hooked_vlm"),
        ({"ABOUT": dataclasses.replace(ABOUT, name="a:b")}, "small letters"),
        ({"ABOUT": dataclasses.replace(ABOUT, id="e4")}, "id 'e4' is taken"),
        ({"ABOUT": dataclasses.replace(ABOUT, id="")}, "ABOUT.id is no text"),
        ({"run": None}, "run is None; expected a function"),
        ({"run": lambda model: None}, r"run takes \(model\)"),
        ({"Config": dict}, "Config is .*; expected a @dataclass"),
        ({"Config": NoDefault}, "a field of Config has no default"),
        ({"draw": "figure"}, "draw is 'figure'"),
    ],
)
def test_what_is_no_experiment_is_refused(names: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        register(module(**names))
    assert registry.EXTENSIONS.names() == []


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"accuracy": 0.5}, "'mine' returned .*; expected Result"),
        (Result(**{**vars(ABOUT), "name": "other"}, table=TABLE, verdict=""), "result of 'other'"),
        (Result(**vars(ABOUT), table=TABLE.rename(columns={"value": "v"}), verdict=""), "'value'"),
    ],
)
def test_a_result_of_another_kind_is_refused(returned: Any, said: str) -> None:
    found = register(module(run=lambda model, config, on_progress: returned))
    with pytest.raises(DataError, match=said):
        found.run(None, Config(), print)


def test_figures_come_of_draw_and_a_broken_one_loses_no_number() -> None:
    result = run(None, Config(), print)
    assert drawings(result) == [] and headlines(result) == ()

    def draw(result: Result) -> Iterator[Drawing]:
        yield Drawing("one", Figure(), "A figure.")

    register(module(draw=draw, HEADLINES=(({"quantity": "accuracy"}, "accuracy"),)))
    assert [drawing.name for drawing in drawings(result)] == ["one"]
    assert headlines(result)[0][1] == "accuracy"
    for wrong, said in ((lambda _: [1 / 0], "ZeroDivisionError"), (lambda _: ["png"], "not a str")):
        register(module(draw=wrong), replace=True)
        with pytest.warns(HookedVLMWarning, match=rf"figures of 'mine' .*{said}"):
            assert drawings(result) == []


def mine(**given: Any) -> Any:
    return dataclasses.replace(stimulus_set("squares"), name="mine", **given)


def test_a_registered_setting_is_a_setting(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/items.csv").write_text("a,b\n")
    seen: list[Any] = []

    def make(data: Path | None = None, other_words: bool = False) -> Any:
        seen.append((data, other_words))
        return mine()

    register_setting("mine", make)
    assert stimulus_set("mine", data=tmp_path, other_words=True).name == "mine"
    assert seen == [(tmp_path, True)]
    assert files_of("mine", data=tmp_path) == {"data/deep/items.csv": tmp_path / "deep/items.csv"}
    (use,) = registry.origins("behaviour", ["squares", "mine"])
    assert use == "setting mine"
    Config(setting="mine").check()
    with pytest.raises(DataError, match="does not read cutouts="):
        stimulus_set("mine", cutouts=tmp_path)
    with pytest.raises(DataError, match="Did you mean 'mine'"):
        stimulus_set("mime")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("squares", mine, "taken by hooked_vlm"),
        ("mine", "squares", "expected a function"),
        ("mine", lambda folder: mine(), "takes 'folder'; it may take cutouts"),
        ("mine", lambda: "squares", "returned 'squares'; expected a StimulusSet"),
        ("mine", lambda: stimulus_set("squares"), "named 'squares'; expected 'mine'"),
        ("mine", lambda: {}["colour"], "raised KeyError: 'colour'"),
    ],
)
def test_what_is_no_setting_is_refused(name: str, make: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        register_setting(name, make)
        stimulus_set(name)

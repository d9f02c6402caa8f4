"""Q7 on codes that are known: of the strip (a planted model), of the order, of nothing."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.forward_counter import count_forwards
from helpers.planted_models import GEOMETRY, PATCH, SIDE, planted
from hooked_vlm.errors import DataError
from hooked_vlm.experiments.dual_mechanisms import ordering_probes
from hooked_vlm.experiments.further import absolute_or_relative as q7
from hooked_vlm.experiments.further import gap_verdicts
from hooked_vlm.experiments.further.close_objects import READINGS, close_together, moved
from hooked_vlm.experiments.further.gap_verdicts import BOTH, CONTROL, DIFFERENCE
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.verdicts import Judgement, judge
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.geometry import PAPER_GEOMETRY, Geometry


CONFIG = q7.Config(images=20, batch_size=20)


def ran(probe: str = "paper") -> tuple[Result, list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    config = dataclasses.replace(CONFIG, probe=probe)
    result = q7.run(planted("background"), config, lambda *step: told.append(step))
    return result, told


def shares(result: Result, **wanted: Any) -> dict[str, float]:
    table = result.table[result.table["place"].isna() & result.table["probe"].isna()]
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table.set_index("quantity")["value"].to_dict()  # pyright: ignore


@pytest.mark.parametrize("probe", ["paper", "converged"])
def test_a_code_of_strips_is_absolute(probe: str) -> None:
    result, told = ran(probe)  # the planted encoder writes the strip of each token
    for axis in ("horizontal", "vertical"):
        for shown in ("three", "alone"):
            found = shares(result, axis=axis, shown=shown, kind=BOTH)
            assert [found[name] for name in READINGS] == [0, 1, 0]
        assert shares(result, axis=axis)[CONTROL] == 1
    assert result.verdict.count("the code is mostly absolute") == 2
    assert result.verdict.count("5 of 5 probes") == (2 if probe == "paper" else 0)
    assert np.isfinite(result.table[["value", "low", "high"]]).all().all()
    assert result.arrays["readings"].sizes == {
        "axis": 2,
        "gap": 1,
        "kind": 2,
        "image": 10,
        "reading": 3,
    }
    names = {"horizontal, right edge, 0 tokens apart", "vertical, top edge, 0 tokens apart"}
    assert set(result.images) >= names
    assert "Not tested: objects 1 token apart and 2 tokens apart" in result.verdict
    assert "differs with the gap" not in result.verdict
    assert [done for done, _ in told] == list(range(told[-1][1] + 1))


def order_of(pictures: Any, questions: Any, *_: Any) -> torch.Tensor:
    """Features of each object's rank along the axis, if there are several objects."""
    features = torch.zeros(len(pictures), SIDE, SIDE, 36)
    for picture, question, own in zip(pictures, questions, features, strict=True):
        cells = np.asarray(picture).reshape(SIDE, PATCH, SIDE, PATCH, 3)[:, 4, :, 4]
        filled = np.argwhere((cells != 255).any(-1))
        along = filled[:, 1 if question.axis == "horizontal" else 0]
        for rank, (row, col) in enumerate(filled[np.argsort(along)]):
            own[row, col, 12 * rank : 12 * rank + 12] = 6.0 * (len(filled) == 3)
    return features.flatten(1, 2)


def test_a_code_of_ranks_is_relative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ordering_probes,
        "projected_pictures",
        lambda _, pictures, asked, *h: order_of(pictures, asked),
    )
    result, _ = ran()
    for axis in ("horizontal", "vertical"):
        found = shares(result, axis=axis, shown="three", kind=BOTH)
        assert [found[name] for name in READINGS] == [1, 0, 0]
    assert result.verdict.count("the code is mostly relative (5 of 5 probes") == 2


def relative_only_when_apart(pictures: Any, *_: Any) -> torch.Tensor:
    """Features of the strip in pictures whose objects touch, else of the rank of each object.

    The objects are those of tiny-qwen2-vl's pictures: 2x2 of 12x12 tokens of 16 px.
    """
    features = torch.zeros(len(pictures), 12, 12, 36)
    for picture, own in zip(pictures, features, strict=True):
        cells = np.asarray(picture).reshape(12, 16, 12, 16, 3)[:, 8, :, 8]
        filled = np.argwhere((cells != 255).any(-1))
        along = filled[:, int(np.ptp(filled[:, 1]) > np.ptp(filled[:, 0]))]
        starts = sorted(set(along))[::2]
        is_apart = len(starts) == 3 and starts[1] > starts[0] + 2
        for (row, col), at in zip(filled, along, strict=True):
            code = int(np.searchsorted(starts, at, "right")) - 1 if is_apart else at // 4
            own[row, col, 12 * code : 12 * code + 12] = 6.0
    return features.flatten(1, 2)


def test_a_code_can_depend_on_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ordering_probes,
        "projected_pictures",
        lambda _, pictures, *__: relative_only_when_apart(pictures),
    )
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    result = q7.run(model, CONFIG, lambda *_: None)
    for gap, expected in ((0, [0, 1, 0]), (1, [1, 0, 0])):
        found = shares(result, axis="horizontal", shown="three", kind=BOTH, gap=gap)
        assert [found[name] for name in READINGS] == expected
    said = result.verdict.splitlines()
    assert said[0].startswith(
        "Horizontal: the answer differs with the gap between the objects: mostly absolute 0 tokens "
        "apart, mostly relative 1 token apart (other objects leave their strips at other gaps"
    )
    assert "differs with the gap" in said[3] and said[3].startswith("Vertical")
    assert said[-1].startswith("Not tested: objects 2 tokens apart")


def judged(sign: int) -> Judgement:
    return Judgement("found" if sign else "undecided", sign, "")


def test_only_outcomes_that_were_found_make_an_answer_depend_on_the_gap() -> None:
    assert "differs" in gap_verdicts.over_gaps({0: judged(-1), 1: judged(1)})
    for signs in ((-1, -1), (-1, 0), (0, 1), (1,)):
        said = gap_verdicts.over_gaps({gap: judged(sign) for gap, sign in enumerate(signs)})
        assert "differs" not in said and said.count("apart") == len(signs)


def test_the_tests_of_all_axes_and_gaps_are_one_family() -> None:
    main = {"quantity": DIFFERENCE, "kind": BOTH, "probe": np.nan}
    rows = [{**main, "p": p} for p in (0.02, 0.03, 0.01)]
    rows += [{**main, "probe": 0, "p": 0.04}]
    rows += [{**main, "kind": "left or top edge", "p": 0.04}]
    adjusted = gap_verdicts.adjusted(pd.DataFrame(rows).assign(p_holm=lambda t: t["p"]))["p_holm"]
    assert adjusted.tolist() == pytest.approx([0.04, 0.04, 0.03, 0.04, 0.04])


def test_nothing_is_said_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        ordering_probes,
        "projected_pictures",
        lambda _, pictures, *__: torch.randn(len(pictures), SIDE**2, 36, generator=noise),
    )
    result, _ = ran()
    assert result.verdict.count(": undecided whether relative or absolute") == 2
    assert result.verdict.count("does not read the order of usual pictures") == 2


N = 120


def claims(three: Any, one: Any, control: float = 1.0, accuracy: float = 1.0) -> pd.DataFrame:
    """The rows of pictures that all have the same shares, `[edge][reading]`."""
    spread = np.ones((1, N))
    three, one = (np.asarray(v, float)[:, None, None] * spread[..., None] for v in (three, one))
    rows = q7._accuracy_claim(accuracy * spread, 0)
    rows += q7._claims(three, one, control * spread, 0)
    rows += q7._share_rows(three, 0, shown="three") + q7._share_rows(one, 0, shown="alone")
    table = pd.DataFrame(rows)
    return table[table["probe"].isna()]


RELATIVE, ABSOLUTE = [(1, 0, 0)] * 2, [(0, 1, 0)] * 2
CASES: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "relative": ({"three": RELATIVE, "one": ABSOLUTE}, "found", 1, ""),
    "absolute": ({"three": ABSOLUTE, "one": ABSOLUTE}, "found", -1, ""),
    "alike": ({"three": [(0.5, 0.5, 0)] * 2, "one": ABSOLUTE}, "not found", 0, "exclude"),
    "a place alone": ({"three": RELATIVE, "one": RELATIVE}, "undecided", 0, "one object alone"),
    "edges": ({"three": [(1, 0, 0), (0, 1, 0)], "one": ABSOLUTE}, "undecided", 0, "edges differ"),
    "neither": ({"three": [(0.5, 0, 0.5)] * 2, "one": ABSOLUTE}, "undecided", 0, "as neither"),
    "control": (
        {"three": RELATIVE, "one": ABSOLUTE, "control": 0.4},
        "undecided",
        0,
        "control in the centre is not read correctly",
    ),
    "no code": (
        {"three": RELATIVE, "one": ABSOLUTE, "accuracy": 0.33},
        "undecided",
        0,
        "does not read the order",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_follows_from_the_claims(case: str) -> None:
    given, outcome, sign, reason = CASES[case]
    found = gap_verdicts.found(claims(**given))
    assert (found.outcome, found.sign) == (outcome, sign)
    assert reason in found.reason


def test_few_pictures_decide_nothing() -> None:
    three = np.full((2, 1, 4, 3), 1 / 3)
    three[..., :2] = 0.6, 0.4
    rows = q7._claims(three, three * 0, np.ones((1, 4)), 0)
    both = [r for r in rows if r["quantity"] == DIFFERENCE and r["kind"] == BOTH]
    assert judge(both[0]).outcome == "undecided"


@pytest.mark.parametrize("geometry", [*PAPER_GEOMETRY.values(), GEOMETRY], ids=str)
@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_only_objects_in_another_strip_than_that_of_their_order_count(
    geometry: Geometry, axis: str
) -> None:
    layouts = close_together(geometry, 0)
    found = {name: moved(layout, axis) for name, layout in layouts.items()}
    assert 2 in [one.place for one in found["start"]] and 0 in [one.place for one in found["end"]]
    assert all((one.strips < one.place).all() for one in found["start"])
    assert all((one.strips > one.place).all() for one in found["end"])
    assert moved(geometry, axis) == []  # of the usual pictures: none
    for layout in layouts.values():
        for place in range(3):
            own = geometry.strip_region(axis, place).mask
            assert (layout.strip_region(axis, place).mask == own).all()


@pytest.mark.parametrize(
    ("gap", "says"), [(1, "tokens in the strip of its order"), (2, "at most 1")]
)
def test_a_gap_that_shows_nothing_is_refused_before_the_model_runs(gap: int, says: str) -> None:
    model = planted("background")
    with count_forwards(model) as forwards, pytest.raises(DataError, match=says):
        q7.run(model, q7.Config(gaps=(gap,)), lambda *_: None)
    assert not forwards
    with pytest.raises(DataError, match="gaps must be a whole number from 0"):
        q7.Config(gaps=(0, -1))

"""Scattered objects: where they stand, and what refuses to read their cells."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_vlm.errors import CannotRunError, DataError
from hooked_vlm.experiments.dual_mechanisms import amplification, strip_swap
from hooked_vlm.experiments.registry import EXPERIMENTS, select, steps
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.geometry import AXES, geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.scattered import LEAST_APART, scattered_layout
from hooked_vlm.stimuli.settings import SCATTERED, stimulus_set
from hooked_vlm.stimuli.squares import COLORS


@given(
    tokens=st.integers(5, 20),
    px=st.integers(4, 56),
    axis=st.sampled_from(AXES),
    names=st.permutations(list(COLORS)),
)
def test_objects_have_the_order_of_their_places_and_do_not_overlap(tokens, px, axis, names):
    layout = scattered_layout(tokens, px).placed(tuple(names[:3]), axis)
    side = geometry_for(tokens, px).object_tokens * px
    boxes = [layout.place_box(axis, place) for place in range(3)]
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= layout.canvas and 0 <= y0 < y1 <= layout.canvas
        assert x1 - x0 == y1 - y0 == side
    first = [box[0 if axis == "horizontal" else 1] for box in boxes]
    assert min(np.diff(first)) >= LEAST_APART * side
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_picture_shows_its_objects_at_its_own_places():
    stimuli, layout = stimulus_set("squares-scattered"), scattered_layout(12, 28)
    assert stimuli.layout(12, 28) == layout
    left, right = (Question(("red", "green", "blue"), d) for d in ("left", "right"))
    picture = np.asarray(stimuli.picture(left, layout))
    assert (
        picture == np.asarray(stimuli.picture(right, layout))
    ).all()  # two questions, one picture
    assert (picture == np.asarray(stimuli.picture(left, geometry_for(12, 28)))).all()
    own = layout.placed(left.entities, "horizontal")
    for place, name in enumerate(left.entities):
        rows, cols = np.nonzero((picture == COLORS[name]).all(-1))
        box = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
        assert box == own.place_box("horizontal", place) and len(rows) == 56**2
    other = stimuli.picture(Question(("red", "green", "black"), "left"), layout)
    assert (np.asarray(other) != picture).any()
    assert stimuli.in_rows().picture(left, geometry_for(12, 28)).tobytes() == (
        stimulus_set("squares").picture(left, geometry_for(12, 28)).tobytes()
    )
    assert stimulus_set("squares").in_rows() == stimulus_set("squares")


def test_a_layout_without_a_picture_and_its_cells_are_refused():
    layout = scattered_layout(12, 28)
    with pytest.raises(DataError, match="Use placed"):
        layout.place_box("horizontal", 0)
    with pytest.raises(DataError, match="axis='vertical' was given"):
        layout.placed(("red", "green", "blue"), "horizontal").place_box("vertical", 0)
    for read in (layout.object_region, layout.strip_region):
        with pytest.raises(CannotRunError, match="without '-scattered'"):
            read("horizontal", 0)
    with pytest.raises(CannotRunError, match="the background, vertical"):
        layout.background("vertical")


@pytest.mark.parametrize("name", SCATTERED)
def test_experiments_that_read_cells_refuse_scattered_objects_before_they_run(name):
    taken = {e.id for e in EXPERIMENTS.values() if e.config.takes(name)}
    assert taken == {"E1", "E7"}  # and Q1, whose settings are several
    for one in taken:
        select(one).config(setting=name).check()
    strips = select("E4")
    with pytest.raises(DataError, match=f"Use '{name.split('-')[0]}'"):
        strips.config(setting=name).check()
    with pytest.raises(DataError, match="which scattered objects lack"):
        steps("E4", name)
    chosen = {step.experiment.id: step.setting for step in steps("dual-mechanisms", name)}
    assert chosen["E1"] == name and chosen["E4"] == "squares"


@pytest.fixture(scope="module")
def model() -> Any:
    return HookedVLM.from_pretrained("tiny-qwen2-vl")


def test_cells_are_refused_without_a_check_too(model):
    with pytest.raises(CannotRunError, match=r"cells of .* were asked for"):
        strip_swap.run_on(
            model, stimulus_set("squares-scattered"), strip_swap.Config(pairs=2, batch_size=4)
        )


def test_ordering_directions_are_fitted_to_rows(model):
    """The questions are about scattered objects, of the same triples."""
    config = amplification.Config(items=2, controls=0)
    plans = {}
    for name in ("squares", "squares-scattered"):
        setting = Setting(model, stimulus_set(name), 8)
        plans[name] = amplification.Plan.of(setting, "horizontal", config)
    plain, scattered = plans.values()
    torch.testing.assert_close(plain.directions, scattered.directions, rtol=0, atol=0)
    assert plain.asked == scattered.asked


def test_amplification_says_that_its_probe_saw_rows(model):
    config = amplification.Config(items=2, controls=0, alphas=(0.0, 4.0), batch_size=8)
    result = amplification.run_on(model, stimulus_set("squares-scattered"), config)
    assert any("questions are about scattered objects" in note for note in result.notes)
    assert result.config["items"] == 8  # two pictures of each axis, each with two questions

"""Known answers: a model whose mechanism was set by hand, under the tools that look for it.

`planted("background")` answers from white tokens, which carry the order code along with the
objects; `planted("object")` from the object tokens, which alone carry it.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.planted_models import GEOMETRY, planted
from hooked_vlm.analysis.probes import (
    LinearProbe,
    held_out_accuracy,
    object_examples,
    shuffled_labels,
    split_by_image,
)
from hooked_vlm.analysis.scoring import top_answer
from hooked_vlm.experiments.dual_mechanisms.swap_regions import cell_pairs
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.pairs import swap_pair
from hooked_vlm.stimuli.prompts import AXIS_OF, DIRECTIONS
from hooked_vlm.stimuli.settings import stimulus_set
from hooked_vlm.stimuli.squares import COLORS, items
from hooked_vlm.sweeps.sweep import Sweep, final_logits


KINDS = ("background", "object")
TRIPLES = (("red", "green", "blue"), ("gray", "black", "brown"), ("black", "gray", "green"))
PROJECTED = "vision_projector.hook_out"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def answers(model, logits: Tensor) -> list[str]:
    return top_answer(final_logits(logits), model.tokenizer)


@pytest.mark.parametrize("coded", KINDS)
def test_it_answers_every_kind_of_question(coded: str) -> None:
    setting = Setting(planted(coded), stimulus_set("squares"), batch_size=64)
    assert setting.geometry == GEOMETRY
    questions = items()[::7]
    assert {q.direction for q in questions} == set(DIRECTIONS)
    assert all(setting.is_right(questions))


@pytest.mark.parametrize("coded", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_answer_flips_exactly_when_the_tokens_that_are_read_are_swapped(
    coded: str, direction: str
) -> None:
    model = planted(coded)
    setting = Setting(model, stimulus_set("squares"), batch_size=8)
    pairs = [swap_pair(direction, triple) for triple in TRIPLES]
    clean, source = (
        setting.inputs([getattr(pair, name) for pair in pairs])
        for name in ("clean", "counterfactual")
    )
    regions = {
        kind: cell_pairs(setting.geometry, AXIS_OF[direction], kind)
        for kind in ("strip", "object", "background")
    }
    names = list(COLORS)
    sweep = Sweep(
        clean,
        {"kind": list(regions), "slot": range(model.cfg.n_layers + 1)},
        make=lambda kind, slot: Patch(slot, at=regions[kind], source=source),
    )
    scores = sweep.run(
        model,
        lambda logits: torch.tensor([names.index(answer) for answer in answers(model, logits)]),
        dims=("pair",),
    )
    swapped = [names.index(pair.swapped_answer) for pair in pairs]
    kept = [names.index(pair.clean_answer) for pair in pairs]
    flips = {"strip", coded}
    for kind in regions:
        for slot in (0, 1):  # what is written at slot 2 comes after the last position has read
            expected = swapped if kind in flips else kept
            assert scores.sel(kind=kind, slot=slot).values.tolist() == expected, (kind, slot)
        assert scores.sel(kind=kind, slot=2).values.tolist() == kept


@pytest.mark.parametrize("coded", KINDS)
def test_swaps_in_the_vision_encoder_and_projector_agree(coded: str) -> None:
    """What flips the answer in the language model flips it where the code was made, too."""
    model = planted(coded)
    setting = Setting(model, stimulus_set("squares"), batch_size=8)
    pair = swap_pair("left", TRIPLES[0])
    clean, source = setting.inputs([pair.clean]), setting.inputs([pair.counterfactual])
    for site in ("vision_encoder.blocks.0.hook_resid_post", "vision_encoder.hook_out", PROJECTED):
        for kind in ("strip", "object", "background"):
            patch = Patch(site, at=cell_pairs(setting.geometry, "horizontal", kind), source=source)
            flipped = kind in ("strip", coded)
            expected = pair.swapped_answer if flipped else pair.clean_answer
            assert answers(model, model.run_with_hooks(clean, [patch])) == [expected], (site, kind)


def test_what_is_not_read_may_be_removed() -> None:
    objects = [GEOMETRY.object_region("horizontal", place) for place in range(3)]
    inside = objects[0] | objects[1] | objects[2]
    question = swap_pair("right", TRIPLES[0]).clean  # not gray: that is what no colour at all is
    for coded, needed in (("background", ~inside), ("object", inside)):
        model = planted(coded)
        inputs = Setting(model, stimulus_set("squares"), batch_size=8).inputs([question])
        for region in (inside, ~inside):
            logits = model.run_with_hooks(inputs, [Ablate(1, at=region)])
            assert (answers(model, logits) == [question.target]) == (region != needed)


@pytest.mark.parametrize("coded", KINDS)
def test_the_final_token_holds_the_direction_and_then_the_answer(coded: str) -> None:
    model = planted(coded)
    setting = Setting(model, stimulus_set("squares"), batch_size=8)
    left, right = (swap_pair(d, TRIPLES[0]).clean for d in ("left", "right"))
    other = swap_pair("right", TRIPLES[1]).clean
    inputs, source = setting.inputs([left]), setting.inputs([other])
    assert right.entities == left.entities[::-1]
    found = [
        answers(model, model.run_with_hooks(inputs, [Patch(slot, at=LastToken(), source=source)]))
        for slot in range(3)
    ]
    # Nothing yet; the place asked for (this picture's right square); the other one's answer.
    assert found == [[left.entities[0]], [left.entities[2]], [other.target]]


def features(coded: str) -> Tensor:
    """The projector's output of all pictures of an axis: `[image, token, d_model]`."""
    model = planted(coded)
    setting = Setting(model, stimulus_set("squares"), batch_size=60)
    parts = []
    for batch in setting.batches(items(("left",))):
        _, cache = model.run_with_cache(setting.inputs(batch), PROJECTED, stop_at_layer=0)
        parts.append(cache[PROJECTED])
    return torch.cat(parts)


def strips(cut: Region) -> list[Region]:
    return [GEOMETRY.strip_region("horizontal", place) & cut for place in range(3)]


@pytest.mark.parametrize("coded", KINDS)
def test_probes_find_the_code_where_it_is_and_not_where_it_is_not(coded: str) -> None:
    found = features(coded)
    objects = [GEOMETRY.object_region("horizontal", place) for place in range(3)]
    inside = objects[0] | objects[1] | objects[2]
    train, test = split_by_image(len(found))

    def accuracy(regions: list[Region], shuffle: bool = False) -> float:
        examples = object_examples(found, regions)
        examples = shuffled_labels(examples) if shuffle else examples
        part = examples.of_images(train)
        probe = LinearProbe().fit(part.X, part.y)
        return held_out_accuracy(probe, examples.of_images(test)).estimate

    in_background = strips(~inside)
    assert accuracy(objects) == 1
    if coded == "background":
        assert accuracy(in_background) == 1
    else:
        # All that is left there is the colour of the strip's object, which says nothing of order.
        assert accuracy(in_background) < 0.5
    # The control's chance is 1/3 of 30 pictures: 0.13 to 0.53 is 2.3 standard errors.
    assert 0.1 < accuracy(objects, shuffle=True) < 0.56

    # The E3 readout: a probe of the object tokens alone, asked about the background.
    part = object_examples(found, objects).of_images(train)
    maps = LinearProbe().fit(part.X, part.y).probability_map(found[test].unflatten(1, (6, 6)))
    strip = np.repeat([0, 1, 2], 2)
    own = (maps.argmax(-1).numpy() == strip)[:, (~inside).mask].mean()
    if coded == "background":
        # Not 1: above and below the objects the probe meets codes of rows that it never saw.
        assert own > 0.6
    else:
        assert 0.2 < own < 0.47

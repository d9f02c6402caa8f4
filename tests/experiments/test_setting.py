"""A setting draws pairs of which statistics can be made, and says what a model cannot do."""

import copy
import types
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conformance import suite
from helpers.prepared_models import pixtral, prepared
from hooked_vlm.errors import CannotRunError, HookedVLMWarning
from hooked_vlm.experiments.dual_mechanisms import amplification
from hooked_vlm.experiments.further import composite_artefacts, grid_probes
from hooked_vlm.experiments.notes import notes_of, with_notes
from hooked_vlm.experiments.options import Config
from hooked_vlm.experiments.registry import EXPERIMENTS
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Setting, for_tokenizer, system_of, token_grid
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.geometry import PAPER_GEOMETRY
from hooked_vlm.stimuli.pairs import Question, final_token_pair, swap_pair
from hooked_vlm.stimuli.settings import stimulus_set


def setting() -> Setting:
    made = object.__new__(Setting)  # without a model, which drawing does not need
    made.stimuli = stimulus_set("squares")
    made.names = made.stimuli.names
    return made


def test_i1_a_direction_with_one_pair_is_left_out_before_anything_is_computed() -> None:
    kept: list[str] = []

    def accept(direction: str, drawn: list) -> list[bool]:
        verdicts = []
        for _ in drawn:
            verdicts.append(direction != "left" or direction not in kept)
            kept.append(direction)
        return verdicts

    with pytest.warns(HookedVLMWarning, match="left"):
        pairs = setting().pairs_accepted(swap_pair, 3, Config(pairs=2), accept)
    assert {direction: len(found) for direction, found in pairs.items()} == {
        "right": 2,
        "above": 2,
        "below": 2,
    }


@pytest.mark.filterwarnings("ignore::hooked_vlm.errors.HookedVLMWarning")
def test_i1_a_model_that_answers_nothing_cannot_run() -> None:
    with pytest.raises(CannotRunError, match="In no direction does the model answer two pairs"):
        setting().pairs_accepted(
            swap_pair, 3, Config(pairs=2), lambda _, drawn: [False] * len(drawn)
        )


def test_g8_a_system_message_is_given_only_where_a_chat_template_holds_it() -> None:
    with_template = types.SimpleNamespace(processor=types.SimpleNamespace(chat_template="{{ x }}"))
    without = types.SimpleNamespace(processor=types.SimpleNamespace())
    assert system_of(with_template, "brief") == "brief"
    assert system_of(without, "brief") is None


# --- B1: Pixtral's layout ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squares", "shapes", "objects"])
def test_b1_rows_with_separators_get_the_papers_canvas_of_15_tokens(name: str) -> None:
    bound = Setting(pixtral(), stimulus_set(name), 4)
    assert bound.geometry == PAPER_GEOMETRY["pixtral"] and bound.geometry.canvas == 240
    first, second = bound.stimuli.items()[:2]
    inputs = bound.inputs([first, second])
    for (grid,) in inputs.grids:
        assert grid.shape == (15, 15) and grid.is_separated and not grid.is_resized
        row, col = torch.arange(15)[:, None], torch.arange(15)
        assert torch.equal(grid.positions, grid.positions[0, 0] + row * 16 + col)
    assert len(bound.is_right([first, second])) == 2


def test_b1_grids_of_shapes_are_read_from_rows_with_separators() -> None:
    config = grid_probes.Config(ks=(2,), images=8)
    result = grid_probes.run(pixtral(), config, lambda *_: None)
    assert result.arrays["mean_maps"].shape == (2, 2, 15, 15)
    cells = result.arrays["object_cells"].sel(probe="2x2 column").values
    assert np.flatnonzero(cells[0].any(0)).tolist() == [4, 5]


def test_a_processor_with_a_size_of_its_own_gives_the_canvas() -> None:
    # Encoders of any size have the paper's canvas, unless the processor would shrink it: objects
    # drawn there and shrunk afterwards are not the colours and edges that are asked about.
    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    for side, found in ((96, (6, 16)), (160, (10, 16)), (192, (12, 16))):
        size = {"shortest_edge": side**2, "longest_edge": side**2}
        model.processor.image_processor.size = size
        assert token_grid(model) == found


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-gemma-3"])
def test_b1_other_layouts_keep_their_canvas(name: str) -> None:
    model = HookedVLM.from_pretrained(name)
    assert token_grid(model) == (12, 16)
    assert not model.prepare(Image.new("RGB", (192, 192)), "").grid.is_separated


def test_b1_a_projector_that_merges_tokens_gets_whole_tokens_of_its_own_size() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = suite.build("mistral3")  # any size, separators, 2x2 patches merged by the projector
    model.processor.image_processor.size = {"longest_edge": 1024}
    vision = model.cfg.vision
    assert vision is not None and vision.merge == 1
    assert token_grid(model) == (15, 2 * vision.patch_size)


def test_b1_names_that_pixtral_splits_are_replaced_or_left_out_with_a_note() -> None:
    squares = Setting(pixtral(), stimulus_set("squares"), 4)
    assert squares.names == ("red", "green", "blue", "black", "orange", "gray")
    assert len(squares.stimuli.items()) == 480
    objects = Setting(pixtral(), stimulus_set("objects"), 4)
    assert "bomb" not in objects.names and len(objects.names) == 7
    assert len(objects.stimuli.items()) == 840
    (note,) = notes_of(pixtral(), stimulus_set("objects"), Config())
    assert "bomb is left out" in note and "840 of 1344 items remain" in note
    (note,) = notes_of(pixtral(), stimulus_set("shapes"), Config())
    assert "brown is replaced by orange" in note and "480 of 480" in note
    assert (
        notes_of(HookedVLM.from_pretrained("tiny-qwen2-vl"), stimulus_set("squares"), Config())
        == ()
    )


def test_b1_too_few_names_for_a_pair_are_a_reason_not_to_run() -> None:
    short = replace(stimulus_set("squares"), names=("red", "green", "brown", "blue"), spares={})
    bound = Setting(pixtral(), short, 4)
    with pytest.raises(CannotRunError, match="5 different names, and Squares has 3 that"):
        bound.pairs_accepted(final_token_pair, 5, Config(pairs=2), lambda _, drawn: [])


def test_b1_composites_are_drawn_with_the_replaced_names() -> None:
    plain, _ = for_tokenizer(stimulus_set("squares"), pixtral().tokenizer)
    drawn = composite_artefacts.composites(plain, "joined")
    question = Question(("red", "orange", "gray"), "left")
    layout = PAPER_GEOMETRY["pixtral"]
    assert drawn.picture(question, layout).getpixel((108, 108)) == (255, 165, 0)


# --- B7: precision -------------------------------------------------------------------------


def test_b7_e5_and_e6_say_in_which_precision_they_ran() -> None:
    whole, squares = prepared("qwen2-vl"), stimulus_set("squares")
    half = HookedVLM(copy.deepcopy(whole.hf_model).bfloat16(), whole.processor)
    for name in ("ordering-ablation", "swap-under-ablation"):
        config = EXPERIMENTS[name].config()
        assert notes_of(whole, squares, config) == (
            "Computed in float32; the paper computes this in float32.",
        )
        (note,) = notes_of(half, squares, config)
        assert note.startswith("Computed in bfloat16, unlike in the paper")
        assert "--dtype float32" in note
    assert notes_of(half, squares, EXPERIMENTS["strip-swap"].config()) == ()


def test_b7_notes_follow_those_of_the_experiment() -> None:
    def run(*_: object) -> Result:
        words = dict.fromkeys(("id", "name", "title", "claim", "section", "verdict"), "")
        return Result(**words, table=pd.DataFrame(), notes=("its own",))

    config = EXPERIMENTS["ordering-ablation"].config()
    found = with_notes(run)(prepared("qwen2-vl"), None, config, lambda *_: None)
    assert found.notes[0] == "its own" and "float32" in found.notes[1]


def test_b7_e7_says_that_its_pictures_stand_in_for_the_papers() -> None:
    (note,) = amplification.stand_in(amplification.Config().setting)
    assert "What'sUp" in note and "COCO-spatial" in note and "'objects-photos'" in note
    assert amplification.stand_in("whatsup-chair") == ()

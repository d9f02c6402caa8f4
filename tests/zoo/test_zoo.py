"""The shipped models: what they are taught, how they are fed, and that they answer."""

import random
import re
import string
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_vlm.analysis.scoring import normalise, spellings
from hooked_vlm.errors import UnsupportedModelError
from hooked_vlm.stimuli import photographs
from hooked_vlm.stimuli.geometry import AXES, geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.prompts import (
    AXIS_OF,
    DIRECTIONS,
    OPTIONS,
    SIDES,
    SYSTEM_PROMPT,
    squares_prompt,
)
from hooked_vlm.stimuli.settings import SCATTERED, SETTINGS, stimulus_set
from hooked_vlm.stimuli.squares import COLORS, draw
from hooked_vlm.zoo import available, folder, load, summary
from training import evaluate
from training.batches import Encoder
from training.build import RECIPES, WORDS, build_processor, build_tokenizer
from training.evaluate import SETS, tokens_of
from training.scenes import KINDS, PHRASINGS, MixedScene, held_out_objects, mixed_scene
from training.tasks import (
    EXTRA_COLORS,
    canonical_scene,
    conversation,
    held_out_triples,
    jittered_scene,
    training_scene,
    training_triples,
)
from training.train import Config, Stage, carry_over, fresh_model, training_batch


NAMES = sorted(RECIPES)
GEOMETRY = geometry_for(12, 16)


# What they are taught


def test_held_out_triples_are_never_trained_on():
    held_out, trained = held_out_triples(), training_triples()
    assert len(held_out) == 24 and held_out == held_out_triples()
    assert held_out.isdisjoint(trained) and held_out | set(trained) == set(permutations(COLORS, 3))
    rng = random.Random(0)
    plain = {training_scene(rng, trained, GEOMETRY).triple for _ in range(300)}
    assert plain <= set(trained)
    extra = {training_scene(rng, trained, GEOMETRY, extra=1.0).triple for _ in range(300)}
    assert extra.isdisjoint(held_out)
    assert all(set(triple) & set(EXTRA_COLORS) for triple in extra)


def test_no_order_can_be_learned_by_heart():
    # Were only one of a triple and its mirror image in training, colours alone would tell
    # which neighbour stands on which side.
    assert {triple[::-1] for triple in held_out_triples()} == held_out_triples()


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
def test_the_canonical_scene_is_the_paper_s_picture(axis):
    triple = ("red", "brown", "gray")
    scene = canonical_scene(triple, axis, GEOMETRY)
    picture = np.asarray(draw(triple, axis, GEOMETRY))
    assert np.array_equal(scene.render(GEOMETRY.canvas), picture)


@pytest.mark.parametrize("unseen", [True, False])
def test_jittered_squares_stay_in_order_apart_and_on_the_canvas(unseen):
    rng = random.Random(1)
    for index in range(200):
        axis = ("horizontal", "vertical")[index % 2]
        scene = jittered_scene(rng, ("red", "green", "blue"), axis, 192, unseen)
        along = 0 if axis == "horizontal" else 1
        spans = [(box[along], box[along + 2]) for box in scene.boxes]
        assert spans[0][1] < spans[1][0] and spans[1][1] < spans[2][0]
        assert all(0 <= x0 < x1 <= 192 and 0 <= y0 < y1 <= 192 for x0, y0, x1, y1 in scene.boxes)
        # The reserved layouts, in pixels: sides of 14 to 17 % and high up (or far left).
        x0, y0, x1, y1 = scene.boxes[1]
        middle = (y0 + y1) / 2 if along == 0 else (x0 + x1) / 2
        small = round(0.14 * 192) <= x1 - x0 <= round(0.17 * 192)
        reserved = small and round(0.15 * 192) <= middle <= round(0.38 * 192)
        assert reserved == unseen or (unseen and small)


def test_questions_and_answers_about_a_scene():
    scene = canonical_scene(("red", "green", "blue"), "vertical", GEOMETRY)
    assert scene.relations() == [
        (squares_prompt("above", "green"), "red"),
        (squares_prompt("below", "green"), "blue"),
        (squares_prompt("above", "blue"), "green"),
        (squares_prompt("below", "red"), "green"),
    ]
    assert scene.listing() == ("List the colors from top to bottom.", "red green blue")
    orders = Counter(conversation(random.Random(i), scene)[0] for i in range(200))
    assert set(orders) == {*scene.relations(), scene.listing()}


# How they are fed


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_one_token_in_every_spelling(name):
    tokenizer = build_tokenizer(RECIPES[name])
    for word in (*COLORS, *WORDS):
        for spelling in spellings(word):
            assert len(tokenizer.encode(spelling, add_special_tokens=False)) == 1, spelling


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [string.printable, "Größe ≥ 3 🙂", "a\u0000b\r\n ", ""])
def test_any_text_can_be_encoded_and_decoded(name, text):
    tokenizer = build_tokenizer(RECIPES[name])
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_are_single_and_a_tokenizer_s_making_is_reproducible(name):
    first, second = build_tokenizer(RECIPES[name]), build_tokenizer(RECIPES[name])
    assert first.get_vocab() == second.get_vocab()
    for token in RECIPES[name].special:
        assert first.encode(token, add_special_tokens=False) == [first.get_vocab()[token]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "tiny-qwen2-vl",
            f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            "<|image_pad|><|vision_end|>What? <|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "tiny-gemma-3",  # as Gemma-3's own: the system prompt opens the user's turn, trimmed
            f"<bos><start_of_turn>user\n{SYSTEM_PROMPT}\n\n<start_of_image>What?"
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
)
def test_chat_templates_are_their_families(name, text):
    assert (
        build_processor(name, 192).apply_chat_template(
            _messages("What? "), add_generation_prompt=True
        )
        == text
    )


def _messages(question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    system = {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]}
    return [system, {"role": "user", "content": content}]


@pytest.mark.parametrize("name", NAMES)
def test_training_batches_are_what_the_processor_makes(name):
    processor = build_processor(name, 192)
    rng = random.Random(2)
    scenes = [training_scene(rng, training_triples(), GEOMETRY) for _ in range(3)]
    turns = [scene.relations()[0] for scene in scenes]
    images = np.stack([scene.render(192) for scene in scenes])
    batch = Encoder(processor).batch([[turn] for turn in turns], images)
    for i, (question, answer) in enumerate(turns):
        text = processor.apply_chat_template(_messages(question), add_generation_prompt=True)
        picture = [Image.fromarray(images[i])]
        made = processor(images=[picture], text=[text], return_tensors="pt")
        n = made["input_ids"].shape[1]
        for key in ("input_ids", "token_type_ids", "mm_token_type_ids"):
            assert (key in made) == (key in batch.inputs)
            if key in made:
                assert torch.equal(batch.inputs[key][i, :n], made[key][0])
        share = len(batch.inputs["pixel_values"]) // 3
        pixels = batch.inputs["pixel_values"][i * share : (i + 1) * share]
        assert torch.equal(pixels, made["pixel_values"])
        told = batch.inputs["input_ids"][i][batch.answers[i]]
        assert processor.tokenizer.decode(told) == answer + processor.tokenizer.eos_token
        assert not batch.answers[i, :n].any()


@pytest.mark.parametrize("name", NAMES)
def test_training_batches_are_seeded(name):
    encoder = Encoder(build_processor(name, 192))
    config, stage = Config(name, batch=4), Stage(6, 1, 0.01, 1e-3, extra_colors=0.5)
    first, second, other = (
        training_batch(random.Random(seed), encoder, config, stage) for seed in (0, 0, 1)
    )
    assert torch.equal(first.inputs["pixel_values"], second.inputs["pixel_values"])
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
    assert not torch.equal(first.inputs["pixel_values"], other.inputs["pixel_values"])


@pytest.mark.parametrize("name", NAMES)
def test_weights_carry_over_to_larger_pictures(name):
    config, processor = Config(name), build_processor(name, 192)
    small = fresh_model(config, processor, Stage(6, 1, 0.01, 1e-3))
    large = fresh_model(Config(name, seed=1), processor, Stage(12, 1, 0.01, 1e-3))
    carry_over(small, large)
    old = dict(small.named_parameters())
    changed = [key for key, value in large.named_parameters() if value.shape != old[key].shape]
    assert len(changed) == (1 if name == "tiny-gemma-3" else 0)
    for key, value in large.named_parameters():
        if key in changed:  # a table of positions: its mean survives bilinear stretching
            torch.testing.assert_close(value.mean(0), old[key].mean(0), atol=5e-3, rtol=0)
        else:
            assert torch.equal(value, old[key])


def test_mixed_scenes_never_show_what_is_held_out():
    rng = random.Random(3)
    seen = {kind: set() for kind in KINDS}
    grounds = set()
    for _ in range(600):
        scene = mixed_scene(rng, GEOMETRY)
        seen[scene.kind].add(scene.names)
        grounds.add(scene.ground.split(":")[0])
        assert len(set(scene.names)) == 3
    assert grounds == {"white", "noise", *photographs.TEXTURES}
    assert not grounds & set(photographs.SCENES)
    assert not seen["objects"] & held_out_objects()
    assert not (seen["squares"] | seen["shapes"]) & held_out_triples()
    assert {t[::-1] for t in held_out_objects()} == held_out_objects()
    assert len(held_out_objects()) == 66


@pytest.mark.parametrize("kind", KINDS)
def test_answers_about_a_mixed_scene_follow_from_where_things_stand(kind):
    rng = random.Random(4)
    for _ in range(40):
        scene = mixed_scene(rng, GEOMETRY, kind=kind)
        along = 0 if scene.axis == "horizontal" else 1
        starts = [box[along] for box in scene.boxes]
        assert starts == sorted(starts)
        before, after = OPTIONS[scene.axis]
        for phrasing in range(len(PHRASINGS[kind])):
            answers = [answer for _, answer in scene.relations(phrasing)]
            first, middle, last = scene.names
            assert answers == [first, last, middle, middle]
        text, answer = scene.side(rng)
        starts = [text.rfind(f"the {scene.label(place)}") for place in range(3)]
        named = [place for place in range(3) if starts[place] >= 0]
        assert len(named) == 2 and answer in (before, after)
        subject = max(named, key=lambda p: starts[p])
        if "reference point" not in text:  # there the reference comes first
            subject = min(named, key=lambda p: starts[p])
        other = next(place for place in named if place != subject)
        assert answer == (before if subject < other else after)
        assert scene.listing()[1].split() == list(scene.names)


def test_a_mixed_scene_is_what_the_setting_shows():
    triple, axis = ("orange", "key", "rose"), "vertical"
    boxes = tuple(GEOMETRY.place_box(axis, place) for place in range(3))
    forms = ("square", "circle", "triangle")  # which objects do not use
    for kind in ("objects", "shapes"):
        names = triple if kind == "objects" else ("red", "green", "blue")
        scene = MixedScene(kind, names, forms, axis, boxes, "white")
        question = Question(names, "below")
        stimuli = stimulus_set("shapes-inset" if kind == "shapes" else kind)  # as they were trained
        assert np.array_equal(scene.render(192), np.asarray(stimuli.picture(question, GEOMETRY)))
        assert scene.relations()[1] == (stimuli.prompt(question), question.target)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_without_a_system_message_is_the_processor_s(name):
    processor = build_processor(name, 192)
    image = np.full((1, 192, 192, 3), 255, dtype=np.uint8)
    batch = Encoder(processor).batch([[("What? ", "red")]], image, [False])
    text = processor.apply_chat_template(_messages("What? ")[1:], add_generation_prompt=True)
    made = processor(images=[[Image.fromarray(image[0])]], text=[text], return_tensors="pt")
    n = made["input_ids"].shape[1]
    assert torch.equal(batch.inputs["input_ids"][0, :n], made["input_ids"][0])


# What ships


def test_models_ship_and_those_chosen_for_what_they_show_are_first():
    assert available() == ["tiny-qwen3-vl-strips", "tiny-gemma-3", "tiny-qwen2-vl"]


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UnsupportedModelError, match="Did you mean 'tiny-qwen2-vl'"):
        load("tiny-qwen-vl")


@pytest.mark.parametrize("name", available())
def test_a_model_s_files_are_small_and_complete(name):
    files = {path.name: path.stat().st_size for path in folder(name).iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"}
    assert expected | {"README.md", "training_log.csv"} <= set(files)
    assert sum(files.values()) < 8e6
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl", ".py"))]


@pytest.fixture(scope="module", params=available())
def shipped(request):
    return load(request.param)


def geometry_of(processor):
    return geometry_for(tokens_of(processor), 16)


def test_a_loaded_model_is_ready_to_use(shipped):
    model, processor = shipped
    assert not model.training and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 1.95e6
    geometry = geometry_of(processor)
    picture = draw(("red", "green", "blue"), "horizontal", geometry)
    text = processor.apply_chat_template(
        _messages(squares_prompt("right", "green")), add_generation_prompt=True
    )
    inputs = processor(images=[[picture]], text=[text], return_tensors="pt")
    image_id = model.config.image_token_id
    # Nothing was resized.
    assert int((inputs["input_ids"] == image_id).sum()) == geometry.n_tokens**2
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    answer = processor.batch_decode(
        said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert [normalise(text) for text in answer] == ["blue"]


@pytest.mark.parametrize(("pictures", "least"), [(SETS[1], 0.97), (SETS[2], 0.87)])
def test_models_answer_pictures_they_never_saw(shipped, pictures, least):
    """At least 0.97 in every direction; on every fifth unseen layout, 0.9 in all together.

    One wrong answer in 24 is 0.958, three are 0.875: chance, between neighbours, is 0.5.  A model
    of the study was trained for a fifth of the others' time, and ships as it was measured.
    """
    model, processor = shipped
    if model.config.model_type == "qwen3_vl":
        least = {SETS[1]: 0.95, SETS[2]: 0.79}[pictures]
    geometry, encoder, rates = geometry_of(processor), Encoder(processor), []
    for direction in DIRECTIONS:
        shown = evaluate.scenes(pictures, direction, geometry)[:: 1 if pictures == SETS[1] else 5]
        assert len(shown) == 24
        asked = [evaluate.question(scene, direction) for scene in shown]
        given = evaluate.answers(model, encoder, asked, shown, geometry.canvas)
        right = [answer == turn[1] for answer, turn in zip(given, asked, strict=True)]
        rates.append(np.mean(right))
        assert rates[-1] >= least, f"{pictures}, {direction}"
    assert np.mean(rates) >= 0.9


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_evaluation_asks_what_the_name_of_a_set_says(direction):
    held_out = held_out_triples()
    every, triples, layouts = (
        evaluate.scenes(pictures, direction, GEOMETRY) for pictures in evaluate.SETS
    )
    assert (len(every), len(triples), len(layouts)) == (120, 24, 120)
    assert {scene.triple for scene in triples} == {scene.triple for scene in layouts} == held_out
    assert {scene.axis for scene in (*every, *triples, *layouts)} == {AXIS_OF[direction]}
    question, answer = evaluate.question(triples[0], direction)
    first, middle, last = triples[0].triple
    assert question == squares_prompt(direction, middle)
    assert answer == (first if direction in ("left", "above") else last)


def card_of(name: str) -> list[tuple[str, str, int, float]]:
    """Returns the rows of accuracy in a model card: pictures, direction, n, accuracy."""
    lines = (folder(name) / "README.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.search(r"\| \d\.\d+ \[", line)]
    return [(what, direction, int(n), float(a.split()[0])) for what, direction, n, a in rows]


def test_every_card_says_in_a_few_words_what_the_model_is():
    words = [summary(name) for name in available()]
    assert all(text.startswith("trained on ") and len(text) < 80 for text in words)
    assert "strips" in words[0] and "accuracy alone" in words[1]


@pytest.mark.parametrize("name", available())
def test_a_card_has_a_row_for_all_that_evaluation_asks(name):
    titles = [stimulus_set(setting).title for setting in (*SETTINGS, *SCATTERED)]
    worded = [title + words for title in titles for words in ("", ", other words")]
    asked = [(row, direction) for row in (*SETS, *worded) for direction in DIRECTIONS]
    sides = [
        (f"Objects, side by {style}", " or ".join(OPTIONS[a])) for style in SIDES for a in AXES
    ]
    assert [row[:2] for row in card_of(name)] == asked + sides


@pytest.mark.slow
@pytest.mark.parametrize("name", available())
def test_a_card_has_what_evaluation_finds(name):
    """But for an answer or two, which rounding of another machine may change."""
    model, processor = load(name)
    found = [*evaluate.evaluate(model, processor), *evaluate.evaluate_settings(model, processor)]
    for (pictures, direction, n, accuracy), row in zip(card_of(name), found, strict=True):
        assert (pictures, direction, n) == (row.pictures, row.direction, row.accuracy.n)
        assert abs(accuracy - row.accuracy.estimate) * n <= 2.1, (pictures, direction)

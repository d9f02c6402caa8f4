"""The study of recipes: pictures, objectives, ingredients, and runs that go on."""

import json
import random
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from hooked_vlm.model.vlm import HookedVLM
from training import specimen, study, train
from training.batches import Batch, Encoder
from training.build import build_model, build_processor
from training.captions import FEW_THINGS, LARGE, SIDES, crowd
from training.loop import Loop, Schedule, muon_and_adam
from training.muon import Muon
from training.objectives import TASKS, Shown
from training.recipes import OBJECTIVES, RECIPES, EncoderTraining
from training.tasks import training_scene, training_triples
from training.train import answer_logits


CANVAS = study.GEOMETRY.canvas


@cache
def encoder() -> Encoder:
    return Encoder(build_processor(study.LAYOUT, CANVAS, is_fixed=True))


def made(seed: int = 0, blocks: int = 2) -> Any:
    torch.manual_seed(seed)
    vision = {**study.VISION, "depth": 2}
    return build_model(study.LAYOUT, encoder().tokenizer, CANVAS, blocks, vision).eval()


@cache
def drawn(n: int = 3) -> tuple[Any, Batch]:
    rng = random.Random(5)
    scenes = [training_scene(rng, training_triples(), study.GEOMETRY) for _ in range(n)]
    images = np.stack([scene.render(CANVAS) for scene in scenes])
    return scenes, encoder().batch([scene.relations()[:1] for scene in scenes], images)


# Pictures of many things


def test_things_do_not_cover_each_other_and_captions_say_where_they_are() -> None:
    rng, words, orders = random.Random(0), set(), set()
    for _ in range(60):
        scene = crowd(rng, CANVAS)
        assert 1 <= len(scene.things) <= 7
        assert len({thing.color for thing in scene.things}) == len(scene.things)
        covered = np.zeros((CANVAS, CANVAS), int)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= CANVAS and 0 <= y0 < y1 <= CANVAS
            covered[y0:y1, x0:x1] += 1
        assert covered.max() == 1
        caption = scene.caption(rng)
        assert all(str(thing) in caption for thing in scene.things)
        words |= set(caption.replace(",", "").split())
        for part in caption.split(", "):
            own = [thing for thing in scene.things if str(thing) in part]
            if len(own) == 2:
                continue  # a relation
            x, y = own[0].middle(CANVAS)
            told = part.replace(str(own[0]), "").split()
            orders |= {part.startswith(str(own[0]))} if told else set()
            assert ("left" in told) <= (x < 1 / 3) and ("right" in told) <= (x >= 2 / 3)
            assert ("above" in told) <= (y < 1 / 3) and ("below" in told) <= (y >= 2 / 3)
    assert {"left", "right", "above", "below"} <= words
    assert orders == {True, False}  # the place after the thing, and before it


# Objectives


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_reaches_every_weight_of_the_encoder(objective: Any) -> None:
    task = TASKS[objective](made(), encoder())
    shown = Shown.drawn(random.Random(1), CANVAS, 4)
    loss = task.loss(shown)
    assert loss.item() == task.loss(shown).item()  # what an objective draws is seeded
    loss.backward()
    for name, weights in study.encoder_weights(task.visual).items():
        assert weights.grad is not None and weights.grad.abs().max() > 0, name


def test_weights_keep_the_size_of_a_signal() -> None:
    model = made()
    study.spread(model)
    weights = dict(model.named_parameters())
    up = weights["model.language_model.layers.0.mlp.up_proj.weight"]
    out = torch.randn(2000, up.shape[1], generator=torch.Generator().manual_seed(0)) @ up.T
    assert out.std().item() == pytest.approx(1, abs=0.05)
    positions = weights["model.visual.pos_embed.weight"]
    assert positions.std().item() == pytest.approx(study.POSITIONS, rel=0.03)
    assert weights["model.language_model.norm.weight"].eq(1).all()


def test_things_alone_are_large_and_a_few_stand_on_white() -> None:
    rng = random.Random(0)
    for most, on_white in ((1, True), (FEW_THINGS, True), (7, False)):
        assert ({crowd(rng, CANVAS, most).ground for _ in range(20)} == {"white"}) == on_white
    for most, (low, high) in ((1, LARGE), (7, SIDES)):
        boxes = [thing.box for _ in range(40) for thing in crowd(rng, CANVAS, most).things]
        assert all(round(low * CANVAS) <= x1 - x0 <= round(high * CANVAS) for x0, _, x1, _ in boxes)


# Ingredients


def test_without_ingredients_logits_are_those_of_the_model() -> None:
    model, (_, batch) = made(), drawn()
    with torch.no_grad():
        ours, plain = study.answer_logits(model, batch), answer_logits(model, batch)
    torch.testing.assert_close(ours, plain)


def test_dropped_cells_are_those_that_things_touch() -> None:
    scenes, batch = drawn()
    cells = torch.zeros(3, study.N_TOKENS, study.N_TOKENS, dtype=torch.bool)
    for row, scene in zip(cells, scenes, strict=True):
        for box in scene.boxes:
            for y, x in np.ndindex(study.N_TOKENS, study.N_TOKENS):
                (x0, x1), (y0, y1) = ((16 * i, 16 * i + 16) for i in (x, y))
                row[y, x] |= x0 < box[2] and box[0] < x1 and y0 < box[3] and box[1] < y1

    class Always(random.Random):
        def random(self) -> float:
            return 0.0

    assert torch.equal(study.dropped_cells(Always(0), scenes), cells.flatten(1))
    model = made()
    with torch.no_grad():
        every = torch.ones(3, study.N_TOKENS**2, dtype=torch.bool)
        empty, _ = study.answer_logits(model, batch, every)
        white = {**batch.inputs, "pixel_values": torch.ones_like(batch.inputs["pixel_values"])}
        blank, _ = study.answer_logits(model, Batch(white, batch.answers))
    torch.testing.assert_close(empty, blank)


def test_without_order_image_tokens_have_one_position_and_another_order() -> None:
    model, (_, batch) = made(), drawn()
    seen: list[dict[str, torch.Tensor]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given), with_kwargs=True
    )
    with torch.no_grad():
        study.answer_logits(model, batch)
        study.answer_logits(model, batch, scrambled=random.Random(0))
    is_image = batch.inputs["mm_token_type_ids"] == 1
    plain, scrambled = seen
    assert torch.equal(plain["position_ids"][:, ~is_image], scrambled["position_ids"][:, ~is_image])
    for row, image in enumerate(is_image):
        own = scrambled["position_ids"][:, row, image]
        assert (own == own[:1, :1]).all() and own[0, 0] == plain["position_ids"][0, row, image][0]
        tokens = [given["inputs_embeds"][row, image] for given in seen]
        assert not torch.equal(*tokens)
        torch.testing.assert_close(*(t[t[:, 0].argsort()] for t in tokens), rtol=0, atol=0)


def test_recipes_differ_from_their_base_in_one_ingredient() -> None:
    for name, recipe in RECIPES.items():
        base = RECIPES["end-to-end" if name.startswith("end-to-end") else "captions"]
        differing = {
            key
            for key, value in asdict(recipe).items()
            if value != asdict(base)[key] and key not in ("name", "varies")
        }
        assert len(differing) == (0 if recipe is base else 1), name
    ends = asdict(RECIPES["end-to-end"]) | {"name": "", "varies": ""}
    captions = asdict(RECIPES["captions"]) | {"name": "", "varies": ""}
    assert {k for k in ends if ends[k] != captions[k]} == {"encoder", "encoder_rate"}


@pytest.mark.parametrize(
    ("name", "rate"), [("captions", 0.0), ("captions", 0.1), ("end-to-end", 1)]
)
def test_a_frozen_encoder_stays_as_it_is(name: str, rate: float) -> None:
    model, recipe = made(), replace(RECIPES[name], encoder_rate=rate)
    rates = study.rates_of(model, recipe)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    small = {**asdict(recipe), "encoder": None, "batch": 2}
    study.training_loss(model, encoder(), type(recipe)(**small), random.Random(0)).backward()
    for optimizer, _ in rates:
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    of_encoder = {f"model.visual.{n}" for n in study.encoder_weights(model.model.visual)}
    assert bool(changed & of_encoder) == (rate > 0)
    assert "model.visual.merger.linear_fc1.weight" in changed  # the projector always learns
    top = max(peak for _, peak in rates)
    assert top == recipe.muon_lr


# Runs


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_changes_matrices_as_torchs_own_does() -> None:
    torch.manual_seed(0)
    shapes = [(32, 32), (64, 32), (32, 64), (32, 32)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(weights.detach().clone()) for weights in ours]
    first = [weights.detach().clone() for weights in ours]
    optimizers = [kind(p, 0.01) for kind, p in ((Muon, ours), (torch.optim.Muon, theirs))]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(ours, theirs, first, strict=True):
        # torch's iterates in bfloat16, which has 8 bits.
        assert (one - other).norm() < 0.02 * (one - start).norm()
    with pytest.raises(ValueError, match=r"takes matrices.*\(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], 0.01)


def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(tmp_path: Any) -> None:
    def loop(out: Any, steps: int) -> tuple[Loop, nn.Module]:
        torch.manual_seed(0)
        module = nn.ModuleDict(
            {"blocks": nn.ModuleList([nn.Linear(3, 3)]), "head": nn.Linear(3, 1)}
        )
        named = [(f".{name}", p) for name, p in module.named_parameters()]
        rates = muon_and_adam([(n.replace("blocks", "blocks."), p) for n, p in named], 0.01, 0.01)
        assert len(rates) == 2
        return Loop(out, module, rates, Schedule(steps, warmup=2)), module

    def loss(module: Any) -> Any:
        def of(step: int) -> torch.Tensor:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return (module["head"](module["blocks"][0](x)) - 1).square().mean()

        return of

    whole, one = loop(tmp_path / "whole", 120)
    whole.run(loss(one), lambda step: 0.0)

    first, two = loop(tmp_path / "parts", 120)

    def ends(step: int) -> torch.Tensor:
        if step == 70:
            raise KeyboardInterrupt
        return loss(two)(step)

    with pytest.raises(KeyboardInterrupt):
        first.run(ends, lambda step: 0.0)
    log = tmp_path / "parts" / "training_log.csv"
    log.write_text(log.read_text() + "100,1.0,0.0,9\n")  # ended between row and checkpoint
    again, three = loop(tmp_path / "parts", 120)
    started: list[int] = []
    again.run(lambda step: (started.append(step), loss(three)(step))[1], lambda step: 0.0)
    assert started[0] == 50
    for weights, other in zip(one.parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(weights, other, rtol=1e-6, atol=1e-7)
    rows = log.read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "50", "100", "120"]


def test_a_model_of_the_study_is_made_and_loads(tmp_path: Any) -> None:
    objective = EncoderTraining("captions", steps=2, batch=2)
    recipe = replace(RECIPES["captions"], encoder=objective, steps=2, batch=2, object_dropout=1.0)
    folder = study.train_model(recipe, 0, tmp_path)
    assert folder == tmp_path / "captions-0"
    held = load_file(tmp_path / "encoders" / "captions-0" / "encoder.safetensors")
    model: Any = HookedVLM.from_pretrained(str(folder), local_files_only=True)
    own = study.encoder_weights(model.hf_model.model.visual)
    assert held.keys() == own.keys() and all(torch.equal(held[n], own[n]) for n in held)
    told = json.loads((folder / "training.json").read_text())
    assert told["object_dropout"] == 1.0 and told["encoder"]["objective"] == "captions"
    picture = Image.new("RGB", (CANVAS, CANVAS), "white")
    assert model.prepare(picture, "What?").grid.shape == (study.N_TOKENS, study.N_TOKENS)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    study.train_model(recipe, 0, tmp_path)  # it is there
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    for other in (
        replace(recipe, steps=3),
        replace(recipe, name="captions-deep", encoder=replace(objective, steps=3)),
    ):
        with pytest.raises(ValueError, match="another recipe"):
            study.train_model(other, 0, tmp_path)


def test_a_specimen_is_a_model_of_the_study_on_larger_pictures(tmp_path: Any) -> None:
    objective = EncoderTraining("captions", steps=2, batch=2)
    recipe = replace(RECIPES["captions"], batch=2, encoder=objective, steps=2)
    stage, runs = train.Stage(12, 1, 0.005, 1e-3), tmp_path / "runs"
    small = study.train_model(specimen.larger(recipe), 0, runs) / "model.safetensors"
    begun, norm = load_file(small), "model.language_model.norm.weight"
    save_file({**begun, norm: begun[norm] + 2}, small, {"format": "pt"})
    folder = specimen.train(recipe, 0, runs, tmp_path / "out", stage, encoder_steps=1)
    assert folder == tmp_path / "out"
    assert sorted(p.name for p in runs.iterdir()) == ["captions-12-0", "encoders"]
    model: Any = HookedVLM.from_pretrained(str(folder), local_files_only=True)
    assert model.cfg.n_layers == specimen.BLOCKS
    picture = Image.new("RGB", (192, 192), "white")
    assert model.prepare(picture, "What?").grid.shape == (12, 12)
    kept = load_file(folder / "model.safetensors")
    assert {weights.dtype for weights in kept.values()} == {torch.bfloat16}
    assert (folder / "model.safetensors").stat().st_size < 12e6
    held = load_file(folder / "encoder" / "encoder.safetensors")
    own = study.encoder_weights(model.hf_model.model.visual)
    for key, weights in own.items():  # frozen: as the encoder's own training left it
        assert torch.equal(weights, held[key].to(torch.bfloat16)), key
    table = load_file(runs / "encoders" / "captions-0" / "encoder.safetensors")["pos_embed.weight"]
    assert len(held["pos_embed.weight"]) == 4 * len(table)
    assert (kept[norm].float() - begun[norm] - 2).abs().max() < 0.05  # it begins with these


@pytest.mark.parametrize(
    ("name", "grown"),
    [
        ("captions", "captions-deep"),
        ("captions-deep", "captions-deep"),
        ("contrastive", "contrastive-12"),
        ("captions-tasks", "captions-tasks-12"),
    ],
)
def test_a_specimen_begins_with_the_study_s_own_deep_model(name: str, grown: str) -> None:
    recipe = specimen.larger(RECIPES[name])
    assert recipe.name == grown and recipe.blocks == specimen.BLOCKS
    assert replace(recipe, name="", varies="", blocks=6) == replace(
        RECIPES[name], name="", varies="", blocks=6
    )


def test_a_shipped_model_s_training_runs_in_stages(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (train.Stage(6, 2, 0.01, 1e-3), train.Stage(6, 1, 0.01, 1e-3, mixed=True))
    monkeypatch.setitem(train.STAGES, "tiny-gemma-3", stages)
    config = train.Config("tiny-gemma-3", batch=2)
    train.train(config, tmp_path / "whole")
    train.train(config, tmp_path / "whole")  # both stages are done: their weights are taken
    rows = (tmp_path / "whole" / "training_log.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [["0", "6", "2"], ["1", "6", "1"]]
    first = load_file(tmp_path / "whole" / "stage-1.safetensors")
    made = load_file(tmp_path / "whole" / "model.safetensors")
    projector = "multi_modal_projector.mm_input_projection_weight"
    assert torch.equal(first[f"weights.model.{projector}"], made[projector])

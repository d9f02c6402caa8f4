"""An intervention is located once for a model and inputs, and all that runs it reads that."""

from typing import Any

import pytest
import torch

from conformance import suite
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.errors import HookedVLMWarning, InterventionError, UnknownHookError
from hooked_vlm.interventions import placing
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.hook_at import HookAt
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.placing import Places
from hooked_vlm.interventions.recording import record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.sweep import Sweep, final_logits


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often places are located, and regions are made."""
    found = {"located": 0, "regions": 0}
    locate, make = placing.locate, Region.__post_init__

    def counted(*args: Any) -> Any:
        found["located"] += 1
        return locate(*args)

    def made(self: Region) -> None:
        found["regions"] += 1
        make(self)

    monkeypatch.setattr(placing, "locate", counted)
    monkeypatch.setattr(Region, "__post_init__", made)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ["growing", "restart", "plain"])
def test_a_sweep_locates_each_distinct_place_once(family, engine, counts):
    model, inputs, other = tiny(family), make_inputs(family, 2), make_inputs(family, 2, seed=3)
    (grid,) = model.grids(inputs)[0]
    region = Region.column_band(grid.shape, 0, 1)
    slots = list(range(model.cfg.n_layers + 1))
    sweep = Sweep(inputs, {"slot": slots}, lambda slot: Patch(slot, at=region, source=other))
    cells = sweep.recorded(model)
    assert counts["located"] == 2  # in the inputs and in the source, for all slots together
    before = dict(counts)
    for cell in cells:
        for part in cell.interventions:
            part.hooks_for()
    assert counts == before
    sweep.run(model, final_logits, engine=engine, dims=("batch", "vocab"))
    assert counts["located"] == 4  # the same again, for a sweep of its own
    assert counts["regions"] == before["regions"]


def test_chains_and_bases_are_placed_part_by_part():
    model, inputs = tiny("llava"), make_inputs("llava")
    chain = Chain(
        Ablate(1, at=LastToken()), Chain(Ablate(2), Steer(3, directions=torch.ones(48), alpha=1.0))
    )
    (cell,) = Sweep(inputs, {"i": [0]}, lambda i: chain, base=[chain]).plan(model)
    sites = [f"blocks.{n}.hook_resid_post" for n in (0, 1, 2)]
    assert [part.site for part in cell.base] == [part.site for part in cell.own] == sites
    assert [part.first for part in cell.own] == [inputs["input_ids"].shape[1] - 1, 0, 0]


def test_what_is_placed_refuses_other_inputs_and_can_read_another_run():
    model, inputs, other = tiny("llava"), make_inputs("llava"), make_inputs("llava", seed=1)
    placed = Patch(1, at=LastToken(), source=other).place(model, inputs, Places(model))
    recorded = record(model, other, ["blocks.0.hook_resid_post"])
    hooks = placed.reading(source=recorded).hooks_for()
    with torch.no_grad():
        expected = model.run_with_hooks(inputs, [Patch(1, at=LastToken(), source=other)])
        assert torch.equal(model.run_with_hooks(inputs, hooks), expected)
        with pytest.raises(InterventionError, match="was made for 1 prompt of"):
            model.run_with_hooks(make_inputs("llava", 2), hooks)


def one_by_one(hf_model: Any) -> None:
    """Lets a model encode its images in one call each, as Mistral 3's projector does."""
    together = hf_model.model.get_image_features

    def each(pixel_values: torch.Tensor, **options: Any) -> Any:
        found = [together(pixel_values=image, **options) for image in pixel_values.split(1)]
        found[0].pooler_output = [tokens for one in found for tokens in one.pooler_output]
        return found[0]

    hf_model.model.get_image_features = each


@pytest.mark.parametrize("site", ["vision_projector.hook_out", "vision_encoder.hook_out"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_j2_what_is_meant_for_one_image_is_not_written_into_the_next(site: str, images: int):
    hf_model = build("llava")
    one_by_one(hf_model)
    model, inputs = HookedVLM(hf_model), make_inputs("llava", images=images)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), tiny("llava")(inputs))
        edit = Ablate(site, at=Region.column_band((6, 6), 0, 1).of_image(0))
        if images == 1:
            expected = tiny("llava").run_with_hooks(inputs, [edit])
            torch.testing.assert_close(model.run_with_hooks(inputs, [edit]), expected)
            return
        other = Ablate(site, at=Region.column_band((6, 6), 0, 1).of_image(1))
        for refused in (edit, other):
            with pytest.raises(InterventionError, match="runs once for each image"):
                model.run_with_hooks(inputs, [refused])


def test_j2_an_encoder_that_runs_twice_on_an_image_is_refused_at_the_second_call():
    hf_model = build("llava")
    own = hf_model.model.get_image_features

    def twice(**options: Any) -> Any:
        own(**options)
        return own(**options)

    model, inputs = HookedVLM(hf_model), make_inputs("llava")
    assert model.grids(inputs)[0]  # measured while the encoder runs once
    hf_model.model.get_image_features = twice
    with torch.no_grad(), pytest.raises(InterventionError, match="runs once for each image"):
        model.run_with_hooks(inputs, [Ablate("vision_projector.hook_out")])


def double(activation: torch.Tensor, hook: Any) -> torch.Tensor:
    return activation * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_attn_out",
        "blocks.2.hook_resid_post",
        "blocks.1.attn.hook_z",
        "blocks.1.attn.hook_pattern",
        "vision_encoder.blocks.1.hook_resid_post",
        "vision_projector.hook_out",
        "hook_logits",
    ],
)
@pytest.mark.filterwarnings("ignore:Attention scores or patterns")
def test_a_hook_function_is_a_cell_like_any_other(family, name):
    model, inputs = tiny(family), make_inputs(family, 2)

    def stronger(strength: float) -> Any:
        return name, lambda activation, hook: activation * (1 + strength) + strength

    strengths = [0.0, 0.5, 1.0]
    sweep = Sweep(inputs, {"strength": strengths}, stronger)
    fast = sweep.run(model, final_logits, dims=("batch", "vocab"))
    plain = sweep.run(model, final_logits, dims=("batch", "vocab"), engine="plain")
    torch.testing.assert_close(
        torch.tensor(fast.values), torch.tensor(plain.values), rtol=1e-4, atol=1e-5
    )
    assert not torch.equal(torch.tensor(fast.values[0]), torch.tensor(fast.values[2]))


def test_a_pair_a_list_of_pairs_and_a_base_of_pairs_are_hooks():
    model, inputs = tiny("llava"), make_inputs("llava")
    pair = ("blocks.1.hook_mlp_out", double)
    metric: Any = final_logits
    scores = [
        Sweep(inputs, {"i": [0, 1]}, lambda i, made=made: made, base=base).run(
            model, metric, dims=("batch", "vocab")
        )
        for made, base in ((pair, ()), ([pair], ()), (HookAt(*pair), ()), (None, [pair]))
    ]
    assert all(score.equals(scores[0]) for score in scores[1:3])
    torch.testing.assert_close(torch.tensor(scores[3].values), torch.tensor(scores[0].values))


def test_j2_a_hook_at_another_site_is_the_same_function_there():
    model, inputs = tiny("llava"), make_inputs("llava")
    there = HookAt(0, double, first_position=3).at_site(2)
    assert (there.fn, there.first_position) == (double, 3)
    ((site, function),) = there.hooks_for(model, inputs)
    assert (site, function) == ("blocks.1.hook_resid_post", double)
    moved = [part.at_site(1).site for part in (Ablate(0), Chain(Ablate(0), Ablate(2)).parts[1])]
    assert moved == [1, 1]
    assert [part.site for part in Chain(Ablate(0), HookAt(2, double)).at_site(1).parts] == [1, 1]


def test_positions_before_the_first_are_the_clean_runs():
    model, inputs = tiny("llava"), make_inputs("llava")
    last = inputs["input_ids"].shape[1] - 1

    def edit(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = activation.clone()
        changed[:, -1] *= 2
        return changed

    sweep = Sweep(inputs, {"slot": [1, 2]}, lambda slot: HookAt(slot, edit, first_position=last))
    fast = sweep.run(model, final_logits, dims=("batch", "vocab"), logits_to_keep=1)
    assert f"from positions {last}" in fast.attrs["engine"]
    plain = sweep.run(model, final_logits, dims=("batch", "vocab"), engine="plain")
    torch.testing.assert_close(
        torch.tensor(fast.values), torch.tensor(plain.values), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (HookAt("blocks.0.hook_resid_per", double), UnknownHookError, "hook_resid_pre"),
        (HookAt(0, double, first_position=999), InterventionError, "out of range"),
        ("blocks.0.hook_resid_pre", InterventionError, "is no intervention"),
    ],
)
def test_what_is_no_hook_is_refused_before_anything_runs(made, error, words, monkeypatch):
    model = tiny("llava")
    monkeypatch.setattr(HookedVLM, "forward", lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(error, match=words):
        Sweep(make_inputs("llava"), {"i": [0]}, lambda i: made).plan(model)


def encoder_decoder() -> tuple[HookedVLM, dict[str, Any]]:
    """A model whose encoder reads the prompt, and inputs whose decoder's prompt is as long."""
    model = suite.build("florence2")
    with pytest.warns(HookedVLMWarning, match="has no grid"):
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    own = {n: v for n, v in inputs.items() if not n.startswith("decoder_")}
    return model, own


@pytest.mark.parametrize("name", ["decoder_input_ids", "labels"])
def test_c5_a_prompt_that_an_encoder_reads_gives_no_positions_in_a_decoder(name: str) -> None:
    model, inputs = encoder_decoder()
    inputs[name] = inputs["input_ids"].flip(1)
    for edit in (
        Ablate(0, at=LastToken()),
        Ablate("blocks.1.hook_mlp_out"),
        Patch(1, source=inputs),
    ):
        with pytest.raises(InterventionError, match=r"Places are found in input_ids .*Use a hook"):
            model.run_with_hooks(inputs, [edit])
    # What the message advises: torch's own hook does the same.
    site = "blocks.1.hook_resid_pre"
    edited = model.run_with_hooks(inputs, [(site, lambda x, hook: x * 2)])
    block = model.hf_model.get_submodule(model.sites[site].module)
    handle = block.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    assert torch.equal(edited, model.hf_model(**inputs).logits)
    handle.remove()


def test_f_several_residual_streams_have_a_message_with_their_shape() -> None:
    model = suite.build("gemma3n")
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    for edit in (Ablate(0), Steer(1, directions=torch.ones(model.cfg.d_model), alpha=1.0)):
        with pytest.raises(InterventionError, match=r"has shape \(4, 1, .* the axes \[batch pos"):
            model.run_with_hooks(inputs, [edit])
    # A site of one stream works.
    site = "blocks.0.hook_resid_mid"
    assert model.run_with_hooks(inputs, [Ablate(site)]).isfinite().all()

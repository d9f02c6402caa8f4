"""Sites that a user adds: read, written and swept as others are; refused where they cannot be."""

import warnings
from typing import Any

import pytest
import torch

from helpers.tiny_models import build, make_inputs, tiny
from hooked_vlm.errors import HookError
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.memory import estimate_cache
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.sweeps.sweep import Sweep


ACT, ENCODER_ACT = "blocks.1.mlp.hook_act", "vision_encoder.blocks.0.mlp.hook_act"


def path_of(model: HookedVLM, block: str) -> str:
    return model.sites[f"{block}.hook_resid_pre"].module


def wrapped(family: str) -> HookedVLM:
    """A wrapper of its own, so that sites of one test are not those of another."""
    return HookedVLM(tiny(family, "eager").hf_model, name=f"tiny {family}")


def with_sites(family: str) -> HookedVLM:
    model = wrapped(family)
    act = "activation_fn" if family != "qwen2-vl" else "act"
    model.add_site(ACT, f"{path_of(model, 'blocks.1')}.mlp.act_fn")
    encoder = f"{path_of(model, 'vision_encoder.blocks.0')}.mlp.{act}"
    model.add_site(ENCODER_ACT, encoder, axes="image patch d_mlp")
    model.add_site("hook_stack", model.anatomy.lm.path)
    return model


@pytest.mark.parametrize("family", ["qwen2-vl", "llava"])
def test_an_own_site_is_a_site(family: str) -> None:
    model, inputs = with_sites(family), make_inputs(family, 2)
    plain, cache = model.run_with_cache(inputs)
    act = model.hf_model.get_submodule(model.sites[ACT].module)
    assert torch.equal(cache[ACT], act(cache["blocks.1.mlp.hook_pre"]))
    encoder_act = model.hf_model.get_submodule(model.sites[ENCODER_ACT].module)
    pre = cache["vision_encoder.blocks.0.mlp.hook_pre"]  # in raster order, so is the own site
    assert torch.allclose(cache[ENCODER_ACT], encoder_act(pre), atol=1e-6)
    assert torch.equal(cache["hook_stack"], cache["ln_final.hook_normalized"])
    assert estimate_cache(model, inputs, ENCODER_ACT).nbytes == cache[ENCODER_ACT].nbytes
    names = model.hook_names
    assert names.index(ACT) == names.index("blocks.1.hook_resid_post") - 1
    assert "hook_act" in model.describe() and model.blocks[1].mlp.hook_act.name == ACT
    for name in (ACT, ENCODER_ACT, "hook_stack"):
        same = model.run_with_hooks(inputs, [(name, lambda x, hook: x.clone())])
        assert torch.allclose(same, plain, atol=1e-5)
        zero = model.run_with_hooks(inputs, [(name, lambda x, hook: x * 0)])
        assert not torch.allclose(zero, plain, atol=1e-3)
        if name != ENCODER_ACT:  # there an ablation leaves class tokens
            assert torch.equal(zero, model.run_with_hooks(inputs, [Ablate(name)]))
    _, stopped = model.run_with_cache(inputs, [ACT], stop_at_layer=2)
    assert torch.equal(stopped[ACT], cache[ACT])


@pytest.mark.parametrize(
    ("sites", "engine"),
    [((ACT, "blocks.1.hook_mlp_out"), "growing"), ((ACT, "hook_stack"), "restart")],
)
def test_sweeps_over_own_sites_are_plain_passes(sites: tuple[str, ...], engine: str) -> None:
    model = with_sites("llava")
    inputs, source = make_inputs("llava", 2, seed=1), make_inputs("llava", 2, seed=2)
    cells = [(site, at) for site in sites for at in (None, LastToken())]
    sweep = Sweep(
        inputs,
        {"cell": range(4)},
        lambda cell: Patch(cells[cell][0], at=cells[cell][1], source=source),
    )
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        fast = sweep.run(model, lambda x: x[:, -1, :3], dims=("batch", "token"))
    plain = sweep.run(model, lambda x: x[:, -1, :3], dims=("batch", "token"), engine="plain")
    assert fast.attrs["engine"].startswith(engine)
    assert abs(fast - plain).max() < 1e-4 and plain.std() > 0.01
    if engine == "restart":
        assert "rows cannot carry what 2 cells" in fast.attrs["engine"]


@pytest.mark.parametrize(
    ("name", "module", "more", "said"),
    [
        ("blocks.0.hook_x", "{b}.mlp.act", {}, r"no module '.*act' .*Did you mean '.*mlp.act_fn'"),
        ("blocks.0.hook_x", "no", {}, "no module 'no'"),
        ("blocks.0.mlp.hook_pre", "{b}.mlp.act_fn", {}, "taken: it is the site"),
        ("blocks.0.hook_out", "{b}.mlp.act_fn", {}, "the site 'blocks.0.hook_resid_post'"),
        ("blocks.1.hook_x", "{b}.mlp.act_fn", {}, "in block 0 of the language model.*'blocks.0.h"),
        ("hook_x", "{b}.mlp.act_fn", {}, "Name it 'blocks.0.hook_x'"),
        ("blocks.0.hook_x", "{lm}", {}, "neither in a block.*Name it 'hook_x'"),
        ("vision_encoder.hook_x", "{b}.mlp.act_fn", {}, "Name it 'blocks.0.hook_x'"),
        ("blocks.0.hook_x", "{b}.mlp.gate_proj", {}, "the site 'blocks.0.mlp.hook_pre' already"),
        ("blocks.0.hook_x", "{b}", {"where": "input"}, "'blocks.0.hook_resid_pre' already"),
        ("blocks.0.act", "{b}.mlp.act_fn", {}, "is no name of a site"),
        ("blocks.0.hook_x_grad", "{b}.mlp.act_fn", {}, "does not end with _grad"),
        ("blocks.0.hook_x", "{b}.mlp.act_fn", {"where": "inputs"}, "Did you mean 'input'"),
        ("blocks.0.hook_x", "{b}.mlp.act_fn", {"axes": "image patch d"}, "begin with 'batch'"),
        ("blocks.0.hook_x", "{b}.mlp.act_fn", {"axes": "batch pos pos"}, "different names"),
        ("hook_x", "{lm}.layers", {}, "ModuleList, which is never called"),
    ],
)
def test_what_cannot_be_a_site_is_refused(
    name: str, module: str, more: dict[str, Any], said: str
) -> None:
    model = wrapped("llava")
    path = module.format(b=path_of(model, "blocks.0"), lm=model.anatomy.lm.path)
    before = list(model.sites)
    with pytest.raises(HookError, match=said):
        model.add_site(name, path, **more)
    assert list(model.sites) == before == list(model.hook_dict)


def test_a_packed_encoder_has_sites_in_blocks_and_projector_only() -> None:
    model, inputs = wrapped("qwen2-vl"), make_inputs("qwen2-vl")
    assert model.anatomy.vision is not None
    outside = f"{model.anatomy.vision.path}.rotary_pos_emb"
    with pytest.raises(HookError, match="order that is not known"):
        model.add_site("vision_encoder.hook_rope", outside)
    merger = f"{model.anatomy.projector}.mlp.1"
    assert isinstance(model.add_site("vision_projector.hook_act", merger), HookPoint)
    cache = model.run_with_cache(inputs, "vision_projector.*")[1]
    assert (
        cache["vision_projector.hook_act"].shape[:2] == cache["vision_projector.hook_out"].shape[:2]
    )


def test_another_shape_or_a_second_call_is_an_error_of_the_run() -> None:
    hf_model, inputs = build("llava"), make_inputs("llava")
    mlp = hf_model.get_submodule(path_of(HookedVLM(hf_model), "blocks.0")).mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + 0 * plain(x)
    model = HookedVLM(hf_model)
    act = f"{path_of(model, 'blocks.1')}.mlp.act_fn"
    model.add_site("blocks.1.hook_x", act, axes="batch pos head d_head")
    said = r"\(1, 45, 96\) float32 .* added with the axes \[batch pos head d_head\]"
    with pytest.raises(HookError, match=said):
        model.run_with_cache(inputs, "blocks.1.hook_x")
    model.add_site("blocks.0.hook_x", f"{path_of(model, 'blocks.0')}.mlp.act_fn")
    with pytest.raises(HookError, match=r"hook_x runs more than once in a pass"):
        model.run_with_hooks(inputs, [Ablate("blocks.0.hook_x")])

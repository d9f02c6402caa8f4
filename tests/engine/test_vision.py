"""Cells before the blocks grow too, where the blocks' input carries all that they change."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.suite import build, image_size, picture
from helpers.growing_sweeps import compared, make_region
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from helpers.toy_grids import make_grid
from hooked_vlm.engine import vision
from hooked_vlm.engine.attempts import GrowthError
from hooked_vlm.engine.growing import run_growing
from hooked_vlm.engine.noise import BOUNDS
from hooked_vlm.engine.proofs import forget
from hooked_vlm.engine.run import run_plain
from hooked_vlm.engine.stages import job_of
from hooked_vlm.engine.vision import TowerRestart, merges_first, tower_depth
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.hooks.stand_ins import encoder_of
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.sweeps.sweep import Sweep


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores or patterns")
        yield


SITES = (
    "vision_encoder.blocks.0.hook_resid_pre",
    "vision_encoder.blocks.0.attn.hook_z",
    "vision_encoder.blocks.1.hook_mlp_out",
    "vision_encoder.blocks.1.hook_resid_post",
    "vision_projector.hook_out",
    "hook_embed",
)


def sweep_of(
    family: str, kinds: list[str], sites: list[Any], batch: int = 2, base: Any = ()
) -> Sweep:
    source, region = make_inputs(family, batch, seed=2), make_region(family)

    def make(kind: str, site: Any) -> Any:
        at = LastToken() if site in ("hook_embed", "hook_merged_embed") else region
        return {
            "patch": lambda: Patch(site, at=at, source=source),
            "zero": lambda: Ablate(site, at=at),
            "and last": lambda: Chain(
                Ablate(site, at=at), Patch(1, at=LastToken(), source=source), Ablate(0, at=region)
            ),
        }[kind]()

    return Sweep(make_inputs(family, batch, seed=1), {"kind": kinds, "site": sites}, make, base)


@pytest.mark.parametrize(
    ("site", "depth"),
    [
        ("vision_encoder.hook_patch_embed", 0),
        ("vision_encoder.blocks.0.hook_resid_pre", 0),
        ("vision_encoder.blocks.0.hook_resid_post", 1),
        ("vision_encoder.blocks.1.hook_mlp_out", 1),
        ("vision_encoder.blocks.1.hook_resid_post", 2),
        ("vision_encoder.hook_out", 3),
        ("vision_projector.hook_out", 3),
        ("blocks.0.hook_resid_pre", 3),
    ],
)
def test_j2_the_tower_is_shared_below_the_lowest_change(site: str, depth: int) -> None:
    model, inputs = tiny("gemma-3"), make_inputs("gemma-3")
    placed = Ablate(site).place(model, inputs)
    assert tower_depth(model, [placed]) == depth
    assert tower_depth(model, [placed, Ablate(1).place(model, inputs)]) == depth
    # One of the user's own, of which nothing is known, may act anywhere.
    assert tower_depth(model, [placed, object()]) == 0


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_cells_in_front_of_the_blocks_grow(family: str, data: st.DataObject) -> None:
    kinds = data.draw(
        st.lists(
            st.sampled_from(["patch", "zero", "and last"]), min_size=1, max_size=2, unique=True
        )
    )
    sites: list[Any] = data.draw(
        st.lists(st.sampled_from([*SITES, 2]), min_size=2, max_size=3, unique=True)
    )
    batch = data.draw(st.integers(1, 2))
    base = data.draw(
        st.sampled_from(
            [[], [Ablate(0, at=make_region(family))], [Ablate(SITES[2], at=make_region(family))]]
        )
    )
    keep = data.draw(st.sampled_from([{}, {"logits_to_keep": 1}]))
    compared(tiny(family), sweep_of(family, kinds, sites, batch, base), **keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_once_proved_no_clean_run_is_made_for_rows_that_bring_all(family: str) -> None:
    """Whether a sweep is the first of its kind does not show in its numbers."""
    model, sweep = tiny(family), sweep_of(family, ["patch"], list(SITES[:5]))
    assert model.anatomy.lm.final_norm is not None
    norm = model.hf_model.get_submodule(model.anatomy.lm.final_norm)  # after the blocks
    ran: list[int] = []
    forget(model)
    cells = sweep.recorded(model)
    handle = norm.register_forward_hook(lambda _, args, output: ran.append(0))

    def scores() -> list[torch.Tensor]:
        return run_growing(model, sweep.inputs, cells, lambda x: x, None, {"logits_to_keep": 1})[0]

    first, n_first = scores(), len(ran)
    again, n_again = scores(), len(ran) - n_first
    handle.remove()
    assert n_again == 1 < n_first  # the pass of all rows
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("family", FAMILIES)
def test_once_proved_the_encoder_is_called_once_for_each_cell(family: str) -> None:
    """What lies below all edits comes of the cells' own passes, and the last one makes all rows."""
    model, sweep = tiny(family), sweep_of(family, ["patch"], list(SITES[1:4]))
    forget(model)
    cells = sweep.recorded(model)
    encoder = encoder_of(model)
    assert encoder is not None
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("encoder", encoder), ("model", model.hf_model))
    ]
    plain = run_plain(model, sweep.inputs, cells, lambda x: x)
    for _ in range(2):
        ran.clear()
        found = run_growing(model, sweep.inputs, cells, lambda x: x)[0]
    for handle in handles:
        handle.remove()
    assert ran.count("encoder") == len(cells)
    assert ran.count("model") == 1  # other passes end before the first block
    for one, other in zip(found, plain, strict=True):
        assert (one - other).abs().max() <= 5e-6 * other.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_in_the_encoder_alone_ends_after_it(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, seed=3)
    names = [SITES[2], SITES[3]]
    _, whole = model.run_with_cache(inputs, names)
    ran: list[int] = []
    inner: Any = model.hf_model.model
    handle = inner.language_model.register_forward_pre_hook(lambda *_: ran.append(0))
    try:
        found = record(model, inputs, names).cache
        assert not ran
        record(model, inputs, [*names, "vision_projector.hook_out"])
        assert ran  # that may lie after the encoder
    finally:
        handle.remove()
    assert all(torch.equal(found[name], whole[name]) for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_follows_the_weights_and_the_way_of_attending(family: str) -> None:
    model = tiny(family)
    sweep = sweep_of(family, ["patch"], list(SITES[:3]))
    assert compared(model, sweep).controls <= 1
    eager = tiny(family, "eager")
    forget(eager)
    assert compared(eager, sweep_of(family, ["patch"], list(SITES[:3]))).controls == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_within_its_bound(family: str, dtype: torch.dtype) -> None:
    model = HookedVLM(deepcopy(tiny(family).hf_model).to(dtype))
    inputs, source = (
        {n: x.to(dtype) if x.is_floating_point() else x for n, x in made.items()}
        for made in (make_inputs(family, 2, seed=seed) for seed in (1, 2))
    )
    sweep = Sweep(
        inputs,
        {"site": [SITES[0], SITES[3], SITES[4]]},
        lambda site: Patch(site, at=make_region(family), source=source),
    )
    compared(model, sweep, bound=BOUNDS[dtype], logits_to_keep=1)


def test_an_encoder_too_large_to_keep_runs_anew_for_every_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, sweep = tiny("qwen2-vl"), sweep_of("qwen2-vl", ["patch"], list(SITES[:4]))
    monkeypatch.setattr(vision, "BUDGET", 10)
    fronts = [cell.interventions for cell in sweep.recorded(model)]
    assert TowerRestart.of(model, sweep.inputs, fronts) is None
    compared(model, sweep)


def test_j2_a_block_of_the_encoder_takes_bytes_for_every_patch_of_every_image() -> None:
    grids = [[make_grid(2, 3), make_grid(1, 2)], [make_grid(3, 1)]]
    model = SimpleNamespace(grids=lambda _: grids, cfg=tiny("gemma-3").cfg)
    # Cells of 2x2 patches, a width of 32, and four bytes for each number.
    assert vision._block_bytes(model, {}) == 4 * (6 + 2 + 3) * 32 * 4


def small(model_type: str) -> tuple[HookedVLM, Any, Any]:
    model = build(model_type)
    size = image_size(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs, source = (model.prepare([picture(*size, seed=s)], "What is this?") for s in (0, 1))
    return model, inputs, source


def test_features_that_reach_later_blocks_too_are_not_carried() -> None:
    """DeepStack: blocks above the first are given features of the encoder's own."""
    model, inputs, source = small("qwen3_vl")
    ends = ("mid", "post")
    sites = [f"vision_encoder.blocks.{i}.hook_resid_{end}" for i in range(3) for end in ends]
    sweep = Sweep(inputs, {"site": sites}, lambda site: Patch(site, source=source))
    with pytest.raises(GrowthError, match=r"off by .* under noise at vision_encoder"):
        run_growing(model, inputs, sweep.recorded(model), lambda x: x)
    with pytest.warns(HookedVLMWarning, match="cannot run by the engine 'growing'.*off by"):
        fast = sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"))
    plain = sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"), engine="plain")
    assert abs(fast - plain).max() < 1e-5 and fast.attrs["engine"].startswith("restart (no growing")


@pytest.mark.parametrize(
    ("model_type", "first"),
    [("blip-2", False), ("granite4_vision", False), ("gemma4", True), ("qwen2_vl", True)],
)
def test_merged_embeddings_are_slot_zero_only_where_nothing_comes_between(
    model_type: str, first: bool
) -> None:
    """BLIP-2 adds positions, Granite scales; Gemma 4 makes inputs for every block of them."""
    model, inputs, _ = small(model_type)
    assert merges_first(model, inputs) is first
    length = inputs["input_ids"].shape[1]
    sweep = Sweep(
        inputs,
        {"alpha": [0.5, 1.0], "site": ["hook_merged_embed", 1]},
        lambda alpha, site: Steer(site, directions=torch.ones(model.cfg.d_model), alpha=alpha),
    )
    kwargs: Any = {"dims": ("batch", "pos", "token")}
    slower = pytest.warns(HookedVLMWarning, match="cannot run by the engine 'growing'")
    with slower if model_type == "gemma4" else nullcontext():
        fast = sweep.run(model, lambda x: x, **kwargs)
    plain = sweep.run(model, lambda x: x, engine="plain", **kwargs)
    assert fast.sizes["pos"] == length
    assert float(abs(fast - plain).max()) < 1e-4 * float(abs(plain).max())
    assert fast.attrs["engine"].startswith("restart" if model_type == "gemma4" else "growing")


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_embeddings_come_before_slot_zero_however_they_are_listed(family: str) -> None:
    region = make_region(family)
    base = [Ablate(0, at=region)]  # wins over what cells write before it
    sweep = Sweep(
        make_inputs(family, 2, seed=1),
        {"alpha": [1.0, 2.0]},
        lambda alpha: Steer("hook_merged_embed", directions=torch.ones(48), alpha=alpha),
        base,
    )
    (cell, _) = sweep.plan(tiny(family))
    assert job_of(tiny(family), sweep.inputs, cell, 0) is None
    forget(tiny(family))
    with pytest.warns(HookedVLMWarning, match="rows cannot carry what 2 cells would change"):
        fast = sweep.run(tiny(family), lambda x: x[:, -1], dims=("batch", "token"))
    plain = sweep.run(tiny(family), lambda x: x[:, -1], dims=("batch", "token"), engine="plain")
    assert float(abs(fast - plain).max()) < 1e-5 * float(abs(plain).max())
    alone = Sweep(sweep.inputs, sweep.axes, lambda alpha: [*base, sweep.make(alpha=alpha)])
    compared(tiny(family), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_has_the_clean_logits_bit_for_bit(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    sweep = Sweep(
        inputs,
        {"alpha": [0.0, 1.0], "slot": [0, 1, 2]},
        lambda alpha, slot: Steer(slot, directions=torch.ones(48), alpha=alpha),
    )
    cells = sweep.recorded(model)
    grown, report = run_growing(model, inputs, cells, lambda x: x)
    plain = run_plain(model, inputs, cells, lambda x: x)
    assert report.idle == 3 and "; 3 cells change nothing" in str(report)
    assert all(torch.equal(grown[i], plain[i]) for i in range(3))
    assert not any(torch.equal(grown[i], plain[0]) for i in range(3, 6))


def test_an_encoder_without_blocks_grows_too() -> None:
    """The noise that proves a pass starts where there is a site: after a convolutional encoder."""
    model, inputs, _ = small("fast_vlm")
    assert "vision_encoder.blocks.0.hook_resid_pre" not in model.sites
    sweep = Sweep(
        inputs,
        {"alpha": [1.0, 2.0]},
        lambda alpha: Steer(
            "vision_projector.hook_out", directions=torch.ones(model.cfg.d_model), alpha=alpha
        ),
    )
    compared(model, sweep)


def test_torch_hooks_of_others_may_lie_between_merged_embeddings_and_blocks() -> None:
    model, inputs = HookedVLM(deepcopy(tiny("llava").hf_model)), make_inputs("llava")
    assert merges_first(model, inputs)
    stack = model.anatomy.lm.blocks[0].path.rsplit(".", 2)[0]

    def twice(_: Any, args: tuple, kwargs: dict) -> Any:
        return args, {**kwargs, "inputs_embeds": 2 * kwargs["inputs_embeds"]}

    handle = model.hf_model.get_submodule(stack).register_forward_pre_hook(twice, with_kwargs=True)
    assert not merges_first(model, inputs)
    handle.remove()
    assert merges_first(model, inputs)

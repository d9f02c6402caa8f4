"""A growing batch gives what hooked passes give, one by one."""

import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.suite import build, image_size, picture
from helpers.growing_sweeps import compared, sweep_of
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.engine import noise
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken, Positions
from hooked_vlm.sweeps.sweep import Sweep


SITES = (
    0,
    1,
    2,
    3,
    "hook_merged_embed",
    "blocks.0.attn.hook_z",
    "blocks.1.attn.hook_q",
    "blocks.2.attn.hook_v",
    "blocks.1.hook_attn_out",
    "blocks.0.hook_resid_mid",
    "blocks.2.hook_mlp_out",
    "ln_final.hook_normalized",
)


ARCHITECTURES = (
    "qwen2_5_vl",
    "gemma3",
    "llava_next",
    "idefics3",
    "smolvlm",
    "paligemma",
    "internvl",
    "mistral3",
    "aya_vision",
    "glm4v",
    "qwen3_vl",
    "vipllava",
    "cohere2_vision",
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores or patterns")
        yield


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_sweep_gives_what_plain_passes_give(family: str, data: st.DataObject) -> None:
    kinds = data.draw(
        st.lists(
            st.sampled_from(["clean", "swap", "last", "all", "zero", "steer", "chain"]),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    sites: list[Any] = data.draw(
        st.lists(st.sampled_from(SITES), min_size=2, max_size=4, unique=True)
    )
    batch = data.draw(st.integers(1, 3))
    keep = data.draw(st.sampled_from([{}, {"logits_to_keep": 1}, {"logits_to_keep": 3}]))
    compared(tiny(family), sweep_of(family, kinds, sites, batch), **keep)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_and_kind(family: str, attn: str) -> None:
    model = tiny(family, attn)
    report = compared(model, sweep_of(family, ["swap", "all", "zero", "chain"], list(SITES)))
    assert 0 in report.starts and report.rows >= 2 * 48
    report = compared(model, sweep_of(family, ["last"], list(SITES)), logits_to_keep=1)
    assert report.starts == [make_inputs(family)["input_ids"].shape[1] - 1]  # one row a cell


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_rows_differ_in_their_last_bits_at_most(family: str) -> None:
    """All positions carried, all logits kept: how many rows a product has may choose its sums'
    order, on some processors."""
    sweep = sweep_of(family, ["all"], [0, 1, 2, 3])
    report = compared(tiny(family), sweep, bound=2e-6)
    assert report.worst <= 2e-6 and report.starts == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_within_its_bound(family: str, dtype: torch.dtype) -> None:
    model = HookedVLM(deepcopy(tiny(family).hf_model).to(dtype))

    def halved(seed: int) -> dict[str, Any]:
        made = make_inputs(family, 2, seed=seed)
        return {n: x.to(dtype) if x.is_floating_point() else x for n, x in made.items()}

    source = halved(2)
    sweep = Sweep(
        halved(1),
        {"at": ["last", "all"], "site": [0, 1, 2, 3]},
        lambda at, site: Patch(site, at=LastToken() if at == "last" else None, source=source),
    )
    compared(model, sweep, bound=noise.BOUNDS[dtype], logits_to_keep=1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_dozen_families(model_type: str) -> None:
    model = build(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = image_size(model)
        inputs, source = (model.prepare([picture(*size, seed=s)], "What is this?") for s in (0, 1))
        for prepared in (inputs, source):
            prepared.tensors.pop("labels", None)  # PaliGemma's, for a loss over all positions
    image = inputs.grids[0][0].positions.flatten()
    places = {
        "image": Positions(tuple(image.tolist()[:2])),
        "last": LastToken(),
        "all": None,
    }
    slots = range(model.cfg.n_layers + 1)
    sweep = Sweep(
        inputs,
        {"at": list(places), "slot": list(slots)},
        lambda at, slot: Patch(slot, at=places[at], source=source),
    )
    compared(model, sweep, bound=1e-4, logits_to_keep=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", ["pre", "post"])
def test_j2_later_edits_of_a_chain_between_blocks_are_carried_out(family: str, end: str) -> None:
    """A row that has joined is edited before, and after, every block that it goes through."""
    inputs = make_inputs(family, 2, seed=1)

    def chain(k: int) -> Chain:
        first = Ablate("blocks.0.hook_resid_pre", at=LastToken())
        return Chain(first, Ablate(f"blocks.{k}.hook_resid_{end}"))

    sweep = Sweep(inputs, {"k": [1, 2]}, chain)
    compared(tiny(family), sweep)
    scores = sweep.run(tiny(family), lambda x: x[:, -1], dims=("batch", "token"))
    alone = Sweep(inputs, {"k": [1, 2]}, lambda k: chain(k).parts[0])
    without = alone.run(tiny(family), lambda x: x[:, -1], dims=("batch", "token"))
    assert (abs(scores - without).max(("batch", "token")) > 1e-2).all()  # they do something


def test_no_trace_is_left_in_the_model() -> None:
    model, sweep = tiny("gemma-3"), sweep_of("gemma-3", ["swap", "last"], list(SITES))
    modules = list(model.hf_model.modules())

    def state() -> list[Any]:
        return [
            (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in modules
        ]

    before = state()
    sweep.run(model, lambda x: x[:, -1, 0], logits_to_keep=1)
    assert state() == before and not model.is_hooked


@pytest.mark.parametrize("engine", ["growing", "restart"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_function_that_writes_in_place_leaves_the_clean_run_alone(
    family: str, engine: str
) -> None:
    inputs = make_inputs(family, 2, seed=1)

    def zero(x: torch.Tensor, hook: Any) -> None:
        x[:, 3:6] = 0

    layers = [0, 1, 2, 2, 1]
    sweep = Sweep(inputs, {"i": range(5)}, lambda i: (f"blocks.{layers[i]}.hook_resid_pre", zero))
    how: Any = {"dims": ("batch", "token")}
    fast = sweep.run(tiny(family), lambda x: x[:, -1], engine=engine, **how)
    plain = sweep.run(tiny(family), lambda x: x[:, -1], engine="plain", **how)
    assert fast.attrs["engine"].startswith(engine) and "change nothing" not in str(fast.attrs)
    assert float(abs(fast - plain).max()) <= 5e-6 * float(abs(plain).max())
    assert float(abs(plain[0] - plain[1]).max()) > 0

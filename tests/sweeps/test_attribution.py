"""First-order estimates: exact where the score is linear, a derivative where the edit is small."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from helpers.forward_counter import count_forwards
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.errors import HookedVLMWarning, InterventionError
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.chain import Chain
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import record
from hooked_vlm.interventions.steer import Steer
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.pairs import swap_pairs
from hooked_vlm.regions.positions import LastToken
from hooked_vlm.regions.region import Region
from hooked_vlm.sweeps.attribution import attribution_patch
from hooked_vlm.sweeps.sweep import Sweep


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 1] - logits[:, -1, 2]


def two_scores(logits: Tensor) -> Tensor:
    return logits[:, -1, 3:5]


class Own:
    """An intervention of one's own: a hook function at a site."""

    mask = True  # what its other attributes are called has no meaning

    def __init__(self, site: str, function: Callable[[Any], Any]) -> None:
        self.site, self.function = site, function

    def check(self, *args: Any) -> None:
        pass

    def hooks_for(self, *args: Any) -> list:
        return [(self.site, lambda activation, hook: self.function(activation))]


def both(sweep: Sweep, model: HookedVLM, metric: Any, **how: Any) -> tuple:
    estimate = sweep.attribution(model, metric, **how)
    return estimate, sweep.run(model, metric, engine="plain", **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_exact_where_the_score_is_linear(family: str) -> None:
    model = tiny(family)
    inputs, source, reference = (make_inputs(family, 2, seed=s) for s in (1, 2, 3))
    made = {
        "clean": lambda site: None,
        "patch": lambda site: Patch(site, source=source),
        "last": lambda site: Patch(site, at=LastToken(), source=source),
        "zero": lambda site: Ablate(site, at=LastToken()),
        "mean": lambda site: Ablate(site, to="mean", reference=reference),
        "two": lambda site: [
            Patch(site, at=LastToken(), source=source),
            Chain(Ablate(site, at=LastToken()), Patch(site, at=LastToken(), source=source)),
        ],
    }
    sites = ["ln_final.hook_normalized", "hook_logits"]
    sweep = Sweep(inputs, {"kind": list(made), "site": sites}, lambda kind, site: made[kind](site))
    how: dict[str, Any] = {"dims": ("batch", "token"), "coords": {"token": ["a", "b"]}}
    estimate, exact = both(sweep, model, two_scores, **how)
    assert estimate.dims == exact.dims and estimate.shape == exact.shape
    xr.testing.assert_equal(estimate.coords.to_dataset(), exact.coords.to_dataset())
    np.testing.assert_allclose(estimate, exact, atol=2e-5)
    np.testing.assert_allclose(
        estimate.sel(kind="clean"), exact.sel(kind="clean"), rtol=2e-6, atol=2e-6
    )
    assert np.abs(exact - exact.sel(kind="clean")).max(("batch", "token")).sel(kind="two").min() > 0
    assert estimate.attrs["engine"] == (
        "first-order estimate: 1 forward and 2 backward passes, gradients at 2 sites"
    )


def doubled(family: str) -> tuple[HookedVLM, Callable[[int], dict[str, Tensor]]]:
    """A model in float64 (its norms stay in float32) and a maker of inputs for it."""

    def inputs(seed: int) -> dict[str, Tensor]:
        made = make_inputs(family, 2, seed=seed)
        return {n: v.double() if v.is_floating_point() else v for n, v in made.items()}

    return HookedVLM(build(family, dtype=torch.float64), name=family), inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_at_every_site_it_is_the_derivative(family: str) -> None:
    """Also in the encoder, in the projector, and in attention, where layouts are many."""
    model, make = doubled(family)
    inputs, step = make(1), 3e-3
    # One block of each tower stands for all; the encoder's positions are shared by all prompts.
    names = [n for n, s in model.sites.items() if not s.read_only and ".0." not in n]
    names = [n for n in names if ".2." not in n and not n.endswith("hook_pos_embed")]

    def nudged(sign: float) -> Callable[[Any], Any]:
        def function(activation: Tensor) -> Tensor:
            random = torch.Generator().manual_seed(3)
            noise = torch.randn(activation.shape, generator=random, dtype=activation.dtype)
            return activation + sign * step * noise

        return function

    sweep = Sweep(
        inputs,
        {"site": names, "sign": [1.0, -1.0]},
        make=lambda site, sign: Own(site, nudged(sign)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)  # eager attention; a layer nobody reads
        estimate, exact = both(sweep, model, difference, use_cache=False)
    slope, found = ((s.sel(sign=1.0) - s.sel(sign=-1.0)) / 2 for s in (exact, estimate))
    scale = np.abs(slope).max("batch")
    error = np.abs(found - slope).max("batch")
    wrong = error.where(error > 1e-2 * scale + 1e-6, drop=True)
    assert wrong.size == 0, wrong["site"].values.tolist()
    assert (scale > 1e-6).mean() > 0.9


@pytest.mark.parametrize("slot", [0, 1, 3])
def test_small_steps_give_the_derivative_and_none_the_clean_score(slot: int) -> None:
    model, make = doubled("qwen2-vl")
    inputs = make(1)
    place, direction = Region.column_band((3, 3), 0, 1), torch.randn(48, dtype=torch.float64)
    alphas = [0.0, 1e-3, -1e-3, 5.0]
    sweep = Sweep(
        inputs,
        {"alpha": alphas},
        make=lambda alpha: Steer(slot, at=place | LastToken(), directions=direction, alpha=alpha),
    )
    estimate, exact = both(sweep, model, difference)
    clean = difference(model(inputs)).numpy()
    slope = (exact.sel(alpha=1e-3) - exact.sel(alpha=-1e-3)) / 2e-3
    for alpha in (1e-3, 5.0):  # linear in alpha, whatever the model is
        found = (estimate.sel(alpha=alpha) - clean) / alpha
        np.testing.assert_allclose(found, slope, atol=2e-3 * float(np.abs(slope).max()))
    np.testing.assert_allclose(estimate.sel(alpha=0.0), clean, atol=1e-12)


def cells_of(family: str) -> dict[str, Any]:
    n = 6 if family == "llava" else 3
    pairs = swap_pairs(Region.column_band((n, n), 0, 1), Region.column_band((n, n), n - 1, n))
    source = make_inputs(family, 2, seed=2)
    return {
        "swap": Patch(1, at=pairs, source=source),
        "vision": Patch("vision_encoder.blocks.1.hook_resid_pre", at=pairs, source=source),
        "heads": Ablate("blocks.1.attn.hook_z", at=LastToken(), heads=(0, 3)),
        "last": Patch(2, at=LastToken(), source=source),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_do_not_see_one_another(family: str) -> None:
    """A batch gives what each prompt gives by itself, the images of the encoder among them."""
    model, made = tiny(family), cells_of(family)
    inputs = make_inputs(family, 2, seed=1)
    sweep = Sweep(inputs, {"cell": list(made)}, make=lambda cell: made[cell])
    together = sweep.attribution(model, difference)
    clean = difference(model(inputs)).numpy()
    for b in range(2):
        only = Sweep(
            inputs,
            {"cell": list(made)},
            make=lambda cell: made[cell],
        ).attribution(model, lambda logits, b=b: difference(logits) * (torch.arange(2) == b))
        np.testing.assert_allclose(
            only.values[:, b] - clean[b], together.values[:, b] - clean[b], atol=1e-6
        )
        np.testing.assert_allclose(only.values[:, 1 - b], 0, atol=1e-12)
    assert (np.abs(together - clean) > 1e-6).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_belong_to_their_prompts(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, images=2, seed=1)
    n = 6 if family == "llava" else 3
    place = Region.column_band((n, n), 0, 1).of_image(1)
    site = "vision_encoder.blocks.1.hook_resid_pre"
    sweep = Sweep(inputs, {"site": [site]}, lambda site: Ablate(site, at=place))
    whole = sweep.attribution(model, difference) - difference(model(inputs)).numpy()
    for b in range(2):
        weight = (torch.arange(2) == b).float()
        one = sweep.attribution(model, lambda logits, w=weight: difference(logits) * w)
        one = one - (difference(model(inputs)) * weight).numpy()
        assert float(abs(one[0, 1 - b])) < 1e-7
        assert float(one[0, b]) == pytest.approx(float(whole[0, b]), abs=1e-6)
    assert (np.abs(whole) > 1e-6).all()


def test_effects_at_two_sites_add_up() -> None:
    model, made = tiny("gemma-3"), cells_of("gemma-3")
    inputs = make_inputs("gemma-3", 2, seed=1)
    cells = {**made, "chain": Chain(made["swap"], made["heads"]), "clean": None}
    found = Sweep(inputs, {"cell": list(cells)}, lambda cell: cells[cell]).attribution(
        model, difference
    )
    effect = found - found.sel(cell="clean")
    np.testing.assert_allclose(
        effect.sel(cell="chain"), effect.sel(cell="swap") + effect.sel(cell="heads"), atol=1e-6
    )


def test_the_base_is_in_force_in_the_clean_run() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", 2, seed=1)
    source = make_inputs("qwen2-vl", 2, seed=2)
    base = [Ablate("blocks.1.hook_attn_out", at=LastToken())]
    site = "ln_final.hook_normalized"
    make = {"clean": None, "patch": Patch(site, at=LastToken(), source=source)}
    sweep = Sweep(inputs, {"cell": list(make)}, lambda cell: make[cell], base=base)
    estimate, exact = both(sweep, model, difference)
    np.testing.assert_allclose(estimate, exact, atol=1e-5)
    np.testing.assert_allclose(estimate[0], exact[0], rtol=2e-6, atol=2e-6)
    assert not np.allclose(exact[0], difference(model(inputs)))
    # What the base overwrites after a cell has no effect, here as there.
    hidden = [Ablate(3, at=LastToken())]
    sweep = Sweep(inputs, {"slot": [1]}, lambda slot: Patch(slot, at=LastToken(), source=source))
    sweep = Sweep(inputs, sweep.axes, sweep.make, base=hidden)
    estimate, exact = both(sweep, model, difference)
    np.testing.assert_allclose(estimate, exact, atol=1e-6)


@pytest.mark.parametrize("asked", [True, False])
def test_one_forward_pass_and_parameters_as_they_were(asked: bool) -> None:
    model = HookedVLM(build("llava"))
    parameters = list(model.hf_model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(asked and i % 3 > 0)
    inputs, source = (make_inputs("llava", 2, seed=s) for s in (1, 2))
    recorded = record(model, source, ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"])
    sweep = Sweep(inputs, {"slot": [0, 3]}, lambda slot: Patch(slot, source=recorded))
    with count_forwards(model) as forwards:
        sweep.attribution(model, difference)
    assert len(forwards) == 1
    assert all(parameter.grad is None for parameter in parameters)
    assert [p.requires_grad for p in parameters] == [
        asked and i % 3 > 0 for i in range(len(parameters))
    ]
    with pytest.raises(RuntimeError, match="broken"):
        sweep.attribution(model, lambda logits: (_ for _ in ()).throw(RuntimeError("broken")))
    assert [p.requires_grad for p in parameters] == [
        asked and i % 3 > 0 for i in range(len(parameters))
    ]
    assert not model.is_hooked


# By position


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_add_up_to_the_sweep(family: str) -> None:
    model = tiny(family)
    inputs, source = (make_inputs(family, 2, seed=s) for s in (1, 2))
    effects = attribution_patch(model, inputs, source, difference)
    batch, length = inputs["input_ids"].shape
    assert effects.dims == ("slot", "batch", "pos")
    assert effects.shape == (model.cfg.n_layers + 1, batch, length)
    assert effects["slot"].values.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(effects["clean"], difference(model(inputs)), atol=1e-6)
    sweep = Sweep(inputs, {"slot": range(4)}, lambda slot: Patch(slot, source=source))
    whole = sweep.attribution(model, difference)
    np.testing.assert_allclose(effects["clean"] + effects.sum("pos"), whole.T, atol=1e-5)
    # Behind the last block only the last position is read.
    assert not effects.sel(slot=3)[:, :-1].any()
    strip = Region.column_band((3, 3) if family != "llava" else (6, 6), 0, 1)
    own = Sweep(inputs, {"slot": [1]}, lambda slot: Patch(slot, at=strip, source=source))
    rows = model.grids(inputs)
    positions = torch.stack([strip.positions(row[0]) for row in rows])
    part = torch.from_numpy(effects.sel(slot=1).values).gather(1, positions).sum(1)
    np.testing.assert_allclose(
        own.attribution(model, difference)[0] - effects["clean"], part, atol=1e-5
    )


def test_sites_by_name_and_what_has_no_positions() -> None:
    model = tiny("qwen2-vl")
    inputs, source = (make_inputs("qwen2-vl", 2, seed=s) for s in (1, 2))
    names = ["hook_logits", "blocks.1.attn.hook_z"]
    effects = attribution_patch(model, inputs, source, difference, names)
    assert effects["site"].values.tolist() == names
    moved = difference(model(source)) - difference(model(inputs))
    np.testing.assert_allclose(effects.sel(site="hook_logits").sum("pos"), moved, atol=1e-5)
    for wrong in ("blocks.0.attn.hook_pattern", "vision_encoder.blocks.0.hook_resid_post"):
        with pytest.raises(InterventionError, match="effects by position need"):
            attribution_patch(model, inputs, source, difference, [wrong])
    with pytest.raises(InterventionError, match="one score for each prompt"):
        attribution_patch(model, inputs, source, two_scores)
    with pytest.raises(InterventionError, match="sites is empty"):
        attribution_patch(model, inputs, source, difference, [])


# What is refused


def write_in_place(logits: Tensor) -> Tensor:
    probabilities = logits.softmax(-1)
    probabilities[..., 0] = 0
    return probabilities[:, -1, 1]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda logits: logits[:, -1].argmax(-1), "int64 without a gradient"),
        (lambda logits: difference(logits).detach(), "float32 without a gradient"),
        (lambda logits: difference(logits).sum().item(), "returned a float; expected a tensor"),
        (lambda logits: difference(logits).mean(), "returned 0 axes"),
        (lambda logits: difference(logits)[:1], "one score for each prompt, batch first"),
        (write_in_place, "could not be differentiated: .*logits.clone"),
    ],
)
def test_a_metric_without_a_slope_is_refused(metric: Any, words: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava", 2, seed=1)
    sweep = Sweep(inputs, {"slot": [1]}, lambda slot: Ablate(slot, at=LastToken()))
    with pytest.raises(InterventionError, match=words):
        sweep.attribution(model, metric)
    assert not model.is_hooked


def test_a_model_in_another_state_is_refused() -> None:
    model, inputs = HookedVLM(build("qwen2-vl")), make_inputs("qwen2-vl", seed=1)
    sweep = Sweep(inputs, {"slot": [1]}, lambda slot: Ablate(slot, at=LastToken()))
    with (
        model.hooks([("hook_logits", lambda a, hook: None)]),
        pytest.raises(InterventionError, match="Hooks are open"),
    ):
        sweep.attribution(model, difference)
    with torch.inference_mode(), pytest.raises(InterventionError, match="inference_mode"):
        sweep.attribution(model, difference)
    model.hf_model.train()
    with pytest.raises(InterventionError, match="training mode"):
        sweep.attribution(model, difference)


def test_sites_that_no_gradient_reaches_are_said() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", 2, seed=1)
    cut = Own("blocks.1.hook_resid_post", lambda activation: activation.detach() + 0)
    sweep = Sweep(inputs, {"slot": [1, 3]}, lambda slot: Ablate(slot), base=[cut])
    with pytest.warns(HookedVLMWarning, match=r"does not depend on 1 .*blocks\.0\."):
        found = sweep.attribution(model, difference)
    clean = difference(model(inputs)).numpy()
    np.testing.assert_allclose(found[0], clean, rtol=2e-6, atol=2e-6)
    assert not np.allclose(found[1], clean)
    sweep = Sweep(inputs, {"slot": [1]}, lambda slot: Ablate(slot), base=[cut])
    with pytest.raises(InterventionError, match="No gradient gets from the edited sites"):
        sweep.attribution(model, difference)

"""Q8 on planted models, in which it is known whether attention writes the code, and which."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.forward_counter import count_forwards
from helpers.planted_models import GEOMETRY, planted
from hooked_vlm.errors import CannotRunError, DataError
from hooked_vlm.experiments.further import encoder_cuts, why_strips
from hooked_vlm.experiments.further.cut_verdicts import CUT, INTACT, RANDOM, writes
from hooked_vlm.experiments.further.encoder_cuts import CUTS, cut_pairs, cutting, random_pairs
from hooked_vlm.experiments.result import Result
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.verdicts import claim_rows
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.stimuli.settings import stimulus_set


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
TO_OBJECTS, BETWEEN, TO_BACKGROUND = CUTS
IMAGES = 80  # 40 held out: with fewer, "does not write" cannot be said


@cache
def ran(coded: str, by: str = "none", probe: str = "paper") -> tuple[Result, list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    config = why_strips.Config(images=IMAGES, batch_size=40, random_cuts=2, by=by, probe=probe)
    result = why_strips.run(planted(coded), config, lambda *step: told.append(step))
    return result, told


def share(result: Result, cut: str, condition: str, quantity: str = "background") -> float:
    own = result.arrays["shares"].sel(axis="horizontal", kind=cut, layer=-1, quantity=quantity)
    return float(own.sel(condition=condition).mean("image"))


def test_attention_to_objects_that_writes_the_background_is_found() -> None:
    result, told = ran("attention", "layer")
    assert share(result, TO_OBJECTS, INTACT) > 0.8
    assert share(result, TO_OBJECTS, CUT) == pytest.approx(1 / 3)
    assert share(result, TO_OBJECTS, RANDOM) == share(result, TO_OBJECTS, INTACT)
    verdict = result.verdict
    for axis in ("Horizontal", "Vertical"):
        assert (
            f"{axis}: attention from background to objects writes the background's code" in verdict
        )
        assert f"{axis}: attention between objects does not write the background's code" in verdict
        assert f"{axis}: attention between objects does not write the objects' code" in verdict
    assert verdict.count("found for layer 0 alone") == 2
    assert verdict.count("5 of 5 probes with other initialisations say the same") == 12
    assert [done for done, _ in told] == list(range(told[-1][1] + 1))
    finite = result.table[["value", "low", "high"]]
    assert np.isfinite(finite).all().all() and (result.table["n"] > 0).all()


def test_a_code_of_positions_needs_no_attention() -> None:
    result, _ = ran("background", probe="converged")
    for cut in CUTS:
        for quantity in ("background", "objects"):
            uncut = share(result, cut, INTACT, quantity)
            assert share(result, cut, CUT, quantity) == uncut > 0.7
    assert result.verdict.count("does not write the background's code") == 6
    assert result.verdict.count("does not write the objects' code") == 6


def test_what_is_not_in_the_background_cannot_be_cut_off() -> None:
    result, _ = ran("object")
    assert result.verdict.count("undecided what writes the background's code: the probe does") == 2
    assert result.verdict.count("does not write the objects' code") == 6


def claims(cut: float, random: float | None, n: int = 60) -> pd.DataFrame:
    """The claims where a cut and its random cuts leave these shares of 0.9."""
    rows = claim_rows(np.full(n, cut - 0.9), {}, range(n), 0, condition=f"{CUT} - {INTACT}")
    if random is not None:
        more = np.full(n, cut - random)
        rows += claim_rows(more, {}, range(n), 0, condition=f"{CUT} - {RANDOM}")
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("cut", "random", "n", "outcome", "reason"),
    [
        (0.4, 0.9, 60, "found", "-0.50"),
        (0.9, 0.9, 60, "not found", "exclude"),
        (0.4, 0.4, 60, "not found", "random cuts lower it as much"),
        (0.4, 0.2, 60, "not found", "random cuts lower it as much"),
        (0.4, 0.46, 60, "undecided", "against random cuts"),
        (0.4, None, 60, "undecided", "have no random cut"),
        (0.9, None, 60, "not found", "exclude"),
        (0.8, 0.9, 4, "undecided", "4 pictures"),
    ],
)
def test_a_cut_writes_only_what_random_cuts_do_not(
    cut: float, random: float | None, n: int, outcome: str, reason: str
) -> None:
    found = writes(claims(cut, random, n))
    assert found.outcome == outcome and reason in found.reason


@pytest.mark.parametrize("axis", ["horizontal", "vertical"])
@pytest.mark.parametrize(("prefix", "side"), [(0, 1), (1, 2)])
def test_pairs_are_those_of_the_classes(axis: str, prefix: int, side: int) -> None:
    n, m = prefix + 36 * side**2, side**2
    objects = 3 * m  # one token each
    sizes = {
        TO_OBJECTS: (n - objects) * objects,
        BETWEEN: objects * 2 * m,
        TO_BACKGROUND: objects * (n - objects),
    }
    for cut, size in sizes.items():
        pairs = cut_pairs(GEOMETRY, axis, cut, prefix, side)
        assert pairs.shape == (n, n) and pairs.sum() == size
        assert not pairs.diagonal().any()
        drawn = random_pairs(pairs, np.random.default_rng(0))
        if cut == TO_BACKGROUND:
            assert drawn is None  # an object's patches have two other objects to lose
            continue
        assert drawn is not None
        assert (drawn.sum(1) == pairs.sum(1)).all()
        assert not (drawn & pairs).any() and not drawn.diagonal().any()
        other = random_pairs(pairs, np.random.default_rng(1))
        assert (drawn != other).any()


def test_scores_of_packed_encoders_are_cut_image_by_image() -> None:
    masks = np.random.default_rng(0).random((2, 4, 4)) < 0.3
    ((site, cut),) = cutting({"scores": masks})
    hook, scores = SimpleNamespace(name=site), torch.randn(2, 3, 4, 4)
    whole = cut(scores, hook)
    assert (whole == torch.finfo(torch.float32).min).equal(
        torch.from_numpy(masks)[:, None].expand(2, 3, 4, 4)
    )
    for one, part in zip(whole, cut(list(scores), hook), strict=True):
        assert torch.equal(one, part)
    ((_, same),) = cutting({"scores": masks[:1]})  # one mask for all images
    assert torch.equal(same(scores, hook)[1], same(list(scores), hook)[1])


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-gemma-3"])
def test_nothing_attends_to_what_is_cut(name: str) -> None:
    setting = Setting(HookedVLM.from_pretrained(name), stimulus_set("squares"), 2)
    encoder = encoder_cuts.whole_attention(setting)
    pairs = cut_pairs(setting.geometry, "horizontal", BETWEEN, encoder.prefix, encoder.side)
    site = encoder.sites[1].replace("attn_scores", "pattern")
    inputs = setting.inputs(setting.stimuli.items()[:2])
    hooks = cutting(dict.fromkeys(encoder.sites, pairs[None]))
    with torch.no_grad():
        _, cache = setting.model.run_with_cache(inputs, site, fwd_hooks=hooks, stop_at_layer=0)
    pattern = cache[site]
    mask = torch.from_numpy(pairs).expand(pattern.shape)
    assert pattern.shape[0] == 2 and pattern[mask].max() == 0
    assert pattern[~mask].min() >= 0
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))


WINDOWS = [torch.zeros(2, 9, 9)] * 8
TILES = torch.zeros(6, 2, 37, 37)
ONE_CALL_EACH = torch.zeros(1, 2, 37, 37)


@pytest.mark.parametrize("scores", [WINDOWS, TILES, ONE_CALL_EACH])
def test_windows_and_tiles_are_refused(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(setting: Setting, batch: Any, hooks: Any) -> None:
        for site, fn in hooks:
            fn(scores, SimpleNamespace(name=site))

    monkeypatch.setattr(encoder_cuts, "projected", fake)
    setting = Setting(planted("object"), stimulus_set("squares"), 2)
    with pytest.raises(CannotRunError, match="expected is one square for each picture") as error:
        encoder_cuts.whole_attention(setting)
    assert len(str(error.value)) <= 400


def test_an_encoder_without_scores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(planted("object"), stimulus_set("squares"), 2)
    monkeypatch.setattr(setting.model, "sites", {})
    with pytest.raises(CannotRunError, match=r"no attention scores at vision_encoder\.blocks\.0"):
        encoder_cuts.whole_attention(setting)


@pytest.mark.parametrize(
    "wrong", [{"random_cuts": 0}, {"images": 7}, {"by": "head"}, {"probe": "none"}], ids=str
)
def test_wrong_options_are_refused_before_the_model_runs(wrong: dict[str, Any]) -> None:
    with count_forwards(planted("object")) as forwards, pytest.raises(DataError, match="must be"):
        why_strips.Config(**wrong)
    assert not forwards

"""Caches with gradients: cut to a place, and of runs whose interventions read another run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.interventions.attend import Attend
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.recording import record
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.generated import Generated
from hooked_vlm.regions.positions import LastToken, Positions
from hooked_vlm.regions.region import Region


SITE = "blocks.1.hook_resid_post"


def score(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].sum()


def cached(model: HookedVLM, inputs: Any, names: Any = None, **options: Any) -> Any:
    return model.run_with_cache(inputs, names, incl_bwd=True, metric=score, **options)[1]


@pytest.mark.filterwarnings("ignore:The output does not depend")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_cut_as_their_activations(family: str) -> None:
    model, inputs = tiny(family, "eager"), make_inputs(family, batch=2)
    whole = cached(model, inputs)
    for cut, index in (
        (whole.at(LastToken()), [-1]),
        (whole.at(Positions((0, 2))), [0, 2]),
        (cached(model, inputs, pos_slice=-1), [-1]),
    ):
        for name in (SITE, "blocks.0.attn.hook_q", "hook_embed"):
            assert torch.equal(cut[name], whole[name][:, index])
            assert torch.equal(cut[f"{name}_grad"], whole[f"{name}_grad"][:, index])
    pattern = cached(model, inputs, "blocks.0.attn.hook_pattern", pos_slice=-1)
    assert all(x.shape[2] == 1 for x in pattern.values()) and len(pattern) == 2
    # In the encoder, too: the rows of a region, of activations as of gradients.
    grid = model.grids(inputs)[0][0]
    corner = whole.at(Region.column_band(grid.shape, 0, 1))
    site = "vision_encoder.blocks.1.hook_resid_post"
    assert corner[site].shape == corner[f"{site}_grad"].shape
    one = whole.select([1]).remove_batch_dim().at(LastToken())
    assert torch.equal(one[f"{SITE}_grad"], whole[f"{SITE}_grad"][1, -1:])


def test_a_source_runs_outside_of_the_gradients_of_the_run_that_reads_it() -> None:
    model = tiny("qwen2-vl", "eager")
    inputs, source = (make_inputs("qwen2-vl", batch=2, seed=seed) for seed in (1, 2))
    patterns = "blocks.2.attn.hook_pattern"
    sources = record(model, source, [SITE, patterns])

    def parts(run: Any) -> list[Any]:
        return [
            Patch(SITE, at=LastToken(), source=run),
            Attend("blocks.2.attn", query=LastToken(), to=run),
        ]

    names = [SITE, "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
    expected = cached(model, inputs, names, fwd_hooks=parts(sources))
    seen: list[str] = []

    def see(gradient: Tensor, hook: Any) -> None:
        seen.append(hook.name)

    found = [cached(model, inputs, names, fwd_hooks=parts(source))]
    with model.hooks(bwd_hooks=[(SITE, see)]):
        logits = model.run_with_hooks(inputs, parts(source))
        score(logits).backward()
        assert seen == [SITE]
        assert torch.equal(record(model, source, SITE).cache[SITE], sources.cache[SITE])
    model.hf_model.zero_grad(set_to_none=True)
    for cache in found:
        assert list(cache) == list(expected)
        assert all(torch.equal(cache[name], expected[name]) for name in expected)
    assert not model.is_hooked


@torch.no_grad()
def test_functions_of_open_blocks_act_on_sources_too() -> None:
    """As docs/guide/interventions.md says; those of the same list do not."""
    model = tiny("llava")
    inputs, source = (make_inputs("llava", seed=seed) for seed in (1, 2))
    double = ("blocks.0.hook_resid_pre", lambda x, hook: 2 * x)
    clean = record(model, source, SITE)
    patch = Patch(SITE, at=LastToken(), source=source)
    in_list = model.run_with_hooks(inputs, [double, patch])
    with model.hooks([double]):
        under = record(model, source, SITE)
        with model.without_hooks():
            assert torch.equal(record(model, source, SITE).cache[SITE], clean.cache[SITE])
        in_block = model.run_with_hooks(inputs, [patch])
    for run, found in ((clean, in_list), (under, in_block)):
        same = Patch(SITE, at=LastToken(), source=run)
        assert torch.equal(found, model.run_with_hooks(inputs, [double, same]))


@torch.no_grad()
def test_generated_tokens_are_written_from_the_site_that_is_read() -> None:
    model = tiny("llava")
    inputs, source = (make_inputs("llava", seed=seed) for seed in (1, 2))
    read = "blocks.0.hook_resid_post"

    def answer(run: Any) -> Tensor:
        patch = Patch(SITE, at=Generated(), source=run, source_at=LastToken(), source_site=read)
        return model.generate(inputs, fwd_hooks=[patch], max_new_tokens=4, do_sample=False)

    assert torch.equal(answer(source), answer(record(model, source, read)))

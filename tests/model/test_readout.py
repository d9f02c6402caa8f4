"""The logit lens: streams of every slot, read by the model's own final norm and head."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import suite
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.checks.lens import check_lens
from hooked_vlm.errors import DataError, UnknownHookError, UnsupportedModelError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.model.vlm import HookedVLM


STREAMS = ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_slot_is_read_by_the_final_norm_and_the_head(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    logits, cache = model.run_with_cache(inputs, STREAMS)
    read = cache.logit_lens()
    assert read.shape == (model.cfg.n_layers + 1, *logits.shape)
    torch.testing.assert_close(read[-1], logits)
    parts = model.hf_model
    norm, head = (
        parts.get_submodule(path)
        for path in (str(model.anatomy.lm.final_norm), model.anatomy.unembed)
    )
    with torch.no_grad():
        plain = head(norm(cache.accumulated_resid()))
    torch.testing.assert_close(read, plain)
    assert not torch.allclose(read[0], read[-1])


@pytest.mark.filterwarnings("ignore")  # of pictures that a processor resizes
@pytest.mark.parametrize(
    "model_type", ["qwen3_vl", "mllama", "gemma4", "granite4_vision", "gemma3n", "inkling2"]
)
def test_what_a_model_does_to_its_logits_is_in_the_lens(model_type: str) -> None:
    model = suite.build(model_type)
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    found = check_lens(model, inputs)
    assert (found.verdict, found.note) == ("yes", "")


def test_positions_are_selected() -> None:
    cache = tiny("llava").run_with_cache(make_inputs("llava", batch=2), STREAMS)[1]
    every = cache.logit_lens()
    for pos, plain in (
        (-1, every[:, :, -1]),
        (slice(2, 5), every[:, :, 2:5]),
        ([0, -2], every[:, :, [0, -2]]),
    ):
        torch.testing.assert_close(cache.logit_lens(pos_slice=pos), plain)
    length = every.shape[2]
    for wrong in (length, [-length - 1], []):
        with pytest.raises(DataError, match=f"the prompts have {length} positions"):
            cache.logit_lens(pos_slice=wrong)


def test_hooks_of_the_run_are_in_its_streams_and_not_in_the_lens() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    site = "blocks.0.hook_resid_post"
    logits, cache = model.run_with_cache(inputs, STREAMS, fwd_hooks=[(site, lambda x, hook: 2 * x)])
    torch.testing.assert_close(cache.logit_lens()[-1], logits)
    with model.hooks([("ln_final.hook_in", lambda x, hook: 0 * x)]):
        torch.testing.assert_close(cache.logit_lens()[-1], logits)


def test_a_cache_of_some_prompts_is_read_too() -> None:
    cache = tiny("llava").run_with_cache(make_inputs("llava", batch=2), STREAMS)[1]
    every = cache.logit_lens()
    torch.testing.assert_close(cache.select([1]).logit_lens(), every[:, 1:])
    one = cache.select([0]).remove_batch_dim()
    torch.testing.assert_close(one.logit_lens(), every[:, 0])


def test_what_the_lens_needs(tmp_path: Path) -> None:
    model: Any = HookedVLM(build("llava"))
    inputs = make_inputs("llava")
    cache = model.run_with_cache(inputs, STREAMS)[1]
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(DataError, match="no model to read weights of"):
        ActivationCache.load(tmp_path / "cache.safetensors").logit_lens()
    with pytest.raises(UnknownHookError, match="resid_post"):
        model.run_with_cache(inputs, STREAMS[:1])[1].logit_lens()
    del model
    gc.collect()
    with pytest.raises(UnsupportedModelError, match="is gone"):
        cache.logit_lens()

"""E3: the parts of a residual stream sum to it, where more than attention and MLPs is added."""

import warnings
from functools import cache
from typing import Any

import pytest
import torch

from conformance import suite
from helpers.tiny_models import make_inputs, tiny
from hooked_vlm.errors import DataError, UnknownHookError
from hooked_vlm.hooks import decomposition
from hooked_vlm.hooks.cache import ActivationCache


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")


@cache
def cached(model_type: str) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = suite.build(model_type)
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
        return model.run_with_cache(inputs, "*blocks.*.hook_*")[1]


def test_e3_what_deepstack_adds_between_blocks_is_a_part() -> None:
    found = cached("qwen3_vl")
    parts, labels = found.decompose_resid(return_labels=True)
    torch.testing.assert_close(parts.sum(0), found["resid_post", -1], atol=1e-5, rtol=1e-5)
    assert "before_1" in labels
    added = parts[labels.index("before_1")]
    torch.testing.assert_close(added, found["resid_pre", 1] - found["resid_post", 0])
    assert added.any()
    for layer in range(2):
        parts = found.decompose_resid(layer=layer)
        torch.testing.assert_close(parts.sum(0), found["resid_pre", layer], atol=1e-5, rtol=1e-5)


def test_e3_scaled_parts_are_what_is_added() -> None:
    found = cached("granite4_vision")
    parts, labels = found.decompose_resid(return_labels=True)
    torch.testing.assert_close(parts.sum(0), found["resid_post", -1], atol=1e-5, rtol=1e-5)
    gained = found["resid_mid", 0] - found["resid_pre", 0]
    torch.testing.assert_close(parts[labels.index("0_attn_out")], gained, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(gained, found["attn_out", 0])


@pytest.mark.parametrize("model_type", ["gemma3n"])
def test_e3_a_stream_that_is_no_sum_is_an_error(model_type: str) -> None:
    with pytest.raises(DataError, match=r"The parts of blocks\.0 do not sum .*: ") as raised:
        cached(model_type).decompose_resid()
    assert len(str(raised.value)) <= 400


def test_inputs_of_each_layer_and_a_scaled_stream_are_in_the_parts() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = suite.build("gemma4")
        inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
        for scale in (1.0, 0.5):
            for block in model.anatomy.lm.blocks:
                layer: Any = model.hf_model.get_submodule(block.path)
                layer.layer_scalar.fill_(scale)
            found = model.run_with_cache(inputs, "*blocks.*.hook_*")[1]
            parts, labels = found.decompose_resid(return_labels=True)
            assert "0_per_layer_out" in labels
            torch.testing.assert_close(parts.sum(0), found["resid_post", -1], atol=1e-5, rtol=1e-4)
            n_later = model.cfg.n_layers
            expected = found["resid_pre", 0] * scale**n_later
            torch.testing.assert_close(parts[0], expected, atol=1e-5, rtol=1e-4)


def test_e3_what_a_hook_wrote_has_no_part() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")

    def parts(site: str) -> Any:
        edit = [(site, lambda x, hook: x + 1)]
        cache = model.run_with_cache(inputs, "blocks.*", fwd_hooks=edit)[1]
        return cache, *cache.decompose_resid(return_labels=True)

    with pytest.raises(DataError, match=r"blocks\.1 do not sum .*: resid_pre \+ 1_attn_out is not"):
        parts("blocks.1.hook_resid_mid")
    cache, found, labels = parts("blocks.1.hook_resid_pre")
    torch.testing.assert_close(found[labels.index("before_1")], torch.ones_like(found[0]))
    torch.testing.assert_close(found.sum(0), cache["resid_post", -1])


def test_e3_a_cache_that_tells_only_the_whole_sum() -> None:
    names = ["blocks.0.hook_resid_pre", "blocks.*.hook_*_out"]
    model, inputs = tiny("llava"), make_inputs("llava")
    found = model.run_with_cache(inputs, [*names, "blocks.2.hook_resid_post"])[1]
    assert len(found.decompose_resid()) == 7
    with pytest.raises(UnknownHookError, match=r"holds no 'blocks\.2\.hook_resid_post'"):
        model.run_with_cache(inputs, names)[1].decompose_resid()
    short = {n: v for n, v in found.items() if n != "blocks.1.hook_mlp_out"}
    with pytest.raises(DataError, match="the sum of all parts is off by"):
        ActivationCache(short, found.n_layers).decompose_resid()


def test_e3_the_stream_before_a_block() -> None:
    found: Any = tiny("gemma-3").run_with_cache(make_inputs("gemma-3"), "*blocks.*.hook_*")[1]
    for tower in (None, "vision_encoder"):
        for layer in range(3):
            parts, labels = found.decompose_resid(layer, return_labels=True, tower=tower)
            assert labels[0] == "embed"
            assert len(labels) == 2 * layer + 1
            torch.testing.assert_close(parts.sum(0), found["resid_pre", layer, tower])
    assert torch.equal(found.decompose_resid(layer=3), found.decompose_resid())
    with pytest.raises(UnknownHookError, match="layer=4 was given; expected 0 to 3"):
        found.decompose_resid(layer=4)


def test_j2_the_blur_of_a_fitted_part_grows_with_the_stream_and_not_with_the_part() -> None:
    given = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 2.0], [1.0, -2.0]]).double()
    start = torch.full((4, 2), 3.0).double()
    found = decomposition._blur(given, start)
    torch.testing.assert_close(found, torch.full((4, 2), 1.5).double())  # 3 / sqrt(4)
    torch.testing.assert_close(decomposition._blur(given, 10 * start), 10 * found)
    torch.testing.assert_close(decomposition._blur(10 * given, start), found)

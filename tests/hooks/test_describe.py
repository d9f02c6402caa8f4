"""The tree of sites, line by line."""

import pytest
import torch

from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.model.vlm import HookedVLM


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")


def test_the_tree_of_a_small_model():
    lines = tiny("llava").describe().splitlines()
    assert lines[:3] == [
        "tiny llava: 3 layers, d_model=48, 4 heads (2 key/value) of 12, d_mlp=96, d_vocab=300",
        "vision encoder: 3 layers, d_model=32, 4 heads of 8, d_mlp=64, patch=8px, merge=1x1",
        "attention: sdpa, torch.float32 on cpu",
    ]
    text = "\n".join(lines)
    assert "[batch pos head=4 d_head=12]" in text
    assert "[batch pos kv_head=2 d_head=12]" in text
    assert "[image patch head=4 d_head=8]" in text
    assert "[batch pos d_vocab=300]" in text
    assert sum("read-only in layer 2" in line for line in lines) == sum(
        site.read_only != "" for site in tiny("llava").sites.values()
    )
    assert lines.count("  blocks") == 1
    assert lines.count("blocks") == 1
    assert "    l = 0..2" in lines


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_in_the_tree_with_the_shape_it_has(family):
    model, inputs = tiny(family), make_inputs(family, 2)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    tree = model.describe()
    for name, site in model.sites.items():
        assert name.split(".")[-1] in tree
        axes, shape = site.axes.split(), cache[name].shape
        assert len(axes) == len(shape), name
        sizes = dict(zip(axes, shape, strict=True))
        cfg = model.cfg.vision if name.startswith("vision_encoder") else model.cfg
        assert cfg is not None
        assert model.cfg.vision is not None
        known = {
            "batch": 2,
            "image": 2,
            "pos": inputs["input_ids"].shape[1],
            "head": cfg.n_heads,
            "kv_head": cfg.n_key_value_heads,
            "d_head": cfg.d_head,
            "d_mlp": cfg.d_mlp,
            "d_model": model.cfg.d_model,
            "d_vision": model.cfg.vision.d_model,
            "d_vocab": model.cfg.d_vocab,
            "1": 1,
        }
        for axis, size in sizes.items():
            assert size == known.get(axis, size), (name, axis)
            if axis in ("d_model", "d_vocab", "d_vision", "d_mlp", "d_head", "head", "kv_head"):
                assert f"{axis}={size}" in tree


def test_a_model_on_the_meta_device_is_described_without_weights():
    with torch.device("meta"):
        hf_model = build("gemma-3")
    model = HookedVLM(hf_model, name="tiny gemma-3")
    assert model.device.type == "meta"
    described, real = model.describe(), tiny("gemma-3").describe()
    assert described.replace("on meta", "on cpu") == real

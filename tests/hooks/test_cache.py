"""The cache: short names, layers from the end, stacks and sums, to disk and back."""

import pytest
import torch

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.errors import DataError, UnknownHookError
from hooked_vlm.hooks.cache import ActivationCache


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (("resid_post", 1), "blocks.1.hook_resid_post"),
        (("resid_post", -1), "blocks.2.hook_resid_post"),
        (("pattern", -3, "vision_encoder"), "vision_encoder.blocks.0.attn.hook_pattern"),
        (("normalized", 0, "ln2"), "blocks.0.ln2.hook_normalized"),
        ("k2", "blocks.2.attn.hook_k"),
        ("embed", "hook_embed"),
        ("blocks.-2.hook_mlp_out", "blocks.1.hook_mlp_out"),
        ("blocks.1.attn.q.hook_out", "blocks.1.attn.hook_q"),
        ("vision_projector.hook_out", "vision_projector.hook_out"),
    ],
)
def test_keys(key, name):
    _, cache = tiny("gemma-3").run_with_cache(make_inputs("gemma-3"))
    assert cache[key] is cache[name]
    assert key in cache


def test_layers_count_from_the_models_end_not_from_the_caches():
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl")
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    _, cache = model.run_with_cache(inputs, names)
    assert cache["resid_post", -2] is cache[names[1]]
    with pytest.raises(UnknownHookError, match=r"holds no 'blocks.-1.hook_resid_post'"):
        cache["resid_post", -1]
    _, stopped = model.run_with_cache(inputs, stop_at_layer=2)
    assert ("resid_post", -1) not in stopped
    assert ActivationCache(dict(cache))["resid_post", -1] is cache[names[1]]  # all that it knows


def test_what_was_not_cached_is_said():
    _, cache = tiny("llava").run_with_cache(make_inputs("llava"), "blocks.*.hook_resid_post")
    assert len(cache) == 3
    assert ("resid_pre", 0) not in cache
    assert 7 not in cache
    with pytest.raises(UnknownHookError, match=r"it has 3 sites.*Widen names_filter"):
        cache["resid_post", 0, "vision_encoder"]
    with pytest.raises(UnknownHookError, match=r"Did you mean 'blocks\.0\.hook_resid_post'"):
        cache["resid_pots", 0]
    for layer in (3, -4):
        with pytest.raises(UnknownHookError, match=rf"layer {layer} is out of range, .* 0 to 2"):
            cache["resid_post", layer]


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_sums(family):
    model = tiny(family)
    _, cache = model.run_with_cache(make_inputs(family, 2))
    for tower in (None, "vision_encoder"):
        slots, labels = cache.accumulated_resid(return_labels=True, tower=tower)
        assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
        assert torch.equal(slots[0], cache["resid_pre", 0, tower])
        assert torch.equal(slots[3], cache["resid_post", 2, tower])
        parts, names = cache.decompose_resid(return_labels=True, tower=tower)
        assert names[:3] == ["embed", "0_attn_out", "0_mlp_out"]
        assert len(parts) == len(names) == 7
        torch.testing.assert_close(parts.sum(0), slots[-1], atol=1e-5, rtol=1e-5)


def test_sums_of_a_partial_cache_are_refused():
    model, inputs = tiny("llava"), make_inputs("llava")
    _, cache = model.run_with_cache(inputs, stop_at_layer=2)
    for method in (cache.accumulated_resid, cache.decompose_resid):
        with pytest.raises(UnknownHookError, match="holds no"):
            method()


def test_stack():
    _, cache = tiny("gemma-3").run_with_cache(make_inputs("gemma-3", 2))
    stacked = cache.stack("resid_post")
    assert stacked.shape == (3, 2, 18, 48)
    assert torch.equal(stacked[2], cache["resid_post", 2])
    assert torch.equal(cache.stack("z", [-1, 0])[0], cache["z", 2])
    assert cache.stack("pattern", tower="vision_encoder").shape == (3, 2, 4, 36, 36)
    with pytest.raises(UnknownHookError, match="no layer of 'nothing'"):
        cache.stack("nothing")


def test_select_takes_prompts_and_leaves_images_out():
    model = tiny("qwen2-vl")
    _, cache = model.run_with_cache(make_inputs("qwen2-vl", 3))
    for rows in ([2, 0], torch.tensor([2, 0]).tolist()):
        chosen = cache.select(rows)
        assert torch.equal(chosen["resid_post", 1], cache["resid_post", 1][[2, 0]])
    assert cache.select(slice(1, 2))["hook_logits"].shape[0] == 1
    assert not any(name.startswith("vision") for name in chosen)


def test_remove_batch_dim():
    model = tiny("qwen2-vl")
    _, cache = model.run_with_cache(make_inputs("qwen2-vl", 1, images=2))
    single = cache.remove_batch_dim()
    assert torch.equal(single["resid_post", 1], cache["resid_post", 1][0])
    assert single["pattern", 0].shape == cache["pattern", 0].shape[1:]
    assert single["resid_post", 1, "vision_encoder"].shape == (2, 36, 32)
    _, cache = model.run_with_cache(make_inputs("qwen2-vl", 2))
    with pytest.raises(DataError, match=r"batches of \[2\]; only 1 can be removed"):
        cache.remove_batch_dim()


def uneven() -> dict[str, torch.Tensor]:
    inputs = make_inputs("qwen2-vl", images=2)
    inputs["image_grid_thw"] = torch.tensor([[1, 6, 4], [1, 6, 8]])
    head, tail = torch.tensor([[5, 298]]), torch.tensor([[297, 7]])
    ids = [head, torch.full((1, 6), 299), tail, head, torch.full((1, 12), 299), tail]
    inputs["input_ids"] = torch.cat(ids, dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == 299).int()
    return inputs


def test_lists_by_image():
    _, cache = tiny("qwen2-vl").run_with_cache(uneven())
    found = cache["resid_post", 0, "vision_encoder"]
    assert [image.shape for image in found] == [(24, 32), (48, 32)]
    with pytest.raises(DataError, match="list by image"):
        cache.stack("resid_post", tower="vision_encoder")


def test_to_disk_and_back(tmp_path):
    _, cache = tiny("qwen2-vl").run_with_cache(uneven(), ["*blocks.1.*", "hook_embed"])
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    back = ActivationCache.load(path)
    assert set(back) == set(cache)
    for name, value in cache.items():
        assert isinstance(back[name], list) == isinstance(value, list)
        for mine, theirs in zip(back[name], value, strict=True):
            assert torch.equal(mine, theirs)
    assert back["resid_post", -2] is back["blocks.1.hook_resid_post"]
    assert ("resid_post", -1) not in back
    # In the order of the run: safetensors would put blocks.10 before blocks.2.
    assert list(back) == list(cache)
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written stays


def test_memory_and_devices():
    _, cache = tiny("llava").run_with_cache(make_inputs("llava"), "blocks.0.hook_resid_*")
    assert cache.nbytes == 3 * 45 * 48 * 4
    assert repr(cache) == "ActivationCache(3 sites, 0.0 MiB)"
    moved = cache.to("meta")
    assert {value.device.type for value in moved.values()} == {"meta"}
    assert ("resid_post", -3) in moved
    _, elsewhere = tiny("llava").run_with_cache(make_inputs("llava"), "hook_embed", device="meta")
    assert elsewhere["hook_embed"].device.type == "meta"


@pytest.mark.parametrize("family", FAMILIES)
def test_later_edits_in_place_do_not_reach_what_was_cached(family):
    model, inputs = tiny(family), make_inputs(family)
    late = ["blocks.2.hook_resid_mid", "vision_encoder.blocks.1.hook_resid_pre", "hook_logits"]
    names = model.hook_names
    _, clean = model.run_with_cache(inputs)
    clean = {name: value.clone() for name, value in clean.items()}

    def zero(x, hook):
        x.zero_()

    for name in late:
        _, cache = model.run_with_cache(inputs, fwd_hooks=[(name, zero)])
        with model.hooks([(name, zero)]):  # a block that is open around the run
            _, around = model.run_with_cache(inputs)
        for found in (cache, around):
            assert (found[name] == 0).all()
            for earlier in names[: names.index(name)]:
                assert torch.equal(found[earlier], clean[earlier]), (name, earlier)


def test_cached_tensors_hold_no_graph():
    with torch.enable_grad():
        _, cache = tiny("llava").run_with_cache(make_inputs("llava"), "blocks.0.*")
    assert not any(value.requires_grad for value in cache.values())

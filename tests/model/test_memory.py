"""What a cache will need is what it takes, for every site; and it is asked before anything runs."""

import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from helpers.prepared_models import prepared
from helpers.tiny_encoders import ENCODERS, encoder, pictures
from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.anatomy import devices
from hooked_vlm.errors import CacheMemoryError, HookedVLMWarning, UnknownHookError
from hooked_vlm.model import memory
from hooked_vlm.model.encoder import HookedVisionEncoder
from hooked_vlm.model.memory import estimate_cache
from hooked_vlm.model.vlm import HookedVLM


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that is said to be free, and below which nobody asks."""

    def say(nbytes: int | None, threshold: int = 0) -> None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: nbytes)
        monkeypatch.setattr(memory, "_NOT_WORTH_ASKING", threshold)

    return say


def by_group(cache: Any) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, value in cache.items():
        group = re.sub(r"blocks\.\d+", "blocks.*", name)
        tensors = value if isinstance(value, list) else [value]
        sizes[group] = sizes.get(group, 0) + sum(t.nbytes for t in tensors)
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
@pytest.mark.parametrize("layer", [None, 0, 1, -1, 3])
def test_the_estimate_is_what_the_cache_takes(family, shape, layer):
    model, inputs = tiny(family, "eager"), make_inputs(family, *shape)
    estimate = estimate_cache(model, inputs, stop_at_layer=layer)
    _, cache = model.run_with_cache(inputs, stop_at_layer=layer)
    assert estimate.by_group == by_group(cache)
    assert estimate.nbytes == cache.nbytes
    assert estimate.unknown == ()


@pytest.mark.filterwarnings("ignore:The processor resized")
def test_images_of_two_sizes_in_a_batch():
    model = prepared("qwen2-vl")
    wide, small = torch.rand(3, 64, 128), torch.rand(3, 64, 64)
    inputs = model.prepare([[wide, small], [small]], ["which is red", "and this"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)  # scores and patterns: eager
        _, cache = model.run_with_cache(inputs)
    assert isinstance(cache["pattern", 0, "vision_encoder"], list)
    assert estimate_cache(model, inputs).by_group == by_group(cache)


@pytest.mark.parametrize("family", ["gemma-3", "llava"])
def test_prepared_inputs(family):
    model = prepared(family)
    inputs = model.prepare([[torch.rand(3, 64, 64)] * 2, [torch.rand(3, 64, 64)]], ["a b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookedVLMWarning)
        _, cache = model.run_with_cache(inputs)
    assert estimate_cache(model, inputs).by_group == by_group(cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_image_no_vision(family):
    model = tiny(family, "eager")
    inputs = {"input_ids": torch.randint(2, 290, (2, 7))}
    _, cache = model.run_with_cache(inputs)
    assert estimate_cache(model, inputs).nbytes == cache.nbytes


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_alone(name):
    model = encoder(name)
    inputs = model.prepare(pictures())
    _, cache = model.run_with_cache(inputs)
    assert estimate_cache(model, inputs).nbytes == pytest.approx(cache.nbytes, rel=0.03)


def test_a_packed_encoder_alone():
    model = HookedVisionEncoder(build("qwen2-vl", "eager"))
    given = make_inputs("qwen2-vl", 1, 2)
    inputs = {"hidden_states": given["pixel_values"], "grid_thw": given["image_grid_thw"]}
    _, cache = model.run_with_cache(inputs)
    assert estimate_cache(model, inputs).nbytes == cache.nbytes


def test_half_precision_takes_half():
    inputs = make_inputs("gemma-3")
    whole = estimate_cache(tiny("gemma-3"), inputs).nbytes
    half = HookedVLM(build("gemma-3", dtype=torch.bfloat16))
    assert estimate_cache(half, inputs).nbytes == whole // 2


def test_filters_and_what_they_spare():
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl")
    estimate = estimate_cache(model, inputs)
    for text, needed in estimate.cheaper.items():
        chosen = eval(text.removeprefix("names_filter="))
        assert estimate_cache(model, inputs, chosen).nbytes == needed < estimate.nbytes
    assert len(estimate.cheaper) == 2
    assert "needs about" in str(estimate) and 'names_filter="blocks.*.hook_resid_post"' in str(
        estimate
    )
    least = estimate_cache(model, inputs, "blocks.*.hook_resid_post")
    assert not least.cheaper
    with pytest.raises(UnknownHookError):
        estimate_cache(model, inputs, "hook_nothing")


def test_what_the_inputs_do_not_tell_is_said():
    model = tiny("qwen2-vl")
    estimate = estimate_cache(model, {"pixel_values": torch.zeros(36, 384)})
    assert "blocks.*.attn.hook_q" in estimate.unknown
    assert "Not counted" in str(estimate)


def test_a_large_model_without_weights():
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": rope,
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        hf_model = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    grid = torch.tensor([[1, 72, 72], [1, 40, 64]])
    n_patches = int(grid.prod(1).sum())
    ids = torch.full((1, 200 + n_patches // 4), 5)
    ids[0, 10 : 10 + n_patches // 4] = config.image_token_id
    pixels = torch.empty(n_patches, 1176, device="meta")
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    said = str(estimate_cache(HookedVLM(hf_model), inputs))
    page = Path(__file__).parents[2] / "docs" / "guide" / "large-models.md"
    assert said in " ".join(page.read_text().split())


@pytest.mark.parametrize("alone", [False, True])
def test_refused_before_anything_runs(alone, free, monkeypatch):
    model = encoder("clip") if alone else tiny("llava")
    inputs = encoder("clip").prepare(pictures()) if alone else make_inputs("llava")
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("it ran"))
    needed = estimate_cache(model, inputs).nbytes
    free(needed - 1)
    with pytest.raises(CacheMemoryError, match=r"needs about .* are free on cpu: .*check_memory"):
        model.run_with_cache(inputs)


def test_room_enough_and_room_for_little(free):
    model, inputs = tiny("llava", "eager"), make_inputs("llava")
    needed = estimate_cache(model, inputs).nbytes
    free(2 * needed)
    model.run_with_cache(inputs)
    free(2 * needed - 1)
    with pytest.warns(HookedVLMWarning, match="more than half of the free memory"):
        model.run_with_cache(inputs)
    free(needed - 1)
    model.run_with_cache(inputs, check_memory=False)
    model.run_with_cache(inputs, "blocks.*.hook_resid_post")
    with pytest.raises(CacheMemoryError, match=r'names_filter="blocks\.\*\.hook_resid_post" needs'):
        model.run_with_cache(inputs)
    free(None)
    model.run_with_cache(inputs)


def test_the_device_that_is_asked(free, monkeypatch):
    model, inputs = tiny("llava", "eager"), make_inputs("llava")
    asked = []
    free(0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(str(device)) or 0)
    with pytest.raises(CacheMemoryError, match=r"free on cuda:1: .*device='cpu'"):
        model.run_with_cache(inputs, device="cuda:1")
    with pytest.raises(CacheMemoryError, match="free on cpu"):
        model.run_with_cache(inputs)
    assert asked == ["cuda:1", "cpu"]


def test_a_model_over_several_devices_asks_each(free, monkeypatch):
    model, inputs = HookedVLM(build("llava", "eager")), make_inputs("llava")
    monkeypatch.setattr(model.hf_model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    head = model.hf_model.get_submodule(model.anatomy.unembed)
    place = {True: torch.device("cuda:1"), False: torch.device("cuda:0")}
    monkeypatch.setattr(memory, "execution_device", lambda module: place[module is head])
    found = {}
    free(0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: found.setdefault(device, 10**9))
    model.run_with_cache(inputs)
    assert set(found) == set(place.values())


def test_the_check_costs_nothing():
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", 2, 2)
    names = model.hook_names
    times = []
    for _ in range(20):
        start = time.perf_counter()
        memory.require_memory(model.footprint, inputs, names, None, None)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.001  # 0.03 ms where nothing else runs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_is_one(family):
    for shape in ((1, 1), (2, 2)):
        inputs = make_inputs(family, *shape)
        model = tiny(family)
        assert model.footprint.at_most(inputs) * 4 >= estimate_cache(model, inputs).nbytes


def test_free_memory():
    pytest.importorskip("psutil", reason="free memory of the CPU is told by psutil")
    free = devices.free_bytes(torch.device("cpu"))
    assert free is not None and free > 0
    assert devices.free_bytes(torch.device("meta")) is None


@pytest.mark.gpu
def test_free_memory_of_a_gpu():
    before = devices.free_bytes(torch.device("cuda"))
    assert before is not None
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    after = devices.free_bytes(torch.device("cuda"))
    assert after is not None and before - after >= held.nbytes // 2

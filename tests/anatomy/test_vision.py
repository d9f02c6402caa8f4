"""Which part of a model is wrapped as its vision encoder, and what is refused."""

from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from helpers.tiny_encoders import SIDE, SIZES, pictures, processor_of
from helpers.tiny_models import build, make_inputs
from hooked_vlm.errors import HookedVLMWarning, UnsupportedModelError
from hooked_vlm.model.encoder import HookedVisionEncoder
from hooked_vlm.model.vlm import HookedVLM


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
OUT = "vision_encoder.hook_out"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", ["llava", "gemma-3", "qwen2-vl"])
def test_the_tower_of_a_vlm_has_the_names_and_values_it_has_there(family):
    options: dict[str, Any] = {"vision_feature_layer": -1} if family == "llava" else {}
    vlm = HookedVLM(build(family, "eager", **options))
    model = HookedVisionEncoder(vlm.hf_model)
    inside = [name for name in vlm.hook_names if name.startswith("vision_encoder.")]
    assert sorted(model.hook_names) == sorted(inside)
    inputs = make_inputs(family, 2)
    alone = {"pixel_values": inputs["pixel_values"]}
    if family == "qwen2-vl":
        alone = {"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
    names = [name for name in inside if name != OUT]  # there, what the projector takes of it
    _, expected = vlm.run_with_cache(inputs, names)
    _, cache = model.run_with_cache(alone, names)
    for name in names:
        assert torch.equal(cache[name], expected[name]), name
    assert [grid.shape for (grid,) in model.grids(alone)] == [(6, 6), (6, 6)]


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_dual_encoder_is_loaded_and_its_tower_wrapped(kind, tmp_path):
    text = {**SIZES, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(vision_config=SIZES, text_config=text)
    whole = getattr(transformers, f"{kind}Model")(config).eval()
    whole.save_pretrained(tmp_path)
    with pytest.warns(HookedVLMWarning, match="No image processor was loaded"):
        model = HookedVisionEncoder.from_pretrained(str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="made without an image processor"):
        model.prepare(pictures())
    processor_of(kind).save_pretrained(tmp_path)
    model = HookedVisionEncoder.from_pretrained(str(tmp_path), attn_implementation="eager")
    assert type(model.hf_model).__name__ == f"{kind}VisionModel"
    assert model.cfg.attn_implementation == "eager"
    inputs = model.prepare(pictures(1)[0])
    expected = whole.get_image_features(**inputs)
    pooled = model(inputs).pooler_output
    if kind == "CLIP":
        pooled = whole.visual_projection(pooled)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_a_packed_encoder_alone_needs_no_sizes_where_images_fill_the_batch():
    config: Any = transformers.PixtralVisionConfig
    model = HookedVisionEncoder(transformers.PixtralVisionModel(config(**SIZES)).eval())
    inputs = {"pixel_values": torch.randn(2, 3, 32, SIDE)}
    output, cache = model.run_with_cache(inputs, OUT)
    assert cache[OUT].shape == (2, 24, 32)
    assert torch.equal(cache[OUT].flatten(0, 1), output.last_hidden_state[0])
    assert [grid.shape for (grid,) in model.grids(inputs)] == [(4, 6), (4, 6)]


def test_shipped_models_lend_their_towers_and_processors():
    model = HookedVisionEncoder.from_pretrained("tiny-qwen2-vl")
    inputs = model.prepare([Image.new("RGB", (64, 48)), Image.new("RGB", (48, 48))])
    assert [grid.shape for (grid,) in inputs.grids] == [(6, 8), (6, 6)]
    _, cache = model.run_with_cache(inputs, OUT)
    assert [len(rows) for rows in cache[OUT]] == [48, 36]


@pytest.mark.parametrize(
    ("model", "config", "options", "message"),
    [
        ("ResNetModel", "ResNetConfig", {"hidden_sizes": [8], "depths": [1]}, "convolutional"),
        (
            "ConvNextModel",
            "ConvNextConfig",
            {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
            "convolutional",
        ),
        (
            "SwinModel",
            "SwinConfig",
            {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
            r"2 lists \(encoder\.layers\.0\.blocks",
        ),
        (
            "VitDetModel",
            "VitDetConfig",
            {**{n: v for n, v in SIZES.items() if n != "intermediate_size"}, "window_size": 3},
            "into windows",
        ),
        (
            "LlamaForCausalLM",
            "LlamaConfig",
            {n: v for n, v in SIZES.items() if "size" in n} | {"num_hidden_layers": 1},
            "takes text, and neither get_encoder",
        ),
    ],
)
def test_what_is_no_encoder_with_one_residual_stream_is_refused(model, config, options, message):
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    with pytest.raises(UnsupportedModelError, match=message):
        HookedVisionEncoder(made)

"""Wrap a model of your own: a transformers model in memory, a local folder, or a hub name.

    python examples/your_own_model.py [MODEL]

Without MODEL, the script builds a small LLaVA with random weights from a configuration and
passes tensors directly, without a processor. With MODEL (a folder, a hub name such as
Qwen/Qwen2-VL-2B-Instruct, or a shipped model), it loads model and processor.
"""

import argparse

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from hooked_vlm import Ablate, HookedVLM


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", metavar="MODEL")
given = parser.parse_args()
torch.manual_seed(0)

if given.model:
    model = HookedVLM.from_pretrained(given.model)
    side = model.require_vision().image_size or 192
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    inputs = model.prepare(pixels, "Describe the image.")
else:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llava",
        vision_config={**sizes, "num_hidden_layers": 3, "image_size": 96, "patch_size": 16},
        text_config={**sizes, "num_hidden_layers": 4, "vocab_size": 100},
        image_token_id=99,
    )
    hf_model = AutoModelForImageTextToText.from_config(config).eval()
    model = HookedVLM(hf_model)  # a processor is needed only for `prepare`
    prompt = [1, *[99] * 36, 5, 6, 7]  # 36 image tokens for 6 x 6 patches
    inputs = {
        "input_ids": torch.tensor([prompt]),
        "attention_mask": torch.ones(1, len(prompt), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 96, 96),
    }

print(model)
print(model.describe(), "\n")

# The wrapper does not change the outputs of the model.
with torch.no_grad():
    logits, cache = model.run_with_cache(inputs, "*resid_post")
    original = model.hf_model(**inputs).logits
print("logits equal transformers' logits:", torch.equal(logits, original))
print("residual stream, last block:", tuple(cache["resid_post", -1].shape))

# The grid maps visual tokens to prompt positions. Some models have none: see docs/guide/regions.md.
grids = model.grids(inputs)
if grids and grids[0]:
    grid = grids[0][0]
    rows, cols = grid.shape
    print(grid)
    left = grid.strip("vertical", 0, cols // 2, name="left half")
    with torch.no_grad():
        ablated = model.run_with_hooks(inputs, [Ablate(0, at=left)])
    change = (ablated[0, -1] - logits[0, -1]).abs().max()
    print(f"ablation of the left half changes the last logits by up to {change:.3g}")
print("To verify hooks, grids and sweeps on a checkpoint: hooked-vlm check MODEL")

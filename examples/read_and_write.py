"""Read activations of a vision-language model, inspect an attention map, and edit it.

    python examples/read_and_write.py

The script runs on a small model that ships with the package. Other image-text-to-text models
work the same way: HookedVLM.from_pretrained("Qwen/Qwen2-VL-7B-Instruct").
"""

import torch

from hooked_vlm import HookedVLM, LastToken
from hooked_vlm.regions.positions import PromptRow
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for
from hooked_vlm.stimuli.squares import draw


torch.set_grad_enabled(False)
model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
print(model.describe(), "\n")

# A picture whose squares fill whole visual tokens, and a question about it.
geometry = geometry_for(n_tokens=12, token_px=16)
image = draw(["red", "green", "blue"], "horizontal", geometry)
question = "The color of the square to the left of the green square is "
inputs = model.prepare(image, question, system=SYSTEM_PROMPT)
grid = inputs.grid
print(grid)

# Read all activations in one run. The names follow TransformerLens.
logits, cache = model.run_with_cache(inputs)
print("answer:", model.tokenizer.decode(logits[0, -1].argmax()))
print("residual stream:", tuple(cache["resid_post", 3].shape))
print("the encoder's patterns:", tuple(cache["pattern", 0, "vision_encoder"].shape))

# Sum the attention of the last token in the last layer over regions.
row = PromptRow(inputs["input_ids"][0], inputs["attention_mask"][0], grids=inputs.grids[0])
last = LastToken().positions(row)
attention = cache["pattern", -1][0, :, last].mean(0).squeeze(0)
for place in range(3):
    cells = geometry.object_region("horizontal", place)
    strip = geometry.strip_region("horizontal", place)
    on_object, on_strip = (attention[region.positions(grid)].sum() for region in (cells, strip))
    print(f"attention on object {place}: {on_object:.3f}, on its strip: {on_strip:.3f}")


# Write: block the last token's attention to the image in every layer.
def knock_out(pattern, hook):
    pattern[:, :, last, grid.positions.flatten()] = 0
    return pattern / pattern.sum(-1, keepdim=True)


blind = model.run_with_hooks(inputs, [("blocks.*.attn.hook_pattern", knock_out)])
print("answer without attention to the image:", model.tokenizer.decode(blind[0, -1].argmax()))

"""Select a region of an image by pixels and patch its visual tokens from another image.

    python examples/patch_a_region.py

The two images differ in one square. A patch of this square's tokens, written at the language
model's input, should change the answer; a patch of the same number of background tokens
should not.
"""

from hooked_vlm import HookedVLM, Patch, draw_regions, final_logits
from hooked_vlm.analysis.scoring import candidate_probability, top_answer
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for
from hooked_vlm.stimuli.squares import draw


model = HookedVLM.from_pretrained("tiny-qwen2-vl")
geometry = geometry_for(n_tokens=12, token_px=16)
question = "The color of the square to the left of the green square is "
image = draw(["red", "green", "blue"], "horizontal", geometry)
other = draw(["black", "green", "blue"], "horizontal", geometry)
inputs = model.prepare(image, question, system=SYSTEM_PROMPT)
source = model.prepare(other, question, system=SYSTEM_PROMPT)

# A region is a set of grid cells. Boxes are in pixels of the image passed to `prepare`.
grid = inputs.grid
square = grid.box(16, 80, 48, 112, name="red square")
corner = grid.box(0, 0, 32, 32, name="corner")
print(square.sketch())
print("tokens:", square.tokens, "prompt positions:", square.positions(grid))
picture = draw_regions(image, grid, [square, corner])  # a PIL image: picture.save("regions.png")
print("picture with both regions:", picture.size)

# An intervention states site, place and source. Slot 0 is the input of block 0.
patches = {
    "no patch": [],
    "red square": [Patch(0, at=square, source=source)],
    "corner": [Patch(0, at=corner, source=source)],
}
for name, hooks in patches.items():
    logits = final_logits(model.run_with_hooks(inputs, hooks))
    red, black = candidate_probability(logits, model.tokenizer, ["red", "black"])[0].tolist()
    answer = top_answer(logits, model.tokenizer)[0]
    print(f"{name:<10}: answer {answer}, P(red) {red:.2f}, P(black) {black:.2f}")

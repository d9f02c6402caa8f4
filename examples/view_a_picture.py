"""Write an interactive page of what a model reads from a picture.

    python examples/view_a_picture.py

The page is one HTML file in the folder of temporary files.
"""

import tempfile
from pathlib import Path

import numpy as np

from hooked_vlm import HookedVLM, progress_bar, view
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.squares import draw


model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
places = geometry_for(6, token_px=16)  # 6 x 6 visual tokens
pictures = [
    draw(names, "horizontal", places)
    for names in (["red", "green", "blue"], ["blue", "green", "red"])
]
question = "The color of the square to the left of the green square is "

with progress_bar("view") as step:
    seen = view(model, pictures[0], question, source=pictures[1], on_progress=step)
out = Path(tempfile.gettempdir()) / "view.html"
page = seen.to_html(out)
print(f"{out}: {len(page) / 1e6:.1f} MB")
for name, array in seen.arrays.items():
    print(f"{name:18} {dict(array.sizes)}")

# The page's numbers are there too: which cell's patch changes the first answer the most?
effects = seen.arrays["patches"].isel(answer=0, place=slice(len(seen.grid)))
slot, place = divmod(int(np.abs(effects.values).argmax()), effects.sizes["place"])
print(
    f"{seen.slots[slot]}, cell {divmod(place, seen.grid.cols)}: {float(effects[slot, place]):.2f}"
)

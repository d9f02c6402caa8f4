"""Are column and row of a grid of shapes in the visual tokens? (paper, App. C.6)

    python examples/e8_grid_probes.py [MODEL]

Pictures of 3x3 random shapes; from every object's tokens after the projector one probe
reads the column, another the row.
"""

import argparse
import random
from dataclasses import replace

import torch

from hooked_vlm import HookedVLM, LinearProbe
from hooked_vlm.analysis.probes import held_out_accuracy, object_examples, split_by_image
from hooked_vlm.stimuli import SYSTEM_PROMPT
from hooked_vlm.stimuli.grids import GridLayout, draw, random_cells


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
given = parser.parse_args()

torch.set_grad_enabled(False)
model = HookedVLM.from_pretrained(given.model)
vision = model.require_vision()
k, rng = 3, random.Random(0)
layout = GridLayout(k, 12, vision.patch_size * max(vision.merge, 2))

site = "vision_projector.hook_out"
parts = []
for _ in range(4):
    pictures = [draw(random_cells(k, rng), layout) for _ in range(20)]
    inputs = model.prepare(pictures, [""] * len(pictures), system=SYSTEM_PROMPT)
    _, cache = model.run_with_cache(inputs, site, stop_at_layer=0)
    parts.append(cache[site])
features = torch.cat(parts)

cells = [layout.object_region(row, col) for row in range(k) for col in range(k)]
examples = object_examples(features, cells)  # labelled 0 to 8, row by row
train, test = split_by_image(len(features), seed=0)
for name, labels in (("column", examples.y % k), ("row", examples.y // k)):
    data = replace(examples, y=labels)
    learned = data.of_images(train)
    probe = LinearProbe(seed=0).fit(learned.X, learned.y)
    found = held_out_accuracy(probe, data.of_images(test))
    print(f"{name:<6} {found} on held-out pictures (chance {1 / k:.2f})")
    given = probe.probability_map(features[test].unflatten(1, (12, 12))).argmax(-1)
    bands = torch.tensor([layout.band(token) for token in range(12)])
    own = bands[None, :] if name == "column" else bands[:, None]
    print(f"       {(given == own).float().mean():.2f} of all tokens are given to their own {name}")

"""Is an object's place in the order written in its tokens, and beyond? (paper, 5.2.1, Fig. 4)

    python examples/e3_ordering_probes.py [MODEL]

A linear probe learns first, middle and last from the squares' own visual tokens after the
projector.  Then it reads *every* token of pictures that it has not seen.
"""

import argparse
from itertools import permutations

import torch

from hooked_vlm import HookedVLM, LinearProbe
from hooked_vlm.analysis.probes import (
    held_out_accuracy,
    object_examples,
    shuffled_labels,
    split_by_image,
)
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for
from hooked_vlm.stimuli.squares import COLORS, draw


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
given = parser.parse_args()

torch.set_grad_enabled(False)
model = HookedVLM.from_pretrained(given.model)
vision = model.require_vision()
geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))

# The projector's output for every ordered triple; the language model does not run.
site = "vision_projector.hook_out"
parts = []
triples = list(permutations(COLORS, 3))
for start in range(0, len(triples), 30):
    pictures = [draw(t, "horizontal", geometry) for t in triples[start : start + 30]]
    inputs = model.prepare(pictures, [""] * len(pictures), system=SYSTEM_PROMPT)
    _, cache = model.run_with_cache(inputs, site, stop_at_layer=0)
    parts.append(cache[site])
features = torch.cat(parts)

regions = [geometry.object_region("horizontal", place) for place in range(3)]
examples = object_examples(features, regions)
train, test = split_by_image(len(features), seed=0)
for name, data in (("probe", examples), ("control", shuffled_labels(examples, seed=0))):
    learned = data.of_images(train)
    probe = LinearProbe(seed=0).fit(learned.X, learned.y)
    print(f"{name} on held-out pictures: {held_out_accuracy(probe, data.of_images(test))}")
    if name == "probe":
        rows, cols = geometry.shape
        maps = probe.probability_map(features[test].unflatten(1, (rows, cols))).mean(0)

print("\nP(first) on every visual token, in hundredths, mean of the held-out pictures")
for line in (100 * maps[..., 0]).round().int().tolist():
    print(" ".join(f"{value:3d}" for value in line))

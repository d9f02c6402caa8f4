"""Do the strips persist on photographs? (paper, App. C.8)

    python examples/e9_photographs.py [MODEL]

The same layout on white and on photographs: a probe learns first, middle and last from the
objects' tokens, and is then asked about the background.
"""

import argparse
from itertools import permutations

import torch

from hooked_vlm import HookedVLM, LinearProbe
from hooked_vlm.analysis.probes import held_out_accuracy, object_examples, split_by_image
from hooked_vlm.stimuli import geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.settings import stimulus_set


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
given = parser.parse_args()

torch.set_grad_enabled(False)
model = HookedVLM.from_pretrained(given.model)
vision = model.require_vision()
geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))
site = "vision_projector.hook_out"
regions = [geometry.object_region("horizontal", place) for place in range(3)]
strips = torch.zeros(geometry.shape, dtype=torch.long)
for place in range(3):
    strips[torch.from_numpy(geometry.strip_region("horizontal", place).mask)] = place
background = torch.from_numpy(geometry.background("horizontal").mask)

for name in ("shapes", "shapes-photos"):
    stimuli = stimulus_set(name)
    questions = [Question(triple, "left") for triple in permutations(stimuli.names, 3)]
    parts = []
    for start in range(0, len(questions), 24):
        batch = questions[start : start + 24]
        pictures = [stimuli.picture(q, geometry) for q in batch]
        inputs = model.prepare(pictures, [""] * len(batch), system=stimuli.system)
        _, cache = model.run_with_cache(inputs, site, stop_at_layer=0)
        parts.append(cache[site])
    features = torch.cat(parts)
    examples = object_examples(features, regions)
    train, test = split_by_image(len(features), seed=0)
    learned = examples.of_images(train)
    probe = LinearProbe(seed=0).fit(learned.X, learned.y)
    given = probe.probability_map(features[test].unflatten(1, geometry.shape)).argmax(-1)
    share = (given == strips)[:, background].float().mean()
    print(f"{stimuli.title}: objects {held_out_accuracy(probe, examples.of_images(test))}")
    print(f"  {share:.2f} of background tokens are given to their strip (chance 0.33)")

"""Does amplified ordering correct wrong answers, and what does it break? (paper, 5.4, Table 2)

    python examples/e7_amplification.py [MODEL]

An ordering probe's class weights are directions; at the language model's input every image
token is moved along them.  Asked are all items, not failures alone, and random directions
with the same norms and angles stand beside.
"""

import argparse
import random
from itertools import permutations

import torch

from hooked_vlm import HookedVLM, LinearProbe, Region, Steer, Sweep, final_logits
from hooked_vlm.analysis.directions import random_controls, stack
from hooked_vlm.analysis.probes import class_directions, object_examples
from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.stimuli import geometry_for
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.settings import stimulus_set


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
given = parser.parse_args()

torch.set_grad_enabled(False)
model = HookedVLM.from_pretrained(given.model)
stimuli = stimulus_set("objects-photos")
vision = model.require_vision()
geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))


def ask(questions):
    pictures = [stimuli.picture(q, geometry) for q in questions]
    texts = [stimuli.prompt(q) for q in questions]
    return model.prepare(pictures, texts, system=stimuli.system)


# Half of the triples for the probe, a few of the others to ask about.
triples = list(permutations(stimuli.names, 3))
random.Random(0).shuffle(triples)
seen = [Question(triple, "left") for triple in triples[: len(triples) // 2]]
asked = [Question(t, d) for t in triples[-16:] for d in ("left", "right")]

parts = []
for start in range(0, len(seen), 24):
    inputs = ask(seen[start : start + 24])
    _, cache = model.run_with_cache(inputs, "vision_projector.hook_out", stop_at_layer=0)
    parts.append(cache["vision_projector.hook_out"])
regions = [geometry.object_region("horizontal", place) for place in range(3)]
examples = object_examples(torch.cat(parts), regions)
ordering = stack(class_directions(LinearProbe(seed=0).fit(examples.X, examples.y)))
directions = {"ordering": ordering, "random": random_controls(ordering, seeds=[0])[0]}

rows, cols = geometry.shape
image = Region.rectangle(geometry.shape, rows=(0, rows), cols=(0, cols), name="image")
sweep = Sweep(
    ask(asked),
    {"kind": list(directions), "alpha": [0.0, 1.0, 2.0, 4.0, 8.0]},
    make=lambda kind, alpha: Steer(
        0, at=image, directions=directions[kind], alpha=alpha, mode="project"
    ),
)


def right(logits: torch.Tensor) -> torch.Tensor:
    answers = top_answer(final_logits(logits), model.tokenizer)
    return torch.tensor(
        [a == normalise(q.target) for a, q in zip(answers, asked, strict=True)]
    ).float()


scores = sweep.run(model, right, dims=("item",)) > 0.5
base = scores.sel(alpha=0.0)
print(f"{int(base.sel(kind='ordering').sum())} of {len(asked)} items are right as they are")
for kind in directions:
    for alpha in (1.0, 2.0, 4.0, 8.0):
        now, before = scores.sel(kind=kind, alpha=alpha), base.sel(kind=kind)
        corrected, broken = int((now & ~before).sum()), int((~now & before).sum())
        print(f"{kind:<9} alpha {alpha:g}: {corrected} corrected, {broken} broken")

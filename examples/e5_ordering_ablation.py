"""How well does a model answer without the order that vision gives? (paper, 5.3.1, Fig. 8)

    python examples/e5_ordering_ablation.py [MODEL]

At the language model's input every object's tokens are replaced by those of a picture in
which it stands alone, in the middle, and every background token by that of an empty
picture.  What things there are is still told; in what order is not, but by position.
"""

import argparse

import torch

from hooked_vlm import HookedVLM, Patch
from hooked_vlm.analysis.scoring import normalise, top_answer
from hooked_vlm.analysis.statistics import wilson
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for
from hooked_vlm.stimuli.squares import draw, items, prompt


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
given = parser.parse_args()

torch.set_grad_enabled(False)
model = HookedVLM.from_pretrained(given.model)
vision = model.require_vision()
geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))


def ask(questions, shown):
    pictures = [draw(shown(q), q.axis, geometry) for q in questions]
    return model.prepare(pictures, [prompt(q) for q in questions], system=SYSTEM_PROMPT)


def ablation(questions, axis):
    """What is written at slot 0, the input of the first block: every image token, once."""
    regions = [geometry.object_region(axis, place) for place in range(3)]
    patches = [
        Patch(0, at=region, source=ask(questions, lambda q, s=place: (None, q.entities[s], None)),
              source_at=regions[1])
        for place, region in enumerate(regions)
    ]  # fmt: skip
    empty = ask(questions, lambda _: (None, None, None))
    return [*patches, Patch(0, at=geometry.background(axis), source=empty)]


for direction in ("left", "right", "above", "below"):
    questions = items((direction,))[::4]
    inputs = ask(questions, lambda q: q.entities)
    for name, hooks in (("intact", []), ("ablated", ablation(questions, questions[0].axis))):
        answers = top_answer(model.run_with_hooks(inputs, hooks)[:, -1], model.tokenizer)
        right = sum(a == normalise(q.target) for a, q in zip(answers, questions, strict=True))
        print(f"{direction:<6} {name:<8} {wilson(right, len(questions))} of {len(questions)}")

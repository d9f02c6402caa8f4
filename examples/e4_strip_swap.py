"""Swap two strips of visual tokens, slot by slot, and see when the answer flips.

    python examples/e4_strip_swap.py [MODEL]

The paper's central intervention (5.2.2) on a handful of pairs, with nothing hidden: a
`Patch` says what is written where, a `Sweep` varies it over slots and kinds of region.
"""

import argparse

import torch

from hooked_vlm import HookedVLM, Patch, Sweep, final_logits, swap_pairs
from hooked_vlm.analysis.scoring import target_probability
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for, sample_tuples
from hooked_vlm.stimuli.pairs import swap_pair
from hooked_vlm.stimuli.squares import COLORS, draw, prompt


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
given = parser.parse_args()

model = HookedVLM.from_pretrained(given.model)
vision = model.require_vision()
geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))

# Eight pairs of a picture and its mirror image, both asked what is left of the middle.
tuples = sample_tuples(list(COLORS), k=3, per_direction=8)["left"]
pairs = [swap_pair("left", names) for names in tuples]


def ask(questions):
    pictures = [draw(q.entities, q.axis, geometry) for q in questions]
    return model.prepare(pictures, [prompt(q) for q in questions], system=SYSTEM_PROMPT)


clean, mirrored = ask([p.clean for p in pairs]), ask([p.counterfactual for p in pairs])

regions = {"object": geometry.object_region, "strip": geometry.strip_region}
cells = {
    kind: swap_pairs(region("horizontal", 0), region("horizontal", 2))
    for kind, region in regions.items()
}

sweep = Sweep(
    clean,
    {"kind": ["object", "strip"], "slot": range(model.cfg.n_layers + 1)},
    make=lambda kind, slot: Patch(slot, at=cells[kind], source=mirrored),
)


def flipped(logits: torch.Tensor) -> torch.Tensor:
    answers = [pair.swapped_answer for pair in pairs]
    return target_probability(final_logits(logits), model.tokenizer, answers)


scores = sweep.run(model, flipped, dims=("pair",))
print("probability of the mirrored picture's answer, by slot")
print(scores.mean("pair").to_pandas().round(2).to_string())

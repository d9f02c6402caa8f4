"""Does the language model form an order of its own? (paper, 5.3.2, Fig. 9)

    python examples/e6_swap_under_ablation.py [MODEL]

The vision encoder's order is removed first (see e5_ordering_ablation.py).  Where swapping
the object cells then flips the answer, the order in them was made by the blocks below.
"""

import argparse

import torch

from hooked_vlm import HookedVLM, Patch, Recording, Sweep, final_logits, swap_pairs
from hooked_vlm.analysis.scoring import normalise, target_probability, top_answer
from hooked_vlm.hooks.names import slot_name
from hooked_vlm.stimuli import SYSTEM_PROMPT, geometry_for
from hooked_vlm.stimuli.pairs import swap_pair
from hooked_vlm.stimuli.squares import draw, items, prompt


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-qwen2-vl", metavar="MODEL")
given = parser.parse_args()

torch.set_grad_enabled(False)
model = HookedVLM.from_pretrained(given.model)
vision = model.require_vision()
geometry = geometry_for(12, vision.patch_size * max(vision.merge, 2))
direction, axis = "above", "vertical"
regions = [geometry.object_region(axis, place) for place in range(3)]


def ask(questions, shown):
    pictures = [draw(shown(q), axis, geometry) for q in questions]
    return model.prepare(pictures, [prompt(q) for q in questions], system=SYSTEM_PROMPT)


def ablation(questions):
    parts = []
    for place in range(3):
        alone = ask(questions, lambda q, s=place: (None, q.entities[s], None))
        parts.append(Patch(0, at=regions[place], source=alone, source_at=regions[1]))
    empty = ask(questions, lambda _: (None, None, None))
    return [*parts, Patch(0, at=geometry.background(axis), source=empty)]


def right(questions):
    inputs = ask(questions, lambda q: q.entities)
    answers = top_answer(model.run_with_hooks(inputs, ablation(questions))[:, -1], model.tokenizer)
    return [a == normalise(q.target) for a, q in zip(answers, questions, strict=True)]


# Pairs that are answered rightly on both sides *under the ablation*.
pairs = [swap_pair(direction, q.entities) for q in items((direction,))[::2]]
both = zip(right([p.clean for p in pairs]), right([p.counterfactual for p in pairs]), strict=True)
pairs = [pair for pair, sides in zip(pairs, both, strict=True) if all(sides)][:16]
print(f"{len(pairs)} pairs are answered rightly without the vision encoder's order")
if not pairs:
    raise SystemExit("nothing to swap: this model has no other order")

clean, mirrored = [p.clean for p in pairs], [p.counterfactual for p in pairs]
slots = range(model.cfg.n_layers + 1)
other = ask(mirrored, lambda q: q.entities)
names = [slot_name(slot, model.cfg.n_layers) for slot in slots]
_, cache = model.run_with_cache(other, names, fwd_hooks=ablation(mirrored))
source = Recording(other, cache)  # the mirrored run, under its own ablation

removed = ablation(clean)
cells = swap_pairs(regions[0], regions[2])
sweep = Sweep(
    ask(clean, lambda q: q.entities),
    {"slot": slots},
    make=lambda slot: [*removed, Patch(slot, at=cells, source=source)],
)


def flipped(logits: torch.Tensor) -> torch.Tensor:
    answers = [pair.swapped_answer for pair in pairs]
    return target_probability(final_logits(logits), model.tokenizer, answers)


scores = sweep.run(model, flipped, dims=("pair",))
print("probability of the mirrored picture's answer, by slot")
print(scores.mean("pair").to_pandas().round(2).to_string())

"""Do visual tokens become words, and where is an object?  (Neo et al. 2024, arXiv:2410.07149)

    python examples/studies/neo2024_visual_tokens.py [MODEL]

1. The logit lens on visual tokens: how often the most probable word at a cell of an object is the
   name of its colour, slot by slot.
2. Ablation of tokens at the language model's input: the cells of the asked object, the same with a
   border of one cell, and as many random cells.  The mean over all cells is written.

In LLaVA-1.5, late layers decode many object tokens to fitting words, and ablating an object's
tokens with a border costs over 70 % of identifications.
"""

import numpy as np
import torch
from common import Study

from hooked_vlm import Ablate, Region


study = Study(__doc__)
model, geometry = study.model, study.geometry
questions = study.questions(24)
inputs = study.prepare(questions)
targets = [q.target for q in questions]

# 1. What every slot reads at the cells of each object.
_, cache = model.run_with_cache(inputs, "blocks.*.hook_resid_p*")
by_slot = np.zeros(model.cfg.n_layers + 1)
for place in range(3):
    positions = geometry.object_region("horizontal", place).positions(inputs.grids[0][0])
    words = cache.logit_lens(positions.tolist()).argmax(-1)  # [slot, prompt, cell]
    for b, question in enumerate(questions):
        name = question.entities[place]
        ids = [model.tokenizer.encode(s, add_special_tokens=False)[0] for s in (name, f" {name}")]
        right = torch.isin(words[:, b], torch.tensor(ids))
        by_slot += right.float().mean(-1).numpy() / (3 * len(questions))
print("object cells read as their colour, by slot:", by_slot.round(2).tolist())

# 2. The asked object's cells, with a border, and as many random cells, five draws each.
target = geometry.object_region("horizontal", 0)
border = target | target.ring(1)
draw = np.random.default_rng(0)


def random_cells(n: int) -> Region:
    mask = np.zeros(geometry.shape, bool)
    mask.flat[draw.choice(mask.size, n, replace=False)] = True
    return Region.from_mask(mask)


kinds = {"object": [target], "object and border": [border]}
kinds |= {
    f"{len(r)} random cells": [random_cells(len(r)) for _ in range(5)] for r in (target, border)
}
mean = cache["resid_pre", 0][:, inputs.grids[0][0].positions.flatten()].mean((0, 1))
right = {"nothing": study.accuracy(model(inputs), targets)}
for kind, regions in kinds.items():
    runs = [model.run_with_hooks(inputs, [Ablate(0, at=r, to=mean)]) for r in regions]
    right[kind] = float(np.mean([study.accuracy(x, targets) for x in runs]))
for kind, share in right.items():
    print(f"accuracy without {kind:<18}: {share:.2f}")

figure, (left, ax) = study.figure(2)
left.plot(by_slot, marker="o")
left.set(xlabel="slot", ylabel="object cells read as their colour", ylim=(-0.02, 1.02))
ax.barh(list(right), list(right.values()))
ax.invert_yaxis()
ax.set(xlabel="accuracy without these tokens", xlim=(0, 1))
study.save(figure)

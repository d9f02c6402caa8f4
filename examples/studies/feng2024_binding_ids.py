"""Is what binds an object to its place a vector that can be added?  (Feng & Steinhardt 2024)

    python examples/studies/feng2024_binding_ids.py [MODEL]

If every entity carries a binding vector of its place, the difference of two places' mean
activations, over many pictures, moves an entity from one to the other.  For each pair of cells in
the left and the right strip it is added to the left one and taken from the right one; colours are
not touched.  Control: vectors of the same length in random directions.

Feng and Steinhardt report binding vectors in all sufficiently large models of the Pythia and LLaMA
families: adding differences of means changes which attribute an entity is bound to.
"""

import torch
from common import Study

from hooked_vlm import HookAt, Sweep, final_logits
from hooked_vlm.analysis.scoring import target_probability


study = Study(__doc__)
model, geometry = study.model, study.geometry
questions = study.questions(40)
train, test = questions[:24], questions[24:]
slots = range(model.cfg.n_layers + 1)

# Mean activations of the two strips, on other pictures than those that are tested.
_, cache = model.run_with_cache(study.prepare(train), "blocks.*.hook_resid_p*")
streams = cache.accumulated_resid()
grid = study.prepare(train).grids[0][0]
left, right = (geometry.strip_region("horizontal", place) for place in (0, 2))
at = [strip.positions(grid) for strip in (left, right)]
means = [streams[:, :, positions].mean(1) for positions in at]  # [slot, cell, d_model]
delta = torch.zeros(len(slots), streams.shape[2], streams.shape[3])
delta[:, at[0]], delta[:, at[1]] = means[1] - means[0], means[0] - means[1]
noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0))
noise = noise * delta.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
vectors = {"difference of means": delta, "random": noise}

inputs = study.prepare(test)
names = {
    "left colour": [q.entities[0] for q in test],
    "right colour": [q.entities[2] for q in test],
}


def answers(logits: torch.Tensor) -> torch.Tensor:
    last = final_logits(logits)
    return torch.stack([target_probability(last, model.tokenizer, n) for n in names.values()], 1)


sweep = Sweep(
    inputs,
    {"vector": list(vectors), "slot": slots},
    make=lambda vector, slot: HookAt(slot, lambda x, hook: x + vectors[vector][slot]),
)
scores = sweep.run(model, answers, dims=("pair", "answer"), coords={"answer": list(names)})
print("asked what is left: probability of each colour, mean over pairs")
print(scores.mean("pair").sel(vector="difference of means").to_pandas().round(2).to_string())
print("random:", scores.mean("pair").sel(vector="random", answer="right colour").values.round(2))

figure, ax = study.figure()
for vector in vectors:
    for answer, style in zip(names, ("-", "--"), strict=True):
        line = scores.mean("pair").sel(vector=vector, answer=answer)
        ax.plot(slots, line, style, marker="o", label=f"{vector}: {answer}")
ax.set(xlabel="slot", ylabel="probability", title="asked what is left of the middle")
ax.legend(fontsize=7)
study.save(figure)

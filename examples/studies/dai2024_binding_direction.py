"""How few directions hold an object's place?  (Dai et al. 2024, arXiv:2409.05448)

    python examples/studies/dai2024_binding_direction.py [MODEL]

Dai et al. find a low-dimensional subspace of activations that encodes the order of entities, by
PCA, and change what is bound by patching along it.  Here: principal components of the strips' mean
tokens, colours averaged out.  Tokens of both outer strips are exchanged, but only in the span of
the first k components; all else stays.  Control: k random directions.
"""

import torch
from common import Study

from hooked_vlm import Patch, Sweep, final_logits, swap_pairs
from hooked_vlm.analysis.scoring import target_probability


SLOT, SIZES = 1, (1, 2, 4, 8, 16, 32)
study = Study(__doc__)
model, geometry = study.model, study.geometry
questions = study.questions(40)
train, test = questions[:24], questions[24:]

# Strips of many pictures, as [picture, strip, d_model]: what is left of a strip's mean when the
# picture's own mean is taken away, then the strip's mean over pictures.
inputs = study.prepare(train)
_, cache = model.run_with_cache(inputs, f"blocks.{SLOT}.hook_resid_pre")
tokens = cache["resid_pre", SLOT]
strips = [geometry.strip_region("horizontal", place) for place in range(3)]
grid = inputs.grids[0][0]
cells = torch.stack([tokens[:, s.positions(grid)].mean(0) for s in strips])  # colours averaged out
rows = (cells - cells.mean((0, 1))).flatten(0, 1)
spectrum, components = torch.linalg.svd(rows, full_matrices=False)[1:]
explained = (spectrum**2 / (spectrum**2).sum()).cumsum(0)
random = torch.randn(components.shape, generator=torch.Generator().manual_seed(0))
bases = {"principal components": components, "random directions": random}

inputs = study.prepare(test)
mirrored = study.prepare([type(q)(q.entities[::-1], q.direction) for q in test])
swapped = swap_pairs(strips[0], strips[2])
others = [q.entities[2] for q in test]


def flipped(logits: torch.Tensor) -> torch.Tensor:
    return target_probability(final_logits(logits), model.tokenizer, others)


sweep = Sweep(
    inputs,
    {"basis": list(bases), "k": list(SIZES)},
    make=lambda basis, k: Patch(SLOT, at=swapped, source=mirrored, subspace=bases[basis][:k]),
)
scores = sweep.run(model, flipped, dims=("pair",), logits_to_keep=1).mean("pair")
whole = flipped(model.run_with_hooks(inputs, [Patch(SLOT, at=swapped, source=mirrored)])).mean()
print(f"slot {SLOT}; probability of the other colour after a whole swap: {whole:.2f}")
print("after a swap in k directions only")
print(scores.to_pandas().round(2).to_string())
print("variance in k components:", [f"{explained[k - 1]:.2f}" for k in SIZES])

figure, ax = study.figure()
for basis in bases:
    ax.plot(SIZES, scores.sel(basis=basis), marker="o", label=basis)
ax.axhline(float(whole), color="grey", linestyle="--", label="whole tokens")
ax.set(xlabel="directions exchanged", ylabel="probability of the other colour", xscale="log")
ax.legend()
study.save(figure)

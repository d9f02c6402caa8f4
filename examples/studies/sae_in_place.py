"""Latents of a sparse autoencoder, switched off in place.  (Cunningham et al. 2023)

    python examples/studies/sae_in_place.py [MODEL]

A small sparse autoencoder (ReLU, L1) is trained on the visual tokens at one slot.  Then single
latents are switched off inside the model, with the error of reconstruction kept, so that nothing
else changes: for each colour the latent that is most specific to its squares.  Control: the latent
of another colour.

Sparse autoencoders of language models and of CLIP have latents that stand for single concepts and
change outputs when they are edited; most of them are trained on millions of tokens, this one on a
few thousand.
"""

import torch
from common import Study
from torch.nn.functional import relu

from hooked_vlm import HookAt, final_logits
from hooked_vlm.analysis.scoring import target_probability
from hooked_vlm.stimuli.squares import COLORS


SLOT, LATENTS, STEPS, SPARSITY = 1, 256, 1500, 0.03
study = Study(__doc__)
model, geometry = study.model, study.geometry

# Visual tokens of many pictures, and which colour's object each belongs to (-1: background).
train = study.questions(60, seed=3)
inputs = study.prepare(train)
_, cache = model.run_with_cache(inputs, f"blocks.{SLOT}.hook_resid_pre")
grid, colors = inputs.grids[0][0], list(COLORS)
tokens = cache["resid_pre", SLOT][:, grid.positions.flatten()]  # [picture, cell, d_model]
labels = torch.full(tokens.shape[:2], -1)
for b, question in enumerate(train):
    for place, name in enumerate(question.entities):
        labels[b, geometry.object_region("horizontal", place).tokens] = colors.index(name)
x, labels = tokens.flatten(0, 1), labels.flatten()
center, size = x.mean(0), (x - x.mean(0)).norm(dim=1).mean()

# Train: x = center + size * relu(z @ E + b) @ D, with rows of D of length 1.
generator = torch.Generator().manual_seed(0)
D = torch.nn.functional.normalize(torch.randn(LATENTS, x.shape[1], generator=generator), dim=1)
E, D = D.T.clone().requires_grad_(), D.requires_grad_()
bias = torch.zeros(LATENTS).requires_grad_()
optimizer = torch.optim.Adam([E, D, bias], lr=2e-3)
with torch.enable_grad():
    for _ in range(STEPS):
        z = (x[torch.randint(len(x), (512,), generator=generator)] - center) / size
        latents = relu(z @ E + bias)
        loss = (z - latents @ D).pow(2).sum(1).mean() + SPARSITY * latents.sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        D.data = torch.nn.functional.normalize(D.data, dim=1)
z = (x - center) / size
latents = relu(z @ E + bias)
kept, active = 1 - (z - latents @ D).pow(2).sum() / z.pow(2).sum(), (latents > 0).sum(1)
print(f"variance kept {kept:.2f}, active latents for each token {active.float().mean():.1f}")

# Each colour's latent: the largest difference of its mean there and on all tokens.
mean = torch.stack([latents[labels == c].mean(0) for c in range(len(colors))])
chosen = (mean - latents.mean(0)).argmax(1)


def without(latent: int) -> HookAt:
    def edit(activation: torch.Tensor, hook: object) -> torch.Tensor:
        edited, at = activation.clone(), grid.positions.flatten()
        on = relu((activation[:, at] - center) / size @ E[:, latent] + bias[latent])
        edited[:, at] -= size * torch.outer(on.flatten(), D[latent]).view_as(edited[:, at])
        return edited

    return HookAt(SLOT, edit)


test = study.questions(24, seed=4)
names = [q.target for q in test]
kinds = {"own colour": names, "another colour": [q.entities[2] for q in test]}
right = {}
for kind, of in kinds.items():
    found = []
    for question, name in zip(test, of, strict=True):
        edit = without(int(chosen[colors.index(name)]))
        logits = model.run_with_hooks(study.prepare([question]), [edit])
        found.append(target_probability(final_logits(logits), model.tokenizer, [question.target]))
    right[kind] = float(torch.cat(found).mean())
plain = target_probability(final_logits(model(study.prepare(test))), model.tokenizer, names)
right["nothing"] = float(plain.mean())
for kind, value in right.items():
    print(f"probability of the right colour without the latent of {kind:<15}: {value:.2f}")

figure, (ax, bars) = study.figure(2)
ax.imshow(mean[:, chosen], cmap="viridis")
ax.set(xticks=range(6), xticklabels=[c[:3] for c in colors], title="latents by tokens' colour")
ax.set(yticks=range(6), yticklabels=colors)
bars.bar(list(right), list(right.values()))
bars.set(ylabel="probability of the right colour", ylim=(0, 1.05))
study.save(figure)

"""Which states carry the picture to the answer?  (Palit et al. 2023; Basu et al. 2024)

    python examples/studies/palit2023_causal_tracing.py [MODEL]

Causal tracing, with the picture as what is corrupted: noise of three standard deviations on all
visual tokens after the projector; then clean states are restored at one slot and one group of
tokens at a time.  The effect is the share of the lost probability that comes back.

For BLIP, Palit et al. report that later layers matter, for all tokens.  For LLaVA, Basu et al.
report that what answers a question is stored in much earlier layers than in text-only models.
"""

import torch
from common import Study

from hooked_vlm import HookAt, LastToken, Patch, Sweep, final_logits
from hooked_vlm.analysis.scoring import target_probability
from hooked_vlm.regions.positions import TextTokens


study = Study(__doc__)
model, geometry = study.model, study.geometry
questions = study.questions(16)
inputs = study.prepare(questions)
targets = [q.target for q in questions]


def probability(logits: torch.Tensor) -> torch.Tensor:
    return target_probability(final_logits(logits), model.tokenizer, targets)


site = "vision_projector.hook_out"
_, cache = model.run_with_cache(inputs, site)
noise = (
    3
    * cache[site].std()
    * torch.randn(cache[site].shape, generator=torch.Generator().manual_seed(0))
)
corrupt = HookAt(site, lambda x, hook: x + noise.to(x))

objects = geometry.object_region("horizontal", 0)
groups = {
    "asked object": objects,
    "all image tokens": inputs.grids[0][0].all(),
    "text": TextTokens(),
    "last token": LastToken(),
}
sweep = Sweep(
    inputs,
    {"group": list(groups), "slot": range(model.cfg.n_layers + 1)},
    make=lambda group, slot: Patch(slot, at=groups[group], source=inputs),
    base=[corrupt],
)
restored = sweep.run(model, probability, dims=("pair",), logits_to_keep=1).mean("pair")
clean = probability(model(inputs)).mean().item()
corrupted = probability(model.run_with_hooks(inputs, [corrupt])).mean().item()
print(f"probability of the right answer: clean {clean:.2f}, corrupted {corrupted:.2f}")
share = (restored - corrupted) / (clean - corrupted)
print("share of the lost probability that comes back")
print(share.to_pandas().round(2).to_string())

figure, ax = study.figure()
for group in groups:
    ax.plot(share.slot, share.sel(group=group), marker="o", label=group)
ax.set(xlabel="slot at which clean states are restored", ylabel="share restored")
ax.legend(loc="center left", fontsize=7)
study.save(figure)

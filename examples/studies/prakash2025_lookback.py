"""A pointer and what it points to, in one token.  (Prakash et al. 2025, arXiv:2505.14685)

    python examples/studies/prakash2025_lookback.py [MODEL]

Prakash et al. find a "lookback" mechanism: first the last token holds an address (which entity),
later the entity itself.  Both are found by interchange in subspaces.  Here the last token of a
clean prompt takes that of another prompt, about other colours in which the answer is at the
other place.  If the address was taken, the answer is the *clean* picture's colour at that place; if
the entity was, it is the other prompt's answer.  Only the span of the first k right singular
vectors of last tokens is taken.

In Llama-3-70B-Instruct, Prakash et al. report ordering IDs in low-rank subspaces, and at the last
token first the pointer of a lookback, in later layers the answer that it fetches.
"""

import torch
from common import Study

from hooked_vlm import LastToken, Patch, Sweep, final_logits
from hooked_vlm.analysis.scoring import target_probability
from hooked_vlm.stimuli import sample_tuples
from hooked_vlm.stimuli.pairs import final_token_pair
from hooked_vlm.stimuli.squares import COLORS


study = Study(__doc__)
model = study.model
slots, sizes = range(model.cfg.n_layers + 1), (2, 8, 32, model.cfg.d_model)

# Singular vectors of last tokens, on other questions of all four directions.
train = study.prepare(study.questions(24, ("left", "right", "above", "below"), seed=7))
_, cache = model.run_with_cache(train, "blocks.*.hook_resid_p*")
last = cache.accumulated_resid(pos_slice=-1)  # [slot, prompt, d_model]
bases = torch.linalg.svd(last - last.mean(1, keepdim=True), full_matrices=True)[2]

drawn = sample_tuples(list(COLORS), k=5, per_direction=24, seed=1)["left"]
pairs = [final_token_pair("left", names) for names in drawn]
clean = study.prepare([p.clean for p in pairs])
other = study.prepare([p.counterfactual for p in pairs])
outcomes = {
    "clean answer": [p.clean_answer for p in pairs],
    "address: clean colour at the other's place": [p.ordering_answer for p in pairs],
    "entity: the other's answer": [p.attribute_answer for p in pairs],
}


def answers(logits: torch.Tensor) -> torch.Tensor:
    z = final_logits(logits)
    return torch.stack([target_probability(z, model.tokenizer, n) for n in outcomes.values()], 1)


sweep = Sweep(
    clean,
    {"k": list(sizes), "slot": slots},
    make=lambda k, slot: Patch(slot, at=LastToken(), source=other, subspace=bases[slot, :k]),
)
scores = sweep.run(model, answers, dims=("pair", "outcome"), coords={"outcome": list(outcomes)})
mean = scores.mean("pair")
for outcome in outcomes:
    print(outcome, "(rows: directions taken)")
    print(mean.sel(outcome=outcome).to_pandas().round(2).to_string())

figure, axes = study.figure(2)
for ax, outcome in zip(axes, list(outcomes)[1:], strict=True):
    for k in sizes:
        ax.plot(slots, mean.sel(k=k, outcome=outcome), marker="o", label=f"{k} directions")
    ax.set(xlabel="slot", ylabel="probability", title=outcome, ylim=(-0.02, 1.02))
    ax.title.set_fontsize(8)
axes[0].legend(fontsize=7)
study.save(figure)

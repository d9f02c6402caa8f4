"""Does more attention to the image help?  (Chen et al. 2025, arXiv:2503.01773)

    python examples/studies/chen2025_scalingvis.py [MODEL]

ScalingVis multiplies the last token's attention scores on image tokens by a number, in all layers:
above 1 attention gets sharper, below 1 flatter.  AdaptVis chooses the number by the confidence of
the plain answer: flatter below a threshold, sharper above.  Pictures are blended with noise, so
that the model errs; the numbers and the threshold are chosen on one half of the questions and
tested on the other.

Chen et al. report up to 50 points more on spatial benchmarks (What'sUp, VSR) for LLaVA models.
"""

import numpy as np
import torch
from common import DIRECTIONS, Study

from hooked_vlm import Attend, LastToken, Sweep, final_logits
from hooked_vlm.analysis.scoring import matches_answer


ALPHAS, NOISE = (0.0, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0), 0.6
study = Study(__doc__)
model = study.model
questions = study.questions(16, DIRECTIONS)
order = np.random.default_rng(0).permutation(len(questions))
half = len(order) // 2


def measured(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which answers are right [alpha, question], and the plain answers' confidence."""
    chosen = [questions[i] for i in indices]
    inputs, targets = study.prepare(chosen, NOISE), [q.target for q in chosen]
    image = inputs.grids[0][0].all()

    def metric(logits: torch.Tensor) -> torch.Tensor:
        last = final_logits(logits)
        right = matches_answer(last, model.tokenizer, targets)
        return torch.stack([right.float(), last.softmax(-1).amax(-1)], 1)

    sweep = Sweep(
        inputs,
        {"alpha": ALPHAS},
        make=lambda alpha: [
            Attend(f"blocks.{i}.attn", query=LastToken(), key=image, score_scale=alpha)
            for i in range(model.cfg.n_layers)
        ],
    )
    found = sweep.run(model, metric, dims=("question", "what"), logits_to_keep=1).values
    return found[..., 0], found[ALPHAS.index(1.0), :, 1]


right, confidence = measured(order[:half])
tested, test_confidence = measured(order[half:])
by_alpha = tested.mean(1)
best = int(right.mean(1).argmax())
# AdaptVis: which number below a threshold of confidence, and which above.
choices = [
    (np.where(confidence < t, right[low], right[high]).mean(), t, low, high)
    for t in np.quantile(confidence, (0.25, 0.5, 0.75))
    for low in range(len(ALPHAS))
    for high in range(len(ALPHAS))
]
_, threshold, low, high = max(choices)
adaptive = np.where(test_confidence < threshold, tested[low], tested[high]).mean()
print("accuracy by factor:", dict(zip(ALPHAS, by_alpha.round(2).tolist(), strict=True)))
plain, scaled = by_alpha[ALPHAS.index(1.0)], by_alpha[best]
print(f"plain {plain:.2f}; ScalingVis, factor {ALPHAS[best]}: {scaled:.2f}")
chosen = f"{ALPHAS[low]} below a confidence of {threshold:.2f}, else {ALPHAS[high]}"
print(f"AdaptVis, {chosen}: {adaptive:.2f}")

figure, ax = study.figure()
ax.plot(ALPHAS, by_alpha, marker="o", label="ScalingVis")
ax.axhline(adaptive, linestyle="--", color="tab:orange", label="AdaptVis")
ax.set(xlabel="factor on scores of image tokens", ylabel="accuracy", ylim=(0, 1.02))
ax.legend()
study.save(figure)

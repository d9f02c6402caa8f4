"""How many image tokens are needed after the first layers?  (Chen et al. 2024, arXiv:2403.06764)

    python examples/studies/chen2024_fastv.py [MODEL]

FastV ranks image tokens by the attention that they get from the last token in layer K, and drops
the lowest share in all layers above.  Here dropped tokens are masked as keys from layer K + 1 on,
which gives the same numbers and saves nothing.  Controls: random tokens dropped, and the ones that
FastV would keep.

For LLaVA-1.5-13B, Chen et al. report 45 % fewer operations without loss, dropping half of the image
tokens after layer 2.
"""

import numpy as np
from common import DIRECTIONS, Study

from hooked_vlm import Attend, LastToken, Region, attention_maps


LAYERS, KINDS = (0, 2), ("FastV", "random", "the reverse")
SHARES = (0.5, 0.75, 0.9, 0.97)
study = Study(__doc__)
model = study.model
questions = study.questions(4, DIRECTIONS)
draw = np.random.default_rng(0)


def dropped(weights: np.ndarray, share: float, kind: str) -> Region:
    """Returns the cells that a way of choosing drops."""
    order = weights.ravel().argsort()
    order = {"FastV": order, "the reverse": order[::-1], "random": draw.permutation(order)}[kind]
    mask = np.zeros(weights.size, bool)
    mask[order[: round(share * len(order))]] = True
    return Region.from_mask(mask.reshape(weights.shape))


right = {}
for question in questions:
    inputs = study.prepare([question])
    maps = attention_maps(model, inputs, LastToken()).isel(query=0).mean("head")
    for k in LAYERS:
        for kind in KINDS:
            for share in SHARES:
                region = dropped(maps.sel(layer=k).values, share, kind)
                mask = Attend("blocks.0.attn", key=region, mask=True)
                above = mask.at_layers(range(k + 1, model.cfg.n_layers))
                logits = model.run_with_hooks(inputs, [above])
                hit = study.accuracy(logits, [question.target])
                right.setdefault((k, kind, share), []).append(hit)
mean = {key: float(np.mean(values)) for key, values in right.items()}
for k in LAYERS:
    for kind in KINDS:
        values = [f"{mean[k, kind, share]:.2f}" for share in SHARES]
        print(f"after layer {k}, {kind:<11}: {' '.join(values)}  (dropped {SHARES})")

figure, axes = study.figure(2)
for k, ax in zip(LAYERS, axes, strict=True):
    for kind in KINDS:
        ax.plot(SHARES, [mean[k, kind, share] for share in SHARES], marker="o", label=kind)
    ax.set(xlabel="share dropped", title=f"after layer {k}", ylim=(-0.02, 1.02))
axes[0].set_ylabel("accuracy")
axes[0].legend(fontsize=7)
study.save(figure)

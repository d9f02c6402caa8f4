"""Do a few heads point at what is asked for?  (Kang et al. 2025, arXiv:2503.06287)

    python examples/studies/kang2025_localization_heads.py [MODEL]

Maps of the last token's attention to the image, for each head.  Heads are chosen without labels, on
some questions: enough attention on the image, and among those the least spatial entropy (attention
in few connected pieces).  On other questions the cell with the largest mean attention of three such
heads is compared with the object that the question names, the one that it asks for, and any object.
Control: three other heads, drawn many times.

In ten VLMs, Kang et al. find that three of thousands of heads suffice to localise objects about as
well as fine-tuned methods.
"""

import numpy as np
from common import DIRECTIONS, Study
from scipy import ndimage

from hooked_vlm import LastToken, attention_maps
from hooked_vlm.stimuli.pairs import target_place


HEADS, LEAST = 3, 0.2
study = Study(__doc__)
model, geometry = study.model, study.geometry


def maps_of(questions: list) -> np.ndarray:
    """Returns attention of last tokens: [question, head of any layer, row, col]."""
    found = [attention_maps(model, study.prepare([q]), LastToken()) for q in questions]
    return np.stack(
        [m.isel(query=0).stack(any=("layer", "head")).transpose("any", ...) for m in found]
    )


def spatial_entropy(weights: np.ndarray) -> float:
    """Entropy of the attention's connected pieces above the mean: low where it is in one place."""
    pieces, n = ndimage.label(weights > weights.mean())  # type: ignore[misc]
    mass = np.array([weights[pieces == i].sum() for i in range(1, n + 1)])
    share = mass / mass.sum()
    return float(-(share * np.log(share)).sum())


train, test = study.questions(6, DIRECTIONS, seed=1), study.questions(12, DIRECTIONS, seed=2)
maps = maps_of(train)
on_image = maps.sum((2, 3)).mean(0)
entropy = np.array([[spatial_entropy(m) for m in question] for question in maps]).mean(0)
able = np.flatnonzero(on_image >= LEAST)
chosen = able[entropy[able].argsort()[:HEADS]]
n_heads = model.cfg.n_heads
print("chosen heads:", [f"L{i // n_heads}H{i % n_heads}" for i in chosen])

tested = maps_of(test)


def hits(heads: np.ndarray) -> dict[str, float]:
    """Returns how often the brightest cell lies on the named, the asked, and any object."""
    found: dict[str, list[bool]] = {"named": [], "asked": [], "any": []}
    for question, weights in zip(test, tested[:, heads].mean(1), strict=True):
        cell = divmod(int(weights.argmax()), weights.shape[1])
        places = [geometry.object_region(question.axis, place) for place in range(3)]
        found["named"].append(cell in places[1])
        found["asked"].append(cell in places[target_place(question.direction)])
        found["any"].append(any(cell in place for place in places))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


draw = np.random.default_rng(0)
others = [hits(draw.choice(maps.shape[1], HEADS, replace=False)) for _ in range(50)]
result = {
    "chosen": hits(chosen),
    "random": {k: float(np.mean([o[k] for o in others])) for k in others[0]},
}
area = len(geometry.object_region("horizontal", 0)) / (geometry.shape[0] * geometry.shape[1])
for heads, found in result.items():
    print(
        f"brightest cell of {heads} heads on:",
        ", ".join(f"{k} object {v:.2f}" for k, v in found.items()),
    )
print(f"by chance: {area:.2f} on one object")

figure, (left, ax) = study.figure(2)
left.imshow(tested[0, chosen].mean(0), cmap="viridis")
left.set(title=f"asked: {test[0].direction} of the middle", xticks=[], yticks=[])
for i, (heads, found) in enumerate(result.items()):
    ax.bar(np.arange(3) + 0.4 * i, list(found.values()), 0.4, label=f"{heads} heads")
ax.set_xticks([0.2, 1.2, 2.2], list(result["chosen"]))
ax.set(xlabel="object", ylabel="brightest cell lies on it", ylim=(0, 1.02))
ax.legend()
study.save(figure)

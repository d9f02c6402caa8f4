"""The published count of R2: how the paper counts a COCO-spatial item as corrected.

The paper lists an item twice, once for each order of its options, and counts differently from
R2's other numbers:

1. Predictions other than the two options of the axis are dropped, so an item may have one
   listing, or none and then does not count.
2. An item is correct at the start where none of its listings is wrong.
3. Only wrong listings are asked again.  An item is *fixed* where all of them become right, so
   nothing can break.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_vlm.analysis.statistics import wilson
from hooked_vlm.experiments.tables import interval_rows
from hooked_vlm.stimuli.datasets.coco import SpatialItem
from hooked_vlm.stimuli.prompts import OPTIONS


DROPPED, WRONG, RIGHT = -1, 0, 1
NOTE = (
    "'published' is the paper's count. A prediction that is none of the axis's two options is "
    "dropped (one that is so under amplification counts as not right; the paper does not say). An "
    "item is correct where none of its remaining listings is wrong, and fixed where all of its "
    "wrong listings become right. It differs from 'accuracy': correct listings are not asked "
    "again, so no answer can break; items without a remaining listing do not count; alpha is "
    "chosen on the same items."
)


def listings(item: SpatialItem, answers: Sequence[str]) -> tuple[int, ...]:
    """Returns the state of an item's listings: `RIGHT`, `WRONG` or `DROPPED`, by normalised answer.

    >>> from pathlib import Path
    >>> item = SpatialItem(Path(), "1", "cat", "left", "dog", "", "")
    >>> listings(item, ["right", "sofa"])
    (0, -1)
    """
    return tuple(
        DROPPED if answer not in OPTIONS[item.axis] else RIGHT if answer == item.side else WRONG
        for answer in answers
    )


def published_accuracy(
    before: Int[np.ndarray, "item order"], now: Bool[np.ndarray, "*axes item order"]
) -> tuple[Float[np.ndarray, "*axes"], Float[np.ndarray, "*axes"], int, int]:
    """Returns accuracy, the share of wrong items that are fixed, and the counts of both.

    `before` has the listings without amplification, `now` whether each listing is right under it.
    """
    counted = (before != DROPPED).any(1)
    wrong = (before == WRONG).any(1)
    fixed = (now | (before != WRONG)).all(-1) & wrong
    n, n_wrong = int(counted.sum()), int(wrong.sum())
    correct = int((counted & ~wrong).sum())
    found = fixed.sum(-1)
    accuracy, share = (correct + found) / max(n, 1), found / max(n_wrong, 1)
    return np.asarray(accuracy), np.asarray(share), n, n_wrong


def published_rows(
    before: Int[np.ndarray, "item order"],
    right: Mapping[str, Bool[np.ndarray, "seed alpha item order"]],
    alphas: Sequence[float],
) -> list[dict]:
    """Returns the rows of the published count, for every kind of direction and strength.

    Of several seeds the mean is reported.  There is no row where no item counts.
    """
    rows = []
    for kind, now in right.items():
        accuracy, fixed, n, n_wrong = published_accuracy(before, now)
        shares = {"published, accuracy": (accuracy.mean(0), n)}
        shares["published, fixed"] = (fixed.mean(0), n_wrong)
        for quantity, (values, count) in shares.items():
            for alpha, value in zip(alphas, values, strict=True) if count else ():
                rows += interval_rows(
                    wilson(float(value) * count, count),
                    {},
                    direction="all",
                    kind=kind,
                    alpha=alpha,
                    quantity=quantity,
                )
    return rows

"""The attention of the background to objects in the vision encoder: a part of Q5."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.experiments.loop import over_batches
from hooked_vlm.experiments.setting import Setting
from hooked_vlm.experiments.tables import interval_rows
from hooked_vlm.hooks.names import VISION
from hooked_vlm.stimuli.pairs import Question


def attention_rows(
    setting: Setting, axis: str, questions: Sequence[Question], seed: int
) -> tuple[list[dict], int]:
    """Returns the rows of the attention of backgrounds to objects in some pictures, by layer.

    Then the number of pictures that are left out because their attention is not a number.
    """
    names = [
        name
        for name in setting.model.sites
        if name.startswith(f"{VISION}.blocks.") and name.endswith("attn.hook_pattern")
    ]
    names = names[: setting.model.anatomy.vision.last_read + 1]

    def score(_: str, batch: list[Question], __: Any) -> dict[str, np.ndarray | None]:
        with torch.no_grad():
            _, cache = setting.model.run_with_cache(setting.inputs(batch), names, stop_at_layer=0)
        found = {}
        for name in names:
            pattern = cache[name]
            whole = pattern[0] if isinstance(pattern, list) else pattern
            prefix = setting.model.anatomy.vision.n_prefix  # class tokens and registers
            whole = whole.flatten(0, -3).mean(0)[prefix:, prefix:]
            found[name] = attention_shares(setting, axis, whole)
        return found

    by_question = over_batches("attention", {axis: questions}, 1, score, last=True)[axis]
    shares = {name: [found[name] for found in by_question] for name in names}
    rows = []
    wrong = {i for name in names for i, share in enumerate(shares[name]) if _is_nan(share)}
    for layer, name in enumerate(names, start=1):
        kept = [share for i, share in enumerate(shares[name]) if i not in wrong]
        whole = [share for share in kept if share is not None]
        if len(whole) < max(len(kept), 2):
            continue  # windows: no background patch attends to the whole picture
        found = interval_rows(
            bootstrap(np.stack(whole), seed=seed),
            {"kind": ("own object", "other objects")},
            axis=axis,
            quantity="attention",
        )
        rows += [{**row, "layer": layer, "site": name} for row in found]
    return rows, len(wrong)


def _is_nan(share: np.ndarray | None) -> bool:
    return share is not None and not np.isfinite(share).all()


def attention_shares(setting: Setting, axis: str, pattern: Tensor) -> np.ndarray | None:
    """Returns background patches' attention to their own and to other objects, over uniform.

    `pattern` is `[query, key]` over a picture's patches, averaged over heads.  The result is
    None where the pattern does not cover all patches.
    """
    side = setting.geometry.shape[0]
    n = round(pattern.shape[-1] ** 0.5)
    if n * n != pattern.shape[-1] or n % side or pattern.shape[0] != pattern.shape[1]:
        return None
    m = n // side

    def patches(region) -> np.ndarray:
        return np.kron(region.mask, np.ones((m, m), dtype=bool)).ravel()

    objects = [patches(setting.geometry.object_region(axis, place)) for place in range(3)]
    background = patches(setting.geometry.background(axis))
    own, other = [], []
    weights = pattern.double().cpu().numpy()
    for place in range(3):
        queries = patches(setting.geometry.strip_region(axis, place)) & background
        given = np.array([weights[queries][:, cells].mean() for cells in objects]) * n * n
        own.append(given[place])
        other.append(given[[s for s in range(3) if s != place]].mean())
    return np.array([np.mean(own), np.mean(other)])

"""The paper's numbers as data, so that a report can show them next to its own results.

They come from the tables and figures of arXiv 2603.22278 (v1 and v2, where they differ).
Numbers that the paper shows only as a curve are left out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One number that the paper reports."""

    id: str
    setting: str
    """As in `--setting`; `whatsup` and `coco` for the paper's real pictures."""
    model: str
    quantity: str
    value: str
    source: str


def _accuracies() -> tuple[Target, ...]:
    settings = ("squares", "shapes", "objects", "whatsup")
    found = []
    for model, values in (
        ("Qwen2-VL-7B", ("1.00", "1.00", "1.00", "0.73")),
        ("Gemma-3-4b", ("0.98", "0.99", "0.99", "0.62")),
    ):
        for setting, value in zip(settings, values, strict=True):
            found.append(Target("E1", setting, model, "accuracy", value, "Table 1"))
        found.append(Target("R3", "whatsup", model, "accuracy", values[-1], "Table 1"))
    return tuple(found)


def _removed() -> tuple[Target, ...]:
    found = []
    for model, values in (
        ("Qwen2-VL-7B", ("0.60", "0.62", "0.43")),
        ("Gemma-3-4b", ("0.57", "0.64", "0.54")),
    ):
        for setting, value in zip(("squares", "shapes", "objects"), values, strict=True):
            what = "accuracy, vision's order removed (chance 0.33)"
            found.append(Target("E5", setting, model, what, value, "Table 5"))
    return tuple(found)


COCO = tuple(
    Target(id, "coco", model, quantity, value, "Table 2, v2, n = 440")
    for id in ("E7", "R2")
    for model, quantity, value in (
        ("Gemma-3-4b", "accuracy", "0.53 to 0.72"),
        ("Gemma-3-4b", "accuracy, random directions", "0.57"),
        ("Qwen2-VL-2B", "accuracy", "0.60 to 0.82"),
        ("Qwen2-VL-2B", "accuracy, random directions", "0.65"),
    )
)
TARGETS = (
    *_accuracies(),
    Target("E2", "squares", "Qwen2-VL-7B", "layers that keep the clean answer", "0-19", "Fig. 3"),
    Target("E2", "squares", "Qwen2-VL-7B", "layers that transfer the ordering", "20-22", "Fig. 3"),
    Target("E2", "squares", "Qwen2-VL-7B", "layers that transfer the attribute", "23-27", "Fig. 3"),
    Target("E4", "squares", "Qwen2-VL-7B", "strips flip up to about layer", "23-24", "Figs. 5-7"),
    *_removed(),
    Target("E6", "squares", "Qwen2-VL-7B", "layers where objects flip", "11-20", "Fig. 9, v2"),
    Target("E6", "squares", "Qwen2-VL-7B", "layers where objects flip", "13-17", "Fig. 9, v1"),
    Target("E7", "whatsup", "Gemma-3-4b", "wrong answers corrected", "over 0.50", "Table 2, v1"),
    Target("E7", "whatsup", "Qwen2-VL-7B", "wrong answers corrected", "over 0.30", "Table 2, v1"),
    *COCO,
)
"""In the order of the paper."""


def targets(experiment: str, setting: str = "") -> list[Target]:
    """Returns the paper's numbers for an experiment: those on a setting, or all if there are none.

    >>> [target.value for target in targets("E5", "shapes")]
    ['0.62', '0.64']
    """
    own = [target for target in TARGETS if target.id == experiment]
    return [target for target in own if target.setting == setting] or own

"""Prompts that ask several questions about each image, padded on the left."""

from collections.abc import Sequence
from typing import Any

import torch

from helpers.tiny_models import PAD, make_inputs


def ask(
    family: str, lengths: Sequence[Sequence[int]], seed: int = 0, same: bool = True
) -> dict[str, torch.Tensor]:
    """Returns inputs with a question of each length, in tokens, about each image.

    `lengths` has a list for each image.  Prompts come question by question, as in a batch that was
    not sorted.  With `same` false every prompt has an image of its own.
    """
    base = make_inputs(family, len(lengths), seed=seed, text=0)
    asked = [
        (image, n)
        for number in range(max(map(len, lengths)))
        for image, own in enumerate(lengths)
        for n in own[number : number + 1]
    ]
    random = torch.Generator().manual_seed(seed + 100)
    longest = max(n for _, n in asked)
    rows: dict[str, list[torch.Tensor]] = {}
    for image, n in asked:
        head, pads = base["input_ids"][image], longest - n
        tail = torch.randint(2, 290, (n,), generator=random)
        own = {"input_ids": (head, tail, PAD), "attention_mask": (1, 1, 0)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in base:
                own[name] = (base[name][image], 0, 0)
        for name, (front, after, pad) in own.items():
            parts = [_filled(pad, pads), _filled(front, len(head)), _filled(after, n)]
            rows.setdefault(name, []).append(torch.cat(parts))
    found = {name: torch.stack(x) for name, x in rows.items()}
    order = [image for image, _ in asked]
    for name in ("pixel_values", "image_grid_thw"):
        if name in base:
            by_image = base[name].unflatten(0, (len(lengths), -1))
            found[name] = by_image[order].flatten(0, 1)
    if family != "qwen2-vl":  # as `prepare` gives them: else positions count the padding
        found["position_ids"] = (found["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if not same:
        noise = torch.randn(found["pixel_values"].shape, generator=random)
        found["pixel_values"] = noise
    return found


def _filled(value: Any, n: int) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full((n,), value)

"""Training batches, made without the processor's per-image work but equal to its output.

Conversations are rendered with the model's own chat template, answers marked for the
loss; pixels are normalised and cut into patches for the whole batch at once.  A test
holds both against the processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from hooked_vlm.stimuli.prompts import SYSTEM_PROMPT
from training.build import MERGE, PATCH
from training.tasks import Turn


@dataclass(frozen=True, eq=False)
class Batch:
    """Model inputs, and which tokens the loss is on (as predictions of the ones before)."""

    inputs: dict[str, Tensor]
    answers: Bool[Tensor, "batch pos"]


class Encoder:
    """Turns conversations and pictures into training batches for one processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.is_gemma = hasattr(self.tokenizer, "boi_token")
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(
            "<image_soft_token>" if self.is_gemma else "<|image_pad|>"
        )
        self._first = cache(self._first_turn)
        self._later = cache(self._later_turn)

    def _render(
        self, turns: Sequence[tuple[str, str]], generate: bool, image: bool, system: bool = True
    ) -> str:
        first = [{"role": "system", "content": SYSTEM_PROMPT}]
        messages: list[dict] = first if image and system else []
        for i, (role, text) in enumerate(turns):
            content = [{"type": "image"}] if image and i == 0 else []
            messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _split(
        self, turn: Turn, before: Sequence[tuple[str, str]], image: bool, system: bool = True
    ) -> tuple[str, str]:
        """Returns the text of a turn up to the answer, and the answer with its end."""
        how = (image, system)
        start = self._render(before, False, *how) if before else ""
        asked = self._render([*before, ("user", turn[0])], True, *how)
        told = self._render([*before, ("user", turn[0]), ("assistant", turn[1])], False, *how)
        return asked[len(start) :], told[len(asked) :]

    def _first_turn(self, turn: Turn, n_tokens: int, system: bool) -> tuple[list[int], list[int]]:
        asked, answer = self._split(turn, [], image=True, system=system)
        if self.is_gemma:
            t = self.tokenizer
            expanded = f"\n\n{t.boi_token}{t.image_token * n_tokens}{t.eoi_token}\n\n"
            asked = asked.replace(t.boi_token, expanded)
        else:
            asked = asked.replace("<|image_pad|>", "<|image_pad|>" * n_tokens)
        return self._ids(asked), self._ids(answer)

    def _later_turn(self, turn: Turn) -> tuple[list[int], list[int]]:
        # A stand-in for what went before: its text is cut off again.
        return tuple(map(self._ids, self._split(turn, [("user", "x"), ("assistant", "y")], False)))  # type: ignore[return-value]

    def conversation(
        self, turns: Sequence[Turn], n_tokens: int, system: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a conversation about one picture, and which of them are answers."""
        ids: list[int] = []
        marks: list[bool] = []
        for i, turn in enumerate(turns):
            asked, answer = self._later(turn) if i else self._first(turn, n_tokens, system)
            # The last token of an answer is the line break after it, which nobody has to learn.
            ids += [*asked, *answer]
            marks += [False] * len(asked) + [True] * (len(answer) - 1) + [False]
        return ids, marks

    def batch(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: UInt8[np.ndarray, "batch height width 3"],
        system: Sequence[bool] | None = None,
    ) -> Batch:
        """Returns a batch of conversations, one picture each, padded on the right.

        `system` says which of them begin with the system message; by default all.
        """
        side = images.shape[1] // PATCH // MERGE
        system = [True] * len(conversations) if system is None else system
        made = [
            self.conversation(turns, side * side, with_system)
            for turns, with_system in zip(conversations, system, strict=True)
        ]
        length = max(len(ids) for ids, _ in made)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in made])
        answers = torch.tensor([row + [False] * (length - len(row)) for _, row in made])
        return Batch({"input_ids": ids, **self.pixels(images, ids)}, answers)

    def pixels(
        self, images: UInt8[np.ndarray, "batch height width 3"], ids: Int[Tensor, "batch pos"]
    ) -> dict[str, Tensor]:
        """Returns the image part of the model's inputs."""
        values = normalised(images)
        is_image = (ids == self.image_token_id).int()
        if self.is_gemma:
            return {"pixel_values": values, "token_type_ids": is_image}
        rows = images.shape[1] // PATCH
        return {
            "pixel_values": packed_patches(values),
            "image_grid_thw": torch.tensor([[1, rows, rows]] * len(images)),
            "mm_token_type_ids": is_image,
        }


def normalised(
    images: UInt8[np.ndarray, "batch height width 3"],
) -> Float[Tensor, "batch 3 height width"]:
    """Returns pixels scaled from 0..255 to -1..1, channels first."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return (values * (1 / 255) - 0.5) / 0.5


def packed_patches(values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "patch pixel"]:
    """Returns Qwen2-VL's patches: 2x2 blocks of them in raster order, two equal frames each."""
    patches = rearrange(
        values,
        "b c (gh mh ph) (gw mw pw) -> (b gh gw mh mw) c ph pw",
        mh=MERGE,
        mw=MERGE,
        ph=PATCH,
        pw=PATCH,
    )
    return repeat(patches, "n c ph pw -> n (c t ph pw)", t=2)

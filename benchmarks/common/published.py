"""Published models and prompts of the paper's lengths for them, with random weights and pixels.

`SETTINGS` are the real shapes.  `tiny` gives the same architecture with small shapes, so that a
program for the real one can be tried out where that has no place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.built import FAMILIES, REAL, asked
from hooked_vlm import HookedVLM


@dataclass(frozen=True)
class Setting:
    """The shapes of a model and of a prompt with one image."""

    name: str
    family: str
    first_image: int
    """Position of the image's first token."""
    side: int
    """Tokens a side of the image."""
    length: int
    made: Callable[[], tuple[type, Any]]
    """Returns the class and the config of the model."""

    @property
    def image_end(self) -> int:
        """The first position after the image."""
        return self.first_image + self.side**2

    def build(self, device: str, dtype: torch.dtype) -> HookedVLM:
        """Returns a wrapped model of this shape with seeded random weights, in eval mode."""
        torch.manual_seed(0)
        model_class, config = self.made()
        with torch.device(device):
            hf_model: Any = model_class._from_config(  # type: ignore[attr-defined]
                config, attn_implementation="sdpa", dtype=dtype
            )
        if device != "meta" and self.family == "gemma-3":  # zeros otherwise: no image would matter
            weight = hf_model.model.multi_modal_projector.mm_input_projection_weight
            torch.nn.init.normal_(weight, std=0.02)
        return HookedVLM(hf_model.eval(), name=self.name)

    def patches(self, model: HookedVLM) -> int:
        """Returns the encoder's positions for one image."""
        if self.family == "qwen2-vl":
            return 4 * self.side**2
        vision: Any = model.hf_model.config.vision_config  # type: ignore[union-attr]
        return (vision.image_size // vision.patch_size) ** 2

    def inputs(
        self, model: HookedVLM, batch: int, seed: int, questions: int = 1
    ) -> dict[str, Tensor]:
        """Returns prompts about `batch` images with random texts and pixels, on the CPU.

        There are so many questions about each image, and the prompts come question by question.
        """
        config: Any = model.hf_model.config
        dice = torch.Generator().manual_seed(seed)
        vocab = min(config.text_config.vocab_size, config.image_token_id, 3000)
        ids = torch.randint(2, vocab, (batch, self.length), generator=dice)
        ids[:, self.first_image : self.image_end] = config.image_token_id
        is_image = (ids == config.image_token_id).int()
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        vision = config.vision_config
        if self.family == "qwen2-vl":
            ids[:, self.first_image - 1] = config.vision_start_token_id
            rows, numbers = 2 * self.side, 3 * 2 * vision.patch_size**2
            made["pixel_values"] = torch.randn(batch * rows**2, numbers, generator=dice)
            made["image_grid_thw"] = torch.tensor([[1, rows, rows]] * batch)
            made["mm_token_type_ids"] = is_image
        else:
            across = vision.image_size
            made["pixel_values"] = torch.randn(batch, 3, across, across, generator=dice)
            made["token_type_ids"] = is_image
        return asked(made, self.image_end, questions, seed)


SETTINGS = {
    "Qwen2-VL-7B": Setting("Qwen2-VL-7B", "qwen2-vl", 21, 12, 185, REAL["Qwen2-VL-7B"]),
    "Gemma-3-4b": Setting("Gemma-3-4b", "gemma-3", 10, 16, 300, REAL["Gemma-3-4b"]),
}


def tiny(name: str, layers: tuple[int, int] = (2, 2)) -> Setting:
    """Returns a setting of the same family with small shapes; `layers` as `built.build` has them.

    >>> tiny("Gemma-3-4b").length
    60
    """
    family, side = SETTINGS[name].family, 6
    made = FAMILIES[family]
    return Setting(f"tiny {name}", family, 5, side, 60, lambda: made(*layers, 64, 4000, 2 * side))

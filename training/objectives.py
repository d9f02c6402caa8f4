"""How an encoder is trained by itself: on captions, or on matching captions.

| objective | what is learned | as in |
|---|---|---|
| `captions` | a small language model writes the caption from the visual tokens | CapPa (2023) |
| `contrastive` | the mean patch and the mean word of a caption match, in a batch | CLIP (2021) |

Only the encoder's blocks are kept.  The projector and whatever else an objective needs are thrown
away; the models that use the encoder get fresh ones.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from training.batches import Encoder, normalised, packed_patches
from training.build import PATCH
from training.captions import MOST_THINGS, Crowd, crowd
from training.recipes import Objective


WIDTH = 128
TEXT_BLOCKS = 2
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Shown:
    """A batch of pictures with captions; `seed` is of what an objective draws."""

    scenes: list[Crowd]
    captions: list[str]
    seed: int

    @classmethod
    def drawn(cls, rng: random.Random, canvas: int, batch: int, most: int = MOST_THINGS) -> "Shown":
        """Returns a batch of new pictures of one to `most` things."""
        scenes = [crowd(rng, canvas, most) for _ in range(batch)]
        captions = [scene.caption(rng) for scene in scenes]
        return cls(scenes, captions, rng.randrange(1 << 30))

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _pixels(scenes: list[Crowd]) -> tuple[Float[Tensor, "patch pixel"], Int[Tensor, "image 3"]]:
    images = np.stack([scene.render() for scene in scenes])
    side = images.shape[1] // PATCH
    return packed_patches(normalised(images)), torch.tensor([[1, side, side]] * len(images))


def _ids(encoder: Encoder, captions: list[str]) -> tuple[Int[Tensor, "batch pos"], Tensor]:
    """Returns captions as ids with an end, padded on the right, and which of them are real."""
    t = encoder.tokenizer
    rows = [[*t.encode(text, add_special_tokens=False), t.eos_token_id] for text in captions]
    length = max(map(len, rows))
    ids = torch.tensor([row + [t.pad_token_id] * (length - len(row)) for row in rows])
    real = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    return ids, real


class Captions(nn.Module):
    """A whole model of few blocks writes the caption after the visual tokens."""

    def __init__(self, model: Any, encoder: Encoder) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder

    @property
    def visual(self) -> Any:
        return self.model.model.visual

    def loss(self, shown: Shown) -> Tensor:
        pixels, grid = _pixels(shown.scenes)
        tokens = self.visual(pixels, grid_thw=grid).pooler_output
        images = rearrange(tokens, "(b n) d -> b n d", b=len(shown.scenes))
        # The encoder has to say what is where: neither order nor position of the tokens does.
        images = images[:, torch.randperm(images.shape[1], generator=shown.generator)]
        ids, real = _ids(self.encoder, shown.captions)
        words = self.model.get_input_embeddings()(ids[:, :-1])
        places = torch.cat([torch.zeros(images.shape[1]).long(), torch.arange(words.shape[1]) + 1])
        hidden = self.model.model.language_model(
            inputs_embeds=torch.cat([images, words], 1),
            position_ids=places.expand(3, len(shown.scenes), -1),
            use_cache=False,
        ).last_hidden_state
        logits = self.model.lm_head(hidden[:, images.shape[1] - 1 :][real])
        return F.cross_entropy(logits, ids[real])


class Contrastive(nn.Module):
    """The mean of the patches and of a caption's words match each other within a batch."""

    def __init__(self, model: Any, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.visual = encoder, model.model.visual
        width = self.visual.config.hidden_size
        self.words = nn.Embedding(len(encoder.tokenizer), WIDTH)
        self.places = nn.Embedding(128, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.text = nn.TransformerEncoder(block, TEXT_BLOCKS, enable_nested_tensor=False)
        self.from_image, self.from_text = nn.Linear(width, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())

    def loss(self, shown: Shown) -> Tensor:
        pixels, grid = _pixels(shown.scenes)
        patches = self.visual(pixels, grid_thw=grid).last_hidden_state
        image = self.norm(rearrange(patches, "(b n) d -> b n d", b=len(shown.scenes))).mean(1)
        ids, real = _ids(self.encoder, shown.captions)
        words = self.words(ids) + self.places.weight[: ids.shape[1]]
        read = self.text(words, src_key_padding_mask=~real)
        text = (read * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        x = F.normalize(self.from_image(image), dim=-1)
        y = F.normalize(self.from_text(text), dim=-1)
        scores = x @ y.T * self.scale.exp().clamp(max=100)
        own = torch.arange(len(shown.scenes))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


TASKS: dict[Objective, type[Captions] | type[Contrastive]] = {
    "captions": Captions,
    "contrastive": Contrastive,
}

"""Models that are none of transformers': a stranger's names, and unusual blocks."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM


# --- a stranger: its own class names, its own attribute names, no transformers inside ------


class Mixer(nn.Module):
    """Causal or full attention under names of its own."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = heads, causal
        self.wo = nn.Linear(width, width)
        self.wv, self.wk, self.wq = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.wq(x), self.wk(x), self.wv(x))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.shrink, self.grow = nn.Linear(3 * width, width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.shrink(self.grow(x).relu())


class Pre(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); children declared in no useful order."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.ffn = Feed(width)
        self.second_norm, self.first_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixing_attention = Mixer(width, heads, causal)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing_attention(self.first_norm(x))
        return x + self.ffn(self.second_norm(x))


class Sandwich(Pre):
    """x + norm(attention(norm(x))), twice: the same children as `Pre`, and two more."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__(width, heads, causal)
        self.third_norm, self.fourth_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second_norm(self.mixing_attention(self.first_norm(x)))
        return x + self.fourth_norm(self.ffn(self.third_norm(x)))


class Tower(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.cutter = nn.Conv2d(3, 24, kernel_size=4, stride=4)
        self.steps = nn.ModuleList(block(24, 3, False) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.cutter(pixels).flatten(2).transpose(1, 2)
        for step in self.steps:
            x = step(x)
        return x


class Talker(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.end_norm = nn.LayerNorm(16)
        self.steps = nn.ModuleList(block(16, 2, True) for _ in range(3))

    def forward(self, vectors: Tensor) -> Tensor:
        for step in self.steps:
            vectors = step(vectors)
        return self.end_norm(vectors)


class Stranger(nn.Module):
    """Follows get_encoder / get_decoder, and calls its decoder with a positional argument."""

    def __init__(self, block: type[nn.Module] = Pre) -> None:
        super().__init__()
        self.eyes, self.mouth = Tower(block), Talker(block)
        self.bridge, self.speak = nn.Linear(24, 16), nn.Linear(16, 20)
        self.config = SimpleNamespace(image_token_id=19)

    def get_encoder(self, modality: str) -> nn.Module:
        assert modality == "image"
        return self.eyes

    def get_decoder(self) -> nn.Module:
        return self.mouth

    def get_input_embeddings(self) -> nn.Module:
        return self.mouth.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.bridge(self.eyes(pixels))

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> SimpleNamespace:
        vectors = self.mouth.words(input_ids)
        if pixel_values is not None:
            mask = (input_ids == 19)[..., None].expand_as(vectors)
            vectors = vectors.masked_scatter(mask, self.get_image_features(pixel_values))
        return SimpleNamespace(logits=self.speak(self.mouth(vectors)))


def stranger_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[3, *[19] * 4, 5, 6], [4, *[19] * 4, 8, 9]])
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}


# --- what is not a VLM ---------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return LlamaForCausalLM(config).eval()

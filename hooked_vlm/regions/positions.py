"""Places in a prompt: which positions of the language model's input an object means.

Anything with a method `positions(row)` can say where an intervention acts.  `row` is a
`PromptRow`, one prompt of a prepared batch; the answer is its positions in that row,
ascending, padding counted, so that it indexes an activation `[batch, pos, d_model]`.
Here are the places that are not cells of an image: the last token, explicit positions,
the tokens of a piece of text, all text; and the two that combine others, `AnyOf` and
`InImage`.  A `Region` of image cells (see `region`) answers the same call.

What a place means never depends on padding: `LastToken` is the last token of the prompt
whichever side the padding is on, and explicit positions count from the unpadded prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import RegionError


@runtime_checkable
class ImageCells(Protocol):
    """What a region needs to know of an image; `TokenGrid` is one."""

    @property
    def rows(self) -> int: ...

    @property
    def cols(self) -> int: ...

    @property
    def patch_rows(self) -> int: ...

    @property
    def patch_cols(self) -> int: ...

    @property
    def n_prefix(self) -> int: ...

    @property
    def patches(self) -> Tensor | None: ...

    @property
    def positions(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class PromptRow:
    """One prompt of a batch, as the language model sees it."""

    input_ids: Int[Tensor, " pos"]
    attention_mask: Int[Tensor, " pos"]
    """1 where there is a token, 0 where there is padding."""
    tokens: tuple[str, ...] | None = None
    """The text of each position (`token_pieces`); joined, they are the prompt."""
    grids: tuple[ImageCells, ...] = ()
    """The token grids of this prompt's images, in the order of the prompt."""

    @property
    def real(self) -> Int[Tensor, " real"]:
        """Positions that hold a token, ascending."""
        return self.attention_mask.nonzero().flatten()


@runtime_checkable
class TokenSelector(Protocol):
    """Anything that can say which positions of a prompt it means."""

    def positions(self, where: PromptRow, /) -> Tensor: ...


class _Joinable:
    """Gives a place the `|` operator."""

    def __or__(self, other: TokenSelector) -> "AnyOf":
        return union(self, other) if isinstance(other, TokenSelector) else NotImplemented


@dataclass(frozen=True)
class LastToken(_Joinable):
    """The last input position of each prompt, wherever its padding is.

    With a chat template and its generation prompt, this is the position that predicts the
    first token of the answer.
    """

    def positions(self, where: PromptRow) -> Int[Tensor, " 1"]:
        """Returns the position `[1]`."""
        return _real_of(where)[-1:]

    def __str__(self) -> str:
        return "last token"


@dataclass(frozen=True)
class Positions(_Joinable):
    """Explicit positions of the unpadded prompt; negative ones count from its end."""

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", tuple(int(i) for i in self.indices))
        if not self.indices:
            raise RegionError("Positions(()) names no position. Give at least one index.")

    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the positions, ascending; raises `RegionError` for one off the prompt."""
        real = _real_of(where)
        for index in self.indices:
            if not -len(real) <= index < len(real):
                raise RegionError(
                    f"Position {index} is not in a prompt of {len(real)} tokens (padding not "
                    f"counted). Use {-len(real)} to {len(real) - 1}."
                )
        return real[list(self.indices)].unique()

    def __str__(self) -> str:
        return f"positions {', '.join(map(str, self.indices))}"


@dataclass(frozen=True)
class Span(_Joinable):
    """The tokens that a piece of the prompt's text is made of.

    A token counts when any of its characters lies in the piece, so `Span("red")` is the one
    token " red" too.  A piece that occurs more than once must say which is meant:
    `occurrence=0` is the first, `-1` the last.
    """

    text: str
    occurrence: int | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise RegionError("Span('') is empty. Give the text whose tokens you mean.")

    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the tokens' positions, ascending.

        Raises `RegionError` when the prompt's text is not known, does not contain the piece,
        or contains it more than once while `occurrence` is not given.
        """
        if where.tokens is None:
            raise RegionError(
                f"{self!r} needs the text of each token, and this input has none. Prepare the "
                "input with a processor, or use Positions((…))."
            )
        real = _real_of(where)
        pieces = [where.tokens[i] for i in real.tolist()]
        start = self._start("".join(pieces))
        stop = start + len(self.text)
        hit, end = [], 0
        for piece in pieces:
            begin, end = end, end + len(piece)
            # An empty piece begins a character that a later token completes.
            hit.append(begin < stop and end > start if piece else start <= begin < stop)
        return real[torch.tensor(hit)]

    def _start(self, prompt: str) -> int:
        found = _occurrences(prompt, self.text)
        if not found:
            raise RegionError(
                f"The prompt does not contain {self.text!r}. Its text is {_shortened(prompt)!r}; "
                "spaces and capitals count."
            )
        if self.occurrence is None and len(found) > 1:
            raise RegionError(
                f"The prompt contains {self.text!r} {len(found)} times. Say which is meant: "
                f"Span({self.text!r}, occurrence=0) is the first, occurrence=-1 the last."
            )
        which = self.occurrence or 0
        if not -len(found) <= which < len(found):
            raise RegionError(
                f"The prompt contains {self.text!r} {len(found)} times, so there is no "
                f"occurrence {which}. Use {-len(found)} to {len(found) - 1}."
            )
        return found[which]

    def __str__(self) -> str:
        which = "" if self.occurrence is None else f" (occurrence {self.occurrence})"
        return f"text {self.text!r}{which}"


@dataclass(frozen=True)
class TextTokens(_Joinable):
    """Every token of the prompt that is not a visual token of an image."""

    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the positions, ascending."""
        text = where.attention_mask.bool().clone()
        for grid in where.grids:
            text[grid.positions.flatten().to(text.device)] = False
        if not text.any():
            raise RegionError("This prompt has no text token: all of it is image or padding.")
        return text.nonzero().flatten()

    def __str__(self) -> str:
        return "text"


@dataclass(frozen=True)
class InImage(_Joinable):
    """A region of one image of a prompt that has several; see `Region.of_image`."""

    region: Any
    image: int

    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the region's positions in the prompt's image number `image`."""
        n_images = len(where.grids)
        if not -n_images <= self.image < n_images:
            raise RegionError(
                f"{self} is not in a prompt of {n_images} images. Images are counted from 0."
            )
        return self.region.positions(where.grids[self.image])

    def __str__(self) -> str:
        return f"{self.region} of image {self.image}"


@dataclass(frozen=True)
class AnyOf(_Joinable):
    """Several places as one: all their positions, ascending, each once."""

    parts: tuple[TokenSelector, ...]

    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the positions of all parts, ascending, each once."""
        found = [part.positions(where) for part in self.parts]
        return torch.cat([f.to(found[0].device) for f in found]).unique()

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


def union(*places: Any) -> AnyOf:
    """Returns the union of places of any kind, with unions inside it laid flat."""
    if not places:
        raise RegionError("A union of no places names no position. Give at least one.")
    parts = []
    for place in places:
        parts.extend(place.parts if isinstance(place, AnyOf) else [place])
    return AnyOf(tuple(parts))


def token_pieces(tokenizer: Any, ids: Sequence[int] | Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Returns the text that each token adds to the decoded prompt.

    Joined, the pieces are the decoded text, special tokens included.  A character made of
    several tokens stands in the last of them, and the ones before it are empty.

    Each token is decoded behind the one before it, because tokenizers of the SentencePiece
    kind drop a leading space from whatever is decoded first.
    """
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    memory: dict[tuple[int, ...], str] = {}

    def decode(*window: int) -> str:
        if window not in memory:
            memory[window] = tokenizer.decode(
                list(window), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        return memory[window]

    pieces, begin = [], 0
    # ids[begin:i] is a stretch that decodes to whole characters; i extends it.
    for i in range(len(ids)):
        anchor = max(begin - 1, 0)
        before, after = decode(*ids[anchor:begin]), decode(*ids[anchor : i + 1])
        unfinished = after.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 - begin < 4
        if unfinished and i + 1 < len(ids):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        begin = i + 1
    return tuple(pieces)


def _real_of(row: PromptRow) -> Int[Tensor, " real"]:
    real = row.real
    if not len(real):
        raise RegionError("This prompt has no token: its attention mask is 0 everywhere.")
    return real


def _occurrences(text: str, piece: str) -> list[int]:
    found, at = [], text.find(piece)
    while at >= 0:
        found.append(at)
        at = text.find(piece, at + 1)
    return found


def _shortened(text: str, limit: int = 300) -> str:
    """Returns the end of a long text: image tokens stand first, what was asked last."""
    return text if len(text) <= limit else f"…{text[-limit:]}"

"""Places in a prompt: objects that select positions of the language model's input.

Any object with a method `positions(row)` selects where an intervention acts.  `row` is a
`PromptRow`, one prompt of a prepared batch.  The method returns positions in that row,
ascending and including padding, so they index an activation `[batch, pos, d_model]`.
This module has the places that are not cells of an image: the last token, explicit
positions, the tokens of a piece of text, all text, the answer, and the two that combine
others, `AnyOf` and `InImage`.  A `Region` of image cells (see `region`) has the same method.

A place does not depend on padding: `LastToken` is the prompt's last token with padding on
either side, and explicit positions count from the unpadded prompt.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_vlm.arguments.checked import checked, is_sequence, shown
from hooked_vlm.arguments.kinds import Kind
from hooked_vlm.errors import RegionError, counted


@runtime_checkable
class ImageCells(Protocol):
    """The attributes of an image that a region needs; `TokenGrid` implements them."""

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

    input_ids: Int[Tensor, " pos"] | None
    """None where the prompt was given as embeddings."""
    attention_mask: Int[Tensor, " pos"]
    """1 for a token, 0 for padding."""
    tokens: tuple[str, ...] | None = None
    """The text of each position (see `token_pieces`); joined, they are the prompt."""
    grids: tuple[ImageCells, ...] = ()
    """The token grids of this prompt's images, in the order of the prompt."""
    visual: Bool[Tensor, " pos"] | None = None
    """Which positions stand for a part of an image or video; None: only the grids tell."""
    n_answer: int = 0
    """Number of tokens at the prompt's end that were given as the beginning of its answer."""

    @property
    def real(self) -> Int[Tensor, " real"]:
        """Positions that hold a token, ascending."""
        return self.attention_mask.nonzero().flatten()


@runtime_checkable
class TokenSelector(Protocol):
    """Any object that selects positions of a prompt."""

    def positions(self, where: PromptRow, /) -> Tensor: ...


class _Joinable:
    """Gives a place the `|` operator."""

    def __or__(self, other: TokenSelector) -> "AnyOf":
        return union(self, other) if isinstance(other, TokenSelector) else NotImplemented


@dataclass(frozen=True)
class LastToken(_Joinable):
    """The last token of each prompt, with padding on either side.

    With a chat template and its generation prompt, this is the position that predicts the
    first token of the answer.

    >>> ids, mask = torch.tensor([5, 6, 7, 0]), torch.tensor([1, 1, 1, 0])
    >>> LastToken().positions(PromptRow(ids, mask))
    tensor([2])
    """

    @checked(RegionError)
    def positions(self, where: PromptRow) -> Int[Tensor, " 1"]:
        """Returns the position `[1]`."""
        return _real_of(where)[-1:]

    def __str__(self) -> str:
        return "last token"


@checked(RegionError, but=("indices",))
@dataclass(frozen=True)
class Positions(_Joinable):
    """Explicit positions of the unpadded prompt; negative ones count from its end."""

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            if not is_sequence(self.indices):
                raise TypeError
            whole = tuple(operator.index(i) for i in self.indices)
        except TypeError:
            raise RegionError(
                f"Positions({repr(self.indices)[:80]}) was given; expected a tuple of whole "
                "numbers, such as Positions((0, -1))."
            ) from None
        object.__setattr__(self, "indices", whole)
        if not self.indices:
            raise RegionError("Positions(()) names no position. Give at least one index.")

    @checked(RegionError)
    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the positions, ascending; raises `RegionError` for one outside the prompt."""
        real = _real_of(where)
        for index in self.indices:
            if not -len(real) <= index < len(real):
                raise RegionError(
                    f"Position {index} is not in a prompt of {counted(len(real), 'token')} "
                    f"(without padding). Use {-len(real)} to {len(real) - 1}."
                )
        return real[list(self.indices)].unique()

    def __str__(self) -> str:
        return f"positions {', '.join(map(str, self.indices))}"


@checked(RegionError, but=("text",))
@dataclass(frozen=True)
class Span(_Joinable):
    """The tokens that contain a piece of the prompt's text.

    A token belongs when any of its characters lies in the piece, so `Span("red")` also selects
    the single token " red".  For a piece that occurs more than once, `occurrence` is required:
    `occurrence=0` is the first, `-1` the last.

    >>> tokens = ("The", " red", " square", ".")
    >>> row = PromptRow(torch.arange(4), torch.ones(4, dtype=torch.long), tokens)
    >>> Span("red square").positions(row)
    tensor([1, 2])
    """

    text: str
    occurrence: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise RegionError(f"Span({repr(self.text)[:80]}) was given; expected a text.")
        if not self.text:
            raise RegionError("Span('') is empty. Give the text whose tokens to select.")

    @checked(RegionError)
    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the tokens' positions, ascending.

        Raises `RegionError` when the prompt's text is not known, does not contain the piece,
        or contains it more than once and `occurrence` is None.
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
            # An empty piece is the beginning of a character that a later token completes.
            hit.append(begin < stop and end > start if piece else start <= begin < stop)
        return real[torch.tensor(hit)]

    def _start(self, prompt: str) -> int:
        found = _occurrences(prompt, self.text)
        if not found:
            raise RegionError(
                f"The prompt does not contain {self.text!r}. Its text is {_shortened(prompt)!r}. "
                "Give a part of that text; spaces and capitals must match."
            )
        if self.occurrence is None and len(found) > 1:
            raise RegionError(
                f"The prompt contains {self.text!r} {len(found)} times. Give the occurrence: "
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
    """Every token of the prompt that is no placeholder of an image or a video."""

    @checked(RegionError)
    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the positions, ascending; raises `RegionError` where there is no text."""
        if where.input_ids is None:
            raise RegionError(
                "This prompt was given as embeddings, which do not tell text from images. Give "
                "input_ids, or use Positions((…))."
            )
        text = where.attention_mask.bool().clone()
        if where.visual is not None:
            text &= ~where.visual.to(text.device)
        for grid in where.grids:
            text[grid.positions.flatten().to(text.device)] = False
        if not text.any():
            raise RegionError(
                "This prompt has no text token: every position is a visual token or padding."
            )
        return text.nonzero().flatten()

    def __str__(self) -> str:
        return "text"


@dataclass(frozen=True)
class Answer(_Joinable):
    """The tokens of the answer that a prompt was given: `prepare(assistant=…)` or `append`.

    >>> row = PromptRow(torch.arange(4), torch.ones(4, dtype=torch.long), n_answer=2)
    >>> Answer().positions(row)
    tensor([2, 3])
    """

    @checked(RegionError)
    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the positions, ascending; raises `RegionError` for a prompt without an answer."""
        if not where.n_answer:
            raise RegionError(
                "This prompt was given no answer. Use prepare(…, assistant='…') or "
                "model.append(inputs, ids), or Positions((…)) for tokens of the prompt."
            )
        return _real_of(where)[-where.n_answer :]

    def __str__(self) -> str:
        return "answer"


@checked(RegionError)
@dataclass(frozen=True)
class InImage(_Joinable):
    """A region of one image of a prompt that has several; see `Region.of_image`."""

    region: Annotated[Any, Kind(lambda place: hasattr(place, "cells"), "a Region")]
    image: int

    @checked(RegionError)
    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the region's positions in the prompt's image number `image`."""
        n_images = len(where.grids)
        if not -n_images <= self.image < n_images:
            raise RegionError(
                f"{self} is not in a prompt of {counted(n_images, 'image')}. Images are counted "
                "from 0."
            )
        return self.region.positions(where.grids[self.image])

    def __str__(self) -> str:
        return f"{self.region} of image {self.image}"


@checked(RegionError)
@dataclass(frozen=True)
class AnyOf(_Joinable):
    """The union of several places: all their positions, ascending, each once."""

    parts: tuple[TokenSelector, ...]

    def __post_init__(self) -> None:
        if not len(self.parts):
            raise RegionError("A union of no places names no position. Give at least one place.")

    @checked(RegionError)
    def positions(self, where: PromptRow) -> Int[Tensor, " pos"]:
        """Returns the positions of all parts, ascending, each once."""
        found = [part.positions(where) for part in self.parts]
        return torch.cat([f.to(found[0].device) for f in found]).unique()

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


def union(*places: Any) -> AnyOf:
    """Returns the union of places of any kind; nested unions are flattened."""
    parts = []
    for place in places:
        if not isinstance(place, TokenSelector):
            raise RegionError(
                f"A union was given {shown(place)}; expected places, such as a Region, LastToken() "
                "or Span('text')."
            )
        parts.extend(place.parts if isinstance(place, AnyOf) else [place])
    return AnyOf(tuple(parts))


def token_mask(mask: Tensor, length: int) -> Int[Tensor, "batch pos"]:
    """Returns which of the last `length` positions hold a token, from any mask that models take.

    Inputs that continue a key-value cache have a mask of what is in it too.  A mask
    `[batch, head, query, key]`, boolean or additive, has the keys that the last query sees.
    """
    if mask.ndim == 4:
        seen = mask[:, :, -1].amax(1)
        mask = seen if mask.dtype == torch.bool else seen > torch.finfo(mask.dtype).min / 2
    return mask[:, mask.shape[1] - length :].long()


def token_pieces(tokenizer: Any, ids: Sequence[int] | Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Returns the text that each token adds to the decoded prompt.

    Joined, the pieces are the decoded text, special tokens included.  A character made of
    several tokens belongs to the last of them; the pieces of the earlier tokens are empty.

    Each token is decoded together with the token before it, because SentencePiece tokenizers
    drop a leading space from the first decoded token.
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
    # ids[begin:i] decodes to whole characters; token i extends it.
    for i in range(len(ids)):
        anchor = max(begin - 1, 0)
        before, after = decode(*ids[anchor:begin]), decode(*ids[anchor : i + 1])
        # A replacement character marks an incomplete one; UTF-8 needs at most four bytes.
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
    """Returns the end of a long text: image tokens come first, the question last."""
    return text if len(text) <= limit else f"…{text[-limit:]}"

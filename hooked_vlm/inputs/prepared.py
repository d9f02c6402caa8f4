"""`Inputs`: what `prepare` returns, the model's tensors by name and the grids of the images."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.anatomy.caches import is_cache
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.displayed import brief, html_block, html_folded, html_table
from hooked_vlm.arguments.kinds import device_and_dtype
from hooked_vlm.errors import (
    DataError,
    GridError,
    NoGridError,
    RegionError,
    UnknownNameError,
    counted,
    did_you_mean,
)
from hooked_vlm.hooks.located import needs_images, needs_text, place_of_each
from hooked_vlm.inputs.rows import rows_of
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.positions import PromptRow


_SHOWN = 4
"""Prompts, and images of each, that a notebook shows."""


class Inputs(Mapping[str, Any]):
    """Model inputs by name, and the grids of their images.

    Pass it to `forward`, `run_with_cache` and other methods, or to the wrapped model as
    `hf_model(**inputs)`.  Tensors are items and attributes: `inputs["input_ids"]`,
    `inputs.input_ids`.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> sorted(inputs)
    ['attention_mask', 'image_grid_thw', 'input_ids', 'mm_token_type_ids', 'pixel_values']
    >>> inputs.grid.shape
    (4, 6)
    """

    @checked(DataError)
    def __init__(
        self,
        tensors: Mapping[str, Any],
        grids: Sequence[Sequence[TokenGrid]],
        texts: Sequence[str] = (),
        tokenizer: Any = None,
        no_grid: str = "",
        placeholders: Sequence[int] = (),
        answers: Sequence[int] = (),
    ) -> None:
        self.tensors = dict(tensors)
        self.grids = tuple(tuple(row) for row in grids)
        """For each prompt, the grids of its images."""
        self.texts = tuple(texts)
        """The prompts passed to the processor, after the chat template."""
        self.tokenizer = tokenizer
        self.no_grid = no_grid
        """Why the images have no grid; empty when they have one."""
        self.placeholders = tuple(placeholders)
        """The ids of tokens that stand for images, videos and sounds."""
        self.answers = tuple(answers)
        """For each prompt, the number of tokens of its answer (see `append`); empty without one."""

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str) or name not in self.tensors:
            raise self._unknown(name)
        return self.tensors[name]

    def __getattr__(self, name: str) -> Any:
        # Not asked of an object that is being copied, and has no tensors yet.
        if name.startswith("_") or name not in (tensors := vars(self).get("tensors", {})):
            raise self._unknown(name)
        return tensors[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get("tensors", {}):
            raise UnknownNameError(
                f"inputs.{name} was assigned; inputs are not changed in place, and a model would "
                f"not read it. Give it {{**inputs, {name!r}: …}}."
            )
        super().__setattr__(name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        shapes = {n: tuple(v.shape) for n, v in self.items() if isinstance(v, Tensor)}
        return f"Inputs({shapes}, {counted(sum(map(len, self.grids)), 'image')})"

    def _repr_html_(self) -> str:
        rows = [(name, brief(value)) for name, value in self.items()]
        texts = [
            html_folded(f"prompt {number}", text) for number, text in enumerate(self.texts[:_SHOWN])
        ]
        drawn = [grid._repr_html_() for row in self.grids[:_SHOWN] for grid in row[:_SHOWN]]
        return html_block(repr(self), html_table(("name", "tensor"), rows), *texts, *drawn)

    @property
    def grid(self) -> TokenGrid:
        """The grid of the only image; raises `GridError` for no image and for several images."""
        if self.no_grid:
            raise NoGridError(self.no_grid)
        found = [grid for row in self.grids for grid in row]
        if len(found) != 1:
            raise GridError(
                f"These inputs hold {counted(len(found), 'image')} in "
                f"{counted(len(self.grids), 'prompt')}; inputs.grid needs exactly one. Use "
                "inputs.grids[prompt][image]."
            )
        return found[0]

    @checked(DataError, only_names=True)
    def to(
        self,
        *where: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Inputs":
        """Returns the inputs on a device, in a dtype, or both; only floats are cast.

        The arguments are a tensor's: `inputs.to("cuda")`, `inputs.to("cuda", torch.bfloat16)`.
        """
        device, dtype = device_and_dtype(where, device, dtype, DataError)

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        return self.but({n: moved(v) for n, v in self.items()})

    def and_given(self, given: Mapping[str, Any]) -> "Inputs":
        """Returns these inputs with the entries of a mapping added."""
        return self.but({**self.tensors, **given})

    def but(self, tensors: Mapping[str, Any], **changed: Any) -> "Inputs":
        """Returns inputs with these tensors and what else has changed; the rest is as here."""
        names = ("grids", "texts", "tokenizer", "no_grid", "placeholders", "answers")
        return Inputs(tensors, **{**{name: getattr(self, name) for name in names}, **changed})

    @checked(RegionError, but=("place",))
    def positions(self, place: Any) -> list[Int[Tensor, " pos"]]:
        """Returns where a place is in each prompt: indices of an activation `[batch, pos, …]`.

        `place` is a Region, `LastToken()`, `Span("text")`, `TextTokens()`, `Answer()`, a union of
        these, a list with one for each prompt, or None for every token.  Indices ascend (those of a
        region are in raster order) and count padding.

        Raises `RegionError` for a place that a prompt does not have, `NoGridError` for a region
        where the images have no grid, and `InterventionError` for what is no place.

        >>> from PIL import Image
        >>> from hooked_vlm import HookedVLM, LastToken
        >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
        >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
        >>> inputs.positions(LastToken())
        [tensor([41])]
        >>> inputs.positions(inputs.grid.box(0, 0, 32, 32))[0].shape
        torch.Size([4])
        """
        rows = self._rows(text=needs_text(place), images=needs_images(place))
        places = place_of_each(place, len(rows))
        return [
            row.real if own is None else own.positions(row)
            for own, row in zip(places, rows, strict=True)
        ]

    @checked(DataError)
    def to_str_tokens(self) -> list[list[str]]:
        """Returns the text of each position of each prompt, and of visual tokens their cell.

        `<img0 r3c4>` is the cell in row 3 and column 4 of the prompt's image 0, and `<thumb0 r0c1>`
        one of the thumbnail of an image that was cut into tiles.  `<pad>` is padding.

        Raises `DataError` for inputs without a tokenizer or without token ids.

        >>> from PIL import Image
        >>> from hooked_vlm import HookedVLM
        >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
        >>> inputs = model.prepare(Image.new("RGB", (32, 32)), "What is this?")
        >>> inputs.to_str_tokens()[0][4:10]
        ['<img0 r0c0>', '<img0 r0c1>', '<img0 r1c0>', '<img0 r1c1>', '<|vision_end|>', 'W']
        """
        rows = self._rows(text=True, images=not self.no_grid)
        if any(row.tokens is None for row in rows):
            raise DataError(
                "These inputs have no text: they were made without a tokenizer, or hold embeddings "
                "in place of token ids. Use prepare(images, texts)."
            )
        return [_labels(row) for row in rows]

    def _rows(self, *, text: bool, images: bool) -> list[PromptRow]:
        if images and self.no_grid:
            raise NoGridError(self.no_grid)
        return rows_of(self, self.grids if images else None, text, self.placeholders)

    def _unknown(self, name: object) -> UnknownNameError:
        held = vars(self).get("tensors", {})
        return UnknownNameError(
            f"These inputs hold no {str(name)[:80]!r}.{did_you_mean(name, held)} They hold "
            f"{', '.join(held)[:200]}."
        )


def _labels(row: PromptRow) -> list[str]:
    """Returns the text of each position of a prompt, or the cell that it shows."""
    labels = list(row.tokens or ())
    for position in (row.attention_mask == 0).nonzero().flatten().tolist():
        labels[position] = "<pad>"
    for number, grid in enumerate(row.grids):
        for kind, shown in (("img", grid), ("thumb", getattr(grid, "overview", None))):
            for r, line in enumerate(shown.positions.tolist() if shown is not None else ()):
                for c, position in enumerate(line):
                    labels[position] = f"<{kind}{number} r{r}c{c}>"
    return labels


def together(inputs: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns inputs with the tensors and caches that a call was given as keywords beside them.

    The model reads both, so an intervention on the inputs must see both.
    """
    more = {n: v for n, v in given.items() if isinstance(v, Tensor) or is_cache(v)}
    if not more:
        return inputs
    return inputs.and_given(more) if isinstance(inputs, Inputs) else {**inputs, **more}

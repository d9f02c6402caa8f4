"""Finds the images in prompts: from image tokens to one `TokenGrid` per image.

A processor expands each image's placeholder into one image token per visual token.  The ids
alone do not mark where one image ends and the next begins, or the length of a row.  An
`ImageLayout` for each image, in the encoder's order, has these numbers.  This module combines
ids and layouts and verifies every count, so that no position is assigned to a wrong image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from hooked_vlm.errors import GridError, counted
from hooked_vlm.regions.grid import TokenGrid


@dataclass(frozen=True)
class ImageLayout:
    """The sizes of one image, without its place in a prompt; sizes are (width, height)."""

    rows: int
    cols: int
    patch_rows: int
    patch_cols: int
    image_size: tuple[int, int]
    processed_size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float] = (0.0, 0.0)
    n_prefix: int = 0

    @property
    def n_tokens(self) -> int:
        return self.rows * self.cols


def token_grids(
    input_ids: Int[Tensor, "batch pos"],
    image_token_id: int,
    layouts: Sequence[ImageLayout],
    images_per_prompt: Sequence[int] | None = None,
) -> list[TokenGrid]:
    """Returns one `TokenGrid` per image, in the order of `layouts` (the encoder's).

    The image tokens of the prompts are assigned to the images in order, as many to each image
    as its layout has.  Without `images_per_prompt`, each prompt takes images until its image
    tokens are used up.

    Raises `GridError` when the counts do not agree, or when a row of an image's tokens is
    interrupted by other tokens.
    """
    grids: list[TokenGrid] = []
    if images_per_prompt is not None and len(images_per_prompt) != len(input_ids):
        raise GridError(
            f"images_per_prompt has {counted(len(images_per_prompt), 'entry', 'entries')} for "
            f"{counted(len(input_ids), 'prompt')}. Give one number per prompt."
        )
    for prompt, ids in enumerate(input_ids):
        found = (ids == image_token_id).nonzero().flatten()
        rest = list(layouts[len(grids) :])
        count = _count(rest, len(found)) if images_per_prompt is None else images_per_prompt[prompt]
        wanted = sum(layout.n_tokens for layout in rest[:count])
        # Verify the counts before any token is assigned.
        if wanted != len(found) or count > len(rest):
            sizes = ", ".join(f"{layout.rows}x{layout.cols}" for layout in rest[:count])
            raise GridError(
                f"Prompt {prompt} has {counted(len(found), 'image token')} (id {image_token_id}) "
                f"for {counted(min(count, len(rest)), 'image')} ({sizes or 'none left'}); expected "
                f"{wanted}. Give one placeholder per image in the text, and expand placeholders "
                "with the model's own processor."
            )
        for layout in rest[:count]:
            tokens, found = found[: layout.n_tokens], found[layout.n_tokens :]
            grids.append(_grid(tokens, layout, prompt, len(grids)))
    if len(grids) != len(layouts):
        raise GridError(
            f"Got {counted(len(layouts), 'image')} for prompts with image tokens for "
            f"{len(grids)}. Give one placeholder per image in the text."
        )
    return grids


def _count(layouts: Sequence[ImageLayout], n_tokens: int) -> int:
    """Returns the number of next images that together have `n_tokens` tokens."""
    count = used = 0
    while used < n_tokens and count < len(layouts):
        used += layouts[count].n_tokens
        count += 1
    return count


def _grid(tokens: Int[Tensor, " token"], layout: ImageLayout, prompt: int, image: int) -> TokenGrid:
    positions = tokens.reshape(layout.rows, layout.cols)
    broken = (positions.diff(dim=1) != 1).any(dim=1).nonzero().flatten()
    if len(broken):
        raise GridError(
            f"Image {image} of prompt {prompt} should be {layout.rows} rows of {layout.cols} "
            f"visual tokens, but row {int(broken[0])} is interrupted by other tokens: "
            f"positions {positions[broken[0]].tolist()}. Its grid is not {layout.rows}x"
            f"{layout.cols}; use prepare(images, texts), which measures it."
        )
    return TokenGrid(
        positions=positions,
        patch_rows=layout.patch_rows,
        patch_cols=layout.patch_cols,
        n_prefix=layout.n_prefix,
        image_size=layout.image_size,
        scale=layout.scale,
        offset=layout.offset,
        processed_size=layout.processed_size,
        prompt=prompt,
        image=image,
    )

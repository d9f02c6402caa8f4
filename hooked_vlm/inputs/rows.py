"""The prompts of some inputs as rows, in which places such as `LastToken` are located.

A row needs no image: the grids of images are asked for only where a place needs them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from hooked_vlm.anatomy.parts import first_of
from hooked_vlm.errors import GridError, InterventionError, NoGridError, counted
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.positions import PromptRow, token_mask, token_pieces


def rows_of(
    inputs: Mapping[str, Any],
    grids: Sequence[Sequence[TokenGrid]] | None,
    text: bool,
    placeholders: Sequence[int] = (),
) -> list[PromptRow]:
    """Returns each prompt of the inputs as a `PromptRow`, with its tokens' text if `text`.

    Without `grids` (None) the rows have no images.  Positions of the ids in `placeholders`
    (see `placeholder_ids`) are visual.  Inputs without a prompt have one row without tokens for
    each image.

    Raises `GridError` when there is no prompt and no grid, and when rows and grids differ in
    number.
    """
    part = "" if "input_ids" in inputs or "inputs_embeds" in inputs else "decoder_"
    ids, mask = inputs.get(f"{part}input_ids"), inputs.get(f"{part}attention_mask")
    shape = prompt_shape(inputs)
    if shape is None and grids is None:
        raise NoGridError(
            "These inputs have no input_ids and no inputs_embeds, so there is no prompt to find a "
            "position in. Give a prompt, or use sites of the vision encoder."
        )
    n_rows, length = shape or (len(grids or ()), 0)
    if grids is not None and len(grids) != n_rows:
        raise GridError(
            f"The processor made {counted(n_rows, 'row')} of {counted(len(grids), 'prompt')}, so "
            "images cannot be assigned to rows. Use hook functions instead of places: "
            "fwd_hooks=[(name, fn)]."
        )
    like = inputs.get(f"{part}inputs_embeds") if ids is None else ids
    if mask is None or like is None:
        device = None if like is None else like.device
        mask = torch.ones(n_rows, length, dtype=torch.long, device=device)
    visual = None if ids is None else _visual(inputs, ids, placeholders)
    # Places are found on the CPU: on a GPU each step of it would wait for the device.
    mask = token_mask(mask, length).expand(n_rows, -1)  # one row may serve all
    ids, mask, visual = (_on_host(x) for x in (ids, mask, visual))
    tokenizer = getattr(inputs, "tokenizer", None) if text else None
    answers = getattr(inputs, "answers", ()) or (0,) * n_rows
    return [
        PromptRow(
            ids[b] if ids is not None else None,
            mask[b],
            token_pieces(tokenizer, ids[b]) if tokenizer and ids is not None else None,
            tuple(grids[b]) if grids is not None else (),
            visual[b] if visual is not None else None,
            answers[b],
        )
        for b in range(n_rows)
    ]


def _on_host(x: Tensor | None) -> Any:
    return x if x is None or x.is_meta else x.cpu()


def prompt_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the number of prompts and their length; None for inputs without a prompt."""
    for part in ("", "decoder_"):
        for name in (f"{part}input_ids", f"{part}inputs_embeds"):
            if (given := inputs.get(name)) is not None:
                return given.shape[0], given.shape[1]
    return None


def require_prompt_of_blocks(hf_model: nn.Module, site: str, inputs: Mapping[str, Any]) -> None:
    """Raises `InterventionError` where an encoder reads the prompt and the blocks another one.

    The two may have one length, so a comparison of shapes does not find it.
    """
    read = next((n for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None), None)
    decoders = (f"decoder_{name}" for name in ("input_ids", "inputs_embeds"))
    given = next((n for n in decoders if inputs.get(n) is not None), None)
    config = getattr(hf_model, "config", None)
    if read and (given or getattr(config, "is_encoder_decoder", False)):
        length = counted(inputs[read].shape[1], "position")
        other = given or "decoder_input_ids"
        of = f"the {inputs[given].shape[1]} of {given}" if given else f"those of {other}"
        raise InterventionError(
            f"Places are found in {read} ({length}), which the model's encoder reads; {site} "
            f"runs on {of}. Use a hook function there: fwd_hooks=[({site!r}, fn)]; its "
            f"activation has the positions of {other}."
        )


def placeholder_ids(hf_model: nn.Module) -> tuple[int, ...]:
    """Returns the ids of tokens that stand for images, videos and sounds, by the config."""
    config = getattr(hf_model, "config", None)
    found = (
        first_of(config, f"{kind}_token_id", f"{kind}_token_index")
        for kind in ("image", "video", "audio")
    )
    return tuple(token for token in found if isinstance(token, int))


def known_grids(model: Any, inputs: Mapping[str, Any]) -> list[TokenGrid]:
    """Returns the grids of all images for their sizes alone; none where they are not known.

    The rule is not compared with a measurement, so nothing runs.
    """
    return [grid for row in known_rows(model, inputs) for grid in row]


def known_rows(model: Any, inputs: Mapping[str, Any]) -> list[Sequence[TokenGrid]]:
    """Returns the grids of `known_grids` by prompt."""
    bare = hasattr(model, "grid_finder") and not hasattr(inputs, "no_grid")  # no `Inputs`
    try:
        return list(model.grid_finder.by_rule(inputs) if bare else model.grids(inputs))
    except GridError:
        return []


def _visual(
    inputs: Mapping[str, Any], ids: Tensor, placeholders: Sequence[int]
) -> Bool[Tensor, "batch pos"]:
    """Returns a mask of the positions that hold no text: placeholders, and those that are marked.

    Some processors mark the positions of images in a mask of the ids' shape instead.
    """
    visual = torch.isin(ids, torch.tensor(placeholders, dtype=ids.dtype, device=ids.device))
    for name, value in inputs.items():
        marks = "image" in name and "mask" in name and getattr(value, "shape", None) == ids.shape
        visual = visual | value.bool() if marks else visual
    return visual

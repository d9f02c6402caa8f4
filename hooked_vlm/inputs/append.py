"""Tokens appended to prepared inputs: the beginning of an answer, for teacher forcing.

What a model's forward takes beside the ids (masks, kinds of tokens, cross-attention to images)
grows with them.  The model's own code for generation says how: it extends its arguments token by
token, and the appended inputs are what it would run after these tokens without a cache.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.anatomy.caches import caches_among
from hooked_vlm.arguments.checked import shown
from hooked_vlm.errors import DataError, UnsupportedModelError, counted
from hooked_vlm.inputs.pixel_routing import Wrapped
from hooked_vlm.inputs.prepare import padded_positions, say_padded
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.regions.grid import TokenGrid


_IDS, _MASK, _POSITIONS = "input_ids", "attention_mask", "position_ids"


def append(model: Wrapped, inputs: Mapping[str, Any], tokens: Any) -> Inputs:
    """Returns inputs with tokens appended to each prompt; see `HookedVLM.append`."""
    _require_appendable(model, inputs)
    assert isinstance(inputs, Inputs)
    ids = inputs[_IDS]
    new = new_ids(inputs.tokenizer, _without_padding(model, inputs, tokens), len(ids))
    if any(token in inputs.placeholders or token < 0 for row in new for token in row):
        raise DataError(
            f"append was given {shown(tokens)}, which holds a token that stands for an image (or "
            "a negative one). Images are given to prepare."
        )
    longest = max(map(len, new))
    filled = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in new]).to(ids)
    # 1. All prompts with as many tokens as the longest answer has.
    made = dict(inputs)
    made[_MASK] = made.get(_MASK, torch.ones_like(ids))
    if _is_counted(made.get(_POSITIONS), made[_MASK]):
        del made[_POSITIONS]  # made again below, for the new padding
    longer = _extended(model, made, filled, inputs.placeholders)
    # 2. The columns that each prompt keeps, with its padding on the left.
    mask = made[_MASK]
    start = ids.shape[1]
    kept = [
        torch.cat([mask[b].nonzero().flatten().cpu(), torch.arange(start, start + len(row))])
        for b, row in enumerate(new)
    ]
    in_step = len({len(row) for row in new}) == 1 and bool(mask[:, -1].all())
    if not in_step:
        longer = {
            name: _repadded(model, inputs, name, value, kept, mask)
            if name in longer.keys() & _growing(made, longer)
            else value
            for name, value in longer.items()
        }
    longer |= padded_positions(model, longer) if _POSITIONS not in longer else {}
    say_padded(model, longer)
    # 3. Grids, where the padding has changed, and what the inputs know of their text.
    grids = inputs.grids if in_step else _moved(inputs.grids, kept)
    before = inputs.answers or (0,) * len(new)
    texts = [
        f"{text}{inputs.tokenizer.decode(row)}" if inputs.tokenizer is not None else text
        for text, row in zip(inputs.texts, new, strict=False)
    ]
    answers = [n + len(row) for n, row in zip(before, new, strict=True)]
    return inputs.but(longer, grids=grids, texts=texts, answers=answers)


def new_ids(tokenizer: Any, tokens: Any, n_prompts: int) -> list[list[int]]:
    """Returns the ids to append to each prompt, from a text, a list of texts, or ids.

    One text, or one row of ids, is for every prompt.  Raises `DataError` for anything else, for
    another number of rows than prompts, and for a row without a token.
    """
    texts = [tokens] if isinstance(tokens, str) else tokens
    if isinstance(texts, list | tuple) and texts and all(isinstance(t, str) for t in texts):
        if tokenizer is None:
            raise DataError(
                "A text was given to append, and these inputs have no tokenizer. Give token ids."
            )
        rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    else:
        rows = _rows_of_ids(tokens)
    rows = rows * n_prompts if len(rows) == 1 else rows
    if len(rows) != n_prompts:
        raise DataError(
            f"append was given {counted(len(rows), 'row')} of tokens for "
            f"{counted(n_prompts, 'prompt')}. Give one for each prompt, or one for all of them."
        )
    if empty := [b for b, row in enumerate(rows) if not len(row)]:
        raise DataError(
            f"There is no token to append to prompt {empty[0]}: {shown(tokens)} was given. Give at "
            "least one token for each prompt."
        )
    return rows


def _rows_of_ids(tokens: Any) -> list[list[int]]:
    given = tokens
    try:
        if isinstance(tokens, Tensor | np.ndarray):
            tokens = tokens.tolist()
        if not isinstance(tokens, list | tuple):
            raise TypeError
        rows = [[t] if isinstance(t, int) else list(t) for t in tokens]
        if all(isinstance(t, int) for t in tokens):
            rows = [[t for row in rows for t in row]]
        if rows and all(isinstance(t, int) and type(t) is not bool for row in rows for t in row):
            return rows
    except TypeError:
        pass
    raise DataError(
        f"append was given {shown(given)}; expected a text, a list with a text for each prompt, or "
        "token ids: a list of lists, or a tensor [batch, pos]."
    )


def _without_padding(model: Wrapped, inputs: Inputs, tokens: Any) -> Any:
    """Returns the rows of a tensor of ids without the padding that a generation ends them with.

    A row of a batch that ends before the others is filled with a padding token, which is an end
    token itself in many models; so of end tokens at the end of a row, the first is kept.  Lists
    have no padding, and are returned as they are.
    """
    if not isinstance(tokens, Tensor | np.ndarray) or tokens.ndim not in (1, 2):
        return tokens
    pads, ends = _filling_ids(model, inputs)
    given = tokens.tolist()
    rows = given if tokens.ndim == 2 else [given]
    cut = [_cut(row, pads, ends) for row in rows]
    if len(rows) == 1 and not cut[0]:
        return rows  # one row needs no padding: this token was chosen
    if empty := [b for b, row in enumerate(cut) if not row and rows[b]]:
        raise DataError(
            f"There is no token to append to prompt {empty[0]}: its row {shown(rows[empty[0]])} is "
            "padding alone. Give a list of ids for each prompt, which is appended as it is."
        )
    return cut


def _cut(row: list[int], pads: set[int], ends: set[int]) -> list[int]:
    stop = len(row)
    while stop and row[stop - 1] in pads - ends:
        stop -= 1
    while stop > 1 and row[stop - 1] in ends and row[stop - 2] in ends:
        stop -= 1
    return row[:stop]


def _filling_ids(model: Wrapped, inputs: Inputs) -> tuple[set[int], set[int]]:
    """Returns the ids that fill the rows of a generation, and those that end them."""
    owners = inputs.tokenizer, getattr(model.hf_model, "generation_config", None)
    found: list[set[int]] = []
    for name in ("pad_token_id", "eos_token_id"):
        ids: set[int] = set()
        for owner in owners:
            told = getattr(owner, name, None)
            ids.update(i for i in (told if isinstance(told, list) else [told]) if i is not None)
        found.append(ids)
    return found[0], found[1]


def _require_appendable(model: Wrapped, inputs: Mapping[str, Any]) -> None:
    if not isinstance(inputs, Inputs):
        raise DataError(
            f"append was given inputs of type {type(inputs).__name__}; expected what prepare "
            "returns, which knows where images and padding are."
        )
    config = getattr(model.hf_model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model.hf_model).__name__} has an encoder that reads the prompt, and answers in "
            "another sequence. Give that as decoder_input_ids: {**inputs, 'decoder_input_ids': …}."
        )
    if not isinstance(inputs.get(_IDS), Tensor):
        raise DataError("These inputs hold no input_ids, so no token can be appended to them.")
    mask = inputs.get(_MASK)
    if caches_among((), inputs) or (mask is not None and mask.shape != inputs[_IDS].shape):
        raise DataError(
            "These inputs continue a key-value cache, or have a mask of another shape than "
            "input_ids. Append to the inputs of the whole prompt."
        )


class _Nothing(OrderedDict[str, Any]):
    """An output of a model that holds nothing, whatever attribute is asked for."""

    def __getattr__(self, name: str) -> "_Nothing | None":
        if name.startswith("_"):
            raise AttributeError(name)
        # Outputs of a part are asked for attributes themselves (Idefics, transformers 5.24).
        return _Nothing() if name.endswith("_outputs") else None


def _extended(
    model: Wrapped,
    made: Mapping[str, Any],
    new: Int[Tensor, "batch new"],
    placeholders: Sequence[int],
) -> dict[str, Any]:
    """Returns a model's arguments after new tokens, extended by the model's own code."""
    ids, others = made[_IDS], {n: v for n, v in made.items() if n != _IDS}
    is_image = torch.isin(ids, torch.tensor(placeholders, dtype=ids.dtype).to(ids))
    update: Any = getattr(model.hf_model, "_update_model_kwargs_for_generation", None)
    if update is None:
        raise UnsupportedModelError(
            f"{type(model.hf_model).__name__} does not generate, so it has no rule for what its "
            "masks are at new tokens. Give the whole text to prepare."
        )
    longer = {**others, "use_cache": False}
    for _ in range(new.shape[1]):
        longer = update(_Nothing(), longer, is_encoder_decoder=False)
    longer = {name: longer[name] for name in others}
    longer |= _of_positions(ids, new, longer, is_image)
    # By default the kind of the last token is repeated, whatever it is.
    kinds = longer.get("token_type_ids")
    if isinstance(kinds, Tensor) and kinds.shape[1] == ids.shape[1] + new.shape[1]:
        added = kinds[:, ids.shape[1] :]
        repeats = is_image[:, -1:] & (added == kinds[:, ids.shape[1] - 1, None])
        added[repeats] = 0
    return {_IDS: torch.cat([ids, new], 1), **longer}


def _of_positions(
    ids: Tensor, new: Tensor, longer: Mapping[str, Any], is_image: Tensor
) -> dict[str, Tensor]:
    """Returns what has an entry for each position and no part in generation, extended.

    New tokens get what all tokens of text have.
    """
    found = {}
    text = ~is_image & longer[_MASK][:, : ids.shape[1]].bool()
    for name, value in longer.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            continue
        if name == "labels":
            found[name] = torch.cat([value, new.to(value)], 1)
        elif not value.is_floating_point():  # such as a mask of positions that are images
            of_text = value[text].unique()
            if len(of_text) == 1:
                more = torch.full_like(new, int(of_text), dtype=value.dtype)
                found[name] = torch.cat([value, more], 1)
                continue
            raise UnsupportedModelError(
                f"{name} has an entry for each position, and the model's code for generation does "
                "not say what it is at new tokens. Give the whole text to prepare."
            )
    return found


def _growing(made: Mapping[str, Any], longer: Mapping[str, Any]) -> set[str]:
    """Returns the names of the arguments that have a place for each position."""
    grown = longer[_IDS].shape[1] - made[_IDS].shape[1]
    return {
        name
        for name, value in longer.items()
        if isinstance(value, Tensor)
        and value.ndim > 1
        and isinstance(made[name], Tensor)
        and value.shape[1] == made[name].shape[1] + grown
    }


def _repadded(
    model: Wrapped,
    inputs: Inputs,
    name: str,
    value: Tensor,
    kept: Sequence[Tensor],
    mask: Tensor,
) -> Tensor:
    """Returns an argument with the columns that each prompt keeps, and its padding on the left."""
    length = max(map(len, kept))
    made = value.new_zeros(len(kept), length, *value.shape[2:])
    hidden = (mask == 0).nonzero()
    if len(hidden):  # what this processor writes at padding
        made[:] = value[hidden[0][0], hidden[0][1]]
    elif name == _IDS:
        made[:] = _padding_id(model, inputs)
    for b, columns in enumerate(kept):
        made[b, length - len(columns) :] = value[b, columns.to(value.device)]
    return made


def _padding_id(model: Wrapped, inputs: Inputs) -> int:
    config = getattr(model.hf_model, "config", None)
    text = config.get_text_config() if config is not None else None
    found = getattr(inputs.tokenizer, "pad_token_id", None)
    found = getattr(text, "pad_token_id", None) if found is None else found
    return found if isinstance(found, int) and found >= 0 else 0


def _is_counted(positions: Any, mask: Tensor) -> bool:
    """Whether position ids are those that `prepare` makes where padding needs them."""
    if not isinstance(positions, Tensor) or positions.shape != mask.shape:
        return False
    return torch.equal(positions, (mask.long().cumsum(-1) - 1).clamp(min=0))


def _moved(grids: Sequence[Sequence[TokenGrid]], kept: Sequence[Tensor]) -> list[list[TokenGrid]]:
    """Returns the grids of prompts of which some columns are kept, at the right end."""
    length = max(map(len, kept))

    def moved(grid: TokenGrid, columns: Tensor) -> TokenGrid:
        place = torch.searchsorted(columns, grid.positions) + length - len(columns)
        overview = moved(grid.overview, columns) if grid.overview is not None else None
        return replace(grid, positions=place, overview=overview)

    return [[moved(g, columns) for g in row] for row, columns in zip(grids, kept, strict=False)]

"""Text and tokens of a wrapped model, by TransformerLens's names, and tokens after a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.errors import DataError, counted
from hooked_vlm.inputs.append import append
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.regions.positions import token_pieces


class HasTokens:
    """Gives a wrapped model with a tokenizer the conversions between text and tokens.

    Prompts with images are made by `prepare`; these are for text alone, such as answers.
    """

    tokenizer: Any
    device: torch.device

    @checked(DataError, but=("inputs",))
    def append(self, inputs: Mapping[str, Any], ids: Any) -> Inputs:
        """Returns prepared inputs with tokens appended to each prompt, as if they were generated.

        `ids` are token ids (a tensor `[batch, new]` or lists, of any lengths) or texts; one row or
        text is for every prompt.  Texts are tokenised on their own, without special tokens.  Masks,
        kinds of tokens, positions and padding are those of a generation, so the logits of the new
        positions equal those of its steps.  `Answer()` is the place of these tokens.

        A tensor is cut as generations pad it: padding tokens at the end of a row are no answer,
        and of several end tokens there the first is kept (so where the padding token is an end
        token, one of them).  Lists are appended as they are.

        Raises `DataError` for inputs that `prepare` did not make, for no token, a token of an
        image, and another number of rows than prompts; `UnsupportedModelError` for a model whose
        encoder reads the prompt.

        >>> from PIL import Image
        >>> from hooked_vlm import Answer, HookedVLM
        >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
        >>> inputs = model.prepare(Image.new("RGB", (32, 32)), "What is this?")
        >>> longer = model.append(inputs, "red")
        >>> longer.to_str_tokens()[0][-1], longer.positions(Answer())
        ('red', [tensor([22])])
        """
        return append(self, inputs, ids)  # type: ignore[arg-type]

    @checked(DataError)
    def to_tokens(
        self, text: str | Sequence[str], prepend_bos: bool | None = None
    ) -> Int[Tensor, "batch pos"]:
        """Returns the ids of a text or a list of texts, padded on the left.

        `prepend_bos` adds the first token that the tokenizer knows as such, or leaves it out; by
        default the tokenizer decides.  For prompts with images use `prepare`.

        Raises `DataError` for no text, for texts of different lengths without a token to pad them,
        and for `prepend_bos=True` where the tokenizer has no such token.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise DataError("to_tokens was given no text. Give at least one.")
        rows = [self._ids(each, prepend_bos) for each in texts]
        longest = max(map(len, rows))
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is None and any(len(row) < longest for row in rows):
            raise DataError(
                "The texts have different lengths, and the tokenizer has no token to pad them. "
                "Give them one by one."
            )
        padded = [[pad] * (longest - len(row)) + row for row in rows]
        return torch.tensor(padded, dtype=torch.long, device=self.device).reshape(len(rows), -1)

    @checked(DataError)
    def to_string(self, tokens: Any) -> str | list[str]:
        """Returns the text of ids: of one row a text, of a batch a list of texts."""
        given = _as_ids(tokens)
        if given.ndim == 2:
            return [str(self.to_string(row)) for row in given]
        return self.tokenizer.decode(given.flatten().tolist(), clean_up_tokenization_spaces=False)

    @checked(DataError)
    def to_str_tokens(
        self, given: Any, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """Returns the text of each token of a text, ids, or prepared inputs.

        A batch gives a list for each prompt.  Of prepared inputs, visual tokens are shown as their
        cell (see `Inputs.to_str_tokens`).
        """
        if isinstance(given, Inputs):
            rows = given.to_str_tokens()
            return rows[0] if len(rows) == 1 else rows
        if isinstance(given, Mapping):
            raise DataError(
                "to_str_tokens was given a mapping that prepare did not make. Give its input_ids."
            )
        if isinstance(given, str):
            return list(token_pieces(self.tokenizer, self._ids(given, prepend_bos)))
        if isinstance(given, list | tuple) and given and isinstance(given[0], str):
            return [list(token_pieces(self.tokenizer, self._ids(g, prepend_bos))) for g in given]
        ids = _as_ids(given)
        if ids.ndim == 2 and len(ids) > 1:
            return [list(token_pieces(self.tokenizer, row)) for row in ids]
        return list(token_pieces(self.tokenizer, ids.flatten()))

    @checked(DataError)
    def to_single_token(self, string: str) -> int:
        """Returns the id of a text that is one token; raises `DataError` for any other."""
        ids = self._ids(string, False)
        if len(ids) != 1:
            pieces = self.tokenizer.convert_ids_to_tokens(ids[:8])
            raise DataError(
                f"{shown(string)} is {counted(len(ids), 'token')} of this model, not one: "
                f"{shown(pieces)}. Spaces count (' red' is a word inside a text); where that does "
                "not help, choose a word that is one token."
            )
        return ids[0]

    @checked(DataError)
    def to_single_str_token(self, token: int) -> str:
        """Returns the text of one token."""
        return str(self.to_string([token]))

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=prepend_bos is None)["input_ids"])
        bos: Any = getattr(self.tokenizer, "bos_token_id", None)
        if prepend_bos and bos is None:
            raise DataError(
                "prepend_bos=True was given, and this tokenizer has no token that begins a text. "
                "Leave it out."
            )
        return [bos, *ids] if prepend_bos else ids


def _as_ids(tokens: Any) -> Tensor:
    try:
        ids = torch.as_tensor(tokens)
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if whole and ids.ndim <= 2 and not bool((ids < 0).any()):
            return ids
    except (TypeError, ValueError, RuntimeError):
        pass
    raise DataError(
        f"{shown(tokens)} was given; expected token ids: a whole number, a list, or a tensor [pos] "
        "or [batch, pos]."
    )

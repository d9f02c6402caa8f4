"""What a run returns in place of logits: the loss of the next token, both, or nothing."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vlm.arguments.kinds import Kind
from hooked_vlm.errors import HookError
from hooked_vlm.inputs.rows import placeholder_ids, rows_of


_KINDS = ("logits", "loss", "both")
ReturnType: TypeAlias = Annotated[
    str | None,
    Kind(lambda kind: kind is None or kind in _KINDS, "logits, loss, both or None", _KINDS),
]
"""What a run returns: TransformerLens's names."""


def returned(
    hf_model: nn.Module,
    logits: Tensor,
    inputs: Mapping[str, Any],
    return_type: str | None,
    loss_per_token: bool,
) -> Any:
    """Returns the loss, `(logits, loss)`, or None."""
    if return_type is None:
        return None
    loss = next_token_loss(hf_model, logits, inputs)
    loss = loss if loss_per_token else loss.nanmean()
    return loss if return_type == "loss" else (logits, loss)


def next_token_loss(
    hf_model: nn.Module, logits: Float[Tensor, "batch pos d_vocab"], inputs: Mapping[str, Any]
) -> Float[Tensor, "batch next"]:
    """Returns the cross-entropy of each next token; NaN where the next one is an image or padding.

    Entry `[b, i]` of the `pos - 1` is about token i + 1 of prompt b, given those before it.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != logits.shape[:2]:
        raise HookError(
            f"A loss needs the logits of every token of input_ids; these are of shape "
            f"{tuple(logits.shape[:2])}. Leave out logits_to_keep, and give token ids. Where an "
            "encoder reads them, compute the loss from the logits and decoder_input_ids."
        )
    counts = _counted(hf_model, inputs).to(logits.device)
    if not bool(counts.any()):
        raise HookError("No token of these prompts is text that follows another, so no loss.")
    targets = ids[:, 1:].to(logits.device).where(counts, -100)
    flat = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=-100
    )
    return flat.masked_fill(~counts, torch.nan)


def _counted(hf_model: nn.Module, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch next"]:
    """Returns which next tokens count: text after a token of the same prompt."""
    rows = rows_of(inputs, None, False, placeholder_ids(hf_model))
    real = torch.stack([row.attention_mask.bool() for row in rows])
    visual = torch.stack([row.visual for row in rows if row.visual is not None])
    return real[:, 1:] & real[:, :-1] & ~visual[:, 1:]

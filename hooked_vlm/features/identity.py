"""A digest of a model's weights, to notice that stored features are another model's."""

import hashlib

import torch
from torch import nn


SAMPLED = 1024
"""Values of each parameter that are read: a model of billions takes a second."""


def model_digest(hf_model: nn.Module) -> str:
    """Returns a digest of the names, shapes, dtypes and some values of all parameters.

    Values are a sample at equal distances, so a change of single weights may go unnoticed; another
    checkpoint, or training, does not.
    """
    made = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(hf_model.named_parameters()):
        made.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
        made.update(sample.view(torch.uint8).numpy().tobytes())
    return made.hexdigest()

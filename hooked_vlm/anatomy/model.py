"""Detects the parts of a vision-language model from its module tree.

`read_anatomy` walks any transformers image-text-to-text model (or a module with the same
`get_encoder(modality="image")` / `get_decoder()` interface) and returns a frozen description
made of module paths and sizes.  Detection does not use the name of the model family (see
`parts` and `blocks`).  The description holds no weights and no modules, so it can be made
for a model on the `meta` device.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from hooked_vlm.anatomy.parts import block_lists, first_of, has_weights
from hooked_vlm.anatomy.projector import base_of, find_projector, takes_maps
from hooked_vlm.anatomy.source import POSITIONAL, keywords_of
from hooked_vlm.anatomy.vision import Stack, Vision, _patch_embed, read_stack, read_vision
from hooked_vlm.anatomy.wrappers import through_wrappers
from hooked_vlm.errors import UnsupportedModelError


@dataclass(frozen=True)
class Anatomy:
    """The module paths of all parts, relative to the wrapped model."""

    lm: Stack
    embed: str
    unembed: str
    merges: bool
    """Whether the decoder takes embeddings into which the image was merged."""
    vision: Vision | None
    projector: str | None
    image_token_id: int | None


@through_wrappers
def read_anatomy(model: nn.Module) -> Anatomy:
    """Returns the anatomy of a transformers model, detected from its module tree.

    Raises `UnsupportedModelError` when there is no decoder with attention blocks, no
    embedding or no vocabulary projection.  For a model without a vision encoder the result
    has `vision=None`, and only code that needs images raises.
    """
    # 1. The decoder, its embedding and its vocabulary projection, by transformers' getters.
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = _ask(model, "get_decoder") or model
    if getattr(getattr(decoder, "config", None), "is_encoder_decoder", False):
        inner = _ask(decoder, "get_decoder")  # a text encoder-decoder: use its decoder only
        decoder = inner if inner is not None and any(block_lists(inner)) else decoder
    embed = _ask(decoder, "get_input_embeddings") or _ask(model, "get_input_embeddings")
    unembed = _ask(model, "get_output_embeddings") or _ask(decoder, "get_output_embeddings")
    if embed is None or unembed is None:
        missing = "get_input_embeddings()" if embed is None else "get_output_embeddings()"
        raise UnsupportedModelError(
            f"{type(model).__name__}.{missing} returned nothing; HookedVLM needs a model with a "
            "language-modelling head. Load it with AutoModelForImageTextToText."
        )
    # 2. The image encoder, the decoder's blocks, and the projector between them.
    encoder = image_encoder(model, decoder)
    config = getattr(model, "config", None)
    lm = read_stack(decoder, paths, without=encoder)
    if not lm.blocks:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has no list of blocks with attention in it, so there is no "
            "residual stream to hook. Give a model whose decoder is a transformer."
        )
    projector, vision = None, None
    if encoder is not None:
        projector = find_projector(model, encoder, decoder, paths)
        maps = projector is not None and takes_maps(model.get_submodule(projector))
        vision = replace(read_vision(encoder, paths, config, model), feature_maps=maps)
    return Anatomy(
        lm=lm,
        embed=paths[id(embed)],
        unembed=paths[id(unembed)],
        merges=encoder is not None and _is_given_embeddings(model, encoder, decoder),
        vision=vision,
        projector=projector,
        image_token_id=first_of(config, "image_token_id", "image_token_index"),
    )


def image_encoder(model: nn.Module, decoder: nn.Module | None = None) -> nn.Module | None:
    """Returns a model's image encoder, or None where the model has none.

    Where transformers knows no image encoder, `get_encoder` returns the model itself or its
    base.  The encoder is then `get_encoder()` of a model whose main input is pixels, or a child
    whose name begins with `image_` or `vision_`.
    """
    # The encoder by transformers' getter; a shared one from outside the model does not count.
    named = _ask(model, "get_encoder", modality="image")
    others = (model, decoder, base_of(model))
    if named is not None and not any(named is other for other in others):
        return named if any(named is module for module in model.modules()) else None
    # Otherwise the first candidate that has weights and cuts the image into patches.
    asked = []
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        asked.append(_ask(model, "get_encoder"))
    children = base_of(model).named_children()
    asked += [child for name, child in children if re.match("(image|vision)_", name)]
    return next(
        (
            found
            for found in asked
            if found is not None
            and not any(found is other for other in others)
            and has_weights(found)
            and _patch_embed(found) is not None
        ),
        None,
    )


def _is_given_embeddings(model: nn.Module, encoder: nn.Module, decoder: nn.Module) -> bool:
    """Whether the decoder is called with embeddings instead of token ids."""
    if any(encoder is module for module in decoder.modules()):
        return False
    owners = [m for m in model.modules() if any(decoder is inner for inner in m.modules())]
    for owner in reversed([m for m in owners if m is not decoder]):
        name = next((n for n, child in owner.named_modules() if child is decoder), "")
        given = keywords_of(type(owner).forward, name)
        if given is not None:
            return "input_ids" not in given and bool(given & {"inputs_embeds", POSITIONAL})
    return True


def _ask(model: nn.Module, method: str, **kwargs: Any) -> nn.Module | None:
    """Returns the result of one of transformers' `get_…` methods, or None without the method.

    Raises `UnsupportedModelError` where a transformers model lacks the method: without its
    result, a wrong module could be detected.
    """
    found: Any = getattr(model, method, None)
    if found is None and isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {method}(), which hooked_vlm needs to find the "
            f"model's parts; transformers {transformers.__version__} seems to have renamed it. "
            "Install a version from docs/measured/compatibility.md, and report this."
        )
    try:
        return None if found is None else found(**kwargs)
    except NotImplementedError:
        return None

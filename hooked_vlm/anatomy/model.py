"""Where the parts of a vision-language model are: read from its module tree.

`read_anatomy` walks any transformers image-text-to-text model (or a module that
follows its `get_encoder(modality="image")` / `get_decoder()` interface) and returns a
frozen description made of module paths and sizes.  Nothing here asks which family a
model belongs to (see `parts` and `blocks` for how a part is recognised).  The description
holds no weights and no modules, so it can be read off a model on the `meta` device.
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
from hooked_vlm.errors import UnsupportedModelError


@dataclass(frozen=True)
class Anatomy:
    """Paths of all parts, relative to the wrapped model."""

    lm: Stack
    embed: str
    unembed: str
    merges: bool
    """Whether the decoder is given embeddings into which the image was merged."""
    vision: Vision | None
    projector: str | None
    image_token_id: int | None


def read_anatomy(model: nn.Module) -> Anatomy:
    """Reads the anatomy of a transformers model off its module tree.

    Raises `UnsupportedModelError` when there is no decoder with attention blocks, no
    embedding or no vocabulary projection.  A model with no vision encoder is described
    with `vision=None`; whoever needs images says so then.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = _ask(model, "get_decoder") or model
    if getattr(getattr(decoder, "config", None), "is_encoder_decoder", False):
        inner = _ask(decoder, "get_decoder")  # a whole text model: its own encoder apart
        decoder = inner if inner is not None and any(block_lists(inner)) else decoder
    embed = _ask(decoder, "get_input_embeddings") or _ask(model, "get_input_embeddings")
    unembed = _ask(model, "get_output_embeddings") or _ask(decoder, "get_output_embeddings")
    if embed is None or unembed is None:
        missing = "get_input_embeddings()" if embed is None else "get_output_embeddings()"
        raise UnsupportedModelError(
            f"{type(model).__name__}.{missing} returned nothing; HookedVLM needs a model with a "
            "language-modelling head, such as an AutoModelForImageTextToText."
        )
    encoder = image_encoder(model, decoder)
    config = getattr(model, "config", None)
    lm = read_stack(decoder, paths, without=encoder)
    if not lm.blocks:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has no list of blocks with attention in it, so there is no "
            "residual stream to hook."
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
    """Returns a model's image encoder, or None where it has none of its own.

    Where transformers knows none by name it answers with the model itself, or with its base;
    then the encoder of a model whose main input are pixels is it, or a child that says so.
    """
    named = _ask(model, "get_encoder", modality="image")
    others = (model, decoder, base_of(model))
    if named is not None and not any(named is other for other in others):
        return named if any(named is module for module in model.modules()) else None
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
    """Whether the decoder is called with embeddings, rather than with ids that it embeds itself."""
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
    """Returns what a model answers to one of transformers' `get_…` methods, if it has it.

    Raises `UnsupportedModelError` where a transformers model has it no longer: without the
    answer another module would be taken for the one that was asked for.
    """
    found: Any = getattr(model, method, None)
    if found is None and isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {method}(), which hooked_vlm reads the model's parts "
            f"by; transformers {transformers.__version__} seems to have renamed it. Install a "
            "version from docs/measured/compatibility.md, and report this."
        )
    try:
        return None if found is None else found(**kwargs)
    except NotImplementedError:
        return None

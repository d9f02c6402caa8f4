"""What a clean cache and indices have to be for TransformerLens's patching functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from hooked_vlm.arguments.checked import shown
from hooked_vlm.arguments.kinds import has_values
from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.pixel_routing import holds_pixels
from hooked_vlm.inputs.rows import known_grids, prompt_shape


def check_images(model: Any, inputs: Mapping[str, Any], cache: Mapping[str, Any]) -> None:
    """Raises `InterventionError` for corrupted inputs without the images of their prompt."""
    if holds_pixels(inputs):
        return
    if "input_ids" not in inputs:
        raise InterventionError("The corrupted inputs have no input_ids. Use what prepare returns.")
    from_image = any(name.startswith("vision_") for name in cache)
    ids, token = inputs.get("input_ids"), model.cfg.image_token_id
    blind = ids is not None and token is not None and bool((ids == token).any())
    if from_image or blind:
        run = "the clean cache is of a run with an image"
        why = run if from_image else "the prompt holds image tokens"
        raise InterventionError(
            f"The corrupted inputs have no pixel_values, but {why}: the patched runs would be "
            "blind. Pass everything that prepare(images, texts) returns, not the tokens alone."
        )


def check_cache(
    model: Any, inputs: Mapping[str, Any], cache: Mapping[str, Any], sites: Mapping[Any, Site]
) -> None:
    """Raises `InterventionError` for a clean cache without the sites, or of other runs."""
    missing = [site.name for site in sites.values() if site.name not in cache]
    if missing:
        raise InterventionError(
            f"The clean cache lacks {len(missing)} of the {len(sites)} sites to patch: "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}. Cache them: "
            "run_with_cache(clean_inputs, names_filter=…)."
        )
    lists = [site.name for site in sites.values() if not _is_cached(cache[site.name], site)]
    if lists:
        raise InterventionError(
            f"{lists[0]} is {shown(cache[lists[0]])} in the clean cache; expected a tensor with "
            "values. It is a list by image where images differ in size: one index then means "
            "nothing for all. Use images of one size, or Patch with regions."
        )
    for site in sites.values():
        expected = _lengths(model, inputs, site)
        shape = dict(zip(site.axes.split(), cache[site.name].shape, strict=False))
        for axis, length in expected.items():
            serves_all = axis in ("batch", "image") and shape.get(axis) == 1
            if axis in shape and shape[axis] != length and not serves_all:
                raise InterventionError(
                    f"{site.name} in the clean cache has {shape[axis]} along {axis!r}, and the "
                    f"corrupted inputs make {length}. Clean and corrupted runs need prompts of "
                    "one length, images of one size and equal batches (or a clean batch of one); "
                    "for other runs use Patch, which maps places to places."
                )


def _is_cached(value: Any, site: Site) -> bool:
    """Whether a cache holds a tensor with values, of a site's axes."""
    is_tensor = isinstance(value, Tensor) and has_values(value)
    return is_tensor and value.ndim == len(site.axes.split())


def _lengths(model: Any, inputs: Mapping[str, Any], site: Site) -> dict[str, int]:
    """Returns how long the axes of a site will be, as far as the inputs alone tell."""
    if site.axes.startswith("batch"):
        batch, pos = prompt_shape(inputs) or (0, 0)
        return {"batch": batch, "pos": pos, "query": pos, "key": pos}
    grids = known_grids(model, inputs)
    sizes = {(g.patch_rows * g.patch_cols, len(g)) for g in grids}
    if len(sizes) != 1:
        raise InterventionError(
            f"The corrupted inputs hold {len(grids)} images of {len(sizes)} different sizes, so "
            f"one index at {site.name} means nothing for all. Use images of one size, or Patch "
            "with regions."
        )
    ((patches, tokens),) = sizes
    if "d_features" not in site.axes and not site.conv:
        patches += grids[0].n_prefix
    lengths = {"patch": patches, "token": tokens, "query": patches, "key": patches}
    return lengths | {"image": len(grids)}


def check_indices(
    index_df: pd.DataFrame, sizes: Sequence[int], layers: Sequence[Any] | None
) -> None:
    """Raises `InterventionError` for indices that are no numbers, or out of range."""
    for axis, size in zip(index_df.columns, sizes, strict=True):
        column = index_df[axis]
        given_layers = axis == "layer" and layers is not None  # resolved by name already
        if not pd.api.types.is_numeric_dtype(column) and not given_layers:
            raise InterventionError(
                f"index_df has {axis} of {column.dtype}; expected whole numbers."
            )
        if not given_layers and not column.between(0, size - 1).all():
            raise InterventionError(
                f"index_df has {axis} from {column.min()} to {column.max()}; the cached "
                f"activation has 0 to {size - 1}."
            )

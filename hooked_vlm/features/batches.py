"""Features of a batch of items: activations of some sites at a place, item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.arguments.checked import is_listed, shown
from hooked_vlm.errors import (
    DataError,
    HookedVLMError,
    InterventionError,
    UnsupportedModelError,
    did_you_mean,
)
from hooked_vlm.features.items import Item
from hooked_vlm.hooks.located import (
    Located,
    locate,
    needs_images,
    needs_text,
    no_positions,
    rows_at,
)
from hooked_vlm.hooks.names import select_names
from hooked_vlm.hooks.patch_order import listed
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.inputs.rows import placeholder_ids, prompt_shape, rows_of
from hooked_vlm.interventions.placing import full_name
from hooked_vlm.interventions.recording import record
from hooked_vlm.model.keywords import require_processed
from hooked_vlm.model.vlm import HookedVLM


POOLS = ("mean", "none")
OPTIONS = (
    *("model", "dataset", "sites", "at", "out", "batch", "pool", "dtype", "text", "image_column"),
    *("text_column", "label_column", "on_error", "progress"),
)
"""Arguments of `extract` that a keyword for `prepare` may have been meant to be."""


@dataclass(frozen=True, eq=False)
class Task:
    """What is computed of each item."""

    model: HookedVLM
    sites: tuple[Site, ...]
    at: Any
    """A place, or a function `(item, grids) -> place`."""
    pool: str
    dtype: torch.dtype | None
    prepare: Mapping[str, Any] = field(default_factory=dict)
    """Options of `prepare`."""


def sites_of(model: HookedVLM, names: Any) -> tuple[Site, ...]:
    """Returns the sites of names, patterns or slots; raises for sites without positions."""
    given = [names] if isinstance(names, str | int) else names
    if not is_listed(given) or not all(isinstance(name, str | int) for name in given):
        raise DataError(
            f"sites={shown(names)} was given; expected names, patterns or numbers of slots."
        )
    full = [full_name(model, name) for name in given]
    if not full:
        raise DataError("No site was given: sites is empty. Give at least one name.")
    sites = [model.sites[name] for name in select_names(full, model.hook_names)]
    for site in sites:
        if not (site.by_position or site.by_patch or site.by_token):
            raise no_positions(site)
    return tuple(sites)


def features_of(task: Task, items: Sequence[Item]) -> list[dict[str, Tensor] | HookedVLMError]:
    """Returns the features of each item, or the error of an item that has none.

    Where a batch cannot be computed, its items are computed one by one, so that the error is that
    of its own item.
    """
    try:
        return _together(task, items)
    except (HookedVLMError, ValueError, RuntimeError) as error:
        if len(items) > 1:
            return [found for item in items for found in features_of(task, [item])]
        if isinstance(error, torch.OutOfMemoryError):
            raise
        known = error if isinstance(error, HookedVLMError) else DataError(_first_line(error))
        if isinstance(known, UnsupportedModelError):
            raise known from None  # no item is to blame
        return [known]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@torch.no_grad()
def _together(task: Task, items: Sequence[Item]) -> list[dict[str, Tensor] | HookedVLMError]:
    # 1. Run the batch; text-only items have no images.
    images = [list(item.images) for item in items]
    given = images if any(images) else None
    inputs = task.model.prepare(given, [item.text for item in items], **task.prepare)
    names = [site.name for site in task.sites]
    cache = record(task.model, inputs, names).cache
    # 2. Select each item's place at each site.
    places = [_place(task, item, grids) for item, grids in zip(items, inputs.grids, strict=True)]
    rows = _rows(task, inputs, places)
    found: list[dict[str, Tensor] | HookedVLMError] = []
    for b, (row, place) in enumerate(zip(rows, places, strict=True)):
        made = {}
        for site in task.sites:
            value = cache[site.name]
            _require_axes(site, value, inputs)
            located = locate(site, place, [row])
            if site.by_position:
                located = Located((b, index) for _, index in located)
            taken = rows_at(value, located.index(None, listed(value)[0].device))
            made[site.name] = _pooled(task, taken)
        wrong = [name for name, x in made.items() if not bool(x.isfinite().all())]
        found.append(
            DataError(f"the activations of {wrong[0]} are NaN or infinite.") if wrong else made
        )
    return found


def _place(task: Task, item: Item, grids: Any) -> Any:
    is_function = callable(task.at) and not hasattr(task.at, "positions")
    return task.at(item.given, grids) if is_function else task.at


def _rows(task: Task, inputs: Inputs, places: Sequence[Any]) -> Any:
    text = any(map(needs_text, places))
    images = any(map(needs_images, places)) or not all(site.by_position for site in task.sites)
    grids = task.model.grids(inputs) if images else None
    if images and inputs.no_grid:
        raise UnsupportedModelError(inputs.no_grid)
    return rows_of(inputs, grids, text, placeholder_ids(task.model.hf_model))


def _pooled(task: Task, taken: Tensor) -> Tensor:
    taken = taken.double().mean(0) if task.pool == "mean" else taken
    return taken.to("cpu", task.dtype or (torch.float32 if task.pool == "mean" else None))


def _require_axes(site: Site, value: Any, inputs: Inputs) -> None:
    ndim = listed(value)[0].ndim + isinstance(value, list)
    shape = prompt_shape(inputs)
    by_prompt = site.by_position and tuple(value.shape[:2]) != shape
    if ndim != len(site.axes.split()) or by_prompt:
        raise UnsupportedModelError(
            f"{site.name} has another shape in this model than [{site.axes}] of the prompts, so no "
            "place can be found there. Use another site."
        )


def require_pool(pool: str) -> None:
    """Raises `DataError` for another way of pooling than those that are known."""
    if pool not in POOLS:
        raise DataError(f"pool={shown(pool)} was given; expected one of {', '.join(POOLS)}.")


def require_task(task: Task) -> None:
    """Raises under open hooks, for a place of text at a vision site, and for unknown options."""
    if task.model.is_hooked:
        raise DataError(
            "Hooks are open on this model, and its features would be those of hooked runs, which "
            "nothing in them says. Leave the `with model.hooks(…)` block."
        )
    own = ("system", "chat", "assistant")
    for name in task.prepare.keys() - own:
        near = did_you_mean(name, OPTIONS)
        if near and not name.endswith("_kwargs"):  # those are a processor's
            raise DataError(f"{name}=… was given, which is no argument of extract.{near}")
    require_processed(task.model.processor, [n for n in task.prepare if n not in own])
    at = task.at
    is_function = callable(at) and not hasattr(at, "positions")
    vision = [site.name for site in task.sites if not site.by_position]
    if not is_function and at is not None and vision and not needs_images(at):
        raise InterventionError(
            f"{at} is no part of an image, and {vision[0]} has no other. Give a Region, or None "
            "for all cells, and extract sites of the language model on their own."
        )

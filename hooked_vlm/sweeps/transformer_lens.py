"""Activation patching, as TransformerLens's users know it, for runs with images.

The corrupted inputs run again and again, each time with one activation (one layer, position
or head) replaced by that of a clean run.  The metric measures how much of the clean answer
comes back; where much does, that activation carries what makes the difference.

Names, setters, argument order and axes of results are those of `transformer_lens.patching`.
New: corrupted inputs hold images; `tower=` patches the vision encoder (`pos` is then a patch)
or the projector; all indices run as one sweep; a clean run that does not fit the corrupted
one is an `InterventionError` before anything runs.  A head's "out" is its z.

    _, clean_cache = model.run_with_cache(clean_inputs)
    scores = get_act_patch_resid_pre(model, corrupted_inputs, clean_cache, metric)  # [layer, pos]
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Model
from hooked_vlm.engine.run import run_cells
from hooked_vlm.errors import InterventionError, did_you_mean
from hooked_vlm.hooks.names import PROJECTOR, VISION, get_act_name, resolve_name, tower_of
from hooked_vlm.hooks.sites import Site
from hooked_vlm.interventions.chain import Cell
from hooked_vlm.interventions.hook_at import HookAt
from hooked_vlm.interventions.placing import Places
from hooked_vlm.sweeps.patching_checks import check_cache, check_images, check_indices


PatchSetter = Callable[[Tensor, list[int], Tensor], Tensor | None]
"""Returns the patched activation, or None when it wrote into the first one it was given."""

_AXES = {
    "pos": ("pos", "patch", "token"),
    "patch": ("patch",),
    "token": ("token",),
    "head": ("head", "kv_head"),
    "head_index": ("head", "kv_head"),
    "dest_pos": ("query",),
    "src_pos": ("key",),
}

# --- setters, under TransformerLens's names -------------------------------------------------


def _index_setter(corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
    """Patches what lies at the index, the layer left out, along the axes after the batch."""
    where = (slice(None), *index[1:])
    corrupted[where] = clean[where]
    return corrupted


# Indices into [batch, pos, ...], [batch, pos, head, d_head] and [batch, head, query, key].
layer_pos_patch_setter = layer_pos_head_vector_patch_setter = _index_setter
layer_head_pattern_patch_setter = layer_head_pos_pattern_patch_setter = _index_setter
layer_head_dest_src_pos_pattern_patch_setter = _index_setter


def layer_head_vector_patch_setter(corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
    """Index `[layer, head]` of `[batch, pos, head, d_head]`: the head at all positions."""
    _, head = index
    corrupted[:, :, head] = clean[:, :, head]
    return corrupted


def pos_patch_setter(corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
    """Index `[pos]` of `[batch, pos, ...]`, at sites that have no layer."""
    return _index_setter(corrupted, [0, *index], clean)


_BY_POSITION = (_index_setter, pos_patch_setter)
"""Setters that change nothing before the position of their index."""

# --- the one function that patches ----------------------------------------------------------


@checked(InterventionError)
def generic_activation_patch(
    model: Model,
    corrupted_inputs: Mapping[str, Any],
    clean_cache: Mapping[str, Any],
    patching_metric: Callable[[Float[Tensor, "batch pos d_vocab"]], Any],
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    tower: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    engine: str = "growing",
) -> Any:
    """Returns the metric of the corrupted run with one clean activation put in, for each index.

    `patch_setter(corrupted_activation, index, clean_activation)` says what an index means;
    it is given a copy and may write into it.  `activation_name` is a short name
    (`"resid_pre"`, `"z"`); `tower` is None for the language model, `"vision_encoder"` or
    `"vision_projector"`.  Indices are all combinations of `index_axis_names` (layer, pos,
    head or head_index, dest_pos, src_pos; patch and token say pos), and the result has an
    axis for each; or they are the rows of `index_df`, whose columns have such names, and
    the result has one axis.  Vision layers that the projector does not read are left out.
    A clean run of one prompt (or image) serves a batch.

    `patching_metric` takes logits `[batch, pos, d_vocab]` and returns one number.  With
    `return_index_df` the result is `(result, index_df)`.  `on_progress(done, total)`
    counts indices.  All indices run as one sweep, by the fastest `engine` that is allowed (see
    `Sweep.run`); `engine="plain"` is one whole forward pass for each.

    Raises `InterventionError`, before any forward pass, for a site that the cache lacks or
    that cannot be written, for a clean run of another length or image size, for images of
    different sizes (their activations are lists), for corrupted inputs without an image
    where the clean run had one, and for indices that are out of range.
    """
    if (index_df is None) == (index_axis_names is None):
        raise InterventionError("Give index_axis_names or index_df: one of the two, and not both.")
    if index_df is not None and index_df.empty:
        raise InterventionError("There is no index to patch: index_df has no rows.")
    model.require_call(corrupted_inputs, ())
    check_images(model, corrupted_inputs, clean_cache)
    axes = list(index_df.columns if index_df is not None else index_axis_names or ())
    layers = None if index_df is None or "layer" not in axes else sorted(set(index_df["layer"]))
    sites = _sites(model, activation_name, tower, "layer" in axes, layers)
    check_cache(model, corrupted_inputs, clean_cache, sites)
    sizes = _sizes(axes, sites, clean_cache)
    flat = index_df is not None
    if index_df is None:
        index_df = pd.DataFrame(list(product(*map(range, sizes))), columns=pd.Index(axes))
    check_indices(index_df, sizes, layers)

    places, cells = Places(model), []
    for row in index_df.itertuples(index=False):
        index = [int(i) for i in row]
        site = sites[index[axes.index("layer")] if "layer" in axes else None]
        hook = partial(_patch, setter=patch_setter, index=index, clean=clean_cache[site.name])
        # Setters of ours leave earlier positions alone; one of the user's may read them.
        by_pos = patch_setter in _BY_POSITION and "pos" in axes
        edit = HookAt(site.name, hook, index[axes.index("pos")] if by_pos else 0)
        cells.append(Cell(tuple(index), (edit,)).placed(model, corrupted_inputs, places))

    def metric(logits: Tensor) -> Tensor:
        return _number(patching_metric(logits))

    values, _ = run_cells(engine, model, corrupted_inputs, cells, metric, on_progress)
    result = torch.stack(values) if flat else torch.stack(values).reshape(sizes)
    return (result, index_df) if return_index_df else result


def _patch(
    activation: Tensor, hook: Any, setter: PatchSetter, index: list[int], clean: Tensor
) -> Tensor:
    # What the batch cannot say beforehand (widths, heads) is compared when it is there.
    if activation.shape[1:] != clean.shape[1:]:
        raise InterventionError(
            f"{hook.name} has shape {tuple(activation.shape)} in the corrupted run and "
            f"{tuple(clean.shape)} in the clean cache. Take both from the same model, on prompts "
            "of one length and images of one size."
        )
    # A copy, so that a setter which writes in place never writes into the model's own memory.
    copy = activation.clone()
    patched = setter(copy, index, clean.to(activation.device, activation.dtype))
    return copy if patched is None else patched


def _number(value: Any) -> Tensor:
    number = torch.as_tensor(value).detach()
    if number.numel() != 1:
        raise InterventionError(
            f"The metric returned shape {tuple(number.shape)}; it must return one number, such "
            "as a mean over the batch. For scores by prompt use Sweep."
        )
    return number.reshape(()) if number.is_floating_point() else number.reshape(()).float()


# --- what is checked before anything runs ---------------------------------------------------


def _sites(
    model: Any, name: str, tower: str | None, by_layer: bool, layers: Sequence[Any] | None
) -> dict[Any, Site]:
    """Returns the patched sites by layer (or under None, for a site that has no layer)."""
    tower = tower_of(tower)
    if tower:
        model.require_vision()
    if layers is None:
        layers = range(model.cfg.vision.last_read + 1 if tower == VISION else model.cfg.n_layers)
    found = {layer: get_act_name(name, layer, tower) for layer in (layers if by_layer else [None])}
    sites = {layer: model.sites[resolve_name(n, model.sites)] for layer, n in found.items()}
    for site in sites.values():
        if site.read_only:
            raise InterventionError(f"{site.name} cannot be written: {site.read_only}.")
    return sites


def _sizes(axes: Sequence[str], sites: Mapping[Any, Site], cache: Mapping[str, Any]) -> list[int]:
    site = next(iter(sites.values()))
    names = site.axes.split()
    sizes = []
    for axis in axes:
        if axis == "layer":
            sizes.append(len(sites))
            continue
        place = next((names.index(n) for n in _AXES.get(axis, ()) if n in names), None)
        if place is None:
            raise InterventionError(
                f"{site.name} has axes [{site.axes}], and no index axis {axis!r} along them. "
                f"Index axes are layer, {', '.join(_AXES)}.{did_you_mean(axis, _AXES)}"
            )
        sizes.append(cache[site.name].shape[place])
    return sizes


# --- ready-made: f(model, corrupted_inputs, clean_cache, metric, tower=…) -------------------


def _ready(name: str, axes: str, setter: PatchSetter, **fixed: Any) -> Callable[..., Any]:
    return partial(
        generic_activation_patch,
        activation_name=name,
        index_axis_names=tuple(axes.split()),
        patch_setter=setter,
        **fixed,
    )


get_act_patch_resid_pre = _ready("resid_pre", "layer pos", layer_pos_patch_setter)
"""Patches the residual stream before each block: `[layer, pos]`."""
get_act_patch_resid_mid = _ready("resid_mid", "layer pos", layer_pos_patch_setter)
"""Patches the residual stream between attention and MLP: `[layer, pos]`."""
get_act_patch_resid_post = _ready("resid_post", "layer pos", layer_pos_patch_setter)
"""Patches the residual stream after each block: `[layer, pos]`."""
get_act_patch_attn_out = _ready("attn_out", "layer pos", layer_pos_patch_setter)
"""Patches what attention adds to the residual stream: `[layer, pos]`."""
get_act_patch_mlp_out = _ready("mlp_out", "layer pos", layer_pos_patch_setter)
"""Patches what the MLP adds to the residual stream: `[layer, pos]`."""
get_act_patch_projector = _ready("out", "token", pos_patch_setter, tower=PROJECTOR)
"""Patches each visual token as the projector hands it over, in raster order: `[token]`."""

_BY_POS = "layer pos head", layer_pos_head_vector_patch_setter
get_act_patch_attn_head_out_by_pos = _ready("z", *_BY_POS)
"""Patches each head's z (for `_q_`, `_k_`, `_v_`: those) by position: `[layer, pos, head]`."""
get_act_patch_attn_head_q_by_pos = _ready("q", *_BY_POS)
get_act_patch_attn_head_k_by_pos = _ready("k", *_BY_POS)
get_act_patch_attn_head_v_by_pos = _ready("v", *_BY_POS)

_ALL_POS = "layer head", layer_head_vector_patch_setter
get_act_patch_attn_head_out_all_pos = _ready("z", *_ALL_POS)
"""Patches each head's z (for `_q_`, `_k_`, `_v_`: those) at all positions: `[layer, head]`."""
get_act_patch_attn_head_q_all_pos = _ready("q", *_ALL_POS)
get_act_patch_attn_head_k_all_pos = _ready("k", *_ALL_POS)
get_act_patch_attn_head_v_all_pos = _ready("v", *_ALL_POS)

get_act_patch_attn_head_pattern_all_pos = _ready(
    "pattern", "layer head_index", layer_head_pattern_patch_setter
)
"""Patches each head's whole attention pattern: `[layer, head]`."""
get_act_patch_attn_head_pattern_by_pos = _ready(
    "pattern", "layer head_index dest_pos", layer_head_pos_pattern_patch_setter
)
"""Patches where each position of a head looks: `[layer, head, dest_pos]`."""
get_act_patch_attn_head_pattern_dest_src_pos = _ready(
    "pattern", "layer head_index dest_pos src_pos", layer_head_dest_src_pos_pattern_patch_setter
)
"""Patches single entries of each head's pattern: `[layer, head, dest_pos, src_pos]`."""


def get_act_patch_attn_head_all_pos_every(
    *args: Any, **options: Any
) -> Float[Tensor, "5 layer head"]:
    """Returns the `_all_pos` patches of out, q, k, v and pattern, stacked in this order.

    k and v have fewer heads where query heads share them; the entries of heads that do
    not exist are NaN.
    """
    functions = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return _stacked([function(*args, **options) for function in functions])


def get_act_patch_attn_head_by_pos_every(
    *args: Any, **options: Any
) -> Float[Tensor, "5 layer pos head"]:
    """Returns the `_by_pos` patches of out, q, k, v and pattern (by its dest_pos), stacked.

    Entries of k and v heads that do not exist are NaN, as in `_all_pos_every`.
    """
    functions = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
    )
    by_dest = get_act_patch_attn_head_pattern_by_pos(*args, **options).transpose(-1, -2)
    return _stacked([*(function(*args, **options) for function in functions), by_dest])


def get_act_patch_block_every(*args: Any, **options: Any) -> Float[Tensor, "3 layer pos"]:
    """Returns the patches of resid_pre, attn_out and mlp_out, stacked in this order."""
    functions = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return _stacked([function(*args, **options) for function in functions])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Returns results stacked, those with fewer heads filled up with NaN."""
    heads = max(part.shape[-1] for part in parts)
    nan = float("nan")
    return torch.stack([pad(part, (0, heads - part.shape[-1]), value=nan) for part in parts])

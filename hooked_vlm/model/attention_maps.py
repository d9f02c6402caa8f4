"""Where in an image tokens look, read while a model runs or generates."""

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from hooked_vlm.analysis.attention import image_map
from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import Model, Whole
from hooked_vlm.errors import InterventionError, UnknownHookError, counted
from hooked_vlm.hooks.dispatch import Reader
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.patch_order import VisionActivation
from hooked_vlm.inputs.rows import placeholder_ids, rows_of
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.positions import LastToken, TokenSelector


@checked(InterventionError, but=("inputs",))
def attention_maps(
    model: Model,
    inputs: Any,
    query: Any = LastToken(),  # noqa: B008 - it has no state
    *,
    grid: TokenGrid | None = None,
    layers: Sequence[int] | None = None,
    max_new_tokens: Whole = 0,
    fwd_hooks: Sequence[Any] = (),
    **generate_kwargs: Any,
) -> xr.DataArray:
    """Returns the attention of tokens to an image: dimensions `(layer, query, head, row, col)`.

    `query` is a place in the prompt (`LastToken()`, `Span("red")`, a `Region`, …).  The map of each
    of its tokens has the weights after the softmax on the image's cells, in raster order: `row` and
    `col` are cells of `grid` (default: the only image there is; `inputs.grids[b][i]` is image i of
    prompt b, `grid.overview` the thumbnail of an image in tiles).  A map sums to
    the query's attention on the image.  The coordinate `query` is the position in the prompt,
    padding counted, and `layer` the block's number.

    With `max_new_tokens`, the model generates, and tokens of the answer are queries too, at the
    positions after the prompt.  The query at a position is what the next token is predicted from:
    the prompt's last token is that for the first token of the answer, and the answer's last token
    is never a query.  Other keyword arguments go to `generate` (or else to the forward pass); use
    `do_sample=False` for the most probable answer.

    `layers` defaults to all whose self-attention has a pattern.  Only the queries' rows are kept,
    so this takes little memory.  `maps.mean("head")` is the mean over heads.  Interventions in
    `fwd_hooks` act before their patterns are read.

    Raises `InterventionError` for a layer without a pattern, for beams, for inputs whose image has
    no grid, and for inputs of several images without `grid`.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64), "red"), "What is this?")
    >>> maps = attention_maps(model, inputs, max_new_tokens=2, do_sample=False)
    >>> dict(maps.sizes)
    {'layer': 6, 'query': 2, 'head': 4, 'row': 4, 'col': 6}
    >>> maps.mean("head").sel(layer=5).isel(query=0).shape
    (4, 6)
    """
    if not (query is None or isinstance(query, TokenSelector)):
        raise InterventionError(
            f"query={shown(query)} is no place; expected LastToken(), Span('text'), a Region, … or "
            "None for all tokens."
        )
    grid = _grid_of(model, inputs) if grid is None else grid
    sites = _sites(model, layers)
    rows = rows_of(inputs, model.grids(inputs), True, placeholder_ids(model.hf_model))
    positions = rows[grid.prompt].real if query is None else query.positions(rows[grid.prompt])
    reading = _Reading(grid, positions, len(rows))
    hooks = [*fwd_hooks, *((name, Reader(reading.read)) for name in sites.values())]
    with torch.no_grad():
        if max_new_tokens:
            how = {"max_new_tokens": max_new_tokens, **generate_kwargs}
            model.generate(inputs, fwd_hooks=hooks, **how)
        else:
            model.run_with_hooks(inputs, hooks, **generate_kwargs)
    return reading.table(sites)


def _grid_of(model: Any, inputs: Any) -> TokenGrid:
    grids = [grid for row in model.grids(inputs) for grid in row]
    if len(grids) > 1:
        raise InterventionError(
            f"These inputs have {len(grids)} images, and a map is of one. Give "
            "grid=inputs.grids[b][i], image i of prompt b."
        )
    grid = grids[0] if grids else None
    if grid is None:
        raise InterventionError(
            "These inputs have no image whose tokens form a grid, so there is no map of it. "
            "Prepare an image, or read blocks.*.attn.hook_pattern."
        )
    return grid


def _sites(model: Any, layers: Sequence[int] | None) -> dict[int, str]:
    """Returns the patterns of self-attention by layer."""
    n_layers = model.cfg.n_layers
    names = {i: f"blocks.{i}.attn.hook_pattern" for i in range(n_layers)}
    known = {i: name for i, name in names.items() if name in model.sites and not _cross(model, i)}
    if layers is None:
        wanted = list(known)
    else:
        wanted = [i + n_layers if -n_layers <= i < 0 else i for i in layers]
    missing = [i for i in wanted if i not in known]
    if missing or not wanted:
        raise UnknownHookError(
            f"layers={layers} was given; layers {missing} have no pattern over the prompt in this "
            f"model of {counted(n_layers, 'layer')}. Those that have: {', '.join(map(str, known))}."
        )
    return {i: known[i] for i in wanted}


def _cross(model: Any, layer: int) -> bool:
    key = model.sites.get(f"blocks.{layer}.attn.hook_k")
    return key is not None and "source" in key.axes


class _Reading:
    """What patterns have of an image, by site and by the position of the query."""

    def __init__(self, grid: TokenGrid, positions: Tensor, batch: int) -> None:
        self.grid, self.batch = grid, batch
        self.prompt = set(positions.tolist())
        self.length = 0
        self.found: dict[str, dict[int, Tensor]] = {}

    def read(self, pattern: VisionActivation, hook: HookPoint) -> None:
        assert isinstance(pattern, Tensor), "only encoders list their patterns"
        if len(pattern) != self.batch:
            raise InterventionError(
                f"{hook.name} has {counted(len(pattern), 'row')} for "
                f"{counted(self.batch, 'prompt')}: maps are of one answer for each prompt. "
                "Generate with num_beams=1 and num_return_sequences=1."
            )
        if pattern.shape[-2] != len(hook.positions):
            raise InterventionError(
                f"{hook.name} has {counted(pattern.shape[-2], 'query', 'queries')} that are no "
                "positions of the prompt, so none can be named. Read it by run_with_cache."
            )
        if hook.step == 0:
            self.length = max(self.length, hook.positions.stop)
        asked = [p for p in hook.positions if self._is_asked(p, hook.step)]
        index = torch.tensor(asked, dtype=torch.long, device=pattern.device) - hook.positions.start
        weights = pattern[self.grid.prompt, :, index]
        shown = image_map(weights, self.grid, hook.key_positions.start).transpose(0, 1)
        maps = zip(asked, shown.float().cpu(), strict=True)
        self.found.setdefault(hook.name, {}).update(maps)

    def _is_asked(self, position: int, step: int) -> bool:
        return position >= self.length or (step == 0 and position in self.prompt)

    def table(self, sites: dict[int, str]) -> xr.DataArray:
        queries = sorted(set().union(*(self.found[name] for name in sites.values())))
        maps = torch.stack(
            [torch.stack([self.found[name][q] for q in queries]) for name in sites.values()]
        )
        return xr.DataArray(
            maps.numpy(),
            dims=("layer", "query", "head", "row", "col"),
            coords={"layer": list(sites), "query": queries},
        )

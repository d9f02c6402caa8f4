"""What an `ActivationCache` has of one place alone, and names of TransformerLens's cache."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.errors import DataError, UnknownNameError, counted, did_you_mean
from hooked_vlm.hooks.located import Located
from hooked_vlm.hooks.names import PROJECTOR, VISION, count_layers, without_gradient
from hooked_vlm.hooks.patch_order import VisionActivation


class Locates(Protocol):
    """Where places are in the inputs of the run that was cached."""

    def located(self, name: str, place: Any, shape: tuple[int, ...]) -> Located | None:
        """Returns a place's indices at a site; None where the site has no such axis.

        `shape` is that of an activation by prompt, its batch axis included.
        """
        ...


PosSlice = int | slice | Sequence[int] | None
"""Which positions: one (whose axis goes), a slice, or a list; None is all."""

INSTEAD = {
    "model": "A cache holds no model: keep the one that made it.",
    "toggle_autodiff": "Use torch.set_grad_enabled(mode), or `with torch.no_grad():`.",
    "compute_head_results": (
        "Name the sites, run_with_cache(inputs, '*attn.hook_result'), or use stack_head_results."
    ),
    "get_neuron_results": "Use stack_neuron_results, which takes neuron_slice and pos_slice.",
    "get_full_resid_decomposition": (
        "Use decompose_resid for layers, stack_head_results for heads and stack_neuron_results "
        "for neurons."
    ),
    **dict.fromkeys(
        ("compute_ssm_effective_attention", "compute_ssm_state", "ssm_layers"),
        "There are no sites inside state-space layers.",
    ),
}
"""Names of TransformerLens's cache, and what to do in their place."""


class Cuts:
    """Gives a cache its parts by place, and TransformerLens's shorter names."""

    where: Locates | None = None
    """Finds places in the inputs of the run; None for a cache without its run, or a cut one."""
    prompts: Tensor | None = None
    """The prompts of the batch that are left after `select`; None: all."""
    has_batch_dim: bool = True
    """Whether LM sites have their batch axis (see `remove_batch_dim`)."""
    left_out: str = ""
    """Why a cache that was cut to a place does not have some sites."""

    _no_run: str
    items: Callable[..., Any]
    _with: Callable[..., Any]

    @checked(DataError, but=("place",))
    def at(self, place: Any) -> Any:
        """Returns the cache of one place alone: every site has that place's positions, in order.

        `place` is what interventions take as `at`: a Region, `LastToken()`, `Span("text")`,
        `Answer()`, a list with a place for each prompt.  Sites of the language model get
        `[batch, n, …]`.  Sites of the vision encoder and projector get the patches (or tokens) of a
        region, `[image, n, …]`, or a list by image where the numbers differ; an image cut into
        tiles has an entry for each.  Sites without such an axis (patterns, scores), and vision
        sites for a place of the text, are left out: asking for one says so.

        Raises `DataError` where prompts have different numbers of positions (`select` one first),
        and for a cache without its run: from a file, by hand, of a generation, or cut already;
        errors of places are those of `Inputs.positions`.

        >>> from PIL import Image
        >>> from hooked_vlm import HookedVLM, LastToken
        >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
        >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
        >>> _, cache = model.run_with_cache(inputs, "*hook_resid_post")
        >>> cache.at(LastToken())["resid_post", 3].shape
        torch.Size([1, 1, 128])
        >>> corner = cache.at(inputs.grid.box(0, 0, 32, 32))
        >>> corner["resid_post", 3].shape, corner["resid_post", 0, "vision_encoder"].shape
        (torch.Size([1, 4, 128]), torch.Size([1, 16, 64]))
        """
        if self.where is None:
            why = self._no_run
            if self.left_out:
                why = "it is cut to a place already. Keep that of model.run_with_cache(inputs)"
            raise DataError(
                f"This cache does not know the prompts of its run: {why}, and use cache.at(place) "
                "on that."
            )
        kept: dict[str, VisionActivation] = {}
        for name, value in self.items():
            is_vision = name.startswith((VISION, PROJECTOR))
            axes = () if is_vision else tuple(value.shape)
            located = self.where.located(name, place, axes if self.has_batch_dim else (1, *axes))
            if located is None or (is_vision and not _fits(value, located)):
                continue
            made_of = _of_images if is_vision else self._of_prompts
            kept[name] = made_of(value, located, place)
        if not kept:
            raise DataError(
                f"No cached site has a position for {shown(place)}. Cache sites of the language "
                "model, or give a Region for those of the vision encoder."
            )
        made = self._with(kept)
        made.where = None
        made.left_out = (
            f"cache.at(…) left out sites without positions for {str(place)[:60]}, such as patterns."
        )
        return made

    def _of_prompts(self, value: Tensor, located: Located, place: Any) -> Tensor:
        prompts = range(len(located)) if self.prompts is None else self.prompts.tolist()
        found = [located[b][1].to(value.device) for b in prompts]
        sizes = sorted({len(index) for index in found})
        if len(sizes) != 1:
            raise DataError(
                f"The prompts have {' or '.join(map(str, sizes))} positions of "
                f"{str(place)[:60]}, so they make no tensor. Select one prompt first: "
                "cache.select([0]).at(place)."
            )
        if not self.has_batch_dim:
            return value[found[0]]
        rows = torch.arange(len(found), device=value.device)[:, None]
        return value[rows, torch.stack(found)]

    def shaped(self, sites: Mapping[str, Any], pos_slice: Any, remove_batch_dim: bool) -> Any:
        """Returns the cache with some positions of the prompts, and without its batch axis.

        `pos_slice` selects queries of patterns and scores, as in TransformerLens; keys are those of
        all positions.
        """
        made: Any = self
        if pos_slice is not None:
            axes = {name: sites[without_gradient(name)].axes for name in self.cache_dict}
            made = self._with({n: sliced(v, axes[n], pos_slice) for n, v in self.items()})
            made.where = None
            made.left_out = "pos_slice=… has cut this cache."
        return made.remove_batch_dim() if remove_batch_dim else made

    @property
    def cache_dict(self) -> dict[str, Any]:
        """The activations by full name, as a dict of their own."""
        return dict(self.items())

    @property
    def has_embed(self) -> bool:
        """Whether the text embedding was cached."""
        return "hook_embed" in self.cache_dict

    @property
    def has_pos_embed(self) -> bool:
        """Whether a positional embedding was cached; no language model has a site of one."""
        return "hook_pos_embed" in self.cache_dict

    @checked(DataError, but=("activation_name", "layer"))
    def stack_activation(
        self, activation_name: str, layer: int = -1, sublayer_type: str | None = None
    ) -> Tensor:
        """Returns one site of the layers below `layer` (-1: of all), as TransformerLens does.

        See `stack`, which takes any layers.
        """
        n_layers = layer if layer >= 0 else getattr(self, "n_layers", {}).get("blocks", 0)
        n_layers = n_layers or count_layers("blocks", self.cache_dict)
        return torch.stack([self[activation_name, i, sublayer_type] for i in range(n_layers)])  # type: ignore[index]

    def apply_slice_to_batch_dim(self, batch_slice: int | slice | Sequence[int]) -> Any:
        """Returns the cache for some prompts; for a single number, without the batch axis.

        Vision sites are left out (see `select`).
        """
        if isinstance(batch_slice, int):
            return self.select([batch_slice]).remove_batch_dim()  # type: ignore[attr-defined]
        return self.select(batch_slice)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"ActivationCache has no attribute {name!r}.")
        hint = INSTEAD.get(name) or did_you_mean(name, dir(type(self))).strip()
        hint = hint or f"Activations are items: cache[{name[:40]!r}]."
        raise UnknownNameError(f"ActivationCache has no attribute {name[:80]!r}. {hint}")


def _of_images(value: VisionActivation, located: Located, _: Any) -> VisionActivation:
    parts = [value[image][index.to(value[image].device)] for image, index in located]
    return torch.stack(parts) if len({len(part) for part in parts}) == 1 else parts


def _fits(value: VisionActivation, located: Located) -> bool:
    """Whether a place's rows are there: some models merge patches before a site."""
    return all(
        image < len(value) and int(index.max()) < len(value[image]) for image, index in located
    )


def sliced(value: Any, axes: str, pos_slice: Any) -> Any:
    """Returns an activation with some positions of its prompts (or queries); others unchanged.

    A number keeps its axis.  Raises `DataError` for positions that are not there.
    """
    names = axes.split()
    dim = 1 if names[:2] == ["batch", "pos"] else names.index("query") if "query" in names else 0
    if not dim or names[0] != "batch" or not isinstance(value, Tensor):
        return value
    found = at_positions(value, pos_slice, dim)
    found = found.unsqueeze(dim) if isinstance(pos_slice, int) else found
    return found.clone()  # a view would keep the whole activation in memory


def at_positions(x: Tensor, pos_slice: PosSlice, axis: int | None = None) -> Tensor:
    """Returns some positions of a tensor; raises `DataError` for others than there are.

    Positions are the axis before the last, if no other is given; a single one's axis goes.
    """
    if pos_slice is None:
        return x
    before = (slice(None),) * (x.ndim - 2 if axis is None else axis)
    if isinstance(pos_slice, slice):
        return x[(*before, pos_slice)]
    listed = [int(i) for i in ([pos_slice] if isinstance(pos_slice, int) else pos_slice)]
    length = x.shape[len(before)]
    if not listed or any(not -length <= i < length for i in listed):
        raise DataError(
            f"pos_slice={shown(pos_slice)} was given; the prompts have "
            f"{counted(length, 'position')}: give some of 0 to {length - 1}, or negative ones from "
            "the end."
        )
    return x[(*before, pos_slice if isinstance(pos_slice, int) else listed)]

"""An intervention bound to a model and inputs: located once, then read by all that runs it.

An intervention is placed for certain inputs.  On others, or on one image of several, its
indices would still fit somewhere; a wrong number is worse than an error, so the hook
function refuses to act on anything but what it was placed for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.errors import InterventionError, UnknownHookError, counted
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.located import Located, locate, needs_images, needs_text
from hooked_vlm.hooks.names import resolve_name, slot_name
from hooked_vlm.hooks.patch_order import each, joint, listed
from hooked_vlm.hooks.prompts import OnGenerated, OnPrompt
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.rows import (
    placeholder_ids,
    prompt_shape,
    require_prompt_of_blocks,
    rows_of,
)
from hooked_vlm.interventions.indexing import rows_needed
from hooked_vlm.interventions.recording import Recording, Source, record, require_stream
from hooked_vlm.model.base import HookedModel
from hooked_vlm.regions.generated import Generated
from hooked_vlm.regions.positions import PromptRow


SiteName = str | int
"""A hook name, or the number of a slot of the LM's residual stream (slot 0: block 0's input)."""

Edit = tuple[str, Callable[..., Any]]


def site_of(model: HookedModel, name: SiteName) -> Site:
    """Returns a model's site by name or slot, or raises `InterventionError` for a read-only one."""
    site = model.sites[resolve_name(full_name(model, name), model.sites)]
    if site.read_only:
        raise InterventionError(f"{site.name} cannot be written: {site.read_only}.")
    return site


def source_site_of(model: HookedModel, part: Any, own: Site) -> Site:
    """Returns the site at which an intervention reads its source: its own, if it names no other."""
    other = getattr(part, "source_site", None)
    if other is None:
        return own
    return by_query(model.sites[resolve_name(full_name(model, other), model.sites)])


def by_query(site: Site) -> Site:
    """Returns a site of scores or patterns as one of queries, each with rows of keys by head.

    Other sites are returned as they are.
    """
    outer, *inner = site.axes.split()
    if inner != ["head", "query", "key"] or outer == "window":
        return site
    rows = "batch pos" if outer == "batch" else "image patch"
    return replace(site, axes=f"{rows} head key")


def _turned(site: Site, activation: Any) -> Any:
    """Returns an activation with the axes of `by_query`, or back in the module's own."""
    if not is_square(site):
        return activation
    if len(sizes := {x.shape[-1] for x in listed(activation)}) > 1:
        raise InterventionError(
            f"{site.name} has rows of {' and '.join(map(str, sorted(sizes)))} keys, of images or "
            "windows of different sizes. Run one image at a time, use Attend(…), which finds "
            "queries and keys there, or a hook function."
        )
    return each(lambda x: x.transpose(-3, -2), activation)


def _written(site: Site, activation: Any, edited: Any) -> Any:
    """Returns an edit of a `_turned` activation in the module's own order of axes."""
    edited = _turned(site, edited)
    if site.part != "attn_scores":
        return edited
    # A score of zero is a score like any other: what the model masks stays masked.
    return joint(lambda old, new: torch.where(is_visible(old), new, old), activation, edited)


def is_square(site: Site) -> bool:
    """Whether a site has attention's scores or patterns."""
    return site.part in ("attn_scores", "pattern")


def is_visible(scores: Tensor) -> Tensor:
    """Returns which scores the model's own mask leaves."""
    return scores > torch.finfo(scores.dtype).min / 2


def full_name(model: HookedModel, name: SiteName) -> str:
    """Returns a site's name; raises `UnknownHookError` for neither a name nor a slot's number."""
    if isinstance(name, Integral) and not isinstance(name, bool):
        return slot_name(int(name), model.cfg.n_layers)
    if not isinstance(name, str):
        raise UnknownHookError(
            f"A site was given as {repr(name)[:80]}; expected a hook name, such as "
            "'blocks.0.hook_resid_post', or the number of a slot."
        )
    return name


class Places:
    """Where places lie in inputs, each located once as long as this object is kept."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        # By identity; the objects are kept with the answers, so that no other gets their id.
        self._rows: dict[Any, tuple[Any, list[PromptRow]]] = {}
        self._located: dict[Any, tuple[Any, Located]] = {}
        self.has_warned = False
        """Whether a warning that is given once was given."""

    def rows(
        self, inputs: Mapping[str, Any], *, text: bool = False, images: bool = True
    ) -> list[PromptRow]:
        """Returns the prompts of some inputs, with their tokens' text and images if asked for."""
        key = id(inputs), text, images
        if key not in self._rows:
            self.model.require_call(inputs, ())
            grids = self.model.grids(inputs) if images else None
            found = rows_of(inputs, grids, text, placeholder_ids(self.model.hf_model))
            self._rows[key] = inputs, found
        return self._rows[key][1]

    def located(self, site: Site, inputs: Mapping[str, Any], at: Any) -> Located:
        """Returns where a place is at a site (at all sites by prompt and position it is alike)."""
        key = id(inputs), id(at), None if site.by_position else site.name
        if key not in self._located:
            if site.by_position:
                require_prompt_of_blocks(self.model.hf_model, site.name, inputs)
            images = not site.by_position or needs_images(at)
            found = locate(site, at, self.rows(inputs, text=needs_text(at), images=images))
            self._located[key] = (inputs, at), found
        return self._located[key][1]


@dataclass(frozen=True, eq=False)
class Placed:
    """An intervention bound to a model and inputs: checks, engines and hooks all read this."""

    part: Any
    where: Site
    inputs: Mapping[str, Any]
    located: tuple[Located, ...]
    """Where it writes, and where its source is read."""
    places: Places
    generated: tuple[Generated, ...] = ()
    """The generated tokens among the places where it writes."""

    @property
    def site(self) -> str:
        """The name of the site."""
        return self.where.name

    @property
    def read_where(self) -> Site:
        """The site at which a source is read."""
        return source_site_of(self.places.model, self.part, self.where)

    @property
    def read(self) -> str:
        """The name of the site at which a source is read."""
        return self.read_where.name

    @property
    def first(self) -> int:
        """The first position (or row), padding counted, that this changes."""
        return self.located[0].first

    def check(self, *_: Any) -> None:
        """Does nothing: everything was checked when the intervention was placed."""

    def hooks_for(self, *_: Any) -> list[Edit]:
        """Returns the hooks that carry this out; a source that is not recorded yet is run.

        One acts on the prompt, and one on generated tokens.
        """
        hooks: list[Edit] = []
        if not self.generated or any(len(inner) for _, inner in self.located[0]):
            hooks.append((self.site, self._hook))
        if self.generated:
            hooks.append((self.site, self._generated_hook()))
        return hooks

    def reading(self, **sources: Any) -> "Placed":
        """Returns the same with other runs of the same inputs to read from."""
        return replace(self, part=replace(self.part, **sources))

    @cached_property
    def _hook(self) -> Callable[..., Any]:
        return guarded(self.part._edit(self), self.inputs, self.where, self.places)

    def _generated_hook(self) -> OnGenerated:
        """Returns a new function, which counts the tokens of one run."""
        ready = self._recorded()
        axes = len(self.where.axes.split())
        made: dict[Any, Callable[[Any], Any]] = {}

        def edit(activation: Any, index: list[int]) -> Any:
            if activation.ndim != axes:
                raise InterventionError(
                    f"{self.site} has shape {tuple(activation.shape)} in this model; an "
                    f"intervention needs the axes [{self.where.axes}]. Use a hook function."
                )
            key = len(activation), tuple(index)
            if key not in made:
                made.clear()  # without a key-value cache, each pass has another
                located = ready.part._generated_at(ready, *key)
                made[key] = ready.part._edit(replace(ready, located=located))
            return _written(self.where, activation, made[key](_turned(self.where, activation)))

        return OnGenerated(edit, self.generated, self.inputs, str(self))

    def _recorded(self) -> "Placed":
        """Returns the same with the run that it reads recorded, so that it runs once."""
        name = getattr(self.part, "reads", "source")
        source = getattr(self.part, name, None)
        if source is None or isinstance(source, Recording):
            return self
        return self.reading(**{name: record(self.places.model, source, [self.read])})

    def __str__(self) -> str:
        return str(self.part)


def recorded_at(placed: Placed, source: "Source") -> Any:
    """Returns what a source has at the site that is read, of its own prompts (or images)."""
    model, site = placed.places.model, placed.read_where
    run = source if isinstance(source, Recording) else record(model, source, [site.name])
    require_stream(run.cache, site.name)
    values = _turned(site, run.cache[site.name])
    require_made_for(site, values, run.inputs, placed.places)
    return values


def inputs_of(source: "Source") -> Mapping[str, Any]:
    """Returns the inputs of a source; raises `InterventionError` for anything else."""
    if not isinstance(source, Recording | Mapping):
        raise InterventionError(
            f"A source was given as {repr(source)[:80]}; expected inputs of model.prepare, or "
            "record(model, inputs, …)."
        )
    return source.inputs if isinstance(source, Recording) else source


def guarded(
    edit: Callable[[Any], Any], inputs: Mapping[str, Any], site: Site, places: Places
) -> OnPrompt:
    """Returns an edit as a hook function that acts on the batch it was made for, and no other."""
    # Sites by prompt and position need no image.
    rows = [] if site.by_position else places.rows(inputs)
    needed = None if site.by_position else rows_needed(site, rows)

    def hook_fn(activation: Any, hook: HookPoint) -> Any:
        # The second call, or the first one of a part of the images.
        apart = hook.call > 0 or len(activation) <= max(needed or (), default=-1)
        if apart and not site.by_position:
            raise InterventionError(
                f"{hook.name} runs once for each image of these inputs, so an intervention there "
                "cannot tell them apart. Use hook_merged_embed (slot 0) at the same region, or one "
                "image at a time."
            )
        if is_square(site) and len(hook.rows) > len(needed or hook.rows):
            raise InterventionError(
                f"{hook.name} has a pattern for each window of an image, and no row of all keys. "
                "Use Attend(…), which finds queries and keys in their windows, or a hook function."
            )
        shown = _turned(site, activation)
        _require(site, shown, inputs, needed)
        return _written(site, activation, edit(shown))

    one_each = bool(rows) and all(len(row.grids) == 1 for row in rows)
    return OnPrompt(hook_fn, inputs, len(rows) if one_each else None)


def require_made_for(
    site: Site, activation: Any, inputs: Mapping[str, Any], places: Places
) -> None:
    """Raises `InterventionError` unless an activation is of these prompts, or of their images.

    Images may have more rows than their grids tell (of registers, say), but not fewer.
    """
    needed = None if site.by_position else rows_needed(site, places.rows(inputs))
    _require(site, activation, inputs, needed)


def _require(
    site: Site, activation: Any, inputs: Mapping[str, Any], needed: Mapping[int, int] | None
) -> None:
    """Does what `require_made_for` says; `needed` are the rows of each image (None: by prompt)."""
    if needed is None:
        _require_prompts(site, activation, inputs)
        return
    for image, n_rows in needed.items():
        if image < len(activation) and len(activation[image]) < n_rows:
            raise InterventionError(
                f"{site.name} has {counted(len(activation[image]), 'row')} for an image that its "
                f"grid gives {n_rows}: the model merges them before this site. Use the same region "
                "at a block of the vision encoder, at vision_projector.hook_out or at slot 0, or "
                "a hook function here."
            )


def _require_prompts(site: Site, activation: Any, inputs: Mapping[str, Any]) -> None:
    shape = prompt_shape(inputs)
    if shape is None:
        raise InterventionError(
            f"There are no positions to intervene at {site.name}: these inputs have no input_ids "
            "and no inputs_embeds. Use a hook function: fwd_hooks=[(name, fn)]."
        )
    # A model with several residual streams has one more axis: none of them is the stream.
    axes = site.axes.split()
    if activation.ndim != len(axes):
        why = "The model keeps several streams there. " if activation.ndim > len(axes) else ""
        raise InterventionError(
            f"{site.name} has shape {tuple(activation.shape)} in this model; an intervention needs "
            f"the axes [{site.axes}], of {_prompts(shape)}. {why}Use a hook function, "
            "fwd_hooks=[(name, fn)], or a site whose cached activation has these axes."
        )
    if (ran := tuple(activation.shape[:2])) != shape:
        raise InterventionError(
            f"An intervention at {site.name} was made for {_prompts(shape)} and ran on "
            f"{_prompts(ran)}. Give hooks(…, inputs=…) the inputs that you run. "
            "Where a model's blocks run on other positions than the prompt's, use a hook function "
            "there."
        )


def _prompts(shape: tuple[int, ...]) -> str:
    return f"{counted(shape[0], 'prompt')} of {counted(shape[1], 'position')}"

"""Interventions: what is written, where, and from what, as printable data.

A `Patch` writes activations of another run, an `Ablate` removes what is there, a `Steer`
moves it along directions; a `Chain` does several, in order.  Each names a site and a
place (a `Region` of an image, the last token, a span of text), says nothing of any
particular model until it is run, and can be moved to another site with `at_site`, which
is what a sweep does.  Use one wherever a hook is taken:

    model.run_with_hooks(inputs, [Patch(site, at=region, source=other_run)])

Everything that can be checked before a forward pass is: names, sizes, grids, shapes.  An
intervention is placed for certain inputs.  Run on others, or on one image of several,
its indices would still fit somewhere; a wrong number is worse than an error, so the hook
function refuses to act on anything but what it was made for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hooked_vlm.errors import InterventionError
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.names import VISION, resolve_name, slot_name
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.prepare import rows_of
from hooked_vlm.interventions.indexing import Located, locate, needs_text, rows_needed
from hooked_vlm.interventions.recording import Model, Recording, Source, record
from hooked_vlm.regions.positions import PromptRow


SiteName = str | int
"""A hook name, or the number of a slot of the LM's residual stream (slot 0: block 0's input)."""

Edit = tuple[str, Callable[..., Any]]


def site_of(model: Model, name: SiteName) -> Site:
    """Returns a model's site by name or slot, or raises `InterventionError` for a read-only one."""
    if isinstance(name, int):
        name = slot_name(name, model.cfg.n_layers)
    site = model.sites[resolve_name(name, model.sites)]
    if site.read_only:
        raise InterventionError(f"{site.name} cannot be written: {site.read_only}.")
    return site


@dataclass(frozen=True, eq=False, kw_only=True)
class _Intervention:
    """What all interventions share: a site, a place there, and how they become a hook."""

    site: SiteName = field(kw_only=False)
    at: Any = None
    """A Region, LastToken(), Span(…), …; None is every position."""
    heads: tuple[int, ...] | None = None
    """At sites with a head axis: the heads to act on; None is all of them."""

    def at_site(self, site: SiteName) -> Any:
        """Returns the same intervention at another site."""
        return replace(self, site=site)

    def check(self, model: Model, inputs: Mapping[str, Any]) -> None:
        """Raises what is wrong with this for a model and some inputs; runs nothing."""
        self.site_and_places(model, inputs)

    def first_position(self, model: Model, inputs: Mapping[str, Any]) -> int:
        """Returns the first position, padding counted, that this changes in any prompt."""
        _, (targets, *_) = self.site_and_places(model, inputs)
        return min((int(inner.min()) for _, inner in targets if len(inner)), default=0)

    def hooks_for(self, model: Model, inputs: Mapping[str, Any]) -> list[Edit]:
        """Returns the hook that carries this out on some inputs, all checks made.

        A source that is not recorded yet is run here.
        """
        site, places = self.site_and_places(model, inputs)
        edit = self._edit(model, site, *places)
        return [(site.name, guarded(edit, inputs, site, _rows(model, inputs, None)))]

    def site_and_places(self, model: Model, inputs: Mapping[str, Any]) -> tuple[Site, tuple]:
        site = site_of(model, self.site)
        self._check_heads(model, site)
        return site, self._places(model, site, inputs)

    def _places(self, model: Model, site: Site, inputs: Mapping[str, Any]) -> tuple:
        """Returns where to write (and to read), having checked everything else as well."""
        raise NotImplementedError

    def _edit(self, model: Model, site: Site, *places: Any) -> Callable[[Any], Any]:
        raise NotImplementedError

    def _check_heads(self, model: Model, site: Site) -> None:
        if self.heads is None:
            return
        if not site.heads and site.tap != "attention":
            raise InterventionError(
                f"{site.name} has axes [{site.axes}]: there are no heads to choose."
            )
        tower = model.cfg.vision if site.name.startswith(VISION) else model.cfg
        n_heads = tower.n_key_value_heads if "kv_head" in site.axes else tower.n_heads
        wrong = [head for head in self.heads if not 0 <= head < n_heads]
        if wrong:
            raise InterventionError(
                f"{site.name} has heads 0 to {n_heads - 1}; {wrong} were given."
            )

    def _located(self, site: Site, model: Model, inputs: Mapping[str, Any], at: Any) -> Located:
        return locate(site, at, _rows(model, inputs, at))

    def _check_width(self, model: Model, site: Site, width: int) -> None:
        tower = model.cfg.vision if site.name.startswith(VISION) else model.cfg
        axis = site.axes.split()[-1].replace("d_vision", "d_model")
        self._check_features(site, getattr(tower, axis, None), width)

    def _check_features(self, site: Site, expected: int | None, width: int) -> None:
        # None: how many features the projector reads is known when they are there.
        if expected is not None and width != expected:
            raise InterventionError(
                f"{site.name} has {expected} features, and {width} were given: {self}. Take "
                "vectors from activations of this site."
            )


def _rows(model: Model, inputs: Mapping[str, Any], place: Any) -> list[PromptRow]:
    return rows_of(inputs, model.grids(inputs), needs_text(place))


def _recorded(model: Model, source: "Source", site: Site) -> Any:
    """Returns what a source has at a site, checked to be of its prompts (or images)."""
    run = source if isinstance(source, Recording) else record(model, source, [site.name])
    values = run.cache[site.name]
    require_made_for(site, values, run.inputs, _rows(model, run.inputs, None))
    return values


def _inputs_of(source: "Source") -> Mapping[str, Any]:
    return source.inputs if isinstance(source, Recording) else source


def guarded(
    edit: Callable[[Any], Any], inputs: Mapping[str, Any], site: Site, rows: Sequence[PromptRow]
) -> Callable:
    """Returns an edit as a hook function that acts on the batch it was made for, and no other."""

    def hook_fn(activation: Any, hook: HookPoint) -> Any:
        if hook.call > 0 and not site.axes.startswith("batch pos"):
            raise InterventionError(
                f"{hook.name} runs once for each image of these inputs, so an intervention there "
                "cannot tell them apart. Use hook_merged_embed (slot 0) at the same region, or one "
                "image at a time."
            )
        require_made_for(site, activation, inputs, rows)
        return edit(activation)

    return hook_fn


def require_made_for(
    site: Site, activation: Any, inputs: Mapping[str, Any], rows: Sequence[PromptRow]
) -> None:
    """Raises `InterventionError` unless an activation is of these prompts, or of their images.

    Images may have more rows than their grids tell (of registers, say), but not fewer.
    """
    if site.axes.startswith("batch pos"):
        _require_prompts(site.name, activation, inputs)
        return
    for image, n_rows in rows_needed(site, rows).items():
        if image < len(activation) and len(activation[image]) < n_rows:
            raise InterventionError(
                f"{site.name} has {len(activation[image])} rows for an image that its grid gives "
                f"{n_rows}: the model merges them in front of this site. Use the same region at a "
                "block of the vision encoder, at vision_projector.hook_out or at slot 0, or a hook "
                "function here."
            )


def _require_prompts(name: str, activation: Any, inputs: Mapping[str, Any]) -> None:
    ids = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    if ids is None:
        raise InterventionError(
            f"There are no positions to intervene at {name}: these inputs have no input_ids. Use "
            "a hook function: fwd_hooks=[(name, fn)]."
        )
    batch, length = ids.shape
    if (ran := tuple(activation.shape[:2])) != (batch, length):
        raise InterventionError(
            f"An intervention at {name} was made for {batch} prompts of {length} positions and "
            f"ran on {ran[0]} of {ran[1]}. Give hooks(…, inputs=…) the inputs that you run; in a "
            "generation, interventions act on the prompt: prefill_only=True. Where a model's "
            "blocks run on other positions than the prompt's, use a hook function there."
        )

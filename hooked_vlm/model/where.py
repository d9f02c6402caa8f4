"""Where places are in the inputs of a run, for the cache of that run."""

import weakref
from collections.abc import Mapping
from typing import Any

from hooked_vlm.errors import UnsupportedModelError
from hooked_vlm.hooks.located import Located, locate, needs_images, needs_text
from hooked_vlm.hooks.names import without_gradient
from hooked_vlm.inputs.rows import placeholder_ids, prompt_shape, require_prompt_of_blocks, rows_of
from hooked_vlm.regions.positions import AnyOf, InImage
from hooked_vlm.regions.region import Region


class Where:
    """Finds places in the inputs of one run; it keeps the model only as long as others do."""

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        self._model, self.inputs = weakref.ref(model), inputs
        self._rows: dict[tuple[bool, bool], Any] = {}
        self._found: dict[Any, tuple[Any, Located]] = {}

    def located(self, name: str, place: Any, shape: tuple[int, ...]) -> Located | None:
        """Returns a place's indices at a site; None where the site has no such axis.

        That is also where a model keeps several streams, so that no axis is where it should be.
        """
        model = self._model()
        if model is None:
            raise UnsupportedModelError(
                "The model of this cache's run is gone, and with it where its images are. Keep the "
                "model as long as its caches are read."
            )
        name = without_gradient(name)  # a gradient has the axes of its activation
        site = model.sites[name]
        if not site.by_position and not (_is_in_image(place) and (site.by_patch or site.by_token)):
            return None
        if site.by_position:
            prompts = prompt_shape(self.inputs)
            if len(shape) != len(site.axes.split()) or prompts is None or shape[1] != prompts[1]:
                return None
        key = id(place), None if site.by_position else name
        if key not in self._found:
            if site.by_position:
                require_prompt_of_blocks(model.hf_model, name, self.inputs)
            images = not site.by_position or needs_images(place)
            found = locate(site, place, self._prompts(model, needs_text(place), images))
            self._found[key] = place, found  # the place is kept, so that no other gets its id
        return self._found[key][1]

    def _prompts(self, model: Any, text: bool, images: bool) -> Any:
        if (text, images) not in self._rows:
            grids = model.grids(self.inputs) if images else None
            known = placeholder_ids(model.hf_model)
            self._rows[text, images] = rows_of(self.inputs, grids, text, known)
        return self._rows[text, images]


def _is_in_image(place: Any) -> bool:
    if isinstance(place, AnyOf):
        return all(map(_is_in_image, place.parts))
    if isinstance(place, list | tuple):
        return bool(place) and all(map(_is_in_image, place))
    return isinstance(place, Region | InImage)

"""`HookedVisionEncoder`: a vision encoder without a language model, with the sites of a VLM's.

    model = HookedVisionEncoder.from_pretrained("facebook/dinov2-base")
    inputs = model.prepare([image, other])
    output, cache = model.run_with_cache(inputs)
    cache["resid_post", 3, "vision_encoder"], output.last_hidden_state

`inputs.grids[0][0]` is the grid of the first image.  Its cells are patches, and regions made
from pixels select the patches to patch, ablate or steer.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hooked_vlm.anatomy.devices import execution_device
from hooked_vlm.anatomy.sizes import EncoderConfig, read_encoder_config
from hooked_vlm.anatomy.vision import Vision, find_tower, read_tower
from hooked_vlm.anatomy.wrappers import chain_of
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import OptionalDevice, Processor
from hooked_vlm.errors import DataError, HookError, UnsupportedModelError, counted
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.names import NamesFilter
from hooked_vlm.hooks.sites import list_encoder_sites
from hooked_vlm.inputs.encoder import EncoderGrids, find_grids, prepare_images
from hooked_vlm.inputs.grid_finder import Grids
from hooked_vlm.inputs.prepare import Images
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.inputs.tensors import require_tensors
from hooked_vlm.model.base import FwdHook, HookedModel, ModelInputs
from hooked_vlm.model.gradients import Metric, require_metric, run_cached_with_gradients
from hooked_vlm.model.keywords import (
    CHECKED_LATER,
    ONE_MAPPING,
    require_held,
    require_inputs,
    require_processed,
)
from hooked_vlm.model.loading import load_image_model
from hooked_vlm.model.where import Where


class HookedVisionEncoder(HookedModel):
    """A vision encoder whose activations can be read, replaced and steered by name.

    >>> from PIL import Image
    >>> model = HookedVisionEncoder.from_pretrained("tiny-gemma-3")
    >>> inputs = model.prepare(Image.new("RGB", (192, 192)))
    >>> output, cache = model.run_with_cache(inputs, "vision_encoder.blocks.*.hook_resid_post")
    >>> inputs.grids[0][0].shape, cache["resid_post", 0, "vision_encoder"].shape
    ((24, 24), torch.Size([1, 576, 64]))
    """

    @checked(UnsupportedModelError)
    def __init__(
        self, hf_model: nn.Module, processor: Processor = None, name: str | None = None
    ) -> None:
        """Wraps a loaded encoder; `processor` is only needed for `prepare`.

        For a model that also takes text (CLIP, SigLIP, a VLM), its image encoder is wrapped.

        Raises `UnsupportedModelError` for a model without a single residual stream of patches:
        a convolutional one, one with stages, or one with attention in windows.
        """
        whole = chain_of(hf_model)
        found = find_tower(whole[-1])
        chain = whole if found is whole[-1] else chain_of(found)
        tower = read_tower(chain[-1])
        vision = tower.vision
        super().__init__(chain, list_encoder_sites(vision, tower.out), vision)
        self.processor = processor
        self.vision: Vision = vision
        name = name or getattr(getattr(hf_model, "config", None), "_name_or_path", "")
        self.cfg: EncoderConfig = read_encoder_config(
            self.hf_model, vision, name or type(hf_model).__name__
        )
        self._grids = EncoderGrids(self.hf_model, vision, self.cfg, self.without_hooks)

    @classmethod
    @checked(UnsupportedModelError, but=("name",))
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: torch.dtype | str = "auto",
        device: OptionalDevice = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "HookedVisionEncoder":
        """Loads a shipped model, a local folder or a hub name with `AutoModel`; safetensors only.

        Other keyword arguments go to transformers' `from_pretrained`
        (`attn_implementation`, `revision`, …).  Remote code runs only when
        `trust_remote_code=True` is among them.

        Raises `MissingWeightsError` for a checkpoint without some of the encoder's weights, which
        would be random; with `allow_missing_weights=True` this is a warning.
        """
        model, processor = load_image_model(
            name, dtype=dtype, device=device, device_map=device_map, **kwargs
        )
        return cls(model, processor, name=name)

    @property
    def device(self) -> torch.device:
        """The device on which the encoder computes; inputs belong there."""
        return execution_device(self.hf_model) or self.cfg.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the encoder computes; pixels belong in it."""
        return self.cfg.dtype

    def _reread(self) -> None:
        self.cfg = read_encoder_config(self.hf_model, self.vision, self.cfg.model_name)
        self._grids.cfg, self._footprint = self.cfg, None

    def __repr__(self) -> str:
        return (
            f"HookedVisionEncoder({self.cfg.model_name!r}, {counted(self.cfg.n_layers, 'layer')}, "
            f"{counted(len(self.sites), 'site')})"
        )

    @checked(DataError)
    def prepare(self, images: Images, **processor_kwargs: Any) -> Inputs:
        """Converts an image, or a list of images, to the encoder's inputs, each with a grid.

        Images are PIL, numpy `[height, width, 3]` or tensors `[3, height, width]`, with
        values in 0..255 (integers) or 0..1 (floats).  The cells of a grid are patches, and its
        positions are the encoder's rows, counting class and register tokens.

        Raises `GridError` when the patches cannot be placed on the image.  Warns when the
        processor resizes an image, because this changes the size of cells.
        """
        if self.processor is not None:
            require_processed(self.processor, processor_kwargs)
        return prepare_images(self._grids, self.processor, images, processor_kwargs)

    @checked(HookError, but=("inputs",))
    def grids(self, inputs: ModelInputs) -> Grids:
        """Returns the `TokenGrid` of each image of the inputs, each in a tuple of its own.

        For inputs that `prepare` did not make, pixels are those of the processed images.
        """
        require_inputs(inputs)
        require_tensors(self.hf_model, inputs)
        return inputs.grids if isinstance(inputs, Inputs) else find_grids(self._grids, inputs)

    @checked(HookError, but=("inputs",), missing=ONE_MAPPING)
    def forward(self, inputs: ModelInputs, **kwargs: Any) -> Any:
        """Runs the wrapped encoder with the keyword arguments and returns its output.

        Raises `HookError` for a keyword that the encoder does not read.
        """
        self.require_call(inputs, kwargs)
        require_held({**inputs, **kwargs})
        with self.turn():
            return self._chain[0](**inputs, **kwargs)

    __call__ = forward

    @checked(HookError, but=("inputs", "fwd_hooks", "bwd_hooks"), missing=ONE_MAPPING)
    def run_with_hooks(
        self,
        inputs: ModelInputs,
        fwd_hooks: Sequence[FwdHook] = (),
        bwd_hooks: Sequence[FwdHook] = (),
        **kwargs: Any,
    ) -> Any:
        """Runs once under hook functions or interventions, and returns the encoder's output.

        `bwd_hooks` get, and may replace, gradients (see `HookedVLM.run_with_hooks`).  Warns when a
        named site never ran.
        """
        self.require_call(inputs, kwargs)
        run = partial(self.forward, inputs, **kwargs)
        return self._run_hooked(run, fwd_hooks, inputs, bwd_hooks=bwd_hooks)

    @checked(HookError, but=CHECKED_LATER, missing=ONE_MAPPING)
    def run_with_cache(
        self,
        inputs: ModelInputs,
        names_filter: NamesFilter = None,
        *,
        fwd_hooks: Sequence[FwdHook] = (),
        device: OptionalDevice = None,
        check_memory: bool = True,
        incl_bwd: bool = False,
        metric: Metric | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Runs once and returns `(output, cache)`; cached tensors are detached.

        `names_filter` selects sites by name, pattern, a sequence of these, or a function.
        Values are cached after `fwd_hooks` have run, which may edit them.  `device` is where
        cached tensors are moved.  Raises `CacheMemoryError` before the run when the cache does
        not fit into memory, unless `check_memory=False`.  With `incl_bwd=True` it also has the
        gradients of one number, `metric(output)` (see `HookedVLM.run_with_cache`).
        """
        self.require_call(inputs, kwargs)
        require_metric(metric, incl_bwd)
        what = partial(self.forward, inputs, **kwargs), inputs, names_filter, fwd_hooks
        how: dict[str, Any] = {"device": device, "check_memory": check_memory}
        if incl_bwd:
            output, cache = run_cached_with_gradients(self, *what, metric, **how)
        else:
            output, cache = self._run_cached(*what, **how)
        cache.where = Where(self, inputs)
        return output, cache

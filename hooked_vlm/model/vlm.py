"""`HookedVLM`: a transformers vision-language model with a name for every activation.

The wrapped model is not changed: no weight is copied, no module is replaced, and a forward
pass without hooks is transformers' own.  The wrapper adds a name for each activation
(`hook_dict`) and runs with functions attached to these names.

    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    inputs = model.prepare(image, "The color of the square above the red square is ")
    logits, cache = model.run_with_cache(inputs)
    cache["resid_post", 3], cache["pattern", 0, "vision_encoder"]
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.anatomy.devices import execution_device
from hooked_vlm.anatomy.model import Anatomy, read_anatomy
from hooked_vlm.anatomy.sizes import HookedVLMConfig, VisionConfig, read_config
from hooked_vlm.anatomy.wrappers import chain_of
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import OptionalDevice, Processor
from hooked_vlm.errors import (
    DataError,
    HookError,
    UnsupportedModelError,
    counted,
)
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.names import NamesFilter
from hooked_vlm.hooks.sites import list_sites
from hooked_vlm.hooks.stand_ins import (
    layer_index,
    returns_tuples,
    run_until,
    uncached,
)
from hooked_vlm.inputs.given import given_grids
from hooked_vlm.inputs.grid_finder import GridFinder, Grids
from hooked_vlm.inputs.prepare import Images, Texts, prepare_inputs
from hooked_vlm.inputs.prepared import Inputs, together
from hooked_vlm.model.base import FwdHook, ModelInputs
from hooked_vlm.model.from_layer import run_from
from hooked_vlm.model.generating import Generates
from hooked_vlm.model.gradients import Metric, require_metric, run_cached_with_gradients
from hooked_vlm.model.instead import ShowsWeights
from hooked_vlm.model.keywords import (
    CHECKED_LATER,
    ONE_MAPPING,
    logits_of,
    require_pixels,
    require_processed,
)
from hooked_vlm.model.loading import load_pretrained
from hooked_vlm.model.readout import Readout


class HookedVLM(ShowsWeights, Generates):
    """A vision-language model whose activations can be read, replaced and steered by name.

    >>> from PIL import Image
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> logits, cache = model.run_with_cache(inputs, "blocks.*.hook_resid_post")
    >>> cache["resid_post", 0].shape
    torch.Size([1, 42, 128])
    >>> site = "blocks.0.hook_resid_post"
    >>> edited = model.run_with_hooks(inputs, [(site, lambda x, hook: 0 * x)])
    >>> torch.equal(edited, logits)
    False
    """

    @checked(UnsupportedModelError)
    def __init__(
        self, hf_model: nn.Module, processor: Processor = None, name: str | None = None
    ) -> None:
        """Wraps a loaded model; `processor` is only needed for `prepare`.

        Of a compiled, parallel or adapted model (PEFT), `hf_model` is then the model inside.

        Raises `UnsupportedModelError` when the module tree has no decoder with
        attention blocks or no language-modelling head, and for a wrapper with weights of its own.
        """
        chain = chain_of(hf_model)
        hf_model = chain[-1]
        self.anatomy: Anatomy = read_anatomy(hf_model)
        sites = list_sites(self.anatomy)
        super().__init__(chain, sites, self.anatomy.vision, self.anatomy.lm.path)
        self.processor = processor
        name = name or getattr(getattr(hf_model, "config", None), "_name_or_path", "")
        self.cfg: HookedVLMConfig = read_config(
            hf_model, self.anatomy, name or type(hf_model).__name__
        )
        self._tuples: list[int] | None = None
        self.grid_finder = GridFinder(self)

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
    ) -> "HookedVLM":
        """Loads a shipped model, a local folder or a hub name; safetensors only.

        Other keyword arguments go to transformers' `from_pretrained`
        (`attn_implementation`, `quantization_config`, `revision`, …).  Remote code runs
        only when `trust_remote_code=True` is among them.

        Raises `MissingWeightsError` for a checkpoint without some of the weights, which would be
        random; with `allow_missing_weights=True` this is a warning.
        """
        model, processor = load_pretrained(
            name, dtype=dtype, device=device, device_map=device_map, **kwargs
        )
        return cls(model, processor, name=name)

    @property
    def device(self) -> torch.device:
        """The device on which the text embedding computes; inputs belong there."""
        return execution_device(self.hf_model.get_submodule(self.anatomy.embed)) or self.cfg.device

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; raises `UnsupportedModelError` when there is no processor."""
        if self.processor is None:
            raise UnsupportedModelError(
                "This HookedVLM was made without a processor, so it has no tokenizer. Pass one: "
                "HookedVLM(hf_model, processor)."
            )
        return getattr(self.processor, "tokenizer", self.processor)

    def _reread(self) -> None:
        self.cfg = read_config(self.hf_model, self.anatomy, self.cfg.model_name)
        self._footprint = None

    def require_vision(self) -> VisionConfig:
        """Returns the vision encoder's sizes; raises `UnsupportedModelError` if there is none."""
        if self.cfg.vision is None:
            raise UnsupportedModelError(
                f"{self.cfg.model_name} has no vision encoder, so it takes no images and has no "
                "vision_encoder or vision_projector sites. Load a vision-language model."
            )
        return self.cfg.vision

    def __repr__(self) -> str:
        vision = f", vision {counted(self.cfg.vision.n_layers, 'layer')}" if self.cfg.vision else ""
        return (
            f"HookedVLM({self.cfg.model_name!r}, {counted(self.cfg.n_layers, 'layer')}{vision}, "
            f"{counted(len(self.sites), 'site')})"
        )

    # --- inputs ---------------------------------------------------------------------------

    @checked(DataError)
    def prepare(
        self,
        images: Images = None,
        texts: Texts = "",
        *,
        system: str | None = None,
        chat: bool | None = None,
        **processor_kwargs: Any,
    ) -> Inputs:
        """Converts images and prompts to model inputs, with a `TokenGrid` for every image.

        For one prompt, give an image (or a list of images) and a string.  For a batch, give a
        list of strings and a list with each prompt's image or list of images.  Images are
        PIL, numpy `[height, width, 3]` or tensors `[3, height, width]`, with values in
        0..255 (integers) or 0..1 (floats).  The chat template is used unless
        `chat=False` or the processor has none; images come before the text.  Prompts
        of different lengths are padded on the left, and positions count from each prompt's
        first token, so padding changes no result.

        Warns when the processor resizes an image, because this changes the size of cells.
        """
        if self.processor is None:
            raise UnsupportedModelError(
                "This HookedVLM was made without a processor, so it cannot prepare images and "
                "texts. Pass one, HookedVLM(hf_model, processor), or give forward() the tensors "
                "that the wrapped model takes."
            )
        if images is not None:
            self.require_vision()
        require_processed(self.processor, processor_kwargs)
        return prepare_inputs(
            self.grid_finder,
            images,
            texts,
            system=system,
            chat=chat,
            processor_kwargs=processor_kwargs,
        )

    @checked(HookError, but=("inputs",))
    def grids(self, inputs: ModelInputs) -> Grids:
        """Returns the `TokenGrid`s of the inputs, a tuple for each prompt.

        For inputs that `prepare` did not make, pixels are those of the processed images.  The
        rule that gives their grids is compared with a measurement, once for each layout.

        Raises `GridError` when these inputs determine no grid, and `NoGridError` where the model
        does not follow the rule: `prepare` then measures the grids, if there are any.
        """
        self.require_call(inputs, ())
        return inputs.grids if isinstance(inputs, Inputs) else given_grids(self.grid_finder, inputs)

    # --- running --------------------------------------------------------------------------

    @checked(HookError, but=("inputs",), missing=ONE_MAPPING)
    def forward(self, inputs: ModelInputs, **kwargs: Any) -> Float[Tensor, "batch pos d_vocab"]:
        """Runs the wrapped model with the keyword arguments and returns its logits.

        Raises `HookError` for a keyword that the wrapped model does not read, and for a prompt
        that holds image tokens without its pixels.
        """
        self.require_call(inputs, kwargs)
        require_pixels({**inputs, **kwargs}, self.cfg.image_token_id)
        with self.turn():
            return logits_of(self._chain[0](**inputs, **kwargs))

    __call__ = forward

    @checked(HookError, but=("inputs", "fwd_hooks", "bwd_hooks"), missing=ONE_MAPPING)
    def run_with_hooks(
        self,
        inputs: ModelInputs,
        fwd_hooks: Sequence[FwdHook] = (),
        bwd_hooks: Sequence[FwdHook] = (),
        **kwargs: Any,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Runs once under hook functions or interventions, and returns the logits.

        `bwd_hooks` are `(name, function)` too: when the user differentiates something computed
        from the logits, `function(gradient, hook)` gets the gradient of the site's activation (as
        it is after all forward functions), in its documented shape.  A tensor that it returns
        takes the gradient's place on the way back; at one site, functions act in this order.

        Warns when a named site never ran, such as a vision site without an image, and about
        `bwd_hooks` at a site that the logits do not depend on.  Raises `HookError` for `bwd_hooks`
        where no graph is kept (`torch.no_grad()`) or blocks are checkpointed.

        >>> from PIL import Image
        >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
        >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
        >>> show = lambda gradient, hook: print(hook.name, tuple(gradient.shape))
        >>> site = "blocks.1.attn.hook_z"
        >>> logits = model.run_with_hooks(inputs, bwd_hooks=[(site, show)])
        >>> logits[0, -1, 5].backward()
        blocks.1.attn.hook_z (1, 42, 4, 32)
        """
        self.require_call(inputs, kwargs)
        given = together(inputs, kwargs)
        run = partial(self.forward, inputs, **kwargs)
        return self._run_hooked(run, fwd_hooks, given, bwd_hooks=bwd_hooks)

    @checked(HookError, but=CHECKED_LATER, missing=ONE_MAPPING)
    def run_with_cache(
        self,
        inputs: ModelInputs,
        names_filter: NamesFilter = None,
        *,
        stop_at_layer: int | None = None,
        fwd_hooks: Sequence[FwdHook] = (),
        device: OptionalDevice = None,
        check_memory: bool = True,
        incl_bwd: bool = False,
        metric: Metric | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """Runs once and returns `(logits, cache)`; cached tensors are detached.

        `names_filter` selects sites by name, pattern (`"blocks.*.hook_resid_post"`), a
        sequence of these, or a function.  With `stop_at_layer=l` the pass ends before LM
        block l, and the residual stream there is returned in place of logits.
        Values are cached after `fwd_hooks` have run, which may edit them.  `device` is where
        cached tensors are moved.

        With `incl_bwd=True` the cache also has the gradients of one number, `metric(logits)`:
        `cache["resid_post_grad", 3]`.  A site that it does not depend on gets zeros, with a
        warning.  The logits are then without a graph, and no parameter gets a gradient.

        Raises `CacheMemoryError` before the run when the cache does not fit into the free
        memory of its device, unless `check_memory=False`.  Warns when the cache takes more
        than half of the free memory (see `memory.estimate_cache`).  Raises `HookError` for a
        metric without a gradient, or of more than one number.
        """
        self.require_call(inputs, kwargs)
        require_metric(metric, incl_bwd)
        if incl_bwd:
            kwargs = {**uncached(self.hf_model), **kwargs}

        def run() -> Tensor:
            return self.forward(inputs, **kwargs)

        def run_part() -> Tensor:
            assert stop_at_layer is not None
            return run_until(self.hf_model, self.anatomy.lm, stop_at_layer, run)

        if stop_at_layer is not None:
            stop_at_layer = layer_index(stop_at_layer, self.cfg.n_layers, "stop_at_layer")
        runs = run if stop_at_layer is None else run_part
        given = together(inputs, kwargs)
        what = runs, given, names_filter, fwd_hooks
        how: dict[str, Any] = {"device": device, "check_memory": check_memory}
        how["stop_at_layer"] = stop_at_layer
        if incl_bwd:
            output, cache = run_cached_with_gradients(self, *what, metric, **how)
        else:
            output, cache = self._run_cached(*what, **how)
        cache.readout = Readout(self, inputs, kwargs)
        return output, cache

    def block_outputs(self, run: Callable[[], Any]) -> list[int]:
        """Returns the length of each LM block's output tuple (0: no tuple).

        It is measured once, in one pass of `run` without the user's hooks, and cached.
        """
        if self._tuples is None:
            blocks = [self.hf_model.get_submodule(b.path) for b in self.anatomy.lm.blocks]
            with self.without_hooks(), torch.no_grad(), self.eager():
                self._tuples = returns_tuples(blocks, run)
        return self._tuples

    @checked(HookError, but=("inputs", "layer", "fwd_hooks"))
    def run_from_layer(
        self,
        inputs: ModelInputs,
        residual: Float[Tensor, "batch pos *streams d_model"],
        layer: int,
        fwd_hooks: Sequence[FwdHook] = (),
        **kwargs: Any,
    ) -> Float[Tensor, "batch kept_pos d_vocab"]:
        """Runs LM blocks `layer` and above on a residual stream, and returns the logits.

        `inputs` are those of the whole prompt; positions and masks are computed from them.
        Blocks below `layer` are skipped, and there is no key-value cache.  With the residual
        stream of `run_with_cache(inputs, stop_at_layer=layer)`, the logits are those of the
        full run.  This is TransformerLens's `start_at_layer`.  `layer=n_layers` is after the last
        block: the final norm and the head alone (a logit lens).
        A model with several residual streams has an axis for them.

        Warns about hooks in skipped blocks, which do not run, and about writes to embeddings,
        which `residual` replaces.  The vision encoder runs as usual, for models in which later
        blocks read it (cross-attention, DeepStack).
        """
        return run_from(self, inputs, residual, layer, fwd_hooks, kwargs)

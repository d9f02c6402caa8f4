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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.anatomy.devices import execution_device
from hooked_vlm.anatomy.model import Anatomy, read_anatomy
from hooked_vlm.anatomy.sizes import HookedVLMConfig, read_config
from hooked_vlm.anatomy.wrappers import chain_of
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import OptionalDevice, Processor
from hooked_vlm.errors import (
    HookError,
    UnsupportedModelError,
    counted,
)
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.names import NamesFilter
from hooked_vlm.hooks.on_request import on_request_sites
from hooked_vlm.hooks.sites import list_sites
from hooked_vlm.hooks.stand_ins import (
    layer_index,
    returns_tuples,
    run_until,
    uncached,
)
from hooked_vlm.inputs.grid_finder import GridFinder
from hooked_vlm.inputs.prepared import together
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
)
from hooked_vlm.model.loading import load_pretrained
from hooked_vlm.model.preparing import Prepares
from hooked_vlm.model.readout import Readout
from hooked_vlm.model.returned import ReturnType, returned
from hooked_vlm.model.tokens import HasTokens
from hooked_vlm.model.views import HasPoints
from hooked_vlm.model.where import Where


class HookedVLM(Prepares, HasTokens, HasPoints, ShowsWeights, Generates):
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
        self._add_on_request(on_request_sites(hf_model, self.anatomy))
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

    def _reread(self) -> None:
        self.cfg = read_config(self.hf_model, self.anatomy, self.cfg.model_name)
        self._footprint = None

    def __repr__(self) -> str:
        vision = f", vision {counted(self.cfg.vision.n_layers, 'layer')}" if self.cfg.vision else ""
        return (
            f"HookedVLM({self.cfg.model_name!r}, {counted(self.cfg.n_layers, 'layer')}{vision}, "
            f"{counted(len(self.sites), 'site')})"
        )

    # --- running --------------------------------------------------------------------------

    @checked(HookError, but=("inputs",), missing=ONE_MAPPING)
    def forward(
        self,
        inputs: ModelInputs,
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Runs the wrapped model with the keyword arguments and returns its logits.

        `return_type="loss"` is the mean cross-entropy of the next token over the tokens of text
        (image tokens are not predicted), `"both"` is `(logits, loss)`, and None returns nothing.
        `loss_per_token` gives it as `[batch, pos - 1]`, NaN where the next token is no text.

        Raises `HookError` for a keyword that the wrapped model does not read, and for a prompt
        that holds image tokens without its pixels.
        """
        self.require_call(inputs, kwargs)
        require_pixels({**inputs, **kwargs}, self.cfg.image_token_id)
        with self.turn():
            logits = logits_of(self._chain[0](**inputs, **kwargs))
        if return_type == "logits":
            return logits
        given = together(inputs, kwargs)
        return returned(self.hf_model, logits, given, return_type, loss_per_token)

    __call__ = forward

    @checked(HookError, but=("inputs", "fwd_hooks", "bwd_hooks"), missing=ONE_MAPPING)
    def run_with_hooks(
        self,
        inputs: ModelInputs,
        fwd_hooks: Sequence[FwdHook] = (),
        bwd_hooks: Sequence[FwdHook] = (),
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Runs once under hook functions or interventions, and returns the logits.

        `bwd_hooks` are `(name, function)` too: when the user differentiates something computed
        from the logits, `function(gradient, hook)` gets the gradient of the site's activation (as
        it is after all forward functions), in its documented shape.  A tensor that it returns
        takes the gradient's place on the way back; at one site, functions act in this order.
        `return_type` and `loss_per_token` are those of `forward`.

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
        given, kind = together(inputs, kwargs), (return_type, loss_per_token)
        run = self._running(inputs, kwargs, *kind)
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
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        pos_slice: int | slice | Sequence[int] | None = None,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Runs once and returns `(logits, cache)`; cached tensors are detached.

        `names_filter` selects sites by name, pattern (`"blocks.*.hook_resid_post"`), a
        sequence of these, or a function.  With `stop_at_layer=l` the pass ends before LM
        block l, and the residual stream there is returned in place of logits.
        Values are cached after `fwd_hooks` have run, which may edit them.  `device` is where
        cached tensors are moved.  With `pos_slice` (a number, a slice or a list) the cache has
        these positions of the prompt alone, cut after the run; with `remove_batch_dim` it has no
        batch axis.  `return_type` and `loss_per_token` are those of `forward`.

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

        run = self._running(inputs, kwargs, return_type, loss_per_token)

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
        readout = Readout(self, inputs, kwargs)
        if stop_at_layer is None:
            readout.keep_last(output)
        cache.readout, cache.where = readout, Where(self, given)
        return output, cache.shaped(self.sites, pos_slice, remove_batch_dim)

    def _running(
        self, inputs: ModelInputs, kwargs: Any, return_type: str | None, loss_per_token: bool
    ) -> Callable[[], Any]:
        how: dict[str, Any] = {"return_type": return_type, "loss_per_token": loss_per_token}
        return lambda: self.forward(inputs, **how, **kwargs)

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

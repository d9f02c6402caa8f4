"""`HookedVLM`: a transformers vision-language model with a name for every activation.

The wrapped model is not changed: no weight is copied, no module is replaced, and a forward
pass without hooks is transformers' own.  The wrapper adds a name for each activation
(`hook_dict`) and runs with functions attached to these names.

    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    inputs = model.prepare(image, "The color of the square above the red square is ")
    logits, cache = model.run_with_cache(inputs)
    cache["resid_post", 3], cache["pattern", 0, "vision_encoder"]
"""

import warnings
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
    HookedVLMWarning,
    HookError,
    UnsupportedModelError,
    callers_level,
    counted,
)
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.names import NamesFilter, site_path
from hooked_vlm.hooks.on_request import on_request_sites
from hooked_vlm.hooks.sites import list_sites
from hooked_vlm.hooks.stand_ins import (
    EMBEDDINGS,
    layer_index,
    noting,
    returns_tuples,
    run_until,
    skipping,
    start_site,
    uncached,
)
from hooked_vlm.inputs.grid_finder import GridFinder
from hooked_vlm.inputs.prepared import together
from hooked_vlm.model.base import FwdHook, HookedModel, ModelInputs
from hooked_vlm.model.instead import ShowsWeights
from hooked_vlm.model.keywords import (
    CHECKED_LATER,
    ONE_MAPPING,
    logits_of,
    require_generates,
    require_given_once,
    require_options,
    require_pixels,
)
from hooked_vlm.model.loading import load_pretrained
from hooked_vlm.model.preparing import Prepares
from hooked_vlm.model.readout import Readout
from hooked_vlm.model.returned import ReturnType, returned
from hooked_vlm.model.said import warn_unran
from hooked_vlm.model.tokens import HasTokens
from hooked_vlm.model.views import HasPoints
from hooked_vlm.model.where import Where


class HookedVLM(Prepares, HasTokens, HasPoints, ShowsWeights, HookedModel):
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

    @checked(HookError, but=("inputs", "fwd_hooks"), missing=ONE_MAPPING)
    def run_with_hooks(
        self,
        inputs: ModelInputs,
        fwd_hooks: Sequence[FwdHook] = (),
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Runs once under hook functions or interventions, and returns the logits.

        `return_type` and `loss_per_token` are those of `forward`.  Warns when a named site never
        ran, such as a vision site without an image.
        """
        self.require_call(inputs, kwargs)
        given, kind = together(inputs, kwargs), (return_type, loss_per_token)
        return self._run_hooked(self._running(inputs, kwargs, *kind), fwd_hooks, given)

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

        Raises `CacheMemoryError` before the run when the cache does not fit into the free
        memory of its device, unless `check_memory=False`.  Warns when the cache takes more
        than half of the free memory (see `memory.estimate_cache`).
        """
        self.require_call(inputs, kwargs)

        run = self._running(inputs, kwargs, return_type, loss_per_token)

        def run_part() -> Tensor:
            assert stop_at_layer is not None
            return run_until(self.hf_model, self.anatomy.lm, stop_at_layer, run)

        if stop_at_layer is not None:
            stop_at_layer = layer_index(stop_at_layer, self.cfg.n_layers, "stop_at_layer")
        runs = run if stop_at_layer is None else run_part
        given = together(inputs, kwargs)
        output, cache = self._run_cached(
            runs, given, names_filter, fwd_hooks, device, check_memory, stop_at_layer
        )
        cache.readout, cache.where = Readout(self, inputs, kwargs), Where(self, given)
        return output, cache.shaped(self.sites, pos_slice, remove_batch_dim)

    def _running(
        self, inputs: ModelInputs, kwargs: Any, return_type: str | None, loss_per_token: bool
    ) -> Callable[[], Any]:
        how: dict[str, Any] = {"return_type": return_type, "loss_per_token": loss_per_token}
        return lambda: self.forward(inputs, **how, **kwargs)

    @checked(HookError, but=("inputs", "fwd_hooks"), missing=ONE_MAPPING)
    def generate(
        self,
        inputs: ModelInputs,
        *,
        fwd_hooks: Sequence[FwdHook] = (),
        prefill_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generates with transformers' own `generate` under hooks; returns prompt and new ids.

        With `return_dict_in_generate=True` it is transformers' own output, as `generate` gives it.

        Functions run at every step, as in TransformerLens and under `hooks()`; `hook.step` is its
        number, and `hook.positions` are the positions that it computes.  With `prefill_only` they
        act on the prompt alone.  Interventions always do, since they name places of the prompt; of
        several beams or sequences they act on each.  Without a key-value cache every step runs the
        prompt again, and they act on the prompt's positions in each, so the result is the same.
        """

        self.require_call(inputs, ())
        require_given_once(inputs, kwargs)
        require_options(kwargs)
        if new := {name: kwargs[name] for name in kwargs.keys() - self._generates}:
            require_generates(self.hf_model, new)
            # With a function of the user's as `custom_generate`, any keyword was let through.
            self._generates |= set() if callable(kwargs.get("custom_generate")) else new.keys()
        require_pixels({**inputs, **kwargs}, self.cfg.image_token_id)

        generate: Any = getattr(self._chain[0], "generate", None) or self.hf_model.generate

        def run() -> Any:
            return generate(**inputs, **kwargs)

        given = together(inputs, kwargs)
        return self._run_hooked(run, fwd_hooks, given, prefill_only, is_generation=True)

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
        # 1. A function that writes the residual stream at `layer`, and those of the user above.
        blocks = [self.hf_model.get_submodule(b.path) for b in self.anatomy.lm.blocks]
        layer = layer_index(layer, len(blocks), "layer")
        kwargs = {**uncached(self.hf_model), **kwargs}
        tuples = self.block_outputs(lambda: self.forward(inputs, **kwargs))
        site = start_site(self.sites, layer, len(blocks))
        start = (site, lambda here, hook: residual.to(here.device, copy=True))
        pairs = self._pairs(fwd_hooks, together(inputs, kwargs))
        below = {("lm", i) for i in range(layer)}
        skipped = {name for name, _ in pairs if site_path(name)[:2] in below}
        lost: set[str] = set()
        run = [
            (name, noting(fn, name, lost) if name in EMBEDDINGS else fn)
            for name, fn in pairs
            if name not in skipped
        ]
        # 2. Run with the blocks below `layer` replaced, then warn about functions without effect.
        with self.turn(), skipping(blocks[:layer], tuples[:layer]):
            logits = self.run_with_hooks(inputs, [start, *run], **kwargs)
        warn_unran(skipped)
        if lost:
            warnings.warn(
                f"The write to {', '.join(sorted(lost))} has no effect: the run starts "
                f"from the residual stream that was given for layer {layer}. Write to "
                f"{site}, or change `residual`.",
                HookedVLMWarning,
                stacklevel=callers_level(),
            )
        return logits

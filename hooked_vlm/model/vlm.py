"""`HookedVLM`: a transformers vision-language model with every activation named.

The wrapped model stays the user's: no weight is copied, no module replaced, and a
forward pass with no hook attached is transformers' own.  What is added is a name for
each activation (`hook_dict`), and running under functions attached to those names.

    model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    inputs = model.prepare(image, "The color of the square above the red square is ")
    logits, cache = model.run_with_cache(inputs)
    cache["resid_post", 3], cache["pattern", 0, "vision_encoder"]
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.anatomy.devices import execution_device
from hooked_vlm.anatomy.model import Anatomy, read_anatomy
from hooked_vlm.anatomy.sizes import HookedVLMConfig, VisionConfig, read_config
from hooked_vlm.errors import HookedVLMWarning, UnsupportedModelError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.names import NamesFilter
from hooked_vlm.hooks.sites import describe_sites, list_sites
from hooked_vlm.hooks.stand_ins import (
    EMBEDDINGS,
    layer_index,
    noting,
    returns_tuples,
    run_until,
    skipping,
    uncached,
)
from hooked_vlm.inputs.grid_finder import GridFinder
from hooked_vlm.inputs.prepare import Images, Inputs, Texts, prepare_inputs
from hooked_vlm.model.base import FwdHook, HookedModel, ModelInputs
from hooked_vlm.model.loading import load_pretrained


class HookedVLM(HookedModel):
    """A vision-language model whose activations can be read, replaced and steered by name."""

    def __init__(self, hf_model: nn.Module, processor: Any = None, name: str | None = None) -> None:
        """Wraps a loaded model; `processor` is only needed for `prepare`.

        Raises `UnsupportedModelError` when the module tree has no decoder with
        attention blocks or no language-modelling head.
        """
        self.anatomy: Anatomy = read_anatomy(hf_model)
        super().__init__(hf_model, list_sites(self.anatomy), self.anatomy.vision)
        self.processor = processor
        name = name or getattr(getattr(hf_model, "config", None), "_name_or_path", "")
        self.cfg: HookedVLMConfig = read_config(
            hf_model, self.anatomy, name or type(hf_model).__name__
        )
        self._tuples: list[int] | None = None
        self.grid_finder = GridFinder(self)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> "HookedVLM":
        """Loads a shipped model, a local folder or a hub name; safetensors only.

        Other keyword arguments go to transformers' `from_pretrained`
        (`attn_implementation`, `quantization_config`, `revision`, …).  Remote code runs
        only when `trust_remote_code=True` is among them.
        """
        model, processor = load_pretrained(
            name, dtype=dtype, device=device, device_map=device_map, **kwargs
        )
        return cls(model, processor, name=name)

    @property
    def device(self) -> torch.device:
        """Where the text embedding computes, and so where inputs belong."""
        return execution_device(self.hf_model.get_submodule(self.anatomy.embed)) or self.cfg.device

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; raises `UnsupportedModelError` when there is no processor."""
        if self.processor is None:
            raise UnsupportedModelError(
                "This HookedVLM was made without a processor: pass one to it."
            )
        return getattr(self.processor, "tokenizer", self.processor)

    def require_vision(self) -> VisionConfig:
        """Returns the vision encoder's sizes; raises `UnsupportedModelError` if there is none."""
        if self.cfg.vision is None:
            raise UnsupportedModelError(
                f"{self.cfg.model_name} has no vision encoder, so it takes no images and has no "
                "vision_encoder or vision_projector sites."
            )
        return self.cfg.vision

    def describe(self) -> str:
        """Returns the sites as a tree with their shapes, layers folded together."""
        return describe_sites(self.cfg, self.sites)

    def __repr__(self) -> str:
        vision = f", vision {self.cfg.vision.n_layers} layers" if self.cfg.vision else ""
        return (
            f"HookedVLM({self.cfg.model_name!r}, {self.cfg.n_layers} layers{vision}, "
            f"{len(self.sites)} sites)"
        )

    # --- inputs ---------------------------------------------------------------------------

    def prepare(
        self,
        images: Images = None,
        texts: Texts = "",
        *,
        system: str | None = None,
        chat: bool | None = None,
        **processor_kwargs: Any,
    ) -> Inputs:
        """Turns images and prompts into model inputs, with a `TokenGrid` for every image.

        One prompt: an image (or a list of images) and a string.  A batch: a list of
        strings and a list that holds each prompt's image or list of images.  Images are
        PIL, numpy `[height, width, 3]` or tensors `[3, height, width]`, with values in
        0..255 (integers) or 0..1 (floats).  The chat template is used unless
        `chat=False` or the processor has none; images stand before the text.  Prompts
        of different lengths are padded on the left, and positions are counted from
        each prompt's own first token, so padding changes no result.

        Warns when the processor resizes an image, because cells move.
        """
        if self.processor is None:
            raise UnsupportedModelError(
                "This HookedVLM was made without a processor, so it cannot prepare images and "
                "texts: pass one, HookedVLM(hf_model, processor), or give forward() the tensors "
                "that the wrapped model takes."
            )
        if images is not None:
            self.require_vision()
        return prepare_inputs(
            self, images, texts, system=system, chat=chat, processor_kwargs=processor_kwargs
        )

    def grids(self, inputs: ModelInputs) -> tuple:
        """Returns the `TokenGrid`s of any inputs, a tuple for each prompt.

        For inputs that `prepare` did not make, pixels are those the encoder sees.
        """
        return inputs.grids if isinstance(inputs, Inputs) else self.grid_finder.by_rule(inputs)

    # --- running --------------------------------------------------------------------------

    def forward(self, inputs: ModelInputs, **kwargs: Any) -> Float[Tensor, "batch pos d_vocab"]:
        """Runs the wrapped model and returns its logits; keyword arguments go to its forward."""
        return self.hf_model(**inputs, **kwargs).logits

    __call__ = forward

    def run_with_hooks(
        self, inputs: ModelInputs, fwd_hooks: Sequence[FwdHook] = (), **kwargs: Any
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Runs once under hook functions or interventions, and returns the logits.

        Warns when a named site never ran, such as a vision site on a prompt with no image.
        """
        return self._run_hooked(lambda: self.forward(inputs, **kwargs), fwd_hooks, inputs)

    def run_with_cache(
        self,
        inputs: ModelInputs,
        names_filter: NamesFilter = None,
        *,
        stop_at_layer: int | None = None,
        fwd_hooks: Sequence[FwdHook] = (),
        device: str | torch.device | None = None,
        check_memory: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """Runs once and returns `(logits, cache)`; cached tensors are detached.

        `names_filter` selects sites by name, pattern (`"blocks.*.hook_resid_post"`), a
        sequence of these, or a function.  With `stop_at_layer=l` the pass ends in front
        of LM block l and the residual stream there is returned in place of logits.
        Values are cached as they are after `fwd_hooks`, which may edit them.  `device`
        moves the cached tensors as they are taken.

        Raises `CacheMemoryError` before anything runs when the cache will not fit in the
        free memory of where it is kept, unless `check_memory=False`; warns above half of it
        (see `memory.estimate_cache`).
        """

        def run() -> Tensor:
            return self.forward(inputs, **kwargs)

        def run_part() -> Tensor:
            assert stop_at_layer is not None
            return run_until(self.hf_model, self.anatomy.lm, stop_at_layer, run)

        runs = run if stop_at_layer is None else run_part
        return self._run_cached(
            runs, inputs, names_filter, fwd_hooks, device, check_memory, stop_at_layer
        )

    def generate(
        self,
        inputs: ModelInputs,
        *,
        fwd_hooks: Sequence[FwdHook] = (),
        prefill_only: bool = True,
        **kwargs: Any,
    ) -> Int[Tensor, "batch pos"]:
        """Generates with transformers' own `generate` under hooks; returns prompt and new ids.

        With `prefill_only` the functions act on the prompt alone.  Without a key-value
        cache (`use_cache=False`) every step runs the prompt anew, and the functions are
        given that part of it each time, so both ways generate the same.  Otherwise they
        run at every step; `hook.step` counts.
        """

        def run() -> Tensor:
            return self.hf_model.generate(**inputs, **kwargs)  # type: ignore[operator]

        return self._run_hooked(run, fwd_hooks, inputs, prefill_only, is_generation=True)

    def block_outputs(self, run: Callable[[], Any]) -> list[int]:
        """Returns how long a tuple each LM block returns (0: none), watching `run` if need be."""
        if self._tuples is None:
            blocks = [self.hf_model.get_submodule(b.path) for b in self.anatomy.lm.blocks]
            with torch.no_grad():
                self._tuples = returns_tuples(blocks, run)
        return self._tuples

    def run_from_layer(
        self,
        inputs: ModelInputs,
        residual: Float[Tensor, "batch pos d_model"],
        layer: int,
        fwd_hooks: Sequence[FwdHook] = (),
        **kwargs: Any,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Runs LM blocks `layer` and above on a residual stream, and returns the logits.

        `inputs` are those of the whole prompt: positions and masks come from them.  Blocks
        below `layer` are skipped; there is no key-value cache.  With the residual stream
        that `run_with_cache(inputs, stop_at_layer=layer)` returned, the logits are those of
        the full run.  TransformerLens's `start_at_layer`.

        Warns of hooks in skipped blocks, which do not run, and of writes to embeddings, which
        `residual` replaces.  The vision encoder runs as ever: where it feeds later blocks too
        (cross-attention, DeepStack) they read it, elsewhere nothing does.
        """
        blocks = [self.hf_model.get_submodule(b.path) for b in self.anatomy.lm.blocks]
        layer = layer_index(layer, len(blocks), "layer", behind=False)
        kwargs = {**uncached(self.hf_model), **kwargs}
        tuples = self.block_outputs(lambda: self.forward(inputs, **kwargs))
        start = (f"blocks.{layer}.hook_resid_pre", lambda here, hook: residual.to(here.device))
        skipped = tuple(f"blocks.{i}." for i in range(layer))
        pairs = self._pairs(fwd_hooks, inputs)
        lost: set[str] = set()
        run = [
            (name, noting(fn, name, lost) if name in EMBEDDINGS else fn)
            for name, fn in pairs
            if not name.startswith(skipped)
        ]
        with skipping(blocks[:layer], tuples[:layer]):
            logits = self.run_with_hooks(inputs, [start, *run], **kwargs)
        self._warn_unran({name for name, _ in pairs if name.startswith(skipped)})
        if lost:
            warnings.warn(
                f"What was written to {', '.join(sorted(lost))} has no effect: the run starts "
                f"from the residual stream that was given for layer {layer}. Write to "
                f"blocks.{layer}.hook_resid_pre, or change `residual`.",
                HookedVLMWarning,
                stacklevel=2,
            )
        return logits

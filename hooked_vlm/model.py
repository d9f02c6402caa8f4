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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.anatomy import Anatomy, read_anatomy
from hooked_vlm.attention import implementation
from hooked_vlm.cache import ActivationCache
from hooked_vlm.config import HookedVLMConfig, VisionConfig, read_config
from hooked_vlm.describe import describe_sites
from hooked_vlm.errors import HookedVLMWarning, HookError, UnsupportedModelError
from hooked_vlm.hooks import HookFunction, HookPoint, Reader, Run, attach
from hooked_vlm.image_grids import GridFinder
from hooked_vlm.inputs import Images, Inputs, Texts, prepare_inputs
from hooked_vlm.layout import Images as VisionActivation
from hooked_vlm.loading import load_pretrained
from hooked_vlm.naming import VISION, NamesFilter, count_layers, select_names
from hooked_vlm.partial import layer_index, returns_tuples, run_until, skipping
from hooked_vlm.sites import Site, list_sites


ModelInputs = Mapping[str, Any]
"""What `prepare` returns, or any mapping of the tensors the wrapped model's forward takes."""

FwdHook = Any
"""`(name, function)`, the name a string, a pattern or a function of names; or an intervention."""


class HookedVLM:
    """A vision-language model whose activations can be read, replaced and steered by name."""

    def __init__(self, hf_model: nn.Module, processor: Any = None, name: str | None = None) -> None:
        """Wraps a loaded model; `processor` is only needed for `prepare`.

        Raises `UnsupportedModelError` when the module tree has no decoder with
        attention blocks or no language-modelling head.
        """
        self.hf_model = hf_model
        self.processor = processor
        self.anatomy: Anatomy = read_anatomy(hf_model)
        self.sites: dict[str, Site] = list_sites(self.anatomy)
        self.hook_dict: dict[str, HookPoint] = {
            site.name: HookPoint(site.name, site.axes, site.read_only)
            for site in self.sites.values()
        }
        name = name or getattr(getattr(hf_model, "config", None), "_name_or_path", "")
        self.cfg: HookedVLMConfig = read_config(
            hf_model, self.anatomy, name or type(hf_model).__name__
        )
        stacks = ("blocks", f"{VISION}.blocks")
        self._n_layers = {stack: count_layers(stack, self.sites) for stack in stacks}
        self._open: list[tuple[list[tuple[str, HookFunction]], Run]] = []
        self._attached = ExitStack()
        self._said_eager = False
        self._tuples: list[bool] | None = None
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
        """Where the text embedding is, and so where inputs belong."""
        return self.hf_model.get_submodule(self.anatomy.embed).weight.device  # type: ignore[return-value]

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; raises `UnsupportedModelError` when there is no processor."""
        if self.processor is None:
            raise UnsupportedModelError(
                "This HookedVLM was made without a processor: pass one to it."
            )
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def hook_names(self) -> list[str]:
        """The names of all sites, in the order in which a forward pass meets them."""
        return list(self.sites)

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

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[FwdHook] = (),
        inputs: ModelInputs | None = None,
        prefill_only: bool = False,
    ) -> Iterator["HookedVLM"]:
        """Attaches hook functions for the length of a `with` block.

        Blocks nest: outer functions run first.  Interventions among `fwd_hooks` need the
        `inputs` they will act on.  Raises `UnknownHookError` for a name of no site before
        anything is attached; whatever happens inside, nothing stays attached after.
        """
        pairs = self._pairs(fwd_hooks, inputs)
        self._say_eager(pairs)
        prompt = None
        if prefill_only and inputs is not None:
            prompt = int(inputs["input_ids"].shape[-1])
        self._open.append((pairs, Run(prefill_only, prompt)))
        try:
            self._reattach()
            yield self
        finally:
            self._open.pop()
            self._reattach()

    def _reattach(self) -> None:
        """Attaches the functions of all open blocks anew, so that the outer ones run first."""
        self._attached.close()
        if self._open:
            vision = self.anatomy.vision
            self._attached.enter_context(
                attach(self.hf_model, self.sites, self.hook_dict, self._open, vision)
            )

    def run_with_hooks(
        self, inputs: ModelInputs, fwd_hooks: Sequence[FwdHook] = (), **kwargs: Any
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Runs once under hook functions or interventions, and returns the logits.

        Warns when a named site never ran, such as a vision site on a prompt with no image.
        """
        pairs = self._pairs(fwd_hooks, inputs)
        ran: set[str] = set()
        with self.hooks([*pairs, *_watchers(pairs, ran)]):
            logits = self.forward(inputs, **kwargs)
        self._warn_unran({name for name, _ in pairs} - ran)
        return logits

    def run_with_cache(
        self,
        inputs: ModelInputs,
        names_filter: NamesFilter = None,
        *,
        stop_at_layer: int | None = None,
        fwd_hooks: Sequence[FwdHook] = (),
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """Runs once and returns `(logits, cache)`; cached tensors are detached.

        `names_filter` selects sites by name, pattern (`"blocks.*.hook_resid_post"`), a
        sequence of these, or a function.  With `stop_at_layer=l` the pass ends in front
        of LM block l and the residual stream there is returned in place of logits.
        Values are cached as they are after `fwd_hooks`, which may edit them.  `device`
        moves the cached tensors as they are taken.
        """
        names = select_names(names_filter, self.hook_names)
        pairs = self._pairs(fwd_hooks, inputs)
        found: dict[str, VisionActivation] = {}
        # A later hook may edit, in place, memory that an earlier site shares.
        copy = bool(pairs) or bool(self._open)

        def keep(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().clone() if copy else tensor.detach()
            return tensor if device is None else tensor.to(device)

        def store(value: VisionActivation, hook: HookPoint) -> None:
            found[hook.name] = [keep(v) for v in value] if isinstance(value, list) else keep(value)

        reader = Reader(store)
        with self.hooks([*pairs, *((name, reader) for name in names)]):
            if stop_at_layer is None:
                output = self.forward(inputs, **kwargs)
            else:
                output = run_until(
                    self.hf_model,
                    self.anatomy.lm,
                    stop_at_layer,
                    lambda: self.forward(inputs, **kwargs),
                )
        if names_filter is not None and not callable(names_filter) and stop_at_layer is None:
            self._warn_unran(set(names) - set(found))
        kept = {name: found[name] for name in names if name in found}
        return output, ActivationCache(kept, self._n_layers)

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
        cached = kwargs.get("use_cache", True)
        pairs = self._pairs(fwd_hooks, inputs)
        ran: set[str] = set()
        watched = [*pairs, *_watchers(pairs, ran)]
        with self.hooks(watched, None if cached else inputs, prefill_only):
            ids = self.hf_model.generate(**inputs, **kwargs)  # type: ignore[operator]
        self._warn_unran({name for name, _ in pairs} - ran)
        return ids

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
        """
        blocks = [self.hf_model.get_submodule(b.path) for b in self.anatomy.lm.blocks]
        layer = layer_index(layer, len(blocks) - 1, "layer")
        kwargs = {"use_cache": False, **kwargs}
        if self._tuples is None:
            with torch.no_grad():
                self._tuples = returns_tuples(blocks, lambda: self.forward(inputs, **kwargs))
        start = (f"blocks.{layer}.hook_resid_pre", lambda _value, hook: residual)
        with skipping(blocks[:layer], self._tuples[:layer]):
            return self.run_with_hooks(inputs, [start, *fwd_hooks], **kwargs)

    # --- names ----------------------------------------------------------------------------

    def _pairs(
        self, fwd_hooks: Iterable[FwdHook], inputs: ModelInputs | None
    ) -> list[tuple[str, HookFunction]]:
        """Returns (site name, function) pairs for hooks given by name, filter or intervention."""
        pairs: list[tuple[str, HookFunction]] = []
        for item in fwd_hooks:
            if hasattr(item, "hooks_for"):
                if inputs is None:
                    raise HookError(f"{item} needs the inputs it acts on: hooks(…, inputs=inputs).")
                pairs += item.hooks_for(self, inputs)
            elif isinstance(item, tuple) and len(item) == 2 and callable(item[1]):
                pairs += [(name, item[1]) for name in select_names(item[0], self.hook_names)]
            else:
                raise HookError(
                    f"{item!r} is not a hook: give (name, function), the name a string, a pattern "
                    "or a function of names, or an intervention such as Patch(…)."
                )
        return pairs

    def _say_eager(self, pairs: list[tuple[str, Callable]]) -> None:
        """Warns, once, that scores and patterns come from eager attention in their layers."""
        wanted = {
            self.sites[name].module
            for name, _ in pairs
            if self.sites[name].part in ("attn_scores", "pattern")
        }
        bases = {implementation(self.hf_model.get_submodule(path)) for path in wanted} - {"eager"}
        if not bases or self._said_eager:
            return
        self._said_eager = True
        warnings.warn(
            f"Attention scores or patterns were asked for in {len(wanted)} layers: those layers "
            f"run eager attention in place of {' and '.join(sorted(bases))}, which costs memory "
            "and can change outputs in the last bits. Leave these sites out with names_filter, or "
            "load with attn_implementation='eager' to have every run alike. (Said once per model.)",
            HookedVLMWarning,
            stacklevel=5,
        )

    def _warn_unran(self, names: set[str]) -> None:
        if names:
            shown = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            warnings.warn(
                f"{len(names)} of the sites asked for never ran, so nothing was read or written "
                f"there: {shown}. Vision sites run only when the inputs hold an image.",
                HookedVLMWarning,
                stacklevel=3,
            )


def _watchers(pairs: list[tuple[str, HookFunction]], ran: set[str]) -> list[tuple[str, Reader]]:
    """Returns a function for each named site that notes in `ran` that it ran."""
    note = Reader(lambda _, hook: ran.add(hook.name))
    return [(name, note) for name in {name for name, _ in pairs}]

"""Generation under hooks, and with a cache of the activations of all its steps."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.anatomy.caches import PROMPTS
from hooked_vlm.anatomy.sizes import HookedVLMConfig
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import OptionalDevice
from hooked_vlm.errors import HookedVLMWarning, HookError, callers_level
from hooked_vlm.hooks.dispatch import Reader
from hooked_vlm.hooks.generation import at_each_pass
from hooked_vlm.hooks.generation_cache import Fed, GenerationCache, StepRecorder, reordered
from hooked_vlm.hooks.hook_point import PassCounter
from hooked_vlm.hooks.names import NamesFilter, select_names
from hooked_vlm.inputs.prepared import together
from hooked_vlm.inputs.rows import prompt_shape
from hooked_vlm.model.base import FwdHook, HookedModel, ModelInputs
from hooked_vlm.model.keywords import (
    ONE_MAPPING,
    require_generates,
    require_given_once,
    require_options,
    require_pixels,
)
from hooked_vlm.model.memory import require_memory
from hooked_vlm.model.said import warn_unran


class Generates(HookedModel):
    """A model that generates under hooks; abstract."""

    cfg: HookedVLMConfig
    _known_options: frozenset[str] = frozenset()

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
        act on the prompt alone.  Interventions act on the places that they name, in the prompt or
        among the new tokens (`Generated()`); of several beams or sequences they act on each.
        Without a key-value cache every step runs the prompt again, and they act on the same
        positions in each, so the result is the same.
        """
        run = self._generation(inputs, kwargs)
        given = together(inputs, kwargs)
        return self._run_hooked(run, fwd_hooks, given, prefill_only, is_generation=True)

    @checked(HookError, but=("inputs", "names_filter", "fwd_hooks"), missing=ONE_MAPPING)
    def generate_with_cache(
        self,
        inputs: ModelInputs,
        names_filter: NamesFilter = None,
        *,
        fwd_hooks: Sequence[FwdHook] = (),
        prefill_only: bool = False,
        device: OptionalDevice = None,
        check_memory: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, GenerationCache]:
        """Generates as `generate` does, and returns `(output, cache)` of all steps.

        The cache has each position once, over prompt and answer, with a key-value cache and
        without: see `GenerationCache`.  Other arguments are those of `generate` and
        `run_with_cache`; values are cached after `fwd_hooks` have run.

        Raises `HookError` where rows are not those of the answers from step to step (beams,
        assisted generation), and `CacheMemoryError` for a cache, of all the tokens that may be
        generated, that does not fit into the free memory of its device.
        """
        run = self._generation(inputs, kwargs)
        if _option(self.hf_model, kwargs, "num_beams") not in (None, 1):
            raise reordered()
        names = select_names(names_filter, self.hook_names)
        if check_memory:
            sized = _with_answer(self.hf_model, inputs, kwargs)
            warning = require_memory(self.footprint, sized, names, None, device)
            if warning:
                warnings.warn(warning, HookedVLMWarning, stacklevel=callers_level())
        recorder = StepRecorder(self.sites, device)
        given = together(inputs, kwargs)
        recorded = _recorded(self, run, recorder, names, given)
        output = self._run_hooked(recorded, fwd_hooks, given, prefill_only, is_generation=True)
        cache = recorder.cache(names, self._n_layers)
        if names_filter is not None and not callable(names_filter):
            warn_unran(set(names) - set(cache))
        return output, cache

    def _generation(self, inputs: ModelInputs, kwargs: Mapping[str, Any]) -> Callable[[], Any]:
        """Returns a function that generates; raises `HookError` for what it would not read."""
        self.require_call(inputs, ())
        require_given_once(inputs, kwargs)
        require_options(kwargs)
        if new := {name: kwargs[name] for name in kwargs.keys() - self._known_options}:
            require_generates(self.hf_model, new)
            # With a function of the user's as `custom_generate`, any keyword was let through.
            if not callable(kwargs.get("custom_generate")):
                self._known_options |= new.keys()
        require_pixels({**inputs, **kwargs}, self.cfg.image_token_id)
        generate: Any = getattr(self._chain[0], "generate", None) or self.hf_model.generate
        return lambda: generate(**inputs, **kwargs)


def _recorded(
    model: Any,
    run: Callable[[], Any],
    recorder: StepRecorder,
    names: Sequence[str],
    inputs: Mapping[str, Any],
) -> Callable[[], Any]:
    """Returns a generation that stores its activations, and verifies whose rows they are."""
    shape = prompt_shape(inputs)
    counter = PassCounter(is_generation=True, length=None if shape is None else shape[1])
    reader = Reader(recorder.store)
    fed = Fed()

    def recorded() -> Any:
        with (
            model._attached_to_sites([(name, reader) for name in names], counter),
            at_each_pass(model._entries(), fed.note, lambda _: None),
        ):
            output = run()
        answer = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        if isinstance(answer, Tensor):
            fed.require(answer)
        return output

    return recorded


def _option(hf_model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """Returns an option of generation: the call's own, or that of the configuration in use."""
    config = kwargs.get("generation_config") or getattr(hf_model, "generation_config", None)
    return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)


def _with_answer(
    hf_model: Any, inputs: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Returns inputs whose prompts are as many, and as long, as those with their answers."""
    shape = prompt_shape(inputs)
    if shape is None:
        return inputs
    batch, length = shape
    n_new = _option(hf_model, kwargs, "max_new_tokens")
    longest = _option(hf_model, kwargs, "max_length") or length + 20  # transformers' default
    length = length + n_new if n_new else max(length, longest)
    rows = batch * (_option(hf_model, kwargs, "num_return_sequences") or 1)
    prompts = {
        name: torch.zeros((), dtype=x.dtype).expand(rows, length, *x.shape[2:])
        for name in PROMPTS
        if isinstance(x := inputs.get(name), Tensor) and x.ndim > 1
    }
    return {**inputs, **prompts}

"""Keyword arguments that nobody would read: refused before anything runs, with the nearest name.

`forward` and `generate` of transformers, and its processors, take any keyword, pass it on, and
drop it where no module reads it.  A misspelt `fwd_hooks` would run without hooks.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from hooked_vlm.anatomy.caches import is_cache
from hooked_vlm.anatomy.source import forward_source
from hooked_vlm.arguments.checked import require, shown
from hooked_vlm.arguments.kinds import Count, NotNegative, Whole
from hooked_vlm.errors import DataError, HookError, did_you_mean
from hooked_vlm.inputs.processor import is_read
from hooked_vlm.inputs.tensors import require_as_long


OURS = (
    *("inputs", "fwd_hooks", "names_filter", "stop_at_layer", "device", "check_memory"),
    *("prefill_only", "residual", "layer", "bwd_hooks", "incl_bwd", "metric"),
)
"""Our own arguments of the functions that run a model: what a misspelt one may have meant."""
ONE_MAPPING = "Give them as one mapping: model(inputs), not model(**inputs)."
CHECKED_LATER = ("inputs", "names_filter", "stop_at_layer", "fwd_hooks")
"""Arguments of `run_with_cache` that are checked with the model's names at hand."""
INSTEAD = {
    "fwd_hooks": "Use run_with_hooks, run_with_cache or generate, which take it.",
    "bwd_hooks": "Use run_with_hooks or `with model.hooks(…)`, which take it.",
    "names_filter": "Use run_with_cache, which takes it.",
    "stop_at_layer": "Use run_with_cache, which takes it.",
    "start_at_layer": "Use run_from_layer(inputs, residual, layer).",
    "return_type": "Compute it from the logits that are returned.",
    "loss_per_token": "Compute it from the logits that are returned.",
    "pos_slice": "Slice what was cached: cache[name][:, -1].",
    **dict.fromkeys(("incl_bwd", "metric"), "Use run_with_cache, which takes it."),
    "remove_batch_dim": "Use cache.remove_batch_dim().",
    "return_cache_object": "Use dict(cache).",
    "reset_hooks_end": "Leave it out: hooks are removed at the end of every call.",
    "clear_contexts": "Leave it out: hooks keep no context.",
    "past_kv_cache": "Use past_key_values, which the wrapped model takes.",
}
"""Arguments of other functions, and of TransformerLens's, and what to do in their place."""


def require_inputs(inputs: Any) -> None:
    """Raises `HookError` for inputs that are no mapping, or hold nothing that a model could run."""
    if not isinstance(inputs, Mapping):
        hint = "prepare(images, texts)" if isinstance(inputs, str) else "{'input_ids': …}"
        raise HookError(
            f"inputs of type {type(inputs).__name__} were given; expected what prepare "
            f"returns, or a mapping of the wrapped model's tensors. Use {hint}."
        )


def require_held(given: Mapping[str, Any]) -> None:
    """Raises `HookError` for a forward pass without a tensor."""
    if not any(isinstance(value, Tensor | Mapping | list | tuple) for value in given.values()):
        raise HookError(
            f"The inputs hold no tensor: {shown(dict(given))} was given; expected what prepare "
            "returns, or a mapping of the wrapped model's tensors."
        )


def require_read(hf_model: nn.Module, given: Iterable[str]) -> None:
    """Raises `HookError` for a keyword that neither the wrapped model nor its modules read."""
    passed = _passed_on(hf_model)
    for name in given:
        if name not in passed and not is_read(hf_model, name):
            _refuse(name, [*OURS, *inspect.signature(type(hf_model).forward).parameters])


def require_names_read(hf_model: nn.Module, processor: Any, names: Iterable[Any]) -> None:
    """Raises `HookError` for an entry of the inputs that the wrapped model would not read.

    What the model's processor returns without the model's reading it is let through.
    """
    lists = [getattr(part, "model_input_names", None) or () for part in _parts(processor)]
    known = {*_passed_on(hf_model), *(name for names in lists for name in names)}
    for name in names:
        if isinstance(name, str) and (name in known or is_read(hf_model, name)):
            continue
        near = did_you_mean(name, {*inspect.signature(type(hf_model).forward).parameters, *known})
        raise HookError(
            f"The inputs hold {shown(name)}, which the wrapped model does not read."
            f"{near or ' Leave it out.'}"
        )


def require_given_once(inputs: Mapping[str, Any], given: Iterable[str]) -> None:
    """Raises `HookError` for a keyword that the inputs hold too: which one is meant?"""
    if twice := sorted(set(given) & set(inputs)):
        raise HookError(
            f"{twice[0]}=… was given, and the inputs hold {twice[0]!r} too. Give it once: "
            f"{{**inputs, {twice[0]!r}: …}}."
        )


def require_generates(hf_model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raises `HookError` for a keyword that generation neither takes nor passes on."""
    if callable(given.get("custom_generate")):
        return  # what it takes is its own affair
    kind: Any = type(hf_model)
    own = getattr(hf_model, "generation_config", None)
    known = {*vars(GenerationConfig()), *(vars(own) if own is not None else ())}
    for owner, method in (
        (GenerationMixin, "generate"),
        (kind, "generate"),
        (kind, "prepare_inputs_for_generation"),
    ):
        if hasattr(owner, method):
            known |= {*inspect.signature(getattr(owner, method)).parameters}
    known |= {"custom_generate", "tokenizer", "assistant_tokenizer", "trust_remote_code"}
    passed = _passed_on(hf_model)
    for name in given:
        if name not in known | passed and not is_read(hf_model, name):
            _refuse(name, [*OURS, *known])


_OPTIONS = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), Count),
    **dict.fromkeys(("min_new_tokens", "min_length", "top_k"), Whole),
    **dict.fromkeys(("do_sample", "use_cache", "return_dict_in_generate", "output_logits"), bool),
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), NotNegative),
}
"""The usual options of generation, and what they may be (None: the model's own)."""


def require_options(given: Mapping[str, Any]) -> None:
    """Raises `HookError` for an option of generation of another type, or out of range."""
    hints = {name: _OPTIONS[name] | None for name in given if name in _OPTIONS}
    require("generate", given, hints, HookError)


def _passed_on(hf_model: nn.Module) -> set[str]:
    """Returns the keywords that the forwards of a model's modules are declared to pass on."""
    kinds = {type(module) for module in hf_model.modules()}
    # The last is taken by a decorator of transformers.
    return {"return_dict", *(name for kind in kinds for name in _typed(kind.forward))}


def _refuse(name: str, known: Iterable[str]) -> None:
    hint = INSTEAD.get(name) or did_you_mean(name, {*known} - {name}).strip()
    hint = hint or "Leave it out, or write a hook function."
    raise HookError(
        f"{name}=… was given, which neither this function nor the wrapped model reads. {hint}"
    )


def require_processed(processor: Any, given: Iterable[str]) -> None:
    """Raises `DataError` for a keyword that no part of a processor takes, as far as they say so."""
    names = list(given)
    known = _taken(processor) - _OURS_TO_GIVE if names else set()
    for name in names:
        if name in known or (name not in _OURS_TO_GIVE and _mentions(processor, name)):
            continue
        near = did_you_mean(name, _OF_PREPARE)
        # A processor that declares none of its keywords may read any.
        if near or _declares(processor):
            raise DataError(
                f"prepare was given {name}=…, which the model's processor "
                f"({type(processor).__name__}) does not take.{near or did_you_mean(name, known)}"
            )


_OF_PREPARE = ("images", "texts", "system", "chat", "assistant")
_OURS_TO_GIVE = {"text", "images", "return_tensors", "self", "args", "kwargs"}
"""What `prepare` itself gives a processor."""


def _mentions(processor: Any, name: str) -> bool:
    """Whether a part of a processor reads a keyword by its name."""
    methods = ("__call__", "preprocess")
    functions = [getattr(type(part), m, None) for part in _parts(processor) for m in methods]
    return any(f'"{name}"' in forward_source(f) for f in functions if f is not None)


def _declares(processor: Any) -> bool:
    """Whether a processor's own class says which keywords it takes."""
    own = [kind for kind in type(processor).__mro__ if kind.__module__.count(".") > 2]
    declared = ("valid_processor_kwargs", "valid_kwargs")
    calls = [vars(kind)["__call__"] for kind in own if "__call__" in vars(kind)]
    said = [_fields(vars(kind).get(name)) for kind in own for name in declared]
    return any(said) or any(_typed(call) for call in calls)


def _parts(processor: Any) -> list[Any]:
    names = ("image_processor", "tokenizer", "video_processor", "feature_extractor")
    return [processor, *filter(None, (getattr(processor, name, None) for name in names))]


def _taken(processor: Any) -> set[str]:
    """Returns the keywords that a processor and its parts are declared to take."""
    names: set[str] = set()
    for part in _parts(processor):
        for declared in ("valid_kwargs", "valid_processor_kwargs"):
            names |= _fields(getattr(part, declared, None))
        for method in ("__call__", "preprocess"):
            function = getattr(type(part), method, None)
            if function is not None:
                names |= {*inspect.signature(function).parameters, *_typed(function)}
    return names


def _typed(function: Any) -> set[str]:
    """Returns the keywords that a function's `**kwargs` are declared to be."""
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return {
        name
        for parameter in parameters
        if parameter.kind is parameter.VAR_KEYWORD
        for typed in get_args(parameter.annotation)
        for name in _fields(typed)
    }


def _fields(typed: Any) -> set[str]:
    """Returns the fields of a TypedDict, and of the TypedDicts in it."""
    found: Mapping[str, Any] = getattr(typed, "__annotations__", None) or {}
    return {*found, *(name for inner in found.values() for name in _fields(inner))}


def require_pixels(given: Mapping[str, Any], token: int | None) -> None:
    """Raises `HookError` for image tokens without an image: the model would run blind."""
    require_held(given)
    require_as_long(given)
    ids = given.get("input_ids")
    if ids is None or token is None or ids.device.type == "meta":
        return
    # Pixels, features or embeddings that were computed before, or a cache of the prompt.
    seen = any(
        is_cache(value)
        or isinstance(value, tuple | list | Mapping)
        or (isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name)
        for name, value in given.items()
    )
    if not seen and bool((ids == token).any()):
        raise HookError(
            "The prompt holds image tokens, and these inputs hold no image: the model would run "
            "blind. Give everything that prepare(images, texts) returns, not the tokens alone."
        )


def logits_of(output: Any) -> Any:
    """Returns the logits of a model's output; raises `HookError` for one without, as a tuple."""
    if hasattr(output, "logits"):
        return output.logits
    raise HookError(
        f"The wrapped model returned a {type(output).__name__}, and logits are read from a "
        "ModelOutput. Leave out return_dict, and keep model.hf_model.config.return_dict=True."
    )

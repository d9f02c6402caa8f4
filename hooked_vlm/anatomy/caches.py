"""Finds key-value caches, token ids and masks among a module's arguments, by type before name.

transformers renames keywords (5.24 calls `past_key_values` `cache`).  A lookup by one
spelling would then find no cache and change results without an error.  Therefore a cache is
detected by its type, and the keyword that takes a cache by its annotation in the signature.
"""

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from hooked_vlm.anatomy.source import forward_parameters, once_per_function, signature_of


PROMPTS = ("decoder_input_ids", "input_ids", "inputs_embeds")
"""Keywords under which a language model takes its input tokens or embeddings."""


def is_cache(value: Any) -> bool:
    """Whether a value is a key-value cache: a `Cache`, or an object with `get_seq_length()`."""
    return isinstance(value, Cache) or callable(getattr(value, "get_seq_length", None))


def caches_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Returns the key-value caches among the arguments of a call."""
    return [value for value in (*args, *kwargs.values()) if is_cache(value)]


def cached_positions(caches: Iterable[Any]) -> int:
    """Returns how many positions key-value caches hold, those that left a window counted."""
    return max((int(cache.get_seq_length()) for cache in caches), default=0)


def cache_parameter(module: nn.Module) -> str | None:
    """Returns the keyword under which a module's `forward` takes a key-value cache (None: none).

    Returns the first parameter whose annotation admits a `Cache`.  A parameter without an
    annotation, as in remote code, is detected by its name.
    """
    return _cache_parameter(type(module).forward)


@once_per_function
def _cache_parameter(function: Callable) -> str | None:
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except (NameError, TypeError, AttributeError):  # an annotation with a name that is not imported
        hints = {}
    for name, parameter in signature_of(function).parameters.items():
        hint = hints.get(name, parameter.annotation)
        unknown = hint is inspect.Parameter.empty
        if re.fullmatch(_NAMED_LIKE_ONE, name) if unknown else _admits_cache(hint):
            return name
    return None


_NAMED_LIKE_ONE = r"past_key_values?|(kv_)?cache(_params)?|layer_past"


def _admits_cache(hint: Any) -> bool:
    if isinstance(hint, str):
        return re.search(r"\b\w*Cache\b", hint) is not None
    if isinstance(hint, type):
        return issubclass(hint, Cache)
    return any(_admits_cache(part) for part in typing.get_args(hint))


def mask_parameter(module: nn.Module) -> str | None:
    """Returns the keyword under which a module's `forward` takes an attention mask (None: none)."""
    names = [name for name in forward_parameters(module) if "mask" in name]
    return min(names, key=lambda name: "attention" not in name, default=None)


def prompts_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Returns the token ids (or embeddings) that a language model was called with."""
    named = (kwargs.get(name) for name in PROMPTS)
    return next((given for given in (*named, *args) if isinstance(given, Tensor)), None)

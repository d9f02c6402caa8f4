"""Tiny random models of every image-text-to-text architecture that transformers knows.

The idea: a configuration's default values already agree with each other, so a small model is
made by walking the default configuration and replacing sizes by the name of the attribute.
Layers are chosen so that every kind in the default (sliding and full, linear attention and
full attention, dense and mixture of experts) is still there.  What names cannot tell is in
`tiny_table.py`.
"""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

from conformance import tiny_table as table


VOCAB = 512
GRID = 8
Values = dict[str, Any]

_LAYERS = ("num_hidden_layers", "depth", "num_layers", "layers", "n_layers", "encoder_layers")
_INDEX_ENDS = ("_indexes", "_indices", "_idxs", "_layers")
_FROM_START, _FROM_END = ("first_k_dense_replace",), ("num_kv_shared_layers",)
_TOKEN_ENDS = ("_token_id", "_token_index", "_token_ids", "_start_id", "_end_id", "_patch_id")
_MLA = (
    "head_dim",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "qk_head_dim",
    "v_head_dim",
    "index_head_dim",
)


def architectures() -> list[str]:
    """Returns the model types of the installed transformers that read images and write text."""
    return sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny_config(model_type: str, vocab_size: int = VOCAB, **overrides: Any) -> PretrainedConfig:
    """Returns a tiny configuration; overrides replace values, nested dictionaries merge."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    for name, inner in table.SUB_CONFIGS.get(model_type, {}).items():
        setattr(default, name, CONFIG_MAPPING[inner]())
    full = merged(default.to_dict(), table.ADDED.get(model_type, {}))
    values = merged(_shrink(full, ""), table.OVERRIDES.get(model_type, {}))
    _fit_feature_layers(values, _depth_of_tower(values))
    _fit_vocabulary(values, vocab_size, {})
    config = config_class(**merged(values, overrides))
    if model_type in table.STAND_INS:
        name, inner, own = table.STAND_INS[model_type]
        vars(config)[name] = CONFIG_MAPPING[inner](**own)  # past the check of its class
    return config


def tiny_model(
    model_type: str,
    config: PretrainedConfig | None = None,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """Returns a seeded random model in eval mode, with no degenerate parameter."""
    config = tiny_config(model_type) if config is None else config
    model_class = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    torch.manual_seed(seed)
    model = _instance(model_class, config, attn)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return _cast(model.eval(), dtype)


def merged(values: Values, more: Values) -> Values:
    """Returns a copy of `values` with `more` merged into it, dictionary by dictionary."""
    result = dict(values)
    for name, value in more.items():
        nested = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if nested else value
    return result


def _instance(model_class: Any, config: PretrainedConfig, attn: str) -> nn.Module:
    """Returns the model, with eager attention where the class has no other."""
    try:
        return model_class._from_config(config, attn_implementation=attn)
    except ValueError as error:
        if attn == "eager" or "attention" not in str(error):
            raise
        return model_class._from_config(config, attn_implementation="eager")


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns the model in another dtype, as transformers loads it: some modules stay float32."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if dtype.itemsize < 4 and any(word in name for word in strict):
            parameter.data = parameter.data.float()
    return model


def _shrink(values: Values, scope: str) -> Values:
    """Returns small values of one (nested) configuration; `scope` is its attribute's name."""
    layers = values.get("per_layer_config") or {}
    small = {n: _small(n, v, values, scope) for n, v in values.items() if n != "per_layer_config"}
    if layers:
        small["per_layer_config"] = {
            int(i): {n: _small(n, v, values, scope) for n, v in layer.items()}
            for i, layer in layers.items()
        }
    return _choose_layers(small)


def _small(name: str, value: Any, values: Values, scope: str) -> Any:
    """Returns the small value of one attribute of a configuration."""
    if isinstance(value, dict):
        nested = "model_type" in value
        return _shrink(value, name) if nested else _small_rope(value)
    if isinstance(value, (list, tuple)) and name != "image_grid_pinpoints":
        return [_small(name, one, values, scope) for one in value]
    if isinstance(value, bool) or not (isinstance(value, int) or name == "image_grid_pinpoints"):
        return value
    return _small_number(name, value, values, scope)


def _small_number(name: str, value: Any, values: Values, scope: str) -> Any:
    """Returns the small value of a number: latent attention, pictures, widths, then names."""
    if "kv_lora_rank" in values and name in (*_MLA, "kv_lora_rank", "q_lora_rank"):
        return value // 32 if name.endswith("lora_rank") else value // _latent_factor(values)
    if name == "num_key_value_heads" and "kv_lora_rank" in values:
        return 4
    if name in ("image_size", "image_grid_pinpoints"):
        return _small_picture(value, values)
    if name == "head_dim" and values["head_dim"]:
        return _widths(scope)["head_dim"] * value // values["head_dim"]
    if name == "window_size":
        return values["patch_size"] * GRID // 2 if value > 64 else GRID // 2
    return min(value, _widths(scope).get(name, table.NAMES.get(name, value)))


def _latent_factor(values: Values) -> int:
    """Returns by how much to divide the head widths of multi-head latent attention."""
    return (values["qk_rope_head_dim"] or 128) // 8


def _small_picture(value: Any, values: Values) -> Any:
    """Returns a picture of 8x8 patches, or the grid of such pictures."""
    patch = values.get("patch_size") or values["vision_config"]["patch_size"]
    side = GRID * (patch[0] if isinstance(patch, (list, tuple)) else patch)
    if isinstance(value, int):
        return side
    unit = min(min(pair) for pair in value)
    return [[length * side // unit for length in pair] for pair in value]


def _small_rope(value: Values) -> Values:
    """Returns rope parameters with sections that fill the small head."""
    if "mrope_section" not in value:
        return value
    return {**value, "mrope_section": [2, 3, 3]}


def _widths(scope: str) -> dict[str, int]:
    """Returns the widths of a nested configuration, by its name."""
    if "qformer" in scope:
        return table.QFORMER
    return table.TOWER if any(word in scope for word in table.TOWER_WORDS) else table.TEXT


def _choose_layers(values: Values) -> Values:
    """Returns the values with few layers, so that each kind of layer is among them."""
    name = next((name for name in _LAYERS if isinstance(values.get(name), int)), None)
    if name is None:
        return values
    depth = values[name]
    kept = _kept([_kind(values, layer, depth) for layer in range(depth)])
    return {n: _cut(n, value, kept, depth) for n, value in values.items()} | {name: len(kept)}


def _is_index(name: str, value: Any) -> bool:
    """Returns whether the attribute lists the layers that have some property."""
    numbers = isinstance(value, list) and all(type(one) is int for one in value)
    return numbers and name.endswith(_INDEX_ENDS) and value == sorted(set(value))


def _kind(values: Values, layer: int, depth: int) -> tuple[str, ...]:
    """Returns everything that the configuration says about one layer."""
    facts = [str(values.get("per_layer_config", {}).get(layer))]
    for name, value in values.items():
        if name in _FROM_START and value:
            facts.append(str(layer < value))
        elif name in _FROM_END:
            facts.append(str(layer >= depth - value))
        elif _is_index(name, value):
            facts.append(str(layer in value))
        elif isinstance(value, list) and len(value) == depth:
            facts.append(str(value[layer]))
    return tuple(facts)


def _kept(kinds: list[tuple[str, ...]]) -> list[int]:
    """Returns the first layer of each kind, then others in turn, up to three or four layers."""
    few = min(max(len(set(kinds)), 4 if len(set(kinds)) > 1 else 3), len(kinds))
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    for kind in [*dict.fromkeys(kinds)] * 4:
        spare = [i for i, one in enumerate(kinds) if one == kind and i not in kept]
        if spare and len(kept) < few:  # after those that are kept, where there is one
            kept.append(next((i for i in spare if i > max(kept)), spare[0]))
    return sorted(kept)


def _cut(name: str, value: Any, kept: list[int], depth: int) -> Any:
    """Returns what is left of an attribute when only some layers are kept."""
    if name in _FROM_START:
        return sum(old < value for old in kept)
    if name in _FROM_END:
        return sum(old >= depth - value for old in kept)
    if name == "per_layer_config":
        return {new: value[old] for new, old in enumerate(kept) if old in value}
    if _is_index(name, value):
        return [new for new, old in enumerate(kept) if old in value]
    if isinstance(value, list) and len(value) == depth:
        return [value[old] for old in kept]
    return value


def _fit_vocabulary(values: Values, vocab_size: int, seen: dict[int, int]) -> None:
    """Gives every vocabulary the size, and ids outside it new places at its end."""
    for name, value in values.items():
        if isinstance(value, dict):
            _fit_vocabulary(value, vocab_size, seen)
        elif name in table.VOCABULARIES:
            values[name] = vocab_size
        elif str(name).endswith(_TOKEN_ENDS) and isinstance(value, list):
            values[name] = [_token(one, vocab_size, seen) for one in value]
        elif str(name).endswith(_TOKEN_ENDS) and type(value) is int:
            values[name] = _token(value, vocab_size, seen)


def _token(value: int, vocab_size: int, seen: dict[int, int]) -> int:
    """Returns the token's id if it fits, else the same new id each time."""
    if value < vocab_size - 64:
        return value
    return seen.setdefault(value, vocab_size - 2 - len(seen))


def _depth_of_tower(values: Values) -> int:
    """Returns how many layers the vision tower has."""
    tower = values.get("vision_config") or {}
    return next((tower[name] for name in _LAYERS if name in tower), 3)


def _fit_feature_layers(values: Values, depth: int) -> None:
    """Moves the layers that image features are taken from to the top of a small tower."""
    for name, value in values.items():
        if isinstance(value, dict):
            _fit_feature_layers(value, depth)
        elif name == "vision_feature_layer" and isinstance(value, int):
            values[name] = max(value, -depth) if value < 0 else min(value, depth - 1)
        elif name == "vision_feature_layer" and isinstance(value, list):
            tops = [i % depth + 1 for i in range(len(value))]
            values[name] = [-t if v < 0 else depth - t for t, v in zip(tops, value, strict=True)]

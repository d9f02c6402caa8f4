"""What users of TransformerLens look for on a model: supported, or an error with what to use.

`HookedTransformer` is a torch module that keeps its hooks; a `HookedModel` wraps one and keeps
none.  `eval`, `train` and `to` act on the wrapped model.  Any other name raises
`UnknownNameError`, an `AttributeError`, which says where the same is found here.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.anatomy.model import Anatomy
from hooked_vlm.anatomy.wrappers import bare
from hooked_vlm.arguments.kinds import device_and_dtype
from hooked_vlm.errors import HookError, UnknownNameError, UnsupportedModelError, did_you_mean


_HOOKS = (
    "Use run_with_hooks(inputs, [(name, function)]) or `with model.hooks([(name, function)])`: "
    "hooks act within the call or the block."
)
_NO_HOOKS = "Leave it out: hooks are removed at the end of every call and every block."
_CACHE = "Use run_with_cache(inputs, names_filter), which returns (logits, cache)."
_WEIGHTS = (
    "No weight is converted: model.hf_model has those of transformers, and model.anatomy names "
    "its modules."
)
_FLAGS = (
    "Nothing is switched on: attn.hook_result, hook_attn_in and hook_mlp_in run where they are "
    "named."
)
_TEXT_ONLY = "There is nothing like it for models that take images."
_COMPOSITION = "Compute it from the weights in model.hf_model: W_Q @ W_K.T and W_V @ W_O of a head."
INSTEAD = {
    **dict.fromkeys(("add_hook", "add_perma_hook", "check_and_add_hook"), _HOOKS),
    **dict.fromkeys(
        ("reset_hooks", "remove_all_hook_fns", "clear_contexts", "clear_hook_registry"), _NO_HOOKS
    ),
    **dict.fromkeys(("check_hooks_to_add", "list_hooks", "context_level"), _NO_HOOKS),
    **dict.fromkeys(("add_caching_hooks", "cache_all", "cache_some", "get_caching_hooks"), _CACHE),
    "is_caching": _CACHE,
    "hook_points": "Use model.hook_dict, from names to hook points.",
    "mod_dict": "Use model.hook_dict, from names to hook points.",
    "get_hook_point": "Use model.hook_dict[name].",
    "hook_aliases": "All accepted spellings are found: model.hook_dict[name].",
    "block_hooks": "Use model.blocks[i], or a pattern: 'blocks.3.*'.",
    "block_submodules": "Use model.blocks[i], or model.hf_model.get_submodule(path).",
    "blocks_with": "Use [b for b in model.blocks if hasattr(b, name)].",
    "to_tokens": "Use model.prepare(images, texts), or model.tokenizer(text).",
    "to_string": "Use model.tokenizer.decode(ids).",
    "to_str_tokens": "Use model.tokenizer.convert_ids_to_tokens(ids).",
    "to_single_token": "Use model.tokenizer.encode(text, add_special_tokens=False).",
    "to_single_str_token": "Use model.tokenizer.decode([id]).",
    "get_token_position": "Use inputs.positions(Span('text')), or the place itself as at=….",
    "tokens_to_residual_directions": "Use model.W_U[:, ids].",
    "input_to_embed": "Use the site hook_embed, or hook_merged_embed with the images in it.",
    "prepare_multimodal_inputs": "Use model.prepare(images, texts).",
    "set_tokenizer": "Give the processor to HookedVLM(hf_model, processor).",
    "to_sentence_pair_tokens": _TEXT_ONLY,
    "predict_next_sentence": _TEXT_ONLY,
    "encoder_output": "Use the site vision_encoder.hook_out.",
    "unembed": "Use model.hf_model.get_submodule(model.anatomy.unembed), and the site hook_logits.",
    "embed": "Use model.hf_model.get_submodule(model.anatomy.embed), and the site hook_embed.",
    "hook_pos_embed": "There is no site of it: hook_resid_pre of block 0 has positions in it.",
    "hook_tokens": "Tokens are inputs['input_ids'], and no site.",
    "name": "Use model.cfg.model_name.",
    "apply_causal_mask": "Masks are the wrapped model's: site attn.hook_attn_scores has them in.",
    "load_sample_training_dataset": _TEXT_ONLY,
    "pos_embed": "Language models with a table of positions keep it in model.hf_model.",
    "ln_final": "Use model.hf_model.get_submodule(model.anatomy.lm.final_norm).",
    "blocks": "Use model.vision_encoder.blocks[i].",
    "forward_with_hooks": _HOOKS,
    "loss_fn": "Use model(inputs, return_type='loss').",
    **dict.fromkeys(
        (
            *("set_use_attn_result", "set_use_attn_in", "set_use_hook_mlp_in"),
            *("set_use_split_qkv_input", "set_ungroup_grouped_query_attention"),
            "set_use_attn_fn",
        ),
        _FLAGS,
    ),
    **dict.fromkeys(
        ("from_pretrained_no_processing", "boot_transformers", "setup", "init_weights"),
        "Use from_pretrained, or HookedVLM(hf_model, processor): no weight is processed.",
    ),
    "hf_generate": "Use model.generate, which is transformers' own, with hooks.",
    "generate_stream": "Use model.generate(inputs, streamer=…), transformers' own.",
    "diffusion_generate": _TEXT_ONLY,
    "sample_datapoint": _TEXT_ONLY,
    "original_model": "Use model.hf_model.",
    "adapter": "Use model.anatomy, which names the modules of model.hf_model.",
    "real_components": "Use model.anatomy, which names the modules of model.hf_model.",
    "layer_types": "Use model.anatomy.lm.blocks.",
    "training": "Use model.hf_model.training.",
    "dtype": "Use model.cfg.dtype.",
    **{
        name: f"Use model.hf_model.{name}."
        for name in (
            *("parameters", "named_parameters", "state_dict", "load_state_dict", "modules"),
            *("named_modules", "zero_grad", "requires_grad_", "children", "buffers"),
        )
    },
    **dict.fromkeys(("tl_parameters", "tl_named_parameters", "get_params"), _WEIGHTS),
    **dict.fromkeys(("stack_params_for", "composition_layer_indices"), _WEIGHTS),
    "n_params_total": "Use sum(p.numel() for p in model.hf_model.parameters()).",
    "close": "Nothing is kept open: leave it out.",
    **dict.fromkeys(("half", "bfloat16", "float", "double"), "Use model.to(dtype)."),
    **dict.fromkeys(("cuda", "cpu", "mps"), "Use model.to(device)."),
    **{
        f"{kind}_{name}": _WEIGHTS
        for kind in "Wb"
        for name in ("Q", "K", "V", "O", "in", "out", "gate", "pos", "U", "E", "E_pos")
    },
    "b_U": "This unembedding has no bias: logits are the normalised residual @ model.W_U.",
    **dict.fromkeys(
        (
            *("QK", "OV", "QK_for_attn_layers", "OV_for_attn_layers", "all_composition_scores"),
            *("composition_scores", "accumulated_bias"),
        ),
        _COMPOSITION,
    ),
    **dict.fromkeys(
        ("all_head_labels", "attn_head_labels"),
        "Use [f'L{l}H{h}' for l in range(cfg.n_layers) for h in range(cfg.n_heads)].",
    ),
    **dict.fromkeys(
        (
            *("process_weights_", "process_weights", "fold_layer_norm", "fold_ln"),
            *("center_writing_weights", "center_unembed", "fold_value_biases"),
            *("refactor_factored_attn_matrices", "enable_compatibility_mode", "compatibility_mode"),
            "load_and_process_state_dict",
        ),
        _WEIGHTS,
    ),
    "move_model_modules_to_device": "Use model.to(device).",
}
"""Names of TransformerLens's models, and what to do in their place."""

Self_ = TypeVar("Self_", bound="ActsLikeAModule")


class ActsLikeAModule:
    """Gives a wrapper `eval`, `train` and `to`, and errors for other names of torch modules."""

    hf_model: nn.Module

    def eval(self: Self_) -> Self_:
        """Sets the wrapped model to evaluation, and returns the wrapper."""
        return self.train(False)

    def train(self: Self_, mode: bool = True) -> Self_:
        """Sets the wrapped model to training (or not), and returns the wrapper."""
        self.hf_model.train(mode)
        return self

    def to(
        self: Self_,
        *where: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self_:
        """Moves the wrapped model to a device, a dtype, or both; returns the wrapper.

        Inputs that were prepared before stay where they are: `inputs.to(…)`.
        """
        device, dtype = device_and_dtype(where, device, dtype, HookError)
        if dtype is not None and not dtype.is_floating_point:
            raise HookError(f"to was given {dtype}; expected a dtype of floating point.")
        move: Any = self.hf_model.to
        move(**{n: v for n, v in (("device", device), ("dtype", dtype)) if v is not None})
        self._reread()
        return self

    def _reread(self) -> None:
        """Reads again what depends on the wrapped model's device and dtype."""
        raise NotImplementedError

    if not TYPE_CHECKING:  # a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            if name.startswith("hook_") and name in (points := vars(self).get("hook_dict", {})):
                return points[name]
            raise _unknown(self, name)


class ShowsWeights:
    """Gives the wrapper of a language model its two matrices of the vocabulary."""

    hf_model: nn.Module
    anatomy: Anatomy

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding matrix: a view of the wrapped model's weight, before any soft-capping."""
        return weight_of(self.hf_model, self.anatomy.unembed).T

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding matrix: the wrapped model's weight, before any scaling."""
        return weight_of(self.hf_model, self.anatomy.embed)

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias; raises `UnknownNameError` for a model that has none."""
        bias = getattr(self.hf_model.get_submodule(self.anatomy.unembed), "bias", None)
        if not isinstance(bias, Tensor):
            raise UnknownNameError(INSTEAD["b_U"])
        return bias


def _unknown(model: Any, name: str) -> UnknownNameError:
    kind, wrapped = type(model).__name__, vars(model).get("hf_model")
    if name.startswith("__"):  # asked by copy, pickle and inspect
        return UnknownNameError(f"{kind} has no attribute {name!r}.")
    hint = INSTEAD.get(name, "")
    if not hint and wrapped is not None and hasattr(wrapped, name):
        hint = f"The wrapped model has: use model.hf_model.{name}."
    own = [each for each in dir(type(model)) if not each.startswith("_")]
    hint = hint or did_you_mean(name, [*own, *vars(model)]).strip()
    return UnknownNameError(f"{kind} has no attribute {name[:80]!r}. {hint}".strip())


def weight_of(hf_model: nn.Module, path: str) -> Tensor:
    """Returns a module's weight; raises `UnsupportedModelError` where it is not the whole map."""
    module = hf_model.get_submodule(path)
    if bare(module) is not module:
        raise UnsupportedModelError(
            f"{path} has an adapter ({type(module).__name__}), so its weight is not the whole map. "
            "Merge the adapter first (PEFT: merge_and_unload())."
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise UnsupportedModelError(
            f"{path} has no weight of floating point that could be read as one matrix (it may be "
            "quantised). Load the model without quantisation."
        )
    return weight

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
INSTEAD = {
    **dict.fromkeys(("add_hook", "add_perma_hook", "check_and_add_hook"), _HOOKS),
    **dict.fromkeys(("reset_hooks", "remove_all_hook_fns", "clear_contexts"), _NO_HOOKS),
    **dict.fromkeys(("add_caching_hooks", "cache_all", "cache_some", "get_caching_hooks"), _CACHE),
    "hook_points": "Use model.hook_dict, from names to hook points.",
    "mod_dict": "Use model.hook_dict, from names to hook points.",
    "to_tokens": "Use model.prepare(images, texts), or model.tokenizer(text).",
    "to_string": "Use model.tokenizer.decode(ids).",
    "to_str_tokens": "Use model.tokenizer.convert_ids_to_tokens(ids).",
    "to_single_token": "Use model.tokenizer.encode(text, add_special_tokens=False).",
    "to_single_str_token": "Use model.tokenizer.decode([id]).",
    "get_token_position": "Use the place Span('text') wherever a position is expected.",
    "tokens_to_residual_directions": "Use model.W_U[:, ids].",
    "unembed": "Use model.hf_model.get_submodule(model.anatomy.unembed).",
    "embed": "Use model.hf_model.get_submodule(model.anatomy.embed).",
    "ln_final": "Use model.hf_model.get_submodule(model.anatomy.lm.final_norm).",
    "blocks": "model.anatomy.lm.blocks has the path of each block in model.hf_model.",
    "forward_with_hooks": _HOOKS,
    "loss_fn": "Compute it from the logits that model(inputs) returns.",
    "set_use_attn_result": "Sites of single heads: blocks.*.attn.hook_z.",
    "from_pretrained_no_processing": "Use from_pretrained: no weight is processed.",
    "training": "Use model.hf_model.training.",
    "dtype": "Use model.cfg.dtype.",
    **dict.fromkeys(("half", "bfloat16", "float", "double"), "Use model.to(dtype)."),
    **dict.fromkeys(("cuda", "cpu", "mps"), "Use model.to(device)."),
    **{
        f"{kind}_{name}": _WEIGHTS
        for kind in "Wb"
        for name in ("Q", "K", "V", "O", "in", "out", "gate", "pos", "U", "E")
    },
    **dict.fromkeys(("QK", "OV", "process_weights_", "fold_layer_norm", "fold_ln"), _WEIGHTS),
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

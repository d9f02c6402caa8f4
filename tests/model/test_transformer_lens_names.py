"""Every name that a user of TransformerLens 4.3 types works here, or says what to use."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from conformance import suite
from helpers.prepared_models import prepared
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import Ablate, ActivationCache, LastToken, Sweep
from hooked_vlm.checks.on_request import check_on_request
from hooked_vlm.errors import DataError, HookError, UnknownHookError, UnknownNameError
from hooked_vlm.hooks import cut, hook_point
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.model import instead


PAGE = Path(__file__).parents[2] / "docs/guide/transformerlens.md"
# Public attributes of TransformerBridge, its bases, and what HookedTransformer had before; of
# ActivationCache; and of HookPoint.
MODEL = [
    "OV",
    "OV_for_attn_layers",
    "QK",
    "QK_for_attn_layers",
    "W_E",
    "W_E_pos",
    "W_K",
    "W_O",
    "W_Q",
    "W_U",
    "W_V",
    "W_gate",
    "W_in",
    "W_out",
    "W_pos",
    "accumulated_bias",
    "adapter",
    "add_caching_hooks",
    "add_hook",
    "add_perma_hook",
    "all_composition_scores",
    "all_head_labels",
    "apply_causal_mask",
    "attn_head_labels",
    "b_K",
    "b_O",
    "b_Q",
    "b_U",
    "b_V",
    "b_in",
    "b_out",
    "bfloat16",
    "block_hooks",
    "block_submodules",
    "blocks",
    "blocks_with",
    "boot_transformers",
    "cache_all",
    "cache_some",
    "center_unembed",
    "center_writing_weights",
    "cfg",
    "check_and_add_hook",
    "check_hooks_to_add",
    "clear_contexts",
    "clear_hook_registry",
    "close",
    "compatibility_mode",
    "composition_layer_indices",
    "context_level",
    "cpu",
    "cuda",
    "diffusion_generate",
    "double",
    "dtype",
    "embed",
    "enable_compatibility_mode",
    "encoder_output",
    "eval",
    "float",
    "fold_layer_norm",
    "fold_value_biases",
    "forward",
    "from_pretrained",
    "from_pretrained_no_processing",
    "generate",
    "generate_stream",
    "get_caching_hooks",
    "get_hook_point",
    "get_params",
    "get_token_position",
    "half",
    "hf_generate",
    "hook_aliases",
    "hook_dict",
    "hook_embed",
    "hook_points",
    "hook_pos_embed",
    "hook_tokens",
    "hooks",
    "init_weights",
    "input_to_embed",
    "is_caching",
    "layer_types",
    "list_hooks",
    "ln_final",
    "load_and_process_state_dict",
    "load_sample_training_dataset",
    "load_state_dict",
    "loss_fn",
    "mod_dict",
    "modules",
    "move_model_modules_to_device",
    "mps",
    "n_params_total",
    "name",
    "named_modules",
    "named_parameters",
    "original_model",
    "parameters",
    "pos_embed",
    "predict_next_sentence",
    "prepare_multimodal_inputs",
    "process_weights",
    "process_weights_",
    "processor",
    "real_components",
    "refactor_factored_attn_matrices",
    "remove_all_hook_fns",
    "requires_grad_",
    "reset_hooks",
    "run_with_cache",
    "run_with_hooks",
    "sample_datapoint",
    "set_tokenizer",
    "set_ungroup_grouped_query_attention",
    "set_use_attn_in",
    "set_use_attn_result",
    "set_use_hook_mlp_in",
    "set_use_split_qkv_input",
    "setup",
    "stack_params_for",
    "state_dict",
    "tl_named_parameters",
    "tl_parameters",
    "to",
    "to_sentence_pair_tokens",
    "to_single_str_token",
    "to_single_token",
    "to_str_tokens",
    "to_string",
    "to_tokens",
    "tokenizer",
    "tokens_to_residual_directions",
    "train",
    "training",
    "unembed",
    "zero_grad",
]

CACHE = [
    "accumulated_resid",
    "apply_ln_to_stack",
    "apply_slice_to_batch_dim",
    "cache_dict",
    "compute_head_results",
    "compute_ssm_effective_attention",
    "compute_ssm_state",
    "decompose_resid",
    "get_full_resid_decomposition",
    "get_neuron_results",
    "has_batch_dim",
    "has_embed",
    "has_pos_embed",
    "items",
    "keys",
    "logit_attrs",
    "logit_lens",
    "model",
    "remove_batch_dim",
    "ssm_layers",
    "stack_activation",
    "stack_head_results",
    "stack_neuron_results",
    "to",
    "toggle_autodiff",
    "values",
]

POINT = [
    "add_hook",
    "add_perma_hook",
    "backward_scale",
    "bwd_hooks",
    "clear_context",
    "ctx",
    "enable_reshape",
    "forward",
    "fwd_hooks",
    "has_hooks",
    "hook_conversion",
    "layer",
    "name",
    "pos_dim",
    "remove_hooks",
]
STREAM = "blocks.*.hook_resid_post"
NEAR: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def not_scores(name: str) -> bool:
    return not name.endswith(("attn_scores", "pattern"))


def works_or_says(thing: Any, name: str, hints: dict[str, str]) -> None:
    try:
        getattr(thing, name)
    except UnknownNameError as error:
        assert hints[name] in str(error)
        assert len(str(error)) <= 400
        assert not hasattr(thing, name)


@pytest.mark.parametrize("name", MODEL)
def test_a_name_of_a_model_works_or_says_what_to_use(name: str) -> None:
    works_or_says(prepared("llava"), name, instead.INSTEAD)


@pytest.mark.parametrize("name", CACHE)
def test_a_name_of_a_cache_works_or_says_what_to_use(name: str) -> None:
    cache = ActivationCache({"blocks.0.hook_resid_post": torch.zeros(1, 2, 3)})
    works_or_says(cache, name, cut.INSTEAD)


@pytest.mark.parametrize("name", POINT)
def test_a_name_of_a_hook_point_works_or_says_what_to_use(name: str) -> None:
    works_or_says(HookPoint("hook_embed", "batch pos d_model"), name, hook_point.INSTEAD)


@pytest.mark.parametrize("name", sorted({*MODEL, *CACHE, *POINT}))
def test_the_page_lists_every_name(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


# --- text and tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_text_becomes_tokens_and_back(family: str) -> None:
    model = prepared(family)
    text = "left or right"
    ids = model.tokenizer(text)["input_ids"]
    assert model.to_tokens(text).tolist() == [ids]
    bare = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.to_tokens(text, prepend_bos=False).tolist() == [bare]
    assert model.to_string(bare) == text
    assert "".join(model.to_str_tokens(bare)) == text  # type: ignore[arg-type]
    batch = model.to_tokens([text, "left"], prepend_bos=False)
    assert batch.shape == (2, len(bare))
    assert batch[1, 0] == model.tokenizer.pad_token_id
    assert [len(row) for row in model.to_str_tokens([text, "left"], False)] == [
        len(bare),
        len(model.tokenizer("left", add_special_tokens=False)["input_ids"]),
    ]
    token = bare[0]
    piece = model.to_single_str_token(token)
    assert model.to_single_token(piece) == token
    with pytest.raises(DataError, match="of this model, not one"):
        model.to_single_token("left or right, up or down")
    for wrong in ("text", 0.5, [[[1]]]):
        with pytest.raises(DataError, match="expected token ids"):
            model.to_string(wrong)


def test_prepared_inputs_are_shown_as_cells() -> None:
    model = prepared("llava")
    inputs = model.prepare(suite.picture(64, 64), "left")
    assert model.to_str_tokens(inputs) == inputs.to_str_tokens()[0]
    with pytest.raises(DataError, match="prepare did not make"):
        model.to_str_tokens(dict(inputs))


def test_the_weights_of_the_vocabulary() -> None:
    model = tiny("llava")
    assert torch.equal(model.W_U, model.hf_model.get_output_embeddings().weight.T)  # type: ignore[operator]
    assert torch.equal(model.W_E, model.hf_model.get_input_embeddings().weight)  # type: ignore[operator]
    with pytest.raises(UnknownNameError, match="has no bias"):
        model.b_U  # noqa: B018
    head = model.hf_model.get_output_embeddings()  # type: ignore[operator]
    head.bias = torch.nn.Parameter(torch.ones(head.weight.shape[0]))
    try:
        assert torch.equal(model.b_U, head.bias)
    finally:
        head.bias = None


# --- hook points by attribute ----------------------------------------------------------------


def test_hook_points_are_found_by_attribute() -> None:
    model = tiny("llava")
    points = model.hook_dict
    assert model.blocks[1].attn.hook_q is points["blocks.1.attn.hook_q"]
    assert model.blocks[-1].hook_out is points["blocks.2.hook_resid_post"]
    assert model.blocks[0].attn.q.hook_out is points["blocks.0.attn.hook_q"]
    assert model.blocks[0].hook_mlp_in is points["blocks.0.hook_mlp_in"]
    assert getattr(model, "hook_embed") is points["hook_embed"]  # noqa: B009
    assert model.ln_final.hook_normalized is points["ln_final.hook_normalized"]
    assert (
        model.vision_encoder.blocks[2].mlp.hook_post
        is points["vision_encoder.blocks.2.mlp.hook_post"]
    )
    assert len(model.blocks) == len(list(model.blocks)) == 3
    assert [b.hook_resid_pre.layer() for b in model.blocks[1:]] == [1, 2]
    assert "hook_z" in dir(model.blocks[0].attn)
    with pytest.raises(UnknownNameError, match=r"blocks\[3\] is not there: it has 0 to 2"):
        model.blocks[3]
    with pytest.raises(UnknownNameError, match="no weight is converted"):
        model.blocks[0].attn.W_Q  # noqa: B018
    with pytest.raises(UnknownNameError, match="Did you mean 'hook_resid_post'"):
        model.blocks[0].hook_resid_pots  # noqa: B018
    with pytest.raises(UnknownNameError, match="computes nothing"):
        model.blocks[0](torch.zeros(1))
    with pytest.raises(UnknownNameError, match="keeps no hooks"):
        model.blocks[0].hook_resid_pre.add_hook  # noqa: B018


# --- what a run returns ----------------------------------------------------------------------


def plain_loss(model: Any, inputs: Any, logits: Tensor) -> Tensor:
    """The mean loss over text tokens after a token, by a loop."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    losses = [
        functional.cross_entropy(logits[b, i], ids[b, i + 1])
        for b in range(len(ids))
        for i in range(ids.shape[1] - 1)
        if mask[b, i] and mask[b, i + 1] and ids[b, i + 1] != model.cfg.image_token_id
    ]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_text_tokens(family: str) -> None:
    model = prepared(family)
    inputs = model.prepare([suite.picture(64, 64)] * 2, ["left or right", "yes"])
    with torch.no_grad():
        logits = model(inputs)
        expected = plain_loss(model, inputs, logits)
        torch.testing.assert_close(model(inputs, return_type="loss"), expected)
        both = model.run_with_hooks(inputs, return_type="both")
        assert torch.equal(both[0], logits)
        torch.testing.assert_close(both[1], expected)
        assert model(inputs, return_type=None) is None
        each = model(inputs, return_type="loss", loss_per_token=True)
        assert each.shape == (2, logits.shape[1] - 1)
        torch.testing.assert_close(each.nanmean(), expected)
        targets = inputs.input_ids[:, 1:]
        assert each[targets == model.cfg.image_token_id].isnan().all()
        loss, cache = model.run_with_cache(inputs, STREAM, return_type="loss")
        torch.testing.assert_close(loss, expected)
        assert len(cache) == model.cfg.n_layers
    loss = model(inputs, return_type="loss")
    loss.backward()
    model.hf_model.zero_grad()


def test_a_loss_that_cannot_be_had_is_an_error() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with pytest.raises(HookError, match="expected logits, loss, both or None"):
        model(inputs, return_type="los")
    with pytest.raises(HookError, match="Leave out logits_to_keep"):
        model(inputs, return_type="loss", logits_to_keep=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_and_the_batch_axis_of_a_cache(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of eager attention
        _, whole = model.run_with_cache(inputs)
        for pos in (-1, slice(2, 5), [0, -2]):
            _, part = model.run_with_cache(inputs, pos_slice=pos)
            index = [pos] if isinstance(pos, int) else pos
            assert set(part) == set(whole)
            for name in ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "hook_logits"):
                torch.testing.assert_close(part[name], whole[name][:, index], **NEAR)
            pattern = "blocks.0.attn.hook_pattern"
            torch.testing.assert_close(part[pattern], whole[pattern][:, :, index], **NEAR)
            vision = "vision_encoder.blocks.0.hook_resid_post"
            torch.testing.assert_close(part[vision], whole[vision], **NEAR)
    with pytest.raises(DataError, match="pos_slice=999 was given"):
        model.run_with_cache(inputs, STREAM, pos_slice=999)
    one = make_inputs(family)
    _, cache = model.run_with_cache(one, STREAM, remove_batch_dim=True)
    _, plain = model.run_with_cache(one, STREAM)
    assert not cache.has_batch_dim and plain.has_batch_dim
    assert torch.equal(cache["resid_post", 1], plain["resid_post", 1][0])
    with pytest.raises(DataError, match="only 1 can be removed"):
        model.run_with_cache(inputs, STREAM, remove_batch_dim=True)


def test_shorter_names_of_a_cache() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=2)
    _, cache = model.run_with_cache(inputs, not_scores)
    stacked = cache.stack_activation("resid_post")
    assert torch.equal(stacked, cache.stack("resid_post"))
    assert torch.equal(cache.stack_activation("resid_post", 2), stacked[:2])
    assert torch.equal(
        cache.stack_activation("normalized", 1, "ln2"), cache["normalized", 0, "ln2"][None]
    )
    assert cache.cache_dict.keys() == dict(cache).keys()
    assert cache.has_embed and not cache.has_pos_embed
    one = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(one["resid_post", 0], cache["resid_post", 0][1])
    assert torch.equal(
        cache.apply_slice_to_batch_dim(slice(0, 1))["resid_post", 0], cache["resid_post", 0][:1]
    )


# --- sites on request ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of pictures that a processor resizes
@pytest.mark.parametrize(
    "model_type", ["qwen2_vl", "gemma3", "llava", "qwen3_vl", "mllama", "blip-2", "gemma4"]
)
def test_sites_on_request_are_what_they_say(model_type: str) -> None:
    model = suite.build(model_type)
    inputs = model.prepare([suite.picture(*suite.image_size(model))], "What is this?")
    with torch.no_grad():
        found = check_on_request(model, inputs)
    assert (found.verdict, found.note) == ("yes", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_on_request_run_only_where_they_are_named(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    more = ["hook_attn_in", "hook_mlp_in", "attn.hook_result", "ln1.hook_scale", "ln2.hook_scale"]
    names = [f"blocks.1.{leaf}" for leaf in more]
    assert not set(names) & set(model.hook_names)
    _, cache = model.run_with_cache(inputs, not_scores)
    assert not set(names) & set(cache)
    _, asked = model.run_with_cache(inputs, names)
    sites: Any = model.sites
    assert list(asked) == sorted(names, key=list(sites.more).index)
    _, by_pattern = model.run_with_cache(inputs, "*hook_result")
    assert len(by_pattern) == model.cfg.n_layers
    _, by_function = model.run_with_cache(inputs, lambda name: name.endswith("hook_mlp_in"))
    assert len(by_function) == model.cfg.n_layers
    torch.testing.assert_close(asked["mlp_in", 1], cache["resid_mid", 1])
    # A head's result is its output through its part of the weight.
    parts: Any = model.anatomy.lm.blocks[1]
    out = model.hf_model.get_submodule(parts.attn.out)
    z, n_heads = cache["z", 1], model.cfg.n_heads
    for head in range(n_heads):
        only = torch.zeros_like(z)
        only[:, :, head] = z[:, :, head]
        with torch.no_grad():
            torch.testing.assert_close(asked["result", 1][:, :, head], out(only.flatten(2)), **NEAR)
    # The norm's own weight, as the family applies it, after x over the scale.
    x = cache["resid_mid", 1]
    norm: Any = model.hf_model.get_submodule(parts.ln2)
    gain = 1 + norm.weight if family == "gemma-3" else norm.weight
    torch.testing.assert_close(
        x / asked["scale", 1, "ln2"] * gain, cache["normalized", 1, "ln2"], **NEAR
    )
    for site in names[2:]:
        with pytest.raises(HookError, match="cannot be written: it is computed from"):
            model.run_with_hooks(inputs, [(site, lambda x, hook: 2 * x)])
    with pytest.raises(UnknownHookError, match="No hook named"):
        model.run_with_cache(inputs, "blocks.1.hook_mpl_in_x")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_write_to_the_input_of_a_part_is_a_torch_hook_on_its_norm(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    for leaf, part in (("hook_attn_in", "ln1"), ("hook_mlp_in", "ln2")):
        edited = model.run_with_hooks(inputs, [(f"blocks.1.{leaf}", lambda x, hook: x.roll(1, -1))])
        norm = model.hf_model.get_submodule(getattr(model.anatomy.lm.blocks[1], part))
        handle = norm.register_forward_pre_hook(lambda _, args: (args[0].roll(1, -1), *args[1:]))
        try:
            plain = model(inputs)
        finally:
            handle.remove()
        torch.testing.assert_close(edited, plain)


@pytest.mark.parametrize("engine", ["growing", "restart", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_edit_the_input_of_a_part(family: str, engine: str) -> None:
    model, inputs = tiny(family), make_inputs(family, batch=2)
    leaves = ("hook_attn_in", "hook_mlp_in")
    sites = [f"blocks.{layer}.{leaf}" for layer in (0, 1, 2) for leaf in leaves]
    last = LastToken()
    sweep = Sweep(inputs, {"site": sites}, lambda site: Ablate(site, at=last))
    scores = sweep.run(model, lambda logits: logits[:, -1].amax(-1), engine=engine)
    for site in sites:
        plain = model.run_with_hooks(inputs, [Ablate(site, at=last)])[:, -1].amax(-1)
        found = torch.as_tensor(scores.sel(site=site).values).float()
        torch.testing.assert_close(found, plain, **NEAR)

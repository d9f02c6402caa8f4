"""Hooks and interventions in generation: what acts where is read from what runs, not the call."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import Ablate, HookedVLM, LastToken, Region, Steer
from hooked_vlm.errors import HookError, InterventionError


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": 0,
    "suppress_tokens": [297, 298, 299],
}
LOGITS: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
NOISE = torch.randn(48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def steer(site: int | str = 2, at: Any = None) -> Steer:
    width = 32 if "vision" in str(site) else 48
    direction = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    return Steer(site, at=at, directions=direction, alpha=8.0)


def logits(model: HookedVLM, inputs: Any, hooks: list, **options: Any) -> torch.Tensor:
    found: Any = model.generate(inputs, fwd_hooks=hooks, **GREEDY, **LOGITS, **options)
    return torch.stack(found.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_b1_a_cache_that_a_config_switches_off(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    for edit in (steer(), steer("vision_encoder.blocks.1.hook_resid_pre", model_region(family))):
        expected = logits(model, inputs, [edit])
        assert not torch.allclose(expected, logits(model, inputs, []), atol=1e-2)
        without = GenerationConfig(use_cache=False)
        torch.testing.assert_close(
            logits(model, inputs, [edit], generation_config=without), expected
        )
        own: Any = model.hf_model.generation_config
        own.use_cache = False
        try:
            torch.testing.assert_close(logits(model, inputs, [edit]), expected)
        finally:
            own.use_cache = True


def model_region(family: str) -> Region:
    side = 6 if family == "llava" else 3
    return Region.column_band((side, side), 0, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
def test_b4_functions_act_at_every_step_by_either_spelling(family: str, cached: bool) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    hook = ("blocks.1.hook_resid_pre", lambda x, hook: x.flip(-1) + 2 * NOISE)
    one = model.generate(inputs, fwd_hooks=[hook], use_cache=cached, **GREEDY)
    with model.hooks([hook]):
        assert torch.equal(model.generate(inputs, use_cache=cached, **GREEDY), one)
    prompt = model.generate(inputs, fwd_hooks=[hook], prefill_only=True, use_cache=cached, **GREEDY)
    with model.hooks([hook], prefill_only=True):
        assert torch.equal(model.generate(inputs, use_cache=cached, **GREEDY), prompt)
    assert not torch.equal(one, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_b4_interventions_act_on_the_prompt_by_either_spelling(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    edit = steer()
    expected = logits(model, inputs, [edit])
    for only in (True, False):
        torch.testing.assert_close(logits(model, inputs, [edit], prefill_only=only), expected)
        with model.hooks([edit], inputs=inputs, prefill_only=only):
            torch.testing.assert_close(logits(model, inputs, []), expected)
            torch.testing.assert_close(logits(model, inputs, [], use_cache=False), expected)


def test_b5_a_hook_knows_the_positions_of_its_keys() -> None:
    """Keys of sliding layers are the last ones; each has the position at which it was computed."""
    model, inputs = tiny("gemma-3"), make_inputs("gemma-3")
    length = inputs["input_ids"].shape[1]
    image = (inputs["input_ids"][0] == model.cfg.image_token_id).nonzero().flatten()
    window = 10
    assert length > window

    def watch(store: dict) -> list:
        def fn(pattern: torch.Tensor, hook: Any) -> None:
            share = pattern[..., -1, :][..., hook.keys_at(image)].sum(-1)
            store[hook.name, hook.positions[-1]] = share, hook.key_positions
            assert len(hook.positions) == pattern.shape[2]

        return [("blocks.*.attn.hook_pattern", fn)]

    ways: list[Any] = [{}, {"cache_implementation": "static"}]
    for options in ways:
        steps: dict = {}
        ids = model.generate(inputs, fwd_hooks=watch(steps), **GREEDY, **options)
        # The right value: the same positions in one pass over the prompt and its answer.
        for end in range(length, ids.shape[1] - 1):  # the last token is not run
            types = torch.zeros_like(ids[:, : end + 1])
            types[:, image] = 1
            whole: dict = {}
            model.run_with_hooks(
                {**inputs, "input_ids": ids[:, : end + 1], "token_type_ids": types,
                 "attention_mask": torch.ones_like(types)},
                watch(whole),
            )  # fmt: skip
            for layer in range(3):
                key = f"blocks.{layer}.attn.hook_pattern", end
                torch.testing.assert_close(steps[key][0], whole[key][0], atol=1e-5, rtol=1e-4)
                assert steps[key][1][-1] == end
    assert len(steps["blocks.1.attn.hook_pattern", length][1]) > window


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_b6_interventions_act_on_every_beam(family: str, way: dict) -> None:
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)
    options = {**GREEDY, **way}
    for site in (2, "vision_encoder.blocks.1.hook_resid_pre"):
        edit = steer(site, None if site == 2 else model_region(family))
        cells = dict(edit.hooks_for(model, inputs))
        ((name, function),) = cells.items()

        def by_hand(x: Any, hook: Any, function: Any = function) -> Any:
            n = len(x) // 2  # images may be encoded before prompts are copied
            parts = [function(x[i::n], hook) for i in range(n)]
            rows = [row for rows in zip(*parts, strict=True) for row in rows]
            return torch.stack(rows) if isinstance(x, torch.Tensor) else rows

        torch.manual_seed(0)
        found = model.generate(inputs, fwd_hooks=[edit], **options)
        torch.manual_seed(0)
        expected = model.generate(inputs, fwd_hooks=[(name, by_hand)], prefill_only=True, **options)
        torch.manual_seed(0)
        plain = model.generate(inputs, **options)
        assert torch.equal(found, expected)
        assert found.shape != plain.shape or not torch.equal(found, plain)


@pytest.mark.parametrize("family", ["gemma-3", "llava"])
def test_b7_the_last_token_of_inputs_that_continue_a_cache(family: str) -> None:
    model, inputs = tiny(family), make_inputs(family)
    ids, new = inputs["input_ids"], torch.tensor([[7, 11]])
    longer = {**inputs, "input_ids": torch.cat([ids, new], 1)}
    mask = torch.ones_like(longer["input_ids"])
    longer |= {"attention_mask": mask}
    if "token_type_ids" in inputs:
        types = torch.cat([inputs["token_type_ids"], torch.zeros_like(new)], 1)
        longer |= {"token_type_ids": types}
    edit = Ablate(2, at=LastToken())
    expected = model.run_with_hooks(longer, [edit])[:, -1]
    past: Any = model.hf_model(**inputs, use_cache=True).past_key_values
    continued = {"input_ids": new, "attention_mask": mask, "past_key_values": past}
    if "token_type_ids" in inputs:
        continued |= {"token_type_ids": torch.zeros_like(new)}
    found = model.run_with_hooks(continued, [edit])[:, -1]
    torch.testing.assert_close(found, expected)
    # The cache as a keyword beside the inputs, as the wrapped model takes it.
    past = model.hf_model(**inputs, use_cache=True).past_key_values
    del continued["past_key_values"]
    found = model.run_with_hooks(continued, [edit], past_key_values=past)[:, -1]
    torch.testing.assert_close(found, expected)


def test_b_a_prefill_in_chunks_is_one_step() -> None:
    model, ids = tiny("llava"), torch.arange(5, 17)[None]
    hook = ("blocks.1.hook_resid_pre", lambda x, hook: x + 2 * NOISE)
    expected = logits(model, {"input_ids": ids}, [hook], prefill_only=True)
    chunks: Any = {"prefill_chunk_size": 5}
    found = logits(model, {"input_ids": ids}, [hook], prefill_only=True, **chunks)
    torch.testing.assert_close(found, expected)
    seen: list[Any] = []
    note = ("blocks.1.hook_resid_pre", lambda x, hook: seen.append((hook.step, hook.positions)))
    logits(model, {"input_ids": ids}, [note], **chunks)
    assert seen[:4] == [(0, range(5)), (0, range(5, 10)), (0, range(10, 12)), (1, range(12, 13))]
    with pytest.raises(InterventionError, match="prefill_chunk_size"):
        logits(model, {"input_ids": ids}, [steer()], **chunks)
    with (
        model.hooks([hook], prefill_only=True),
        pytest.raises(HookError, match="inputs=inputs"),
    ):
        model.generate({"input_ids": ids}, **GREEDY, **chunks)


@pytest.mark.parametrize("family", FAMILIES)
def test_c5_interventions_do_not_act_on_other_inputs(family: str) -> None:
    model = tiny(family)
    one, other = (make_inputs(family, 2, seed=seed) for seed in (1, 2))
    assert one["input_ids"].shape == other["input_ids"].shape
    edits = [steer(), steer("vision_encoder.blocks.1.hook_resid_pre", model_region(family))]
    for edit in edits:
        with model.hooks([edit], inputs=one):
            expected = model(one)
            copies = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in one.items()}
            torch.testing.assert_close(model(copies), expected)
            with pytest.raises(InterventionError, match=r"other ones"):
                model(other)
            with pytest.raises(InterventionError, match=r"other ones"):
                model.generate(other, **GREEDY)


def test_c5_prompts_of_the_same_tokens_and_other_grids() -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl")
    other = {**inputs, "image_grid_thw": inputs["image_grid_thw"] * torch.tensor([1, 2, 1])}
    with (
        model.hooks([steer()], inputs=inputs),
        pytest.raises(InterventionError, match="image_grid_thw"),
    ):
        model(other)


@pytest.mark.parametrize("family", ["gemma-3", "llava"])
def test_b7_the_last_token_of_embeddings(family: str) -> None:
    model = tiny(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    embeds = {"inputs_embeds": model.hf_model.get_input_embeddings()(ids)}  # type: ignore[operator]
    edit = Ablate(2, at=LastToken())
    expected = model.run_with_hooks({"input_ids": ids}, [edit])
    torch.testing.assert_close(model.run_with_hooks(embeds, [edit]), expected)
    if family == "gemma-3":
        return  # transformers generates from no embeddings with this class
    answer = model.generate({"input_ids": ids}, fwd_hooks=[edit], **GREEDY)
    assert torch.equal(model.generate(embeds, fwd_hooks=[edit], **GREEDY), answer[:, 4:])

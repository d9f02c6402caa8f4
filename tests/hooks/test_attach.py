"""Attaching and removing: order, nesting, refusals, and that nothing stays behind."""

import pytest
import torch
from torch import nn

from helpers.tiny_models import FAMILIES, build, make_inputs, tiny
from hooked_vlm.errors import HookedVLMWarning, HookError, UnknownHookError
from hooked_vlm.hooks.hook_point import PassCounter
from hooked_vlm.model.vlm import HookedVLM


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
POST = "blocks.1.hook_resid_post"
KINDS = [
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_mid",
    "blocks.0.attn.hook_pattern",
    "vision_encoder.blocks.0.attn.hook_rot_q",
    "vision_encoder.blocks.0.hook_resid_pre",
    "vision_projector.hook_out",
]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def state(hf_model: nn.Module) -> list[tuple]:
    """Everything that attaching touches, on every module."""
    return [
        (list(m._forward_hooks), list(m._forward_pre_hooks), id(getattr(m, "config", None)))
        for m in hf_model.modules()
    ]


class Boom(Exception):  # noqa: N818
    pass


def boom(activation, hook):
    raise Boom


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays_behind_whatever_raises(family):
    model, inputs = tiny(family), make_inputs(family)
    base, before = model(inputs), state(model.hf_model)
    kinds = [name for name in KINDS if name in model.hook_dict]
    reading = [(name, lambda x, hook: None) for name in kinds]
    for name in kinds:
        with pytest.raises(Boom):
            model.run_with_hooks(inputs, [*reading, (name, boom)])
        assert state(model.hf_model) == before, name
        with pytest.raises(HookError):
            model.run_with_cache(inputs, fwd_hooks=[(name, lambda x, hook: "wrong")])
        with pytest.raises(Boom), model.hooks([(name, lambda x, hook: None)]):
            assert state(model.hf_model) != before
            raise Boom
        with pytest.raises(Boom):
            model.generate(inputs, fwd_hooks=[(name, boom)], max_new_tokens=1)
        assert state(model.hf_model) == before, name
    assert torch.equal(model(inputs), base)


def test_a_name_that_matches_nothing_attaches_nothing():
    model = tiny("qwen2-vl")
    before = state(model.hf_model)
    with pytest.raises(UnknownHookError, match="Did you mean"):
        model.run_with_hooks(make_inputs("qwen2-vl"), [(POST, boom), (POST + "t", boom)])
    with (
        pytest.raises(UnknownHookError, match="layers 0 to 2"),
        model.hooks([("blocks.3.hook_resid_pre", boom)]),
    ):
        pass
    with pytest.raises(UnknownHookError, match="matches none"):
        model.run_with_cache(make_inputs("qwen2-vl"), "blocks.*.hook_residpost")
    assert state(model.hf_model) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["hook_resid_post", "attn.hook_pattern", "attn.hook_rot_q"])
def test_outer_blocks_run_first(family, site):
    model, inputs, order = tiny(family), make_inputs(family), []
    name = f"blocks.1.{site}"

    def mark(word):
        return lambda x, hook: order.append(word)

    with model.hooks([(name, mark("outer")), (name, mark("outer, second"))]):
        with model.hooks([(name, mark("inner"))]):
            model.run_with_hooks(inputs, [(name, mark("run"))])
        assert order == ["outer", "outer, second", "inner", "run"]
        order.clear()
        model(inputs)
    assert order == ["outer", "outer, second"]
    model(inputs)
    assert len(order) == 2


def test_later_functions_see_what_earlier_ones_made_and_the_cache_sees_the_last():
    model, inputs = tiny("llava"), make_inputs("llava")
    seen = []
    hooks = [
        (POST, lambda x, hook: x + 1),
        (POST, lambda x, hook: seen.append(x.clone())),
        (POST, lambda x, hook: x.mul_(2) and None),
    ]
    _, clean = model.run_with_cache(inputs, POST)
    _, cache = model.run_with_cache(inputs, POST, fwd_hooks=[(n, f) for n, f in hooks[:2]])
    assert torch.equal(seen[0], clean[POST] + 1)
    assert torch.equal(cache[POST], clean[POST] + 1)


def test_two_wrappers_of_one_model_work_together():
    hf_model = build("qwen2-vl")
    one, two = HookedVLM(hf_model), HookedVLM(hf_model)
    inputs, before = make_inputs("qwen2-vl"), state(hf_model)
    for site in ("attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_rot_q", "attn.hook_q"):
        for tower in ("", "vision_encoder."):
            name = f"{tower}blocks.1.{site}"
            double, add = (lambda x, hook: x * 2), (lambda x, hook: x + 0.5)
            both = one.run_with_hooks(inputs, [(name, add), (name, double)])
            with one.hooks([(name, double)]):  # the newer wrapper's functions run first
                assert torch.equal(two.run_with_hooks(inputs, [(name, add)]), both), name
            # The two may also ask for different quantities of one attention.
            with one.hooks([(f"{tower}blocks.1.attn.hook_rot_k", double)]):
                two.run_with_hooks(inputs, [(name, add)])
    assert state(hf_model) == before


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda x: x[:, 1:], r"returned \(1, 17, 48\) float32 .* expected \(1, 18, 48\) float32"),
        (lambda x: x.double(), r"returned \(1, 18, 48\) float64"),
        (lambda x: [x], r"returned a list of 1"),
        (lambda x: (x,), r"returned a tuple of 1"),
        (lambda x: 3.0, r"returned a float"),
        (lambda x: x.numpy(), r"returned a ndarray"),
    ],
)
def test_a_wrong_result_names_the_hook_what_was_given_and_what_was_expected(made, text):
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl")

    def clumsy(x, hook):
        return made(x)

    for name in ("blocks.0.hook_resid_post", "blocks.0.hook_resid_mid", "hook_embed"):
        with pytest.raises(HookError, match=f"'clumsy' at {name} " + text) as error:
            model.run_with_hooks(inputs, [(name, clumsy)])
        assert "axes [batch pos d_model]" in str(error.value)


def test_a_tuple_is_as_good_as_a_list_by_image():
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", images=2)
    inputs["image_grid_thw"] = torch.tensor([[1, 6, 4], [1, 6, 8]])
    name = "vision_projector.hook_out"
    runs = [
        model.run_with_hooks(inputs, [(name, lambda x, hook, kind=kind: kind(v * 2 for v in x))])
        for kind in (list, tuple)
    ]
    assert torch.equal(*runs)


def test_a_list_of_the_wrong_length_or_shape_is_refused():
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl", images=2)
    inputs["image_grid_thw"] = torch.tensor([[1, 6, 4], [1, 6, 8]])
    for name in ("vision_encoder.blocks.0.hook_resid_post", "vision_encoder.blocks.0.attn.hook_z"):
        for made in (lambda x: x[:1], lambda x: torch.cat(x), lambda x: x[::-1]):
            with pytest.raises(HookError, match=r"expected a list of 2 \(\(24, .*\(48, "):
                model.run_with_hooks(inputs, [(name, lambda x, hook, made=made: made(x))])


@pytest.mark.parametrize(
    "item", ["hook_embed", ("hook_embed",), ("hook_embed", 3), (boom, "hook_embed"), boom]
)
def test_what_is_no_hook_is_refused(item):
    with pytest.raises(HookError, match="is not a hook"):
        tiny("llava").run_with_hooks(make_inputs("llava"), [item])


def test_hook_points_say_where_they_are():
    model, seen = tiny("gemma-3"), []
    names = ["vision_encoder.blocks.2.hook_resid_post", POST, "hook_logits"]

    def note(x, hook):
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1
        seen.append((hook.name, hook.axes, hook.step, hook is model.hook_dict[hook.name]))

    model.run_with_hooks(make_inputs("gemma-3"), [(lambda name: name in names, note)])
    axes = ["image patch d_vision", "batch pos d_model", "batch pos d_vocab"]
    assert seen == [(name, axis, 0, True) for name, axis in zip(names, axes, strict=True)]
    assert model.hook_dict[POST].ctx.pop("calls") == 1
    assert [model.hook_dict[name].layer() for name in names[:2]] == [2, 1]
    with pytest.raises(HookError, match="not inside a block"):
        model.hook_dict["hook_logits"].layer()


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_sites_on_a_text_only_prompt_are_said_not_to_have_run(family):
    model = tiny(family)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    name = "vision_encoder.blocks.0.hook_resid_post"
    with pytest.warns(HookedVLMWarning, match="1 of the sites .* never ran.*: vision_encoder.bl"):
        model.run_with_hooks(inputs, [(name, boom)])
    with pytest.warns(HookedVLMWarning, match="never ran"):
        _, cache = model.run_with_cache(inputs, [name, POST])
    assert list(cache) == [POST]
    _, cache = model.run_with_cache(inputs)  # nothing in particular was asked for
    assert all(not site.startswith("vision") for site in cache)
    assert len(cache) == sum(not site.startswith("vision") for site in model.hook_dict)


@pytest.mark.parametrize("family", FAMILIES)
def test_j2_calls_are_counted_from_0_in_every_pass_and_every_block(family):
    model, inputs = tiny(family), make_inputs(family)
    calls: list[tuple[str, int]] = []
    sites = ["vision_projector.hook_out", POST, "blocks.0.attn.hook_pattern"]
    hooks = [(site, lambda x, hook: calls.append((hook.name, hook.call))) for site in sites]
    for _ in range(2):
        with model.hooks(hooks):
            model(inputs)
            model(inputs)
    assert sorted(calls) == sorted((site, 0) for site in sites * 4)


def test_j2_what_runs_outside_of_a_pass_is_no_edit_of_one() -> None:
    run = PassCounter()
    run.note(changed=True)
    assert not run.edited
    run.running = True
    run.note(changed=True)
    run.note(changed=False)
    assert run.edited


def test_torch_hooks_of_the_user_run_after_the_librarys():
    # As the guide says: they receive what functions returned, and the cache has the value before.
    model, inputs, seen = HookedVLM(build("llava")), make_inputs("llava"), []
    block = model.hf_model.get_submodule(model.sites[POST].module)
    _, clean = model.run_with_cache(inputs, [POST])

    def double(_, args, output):
        seen.append(output)
        return output * 2

    handle = block.register_forward_hook(double)
    _, cache = model.run_with_cache(inputs, [POST, "blocks.2.hook_resid_pre"])
    assert torch.equal(cache[POST], clean[POST])
    assert torch.equal(cache["blocks.2.hook_resid_pre"], clean[POST] * 2)
    model.run_with_hooks(inputs, [(POST, lambda x, hook: x + 1)])
    assert torch.equal(seen[-1], clean[POST] + 1)
    handle.remove()

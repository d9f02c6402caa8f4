"""Models that are not as usual: compiled, checkpointed, adapted, parallel, hooked by others.

In each the outermost module's forward does not run, or modules run otherwise than they are written.
Hooks then work as on the plain model, or an error comes before a number does.
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import CompileConfig

from conformance.tiny import tiny_model
from helpers.large_models import PackedLinear, quantised
from helpers.prepared_models import prepared
from helpers.tiny_encoders import build_encoder
from helpers.tiny_models import END, FAMILIES, IMAGE, START, build, make_inputs, tiny
from hooked_vlm import Ablate, HookedVisionEncoder, HookedVLM, Region, Sweep
from hooked_vlm.anatomy.wrappers import modules_of
from hooked_vlm.errors import (
    HookedVLMWarning,
    HookError,
    InterventionError,
    UnsupportedModelError,
)
from hooked_vlm.sweeps.attribution import attribution_patch
from hooked_vlm.sweeps.transformer_lens import get_act_patch_resid_pre


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
GREEDY: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "pad_token_id": 0,
    "suppress_tokens": [START, END, IMAGE],
}
NOISE = torch.randn(48, generator=torch.Generator().manual_seed(0))
EDIT = ("blocks.1.hook_attn_out", lambda x, hook: x + 3 * NOISE)
Wrap = Callable[[nn.Module], nn.Module]


def score(logits: Tensor) -> Tensor:
    return logits[:, -1, 5]


# --- D1: compiled ---------------------------------------------------------------------------


class Backend:
    """A backend of torch's compiler that runs graphs as they are, and counts the runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __deepcopy__(self, memo: Any) -> "Backend":
        return self  # transformers copies its options

    def __call__(self, graph: Any, example_inputs: Any, **options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def in_place(hf_model: Any, backend: Backend) -> Any:
    hf_model.model.language_model.compile(backend=backend)
    return hf_model


def whole(hf_model: Any, backend: Backend) -> Any:
    return torch.compile(hf_model, backend=backend)


def part(hf_model: Any, backend: Backend) -> Any:
    hf_model.model.language_model = torch.compile(hf_model.model.language_model, backend=backend)
    return hf_model


def blocks(hf_model: Any, backend: Backend) -> Any:
    layers = hf_model.model.language_model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend=backend)
    return hf_model


def forward(hf_model: Any, backend: Backend) -> Any:
    hf_model.forward = torch.compile(hf_model.forward, backend=backend)
    return hf_model


WAYS = {"in place": in_place, "whole": whole, "part": part, "blocks": blocks, "forward": forward}


@contextmanager
def compiled(way: str) -> Iterator[tuple[HookedVLM, Backend]]:
    torch.compiler.reset()
    backend = Backend()
    yield HookedVLM(WAYS[way](build("llava"), backend), name="tiny llava"), backend
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS)
def test_d1_hooks_act_in_compiled_models(way: str) -> None:
    plain, inputs = tiny("llava"), make_inputs("llava")
    if way in ("whole", "forward"):  # the encoder would be compiled too, which takes long
        inputs = {"input_ids": inputs["input_ids"][:, -6:]}
    with torch.no_grad(), compiled(way) as (model, backend):
        assert model.hook_names == plain.hook_names and model.cfg == plain.cfg
        torch.testing.assert_close(model(inputs), plain(inputs))
        assert backend.runs > 0
        before, backend.runs = backend.runs, 0

        edited = plain.run_with_hooks(inputs, [EDIT])
        assert not torch.equal(edited, plain(inputs))
        assert torch.equal(model.run_with_hooks(inputs, [EDIT]), edited)
        with model.hooks([EDIT]):
            assert torch.equal(model(inputs), edited)
            assert torch.equal(model.hf_model(**inputs).logits, edited)
        _, cache = model.run_with_cache(inputs, lambda name: True)
        _, expected = plain.run_with_cache(inputs, lambda name: True)
        assert list(cache) == list(expected)
        assert all(torch.equal(cache[name], expected[name]) for name in ("hook_logits", EDIT[0]))
        residual, _ = model.run_with_cache(inputs, "hook_embed", stop_at_layer=1)
        again = model.run_from_layer(inputs, residual, 1)
        assert torch.equal(again, plain.run_from_layer(inputs, residual, 1))
        assert backend.runs == 0

        model(inputs)
        assert backend.runs == before  # and runs without hooks are compiled again


@pytest.mark.parametrize("way", ["in place", "blocks"])
def test_d1_sweeps_and_attribution_of_compiled_models(way: str) -> None:
    plain, inputs = tiny("llava"), make_inputs("llava")
    sweep = Sweep(
        inputs,
        {"slot": [0, 1, 2], "col": [0, 1, 2]},
        make=lambda slot, col: Ablate(slot, at=Region.column_band((6, 6), col, col + 1)),
    )
    clean = plain.run_with_cache(make_inputs("llava", seed=3))[1]
    with compiled(way) as (model, backend):
        with torch.no_grad():
            model(inputs)
        backend.runs = 0
        found, expected = (sweep.run(m, score) for m in (model, plain))
        assert found.attrs["engine"] == expected.attrs["engine"]
        torch.testing.assert_close(torch.tensor(found.values), torch.tensor(expected.values))
        found, expected = (sweep.attribution(m, score) for m in (model, plain))
        torch.testing.assert_close(torch.tensor(found.values), torch.tensor(expected.values))
        found, expected = (
            get_act_patch_resid_pre(m, inputs, clean, lambda logits: score(logits).mean())
            for m in (model, plain)
        )
        torch.testing.assert_close(found, expected)
        assert backend.runs == 0


def test_d1_generation_under_hooks_compiles_no_step() -> None:
    torch.compiler.reset()
    plain, inputs = tiny("llava"), make_inputs("llava")
    model, backend = HookedVLM(build("llava")), Backend()
    config = CompileConfig(backend=backend, mode="default")
    config._compile_all_devices = True  # type: ignore[assignment] - as it does on a GPU by itself
    options = {**GREEDY, "cache_implementation": "static", "compile_config": config}
    static = {**GREEDY, "cache_implementation": "static"}
    with torch.no_grad():
        assert torch.equal(model.generate(inputs, **options), plain.generate(inputs, **static))
        assert backend.runs > 0
        backend.runs = 0
        steps: list[int] = []
        edit = (EDIT[0], lambda x, hook: steps.append(hook.step) or EDIT[1](x, hook))
        found = model.generate(inputs, fwd_hooks=[edit], prefill_only=False, **options)
        expected = plain.generate(inputs, fwd_hooks=[EDIT], prefill_only=False, **static)
        assert torch.equal(found, expected) and steps == [0, 1, 2] and backend.runs == 0
    assert "get_compiled_call" not in vars(model.hf_model)
    torch.compiler.reset()


def test_d1_blocks_closed_in_another_order_stay_eager() -> None:
    inputs = make_inputs("llava")
    with torch.no_grad(), compiled("in place") as (model, backend):
        other = HookedVLM(model.hf_model)
        expected = tiny("llava").run_with_hooks(inputs, [EDIT])
        one, two = model.hooks([("hook_embed", lambda x, hook: x + 1)]), other.hooks([EDIT])
        one.__enter__()
        two.__enter__()
        one.__exit__(None, None, None)
        assert torch.equal(model(inputs), expected) and backend.runs == 0
        two.__exit__(None, None, None)
        model(inputs)
        assert backend.runs > 0


def test_d1_parts_compiled_after_wrapping_are_refused() -> None:
    hf_model, inputs = build("llava"), make_inputs("llava")
    model = HookedVLM(hf_model)
    blocks(hf_model, Backend())
    with pytest.raises(HookError, match=r"OptimizedModule.*Wrap the model again") as caught:
        model.run_with_hooks(inputs, [("blocks.1.hook_resid_pre", EDIT[1])])
    assert len(str(caught.value)) <= 400 and not model.is_hooked
    assert torch.equal(
        HookedVLM(hf_model).run_with_hooks(inputs, [EDIT]),
        tiny("llava").run_with_hooks(inputs, [EDIT]),
    )


def test_d1_a_compiled_encoder() -> None:
    model_type = "siglip"
    plain = HookedVisionEncoder(build_encoder(model_type))
    torch.compiler.reset()
    backend = Backend()
    compiled: Any = torch.compile(build_encoder(model_type), backend=backend)
    model = HookedVisionEncoder(compiled)
    side = plain.cfg.image_size or 0
    inputs = {"pixel_values": torch.randn(1, 3, side, side)}
    name = "vision_encoder.blocks.0.hook_attn_out"
    with torch.no_grad():
        model(inputs)
        assert backend.runs > 0
        backend.runs = 0
        found, expected = (m.run_with_cache(inputs, name)[1][name] for m in (model, plain))
        assert torch.equal(found, expected) and backend.runs == 0
        assert torch.equal(model.grids(inputs)[0][0].positions, plain.grids(inputs)[0][0].positions)
    torch.compiler.reset()


def test_d1_traced_modules_are_refused() -> None:
    hf_model = build("llava")
    linear = hf_model.model.language_model.layers[0].mlp.down_proj
    hf_model.model.language_model.layers[0].mlp.down_proj = torch.jit.trace(
        linear, torch.randn(1, 96)
    )
    with pytest.raises(UnsupportedModelError, match="scripted or traced"):
        HookedVLM(hf_model)


# --- D2: checkpointed -----------------------------------------------------------------------

UNCACHED: dict[str, Any] = {"use_cache": False}
"""What transformers' own checkpointing sets, and torch's wrapper leaves to the user."""


def training(family: str, wrapped: bool = False) -> HookedVLM:
    """Returns a model in training with checkpointing by a flag, or by torch's wrapper."""
    hf_model = build(family)
    if wrapped:
        layers = hf_model.get_decoder().layers
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer)
        return HookedVLM(hf_model, name=family)
    switch(hf_model, "enable", {"use_reentrant": False})
    return HookedVLM(hf_model.train(), name=family)


def switch(hf_model: Any, which: str, *options: Any) -> None:
    """Switches checkpointing, under the name that the installed transformers has for it."""
    name = f"activation_checkpointing_{which}"
    name = name if hasattr(hf_model, name) else f"gradient_checkpointing_{which}"
    getattr(hf_model, name)(*options)


def gradient(model: HookedVLM, run: Callable[[], Tensor]) -> Tensor:
    weight: Any = model.hf_model.get_submodule(model.anatomy.embed).weight
    return torch.autograd.grad(run()[0, -1].max(), weight)[0]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_d2_edits_of_runs_that_a_backward_pass_repeats(family: str, wrapped: bool) -> None:
    model, inputs = training(family, wrapped), make_inputs(family)
    plain = HookedVLM(build(family))
    off = ("blocks.1.hook_attn_out", lambda x, hook: x * 0)
    expected = gradient(plain, lambda: plain.run_with_hooks(inputs, [off]))
    clean = gradient(plain, lambda: plain(inputs))
    assert not torch.allclose(expected, clean)

    for run in (
        lambda: model.run_with_hooks(inputs, [off]),
        lambda: model.run_with_cache(inputs, "hook_embed", fwd_hooks=[off])[0],
    ):
        with pytest.raises(HookError, match=r"with model\.hooks.*gradient_checkpoi") as caught:
            run()
        assert len(str(caught.value)) <= 400 and not model.is_hooked
    with model.hooks([off]):
        torch.testing.assert_close(gradient(model, lambda: model(inputs, **UNCACHED)), expected)
        torch.testing.assert_close(gradient(model, lambda: model(inputs, **UNCACHED)), expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_d2_what_checkpointing_leaves_alone(wrapped: bool) -> None:
    model, inputs = training("llava", wrapped), make_inputs("llava")
    plain = HookedVLM(build("llava"))
    seen: list[Tensor] = []
    reading = (EDIT[0], lambda x, hook: seen.append(x.detach()))
    clean = gradient(plain, lambda: plain(inputs))
    found = gradient(model, lambda: model.run_with_hooks(inputs, [reading]))
    torch.testing.assert_close(found, clean)
    # Patterns would be read of eager attention, which the backward pass then misses: torch says so.
    names = [name for name in model.hook_names if "attn_scores" not in name]
    names = [name for name in names if "pattern" not in name]
    found = gradient(model, lambda: model.run_with_cache(inputs, names)[0])
    torch.testing.assert_close(found, clean)
    with torch.no_grad():
        edited = model.run_with_hooks(inputs, [EDIT])
    torch.testing.assert_close(edited, plain.run_with_hooks(inputs, [EDIT]))
    model.generate(inputs, fwd_hooks=[EDIT], use_cache=False, **GREEDY)


def test_d2_a_block_that_ends_before_the_backward_pass() -> None:
    model, inputs = training("llava"), make_inputs("llava")
    with pytest.warns(HookedVLMWarning, match="before a backward pass"), model.hooks([EDIT]):
        model(inputs)
    with model.hooks([EDIT]):  # said once
        model(inputs)
    switch(model.hf_model, "disable")
    model.run_with_hooks(inputs, [EDIT])


def test_d2_estimates_by_gradients_are_refused() -> None:
    inputs, source = make_inputs("llava"), make_inputs("llava", seed=2)
    for model in (training("llava"), training("llava", wrapped=True)):
        model.hf_model.training = False  # the blocks are in training yet
        with pytest.raises(InterventionError, match="checkpointing"):
            attribution_patch(model, inputs, source, score)


def test_d2_grids_are_measured_in_evaluation() -> None:
    plain = prepared("llava")
    hf_model: Any = copy.deepcopy(plain.hf_model)
    switch(hf_model, "enable")
    model = HookedVLM(hf_model.train(), plain.processor)
    picture = torch.rand(3, 64, 64)
    found, expected = (m.prepare(picture, "what") for m in (model, plain))
    assert model.grid_finder.trusts_rule and hf_model.training
    assert torch.equal(found.grid.positions, expected.grid.positions)


# --- D3: adapted, parallel and other wrappers -----------------------------------------------


class AdaptedLayer(nn.Module):
    """A layer with an adapter beside it, as PEFT makes of linear maps and convolutions."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base_layer = layer
        for name in ("in_features", "out_features"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.beside = type(layer)(**_sizes(layer))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.beside(x)


def _sizes(layer: Any) -> dict[str, Any]:
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride")
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


class Passing(nn.Module):
    """A module that asks the one inside it for attributes that it lacks, as PEFT's do."""

    inner = ""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.inner:
                raise
            return getattr(getattr(self, self.inner), name)


class Tuner(Passing):
    inner = "model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)  # not by a call, as in PEFT before 0.18


class Adapted(Passing):
    """The outermost module of an adapted model: by way of the tuner, and in `generate` not."""

    inner = "base_model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(model)

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        return self.base_model(input_ids=input_ids, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


class Prompted(Adapted):
    """Prompt learning: positions of its own before those of the prompt."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(4, 48)})


def adapted(family: str) -> Any:
    """Returns a model with adapters beside attention, MLP, and the cut into patches."""
    hf_model = build(family)
    torch.manual_seed(1)
    for module in list(hf_model.modules()):
        for name, child in list(module.named_children()):
            named = name in ("q_proj", "down_proj", "qkv", "linear_2", "patch_embedding")
            if named and isinstance(child, nn.Linear | nn.Conv2d):
                setattr(module, name, AdaptedLayer(child))
    return hf_model.eval()


def require_the_same(model: HookedVLM, plain: HookedVLM, inputs: Any) -> None:
    """Everything that runs gives what it gives for the model inside."""
    assert model.sites == plain.sites and model.anatomy == plain.anatomy
    assert model.cfg.d_vocab == plain.cfg.d_vocab and model.hf_model is plain.hf_model
    assert torch.equal(model(inputs), plain(inputs))
    _, cache = model.run_with_cache(inputs)
    _, expected = plain.run_with_cache(inputs)
    assert list(cache) == list(expected)
    edited = plain.run_with_hooks(inputs, [EDIT])
    assert torch.equal(model.run_with_hooks(inputs, [EDIT]), edited)
    assert not torch.equal(edited, plain(inputs))
    with model.hooks([EDIT]):
        assert torch.equal(model(inputs), edited)
    for only in (True, False):
        steps: dict[int, list[int]] = {}
        answers = []
        for i, one in enumerate((model, plain)):
            seen = steps.setdefault(i, [])
            edit = (EDIT[0], lambda x, hook, s=seen: s.append(hook.step) or EDIT[1](x, hook))
            answers.append(one.generate(inputs, fwd_hooks=[edit], prefill_only=only, **GREEDY))
        assert torch.equal(*answers)
        assert steps[0] == steps[1] == ([0] if only else [0, 1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_d3_adapted_models_are_the_model_inside(family: str) -> None:
    with torch.no_grad():
        hf_model, inputs = adapted(family), make_inputs(family)
        plain = HookedVLM(hf_model, name="tiny")
        # Adapters are layers inside: the same sites as without them, with their effect.
        assert plain.hook_names == tiny(family).hook_names
        assert plain.cfg.vision == tiny(family).cfg.vision
        require_the_same(HookedVLM(Adapted(hf_model), name="tiny"), plain, inputs)
        for name in ("blocks.1.attn.hook_q", "vision_encoder.hook_patch_embed"):
            seen: list[Tensor] = []
            path = plain.sites[name].module
            module: Any = hf_model.get_submodule(path)
            assert isinstance(module, AdaptedLayer) or family == "qwen2-vl", path
            handle = module.register_forward_hook(lambda _, args, out, s=seen: s.append(out))
            plain.run_with_hooks(inputs, [(name, lambda x, hook: 0 * x)])
            handle.remove()
            assert not seen[0].any(), name


def test_d3_a_vocabulary_with_an_adapter_is_no_single_matrix() -> None:
    hf_model = build("llava")
    hf_model.lm_head = AdaptedLayer(hf_model.lm_head)
    with pytest.raises(UnsupportedModelError, match="lm_head has an adapter"):
        _ = HookedVLM(hf_model).W_U
    with pytest.raises(UnsupportedModelError, match="quantised"):
        _ = HookedVLM(quantised(build("llava"), PackedLinear)).W_U


def test_d3_prompt_learning_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"prompt_encoder.*prompt learning") as caught:
        HookedVLM(Prompted(build("llava")))
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_d3_peft(family: str, task: str | None) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    config.task_type = task
    inputs = make_inputs(family)
    with torch.no_grad():
        model = peft.get_peft_model(build(family), config).eval()
        hooked = HookedVLM(model, name="tiny")
        plain = HookedVLM(model.get_base_model(), name="tiny")
        assert hooked.hook_names == tiny(family).hook_names
        require_the_same(hooked, plain, inputs)
        assert not torch.equal(hooked(inputs), tiny(family)(inputs))
        with model.disable_adapter():
            torch.testing.assert_close(hooked(inputs), tiny(family)(inputs))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_d3_prompt_learning_of_peft_is_refused(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    shape = {"num_layers": 3, "token_dim": 48, "num_attention_heads": 4}
    for name, value in shape.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModelError, match="prompt learning"):
        HookedVLM(peft.get_peft_model(build("llava"), config))


def test_d3_data_parallel() -> None:
    hf_model, inputs = build("llava"), make_inputs("llava")
    wrapped = nn.DataParallel(hf_model, device_ids=[])
    with torch.no_grad():
        require_the_same(HookedVLM(wrapped, name="x"), HookedVLM(hf_model, name="x"), inputs)
    wrapped.device_ids = [0, 1]
    with pytest.raises(UnsupportedModelError, match=r"copies of the model on 2 devices"):
        HookedVLM(wrapped)


@pytest.fixture
def one_process() -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching")  # one process has nothing to share
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "fully_shard", "FSDP"])
def test_d3_distributed(kind: str) -> None:
    hf_model, inputs = build("llava"), make_inputs("llava")
    fsdp = importlib.import_module("torch.distributed.fsdp")
    if kind == "FSDP":
        blocks = {type(hf_model.model.language_model.layers[0])}
        policy = importlib.import_module("torch.distributed.fsdp.wrap").ModuleWrapPolicy(blocks)
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        wrapped: Any = fsdp.FullyShardedDataParallel(hf_model, auto_wrap_policy=policy, **options)
    elif kind == "fully_shard":
        fully_shard = fsdp.fully_shard
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in hf_model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(hf_model, mesh=mesh)
    else:
        wrapped = nn.parallel.DistributedDataParallel(hf_model)
    model, plain = HookedVLM(wrapped), tiny("llava")
    assert model.hook_names == plain.hook_names
    with torch.no_grad():
        edited = plain.run_with_hooks(inputs, [EDIT])
        assert torch.equal(model.run_with_hooks(inputs, [EDIT]), edited)
        found, expected = (m.generate(inputs, fwd_hooks=[EDIT], **GREEDY) for m in (model, plain))
        assert torch.equal(found, expected)


def test_d3_wrapped_twice() -> None:
    hf_model, inputs = adapted("llava"), make_inputs("llava")
    outer = nn.DataParallel(Adapted(hf_model), device_ids=[])
    with torch.no_grad():
        require_the_same(HookedVLM(outer, name="x"), HookedVLM(hf_model, name="x"), inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_d3_forwards_that_accelerate_has_replaced(family: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    hf_model, inputs = build(family), make_inputs(family)
    plain = HookedVLM(build(family), name="x")
    for module in modules_of(hf_model):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    model = HookedVLM(hf_model, name="x")
    assert hasattr(hf_model, "_old_forward") and model.sites == plain.sites
    with torch.no_grad():
        assert torch.equal(
            model.run_with_hooks(inputs, [EDIT]), plain.run_with_hooks(inputs, [EDIT])
        )
        found, expected = (m.generate(inputs, fwd_hooks=[EDIT], **GREEDY) for m in (model, plain))
        assert torch.equal(found, expected)
        residual = plain.run_with_cache(inputs, "hook_embed", stop_at_layer=1)[0]
        found, expected = (m.run_from_layer(inputs, residual, 1) for m in (model, plain))
        assert torch.equal(found, expected)


def test_d3_weights_of_integers() -> None:
    model, inputs = HookedVLM(quantised(build("llava"), PackedLinear)), make_inputs("llava")
    plain = tiny("llava")
    assert model.sites == plain.sites and model.cfg.dtype == torch.float32
    assert model.cfg.d_vocab == plain.cfg.d_vocab
    inside = Adapted(quantised(build("llava"), PackedLinear))
    with torch.no_grad():
        edited = model.run_with_hooks(inputs, [EDIT])
        assert torch.equal(HookedVLM(inside).run_with_hooks(inputs, [EDIT]), edited)


@pytest.mark.parametrize("model_type", ["blip-2", "kosmos-2"])
def test_d3_models_that_generate_by_the_language_model_inside(model_type: str) -> None:
    hf_model: Any = tiny_model(model_type)
    hf_model.config.image_token_id = 4
    model = HookedVLM(hf_model)
    ids = torch.randint(5, 90, (1, 12))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "min_new_tokens": 3}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.randn(1, 3, *[model.require_vision().image_size or 0] * 2)
    if model_type == "blip-2":
        ids[:, : hf_model.config.num_query_tokens] = 4
    else:
        mask = torch.zeros_like(ids)
        mask[:, : hf_model.config.latent_query_num] = 1
        inputs["image_embeds_position_mask"] = mask
    inputs["pixel_values"] = pixels
    for only, expected in ((True, [0]), (False, [0, 1, 2])):
        steps: list[int] = []
        watch = ("blocks.0.hook_resid_post", lambda x, hook, s=steps: s.append(hook.step))
        with torch.no_grad():
            model.generate(inputs, fwd_hooks=[watch], prefill_only=only, **options)
        assert steps == expected

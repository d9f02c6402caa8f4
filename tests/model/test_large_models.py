"""Large models as they are loaded (in pieces, offloaded, in half precision, quantised), in small.

Offloading is real: weights come from disk before each module runs and leave after it.
There is no second device in these tests but `cpu`; what runs over several GPUs is the same
code of accelerate's.
"""

import importlib
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import is_accelerate_available

from helpers.large_models import Opaque, PackedLinear, folder, in_pieces, quantised, split
from helpers.tiny_encoders import build_encoder, encoder, pictures, processor_of
from helpers.tiny_models import FAMILIES, build, make_inputs
from hooked_vlm.anatomy.devices import compute_dtype, execution_device
from hooked_vlm.errors import HookedVLMWarning, HookError
from hooked_vlm.inputs import pixel_routing
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.model.encoder import HookedVisionEncoder
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.report.provenance import Stopwatch, describe_run


pytestmark = [
    pytest.mark.filterwarnings("ignore:Attention scores or patterns"),
    pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered"),
]
needs_accelerate = pytest.mark.skipif(
    not is_accelerate_available(), reason="device_map needs accelerate (the extra 'gpu')"
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@cache
def whole(family: str) -> HookedVLM:
    return HookedVLM.from_pretrained(folder(family))


@pytest.fixture(params=["alternating", "disk"])
def layout(request) -> str:
    return request.param


@pytest.fixture
def pieces(family, layout, tmp_path) -> HookedVLM:
    """The same model with every second block, or everything, on disk."""
    return in_pieces(family, split(family) if layout == "alternating" else {"": "disk"}, tmp_path)


@cache
def inputs_of(family: str) -> Any:
    random = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 64, generator=random) for _ in range(2)]
    return whole(family).prepare([[images[0]], [images[1]]], ["left or right", "red or blue"])


def edited(value: Any, hook: Any) -> Any:
    if isinstance(value, list):
        return [edited(part, hook) for part in value]
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    return value * 1.5 + 0.1 * noise.to(value.dtype)


def listed(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return [v.to(dtype) for v in value] if isinstance(value, list) else value.to(dtype)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(listed(a), listed(b), strict=True))


def writable(model: HookedVLM) -> list[str]:
    """Returns the sites that can be written, of the first block of each tower and outside them."""
    return [
        name
        for name, site in model.sites.items()
        if not site.read_only and ("blocks." not in name or "blocks.0." in name)
    ]


class Noted:
    """A hook function that edits, and keeps the dtypes that it saw."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, value: Any, hook: Any) -> Any:
        self.dtypes |= {part.dtype for part in listed(value)}
        return edited(value, hook)


# --- in pieces, offloaded -----------------------------------------------------------------


@needs_accelerate
@pytest.mark.parametrize("family", FAMILIES)
class TestOffloaded:
    def test_weights_are_elsewhere_and_inputs_belong_where_they_compute(self, pieces, layout):
        parameters = list(pieces.hf_model.parameters())
        away = [p.is_meta for p in parameters]
        assert all(away) if layout == "disk" else 0 < sum(away) < len(away)
        assert pieces.device == pieces.cfg.device == torch.device("cpu")
        assert pieces.cfg.dtype == torch.float32
        assert "cpu" in pieces.describe() and "meta" not in pieces.describe()

    def test_prepare_measures_grids_through_weights_on_disk(self, family, pieces):
        image = torch.rand(3, 64, 64)
        mine, other = pieces.prepare(image, "what"), whole(family).prepare(image, "what")
        assert pieces.grid_finder.trusts_rule is whole(family).grid_finder.trusts_rule is True
        assert all(torch.equal(mine[name], other[name]) for name in other)
        assert torch.equal(mine.grid.positions, other.grid.positions)
        assert all(p.is_meta for p in pieces.hf_model.parameters() if p.is_meta)

    def test_outputs_and_caches_are_those_of_the_whole_model(self, family, pieces):
        model, inputs = whole(family), inputs_of(family)
        assert torch.equal(pieces(inputs), model(inputs))
        _, mine = pieces.run_with_cache(inputs)
        _, other = model.run_with_cache(inputs)
        assert list(mine) == list(other)
        assert [name for name in other if not same(mine[name], other[name])] == []

    def test_every_site_takes_an_edit(self, family, pieces):
        model, inputs = whole(family), inputs_of(family)
        clean = pieces(inputs)
        for name in writable(model):
            mine, other = (m.run_with_hooks(inputs, [(name, edited)]) for m in (pieces, model))
            assert torch.equal(mine, other), name
        assert torch.equal(pieces(inputs), clean)

    def test_interventions(self, family, pieces):
        model, inputs = whole(family), inputs_of(family)
        other = model.prepare([[torch.zeros(3, 64, 64)]] * 2, list(inputs.texts), chat=False)
        for site in ("blocks.1.hook_resid_post", "vision_encoder.blocks.0.hook_resid_post"):
            for edit in (Ablate(site, at=None), Patch(site, at=None, source=other)):
                mine, theirs = (m.run_with_hooks(inputs, [edit]) for m in (pieces, model))
                assert torch.equal(mine, theirs)

    def test_parts_of_a_pass(self, family, pieces):
        model, inputs = whole(family), inputs_of(family)
        for layer in range(1, model.cfg.n_layers):
            residual, _ = pieces.run_with_cache(inputs, "hook_embed", stop_at_layer=layer)
            assert torch.equal(
                residual, model.run_with_cache(inputs, "hook_embed", stop_at_layer=layer)[0]
            )
            torch.testing.assert_close(
                pieces.run_from_layer(inputs, residual, layer), pieces(inputs), atol=1e-5, rtol=1e-5
            )
            changed = pieces.run_from_layer(inputs, residual * 1.1, layer)
            assert torch.equal(changed, model.run_from_layer(inputs, residual * 1.1, layer))
        assert torch.equal(pieces(inputs), model(inputs))  # accelerate's forwards are back

    def test_generate(self, family, pieces):
        inputs = inputs_of(family)
        hooks = [("blocks.0.hook_resid_post", edited)]
        for fwd_hooks in ([], hooks):
            mine, other = (
                m.generate(inputs, max_new_tokens=4, do_sample=False, fwd_hooks=fwd_hooks)
                for m in (pieces, whole(family))
            )
            assert torch.equal(mine, other)

    def test_nothing_stays_attached_when_a_hook_raises(self, family, pieces):
        inputs, clean = inputs_of(family), pieces(inputs_of(family))

        def broken(value: Any, hook: Any) -> None:
            raise RuntimeError("on purpose")

        for name in ("blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"):
            with pytest.raises(RuntimeError, match="on purpose"):
                pieces.run_with_hooks(inputs, [(name, broken)])
        assert torch.equal(pieces(inputs), clean)


@needs_accelerate
def test_a_map_by_accelerate_itself(tmp_path):
    size = sum(p.nbytes for p in whole("llava").hf_model.parameters())
    model = HookedVLM.from_pretrained(
        folder("llava"),
        device_map="auto",
        max_memory={"cpu": size // 2},
        offload_folder=str(tmp_path),
    )
    hf_model: Any = model.hf_model
    assert set(hf_model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(model(inputs_of("llava")), whole("llava")(inputs_of("llava")))


@needs_accelerate
def test_half_precision_in_pieces(tmp_path):
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    model = HookedVLM.from_pretrained(
        folder("qwen2-vl"), device_map={"": "disk"}, offload_folder=str(tmp_path), **options
    )
    assert model.cfg.dtype == torch.bfloat16
    _, cache = model.run_with_cache(inputs_of("qwen2-vl"))
    assert {t.dtype for value in cache.values() for t in listed(value)} == {torch.bfloat16}


@needs_accelerate
def test_an_encoder_in_pieces(tmp_path):
    from accelerate import cpu_offload, disk_offload

    plain = encoder("dinov2")
    inputs = plain.prepare(pictures())
    for offload in (cpu_offload, lambda model: disk_offload(model, str(tmp_path))):
        hf_model = build_encoder("dinov2")
        offload(hf_model)
        model = HookedVisionEncoder(hf_model, processor_of("dinov2"))
        assert model.device == model.cfg.device == torch.device("cpu")
        assert torch.equal(model.prepare(pictures())["pixel_values"], inputs["pixel_values"])
        edit = [("vision_encoder.blocks.1.attn.hook_pattern", edited)]
        mine, other = (m.run_with_hooks(inputs, edit) for m in (model, plain))
        assert torch.equal(mine.last_hidden_state, other.last_hidden_state)


@needs_accelerate
def test_the_record_of_a_run_names_the_device_that_computed(tmp_path):
    model = in_pieces("llava", {"": "disk"}, tmp_path)
    made: dict[str, Any] = {"model_sha256": "", "experiment": "", "config": {}, "seed": 0}
    with Stopwatch() as watch:
        pass
    assert describe_run(model.hf_model, "llava", watch, **made).device == "cpu"


def test_where_a_module_computes():
    linear = nn.Linear(2, 2, device="meta")
    assert execution_device(linear) == torch.device("meta")
    assert execution_device(nn.GELU()) is None
    hook = SimpleNamespace(execution_device="cuda:1")  # as accelerate's have one
    vars(linear)["_hf_hook"] = hook
    assert execution_device(nn.Sequential(nn.GELU(), linear)) == torch.device("cuda:1")
    vars(linear)["_hf_hook"] = SimpleNamespace(hooks=(SimpleNamespace(), hook))
    assert execution_device(linear) == torch.device("cuda:1")


# --- half precision -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_and_return_the_models_dtype(family, dtype):
    model = HookedVLM(build(family, dtype=dtype))
    inputs: Any = make_inputs(family)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    clean, cache = model.run_with_cache(inputs, lambda name: "pattern" not in name)
    assert model.cfg.dtype == clean.dtype == dtype
    wrong = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for name in writable(model):
        edit = Noted()
        assert model.run_with_hooks(inputs, [(name, edit)]).dtype == dtype, name
        assert edit.dtypes == {dtype}, name
        with pytest.raises(HookError, match=rf"{name} returned .*expected .*float16"):
            model.run_with_hooks(inputs, [(name, lambda value, hook: in_dtype(value, wrong))])
    assert {t.dtype for value in cache.values() for t in listed(value)} == {dtype}


# --- quantised ----------------------------------------------------------------------------


def dynamic(hf_model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and the one kind that torch itself ships
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(hf_model, {nn.Linear})


KINDS = {
    "packed": lambda hf_model: quantised(hf_model, PackedLinear),
    "opaque": lambda hf_model: quantised(hf_model, Opaque),
    "dynamic": dynamic,
}


def quantised_model(family: str, kind: str) -> HookedVLM:
    loaded = HookedVLM.from_pretrained(folder(family))
    return HookedVLM(KINDS[kind](loaded.hf_model), loaded.processor, name=loaded.cfg.model_name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_layers(family, kind):
    plain, model, inputs = whole(family), quantised_model(family, kind), inputs_of(family)
    assert model.anatomy == plain.anatomy
    assert model.cfg == plain.cfg
    assert model.describe() == plain.describe()
    assert model.sites == plain.sites
    clean, cache = model.run_with_cache(inputs, lambda name: "hook_attn_scores" not in name)
    assert [n for n in plain.hook_names if "hook_attn_scores" not in n] == list(cache)
    assert {t.dtype for value in cache.values() for t in listed(value)} == {torch.float32}
    for name in writable(model):
        edit = Noted()
        assert not torch.equal(model.run_with_hooks(inputs, [(name, edit)]), clean), name
        assert edit.dtypes == {torch.float32}, name
    assert torch.equal(model.run_with_hooks(inputs), model(inputs))
    residual, _ = model.run_with_cache(inputs, "hook_embed", stop_at_layer=1)
    again = model.run_from_layer(inputs, residual, 1)
    torch.testing.assert_close(again, model(inputs), atol=1e-4, rtol=1e-4)
    model.generate(inputs, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_are_measured_through_packed_weights(family):
    model = quantised_model(family, "packed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = model.prepare(torch.rand(3, 64, 64), "what")
    assert model.grid_finder.trusts_rule
    assert torch.equal(
        inputs.grid.positions, whole(family).prepare(torch.rand(3, 64, 64), "what").grid.positions
    )


@pytest.mark.parametrize("kind", ["opaque", "dynamic"])
@pytest.mark.parametrize("family", ["qwen2-vl", "llava"])
def test_grids_follow_the_rule_where_no_gradient_passes(family, kind):
    model = quantised_model(family, kind)
    with pytest.warns(HookedVLMWarning, match="quantised layers pass no gradient on"):
        inputs = model.prepare(torch.rand(3, 64, 64), "what")
    expected = whole(family).prepare(torch.rand(3, 64, 64), "what").grid.positions
    assert torch.equal(inputs.grid.positions, expected)


def test_grids_follow_the_rule_where_the_measurement_breaks(monkeypatch):
    model = HookedVLM(whole("llava").hf_model, whole("llava").processor)

    def broken(*args: Any) -> Any:
        raise RuntimeError("derivative for this operation is not implemented")

    monkeypatch.setattr(pixel_routing, "positions_reached", broken)
    with pytest.warns(HookedVLMWarning, match=r"derivative .* was not compared"):
        inputs = model.prepare(torch.rand(3, 64, 64), "what")
    assert inputs.grid.shape == (8, 8)


def test_sizes_and_dtypes_of_packed_weights():
    packed = PackedLinear(nn.Linear(4, 6))
    assert packed.weight.shape == (24, 1)
    assert compute_dtype(packed, nn.Linear(1, 1, dtype=torch.bfloat16)) == torch.float32  # its bias
    bare = PackedLinear(nn.Linear(4, 6, bias=False))
    assert compute_dtype(bare, nn.Linear(1, 1, dtype=torch.bfloat16)) == torch.bfloat16
    assert compute_dtype(bare) == torch.float32


def optional(name: str) -> Any:
    """Returns the quantisation of a library that may be there."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    if name == "torchao":
        quantization = importlib.import_module("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    if name == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.QuantoConfig(weights="int8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["torchao", "optimum.quanto", "bitsandbytes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_by_a_library(family, library, tmp_path: Path):
    options: dict[str, Any] = {"quantization_config": optional(library), "dtype": torch.float32}
    if library == "bitsandbytes":
        options["device_map"] = {"": "cpu"}
    model, plain = HookedVLM.from_pretrained(folder(family), **options), whole(family)
    assert model.sites == plain.sites
    assert model.cfg == plain.cfg
    inputs = model.prepare(torch.rand(3, 64, 64), "what")
    clean, cache = model.run_with_cache(inputs, lambda name: "hook_attn_scores" not in name)
    assert {t.dtype for value in cache.values() for t in listed(value)} == {torch.float32}
    for name in ("blocks.1.attn.hook_q", "blocks.1.mlp.hook_post", "vision_projector.hook_out"):
        assert not torch.equal(model.run_with_hooks(inputs, [(name, edited)]), clean)

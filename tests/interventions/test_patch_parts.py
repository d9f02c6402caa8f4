"""Patches of some neurons, of a subspace, and from another site: against hooks written by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.errors import InterventionError, UnknownHookError
from hooked_vlm.interventions.patch import Patch
from hooked_vlm.interventions.placing import site_of
from hooked_vlm.interventions.recording import record
from hooked_vlm.regions.generated import Generated
from hooked_vlm.regions.positions import LastToken, Positions
from hooked_vlm.sweeps.sweep import Sweep, final_logits


MID, LATE = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def by_hand(family: str, site: str, write: Any) -> Tensor:
    """Logits under a hook function that writes the last token, from the last token of a source."""
    model, inputs = tiny(family), make_inputs(family, 2, seed=1)

    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, -1] = write(x[:, -1])
        return x

    return model.run_with_hooks(inputs, [(site, hook)])


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_a_subspace_and_another_site(family: str) -> None:
    model = tiny(family)
    inputs, source = make_inputs(family, 2, seed=1), make_inputs(family, 2, seed=2)
    clean = model(inputs)
    recorded = record(model, source, [MID, "blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post"])
    late, early = recorded.cache[MID][:, -1], recorded.cache["resid_pre", 0][:, -1]
    post = recorded.cache["post", 1][:, -1]
    rows = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(rows.T)[0].T

    def neurons(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, [5, 2]] = post[:, [5, 2]]
        return x

    for patch, plain in (
        (
            Patch("blocks.1.mlp.hook_post", at=LastToken(), source=recorded, neurons=(5, 2)),
            by_hand(family, "blocks.1.mlp.hook_post", neurons),
        ),
        (
            Patch(MID, at=LastToken(), source=recorded, subspace=rows),
            by_hand(family, MID, lambda x: x + (late - x) @ q.T @ q),
        ),
        (
            Patch(MID, at=LastToken(), source=recorded, source_site="blocks.0.hook_resid_pre"),
            by_hand(family, MID, lambda x: early),
        ),
        (
            Patch(MID, at=LastToken(), source=source, source_site=0),
            by_hand(family, MID, lambda x: early),
        ),
    ):
        edited = model.run_with_hooks(inputs, [patch])
        torch.testing.assert_close(edited, plain, msg=str(patch))
        assert not torch.allclose(edited, clean)


@pytest.mark.parametrize("engine", ["growing", "restart", "plain"])
def test_they_sweep(engine: str) -> None:
    model = tiny("qwen2-vl")
    inputs, source = make_inputs("qwen2-vl", 2, seed=1), make_inputs("qwen2-vl", 2, seed=2)
    rows = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    kinds: dict[str, dict[str, Any]] = {
        "subspace": {"subspace": rows},
        "neurons": {"neurons": (0, 7)},
        "below": {"source_site": 1},
    }

    def make(kind: str, slot: int) -> Patch:
        return Patch(slot, at=LastToken(), source=source, **kinds[kind])

    sweep = Sweep(inputs, {"kind": list(kinds), "slot": [1, 2, 3]}, make)
    scores = sweep.run(model, lambda x: final_logits(x)[:, :5], dims=("batch", "v"), engine=engine)
    assert scores.attrs["engine"].startswith(engine)
    assert sweep.plan(model).explain(logits_to_keep=1)
    for kind in kinds:
        for slot in (1, 2, 3):
            plain = final_logits(model.run_with_hooks(inputs, [make(kind, slot)]))[:, :5]
            found = torch.as_tensor(scores.sel(kind=kind, slot=slot).values)
            torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


def test_patchscopes_writes_one_prompt_from_another() -> None:
    """An early token of one prompt, read late, is written into another prompt's first block."""
    model = tiny("llava")
    inputs, source = make_inputs("llava", 1, seed=3), make_inputs("llava", 1, seed=4)
    recorded = record(model, source, LATE)
    patch = Patch(0, at=LastToken(), source=source, source_at=Positions((2,)), source_site=LATE)
    edited = model.run_with_hooks(inputs, [patch])

    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, -1] = recorded.cache[LATE][:, 2]
        return x

    plain = model.run_with_hooks(inputs, [("hook_merged_embed", hook)])
    torch.testing.assert_close(edited, plain)


def test_generated_tokens_are_written_from_another_site() -> None:
    model = tiny("llava")
    inputs, source = make_inputs("llava", 1, seed=3), make_inputs("llava", 1, seed=4)
    given: dict[str, Any] = {"at": Generated(), "source_at": LastToken(), "source_site": LATE}
    patches = [Patch(0, source=run, **given) for run in (source, record(model, source, LATE))]
    options: dict[str, Any] = {"min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False}
    lazy, recorded = (model.generate(inputs, fwd_hooks=[p], **options) for p in patches)
    assert torch.equal(lazy, recorded)


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"neurons": (48,)}, "expected different numbers from 0 to 47"),
        ({"neurons": (1, 1)}, "expected different numbers"),
        ({"neurons": ()}, "expected different numbers"),
        ({"subspace": torch.ones(2, 47)}, "has 48 features, and 47 were given"),
        ({"subspace": torch.full((1, 48), float("nan"))}, "expected finite rows"),
        ({"subspace": torch.zeros(2, 48)}, "2 rows, all zero: they span no direction"),
        ({"subspace": torch.ones(1, 48), "neurons": (1,)}, "give one of them"),
        ({"source_site": "blocks.1.mlp.hook_post"}, "writes 48 features .* from 96"),
    ]
    for change, said in wrong:
        with pytest.raises(InterventionError, match=said):
            Patch(MID, at=LastToken(), source=inputs, **change).check(model, inputs)
    for neurons in ((1.5,), ("a",), 3):
        patch = Patch(MID, at=LastToken(), source=inputs)
        object.__setattr__(patch, "neurons", neurons)  # as without beartype
        with pytest.raises(InterventionError, match="neurons"):
            patch.check(model, inputs)
    for site, other in (("hook_q", "hook_k"), ("hook_z", "hook_v")):  # 4 and 2 heads
        patch = Patch(f"blocks.1.attn.{site}", source=inputs, source_site=f"blocks.1.attn.{other}")
        with pytest.raises(InterventionError, match=r"with 4 heads from .* with 2 heads"):
            patch.check(model, inputs)
    with pytest.raises(UnknownHookError, match="blocks"):
        Patch(MID, source=inputs, source_site="blocks.9.hook_resid_pre").check(model, inputs)


@pytest.mark.parametrize(
    ("held", "read"),
    [
        (LATE, 2),  # a slot is the stream after a block
        ("blocks.1.hook_resid_post", LATE),
        ("vision_encoder.blocks.1.hook_resid_pre", "vision_encoder.blocks.0.hook_resid_post"),
    ],
)
def test_a_stream_recorded_by_its_other_name_is_named(held: str, read: Any) -> None:
    model, inputs = tiny("qwen2-vl"), make_inputs("qwen2-vl")
    recorded = record(model, inputs, held)
    with pytest.raises(InterventionError, match="They are one stream in most models") as caught:
        model.run_with_hooks(inputs, [Patch(read, source=recorded)])
    said = str(caught.value)
    assert held in said and site_of(model, read).name in said and len(said) <= 400
    clean = model(inputs)  # as the error says; here the two are the same stream
    edited = model.run_with_hooks(inputs, [Patch(read, source=recorded, source_site=held)])
    torch.testing.assert_close(edited, clean)
    with pytest.raises(UnknownHookError, match="The cache holds no"):
        model.run_with_hooks(inputs, [Patch("blocks.0.hook_resid_pre", source=recorded)])

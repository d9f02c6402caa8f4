"""A clean run keeps what rows need of it, and no more."""

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from helpers.live_memory import peak_live
from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm import LastToken, Patch, Sweep, shared_runs
from hooked_vlm.engine import growing as engine
from hooked_vlm.engine.clean_run import Clean, run_clean
from hooked_vlm.regions.positions import Positions


def clean_run(family: str, *starts: int) -> Clean:
    inputs = make_inputs(family, 2, seed=1)
    with torch.no_grad():
        return run_clean(
            tiny(family), inputs, [], {1, 2}, {"logits_to_keep": 1}, want_keys=True, starts=starts
        )


def owns_its_memory(x: Tensor) -> bool:
    return x.untyped_storage().nbytes() == x.nbytes


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_positions_that_no_row_reads_are_let_go(family: str) -> None:
    whole, kept = clean_run(family), clean_run(family, 8, 4, 4)
    assert (whole.first, kept.first) == (0, 4) and whole.size == kept.size
    assert torch.equal(whole.logits, kept.logits)
    for stage in (1, 2):
        assert torch.equal(kept.residuals[stage], whole.residuals[stage][:, 4:])
        assert owns_its_memory(kept.residuals[stage])
    for pair, other in zip(kept.keys, whole.keys, strict=True):
        for x, y in zip(pair, other, strict=True):
            assert torch.equal(x, y[:, :, :8]) and owns_its_memory(x)


def test_where_an_image_sees_all_of_itself_everything_is_kept() -> None:
    length = make_inputs("gemma-3")["input_ids"].shape[1]
    assert clean_run("gemma-3", 5, length - 1).first == 0  # within the image
    assert clean_run("gemma-3", length - 2, length - 1).first == length - 2


def scores_of(family: str, **options: Any) -> Any:
    length = make_inputs(family)["input_ids"].shape[1]
    source = make_inputs(family, 2, seed=7)
    places = {"last": LastToken(), "end": Positions((length - 3, length - 2))}
    sweep = Sweep(
        make_inputs(family, 2, seed=1),
        {"at": list(places), "slot": [0, 1, 2, 3]},
        lambda at, slot: Patch(slot, at=places[at], source=source),
    )
    return sweep.run(
        tiny(family), lambda x: x[:, -1], dims=("batch", "token"), logits_to_keep=1, **options
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_the_same_and_memory_is_less(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak() -> tuple[int, Any]:
        found: list[Any] = []
        bytes_ = peak_live(lambda: found.append(scores_of(family, memory=1)))
        return bytes_, found[0]

    scores_of(family)  # the controls are made
    less, kept = peak()
    with shared_runs(tiny(family)):
        shared = scores_of(family, memory=1)

    def keep_all(*args: Any, folding: Any = None) -> Clean:
        return run_clean(*args[:6], folding=folding)

    monkeypatch.setattr(engine, "run_clean", keep_all)
    more, whole = peak()
    # Older torch shows what attention holds inside: there both may have their peak in that.
    assert less < more or (less == more and Version(torch.__version__) < Version("2.13"))
    assert kept.equals(whole)
    assert (abs(shared - whole) <= 5e-6 * abs(whole).max()).all()
    assert whole.attrs["engine"].startswith("growing")

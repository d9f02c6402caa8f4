"""The tuned lens: trained on streams, it reads them better than the logit lens does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_models import FAMILIES, make_inputs, tiny
from hooked_vlm.errors import DataError
from hooked_vlm.sweeps.tuned_lens import TunedLens


STREAMS = "blocks.*resid*"


def fitted(family: str, steps: int = 60) -> tuple[Any, TunedLens]:
    batches = [make_inputs(family, 2, seed=seed) for seed in range(4)]
    return tiny(family), TunedLens.fit(tiny(family), batches, steps=steps, learning_rate=3e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_unseen_positions_better_than_the_logit_lens(family: str) -> None:
    model, lens = fitted(family)
    plain, tuned = (lens.divergence[name] for name in ("logit_lens", "tuned_lens"))
    assert len(plain) == len(tuned) == model.cfg.n_layers
    assert sum(tuned) < sum(plain)
    logits, cache = model.run_with_cache(make_inputs(family, 2, seed=9), STREAMS)
    read = lens.logits(cache)
    torch.testing.assert_close(read[-1], logits)
    # By hand: translate a stream, then run the rest of the model on it.
    stream = cache["resid_pre", 1]
    moved = stream + stream @ lens.weights[1].T + lens.biases[1]
    plain_run = model.run_from_layer(make_inputs(family, 2, seed=9), moved, model.cfg.n_layers)
    torch.testing.assert_close(read[1], plain_run, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lens.logits(cache, -1), read[:, :, -1])


def test_without_steps_it_is_the_logit_lens_and_a_seed_repeats_it(tmp_path: Path) -> None:
    model, lens = fitted("llava", steps=5)
    again = fitted("llava", steps=5)[1]
    assert torch.equal(lens.weights, again.weights)
    lens.save(tmp_path / "lens.safetensors")
    loaded = TunedLens.load(tmp_path / "lens.safetensors")
    assert torch.equal(loaded.weights, lens.weights)
    assert loaded.divergence == lens.divergence
    _, cache = model.run_with_cache(make_inputs("llava"), STREAMS)
    none = TunedLens(torch.zeros_like(lens.weights), torch.zeros_like(lens.biases))
    torch.testing.assert_close(none.logits(cache), cache.logit_lens())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny("llava")
    with pytest.raises(DataError, match="no inputs"):
        TunedLens.fit(model, [])
    _, cache = model.run_with_cache(make_inputs("llava"), STREAMS)
    with pytest.raises(DataError, match="belongs to another model"):
        TunedLens(torch.zeros(2, 48, 48), torch.zeros(2, 48)).logits(cache)
    with pytest.raises(DataError, match=r"expected \[slot, 1, 45, 48\]"):
        cache.read_streams(torch.zeros(4, 1, 3, 48))
    with pytest.raises(DataError, match="cannot be written"):
        TunedLens(torch.zeros(2, 4, 4), torch.zeros(2, 4)).save(tmp_path / "none" / "lens")
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"not a file of TunedLens\.save"):
        TunedLens.load(tmp_path / "other")

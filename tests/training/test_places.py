"""What is read off encoders is what their tokens hold, at the cell where the object is."""

import random
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training import places
from training.recipes import N_TOKENS
from training.study import GEOMETRY
from training.tasks import training_scene, training_triples


def mean_colors(patches: Tensor) -> Tensor:
    """The three mean channels of each patch, over its two equal frames."""
    return patches.view(len(patches), 3, -1).mean(-1)


def planted(patches: Tensor, *, grid_thw: Tensor) -> Any:
    """An encoder whose tokens are the patch's mean colour, and column and row of its cell."""
    cells = torch.arange(N_TOKENS).repeat(N_TOKENS, 1)
    where = torch.cat([F.one_hot(cells, N_TOKENS), F.one_hot(cells.T, N_TOKENS)], -1).flatten(0, 1)
    where = where.repeat_interleave(4, 0).repeat(len(grid_thw), 1).float()
    return SimpleNamespace(last_hidden_state=torch.cat([mean_colors(patches) * 5, where], -1))


def noise(patches: Tensor, *, grid_thw: Tensor) -> Any:
    generator = torch.Generator().manual_seed(len(grid_thw) + int(patches.sum()) % 1000)
    return SimpleNamespace(last_hidden_state=torch.randn(len(patches), 16, generator=generator))


def test_a_token_is_that_of_its_place() -> None:
    scene = training_scene(random.Random(3), training_triples(), GEOMETRY)
    tokens = places.tokens_of(planted, [scene])[0]
    assert tokens.shape == (N_TOKENS, N_TOKENS, 3 + 2 * N_TOKENS)
    picture = torch.from_numpy(scene.render(GEOMETRY.canvas)).float() / 127.5 - 1
    cells = picture.unfold(0, places.CELL, places.CELL).unfold(1, places.CELL, places.CELL)
    torch.testing.assert_close(tokens[..., :3] / 5, cells.mean((-1, -2)))


@pytest.mark.parametrize("visual, reads", [(planted, True), (noise, False)])
def test_what_tokens_hold_is_read_and_nothing_else(visual: Any, reads: bool) -> None:
    found = pd.DataFrame(places.read(visual)).set_index("label")
    assert list(found.index) == ["colour", "column", "row"]
    assert (found["n"] == places.PICTURES // 4).all()  # pictures, not objects
    if reads:
        # Things cover parts of a cell, so a mean colour tells the fourteen apart in most only.
        assert (found["accuracy"] > [0.5, 0.9, 0.9]).all()
    else:
        # A probe that knows nothing may do a little worse than the most frequent label.
        assert (found["low"] <= found["chance"] + 0.02).all()


def test_a_folder_without_encoders_is_named(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["places", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no finished encoder"):
        places.main()

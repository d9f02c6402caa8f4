"""E8 and E9: grids whose columns and rows are known, and layouts on two kinds of ground."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.planted_models import planted
from hooked_vlm.errors import DataError
from hooked_vlm.experiments.further import grid_probes, photographs
from hooked_vlm.stimuli import shapes
from hooked_vlm.stimuli.geometry import geometry_for
from hooked_vlm.stimuli.grids import GridLayout, draw, random_cells


@pytest.mark.parametrize("n_tokens", [6, 8, 12, 15, 16, 24])
@pytest.mark.parametrize("k", [2, 3])
def test_cells_stand_apart_on_whole_tokens(n_tokens: int, k: int) -> None:
    layout = GridLayout(k, n_tokens, 14)
    cells = random_cells(k, random.Random(0))
    painted = (np.asarray(draw(cells, layout)) != 255).any(-1)
    total = np.zeros((n_tokens, n_tokens), dtype=int)
    for row in range(k):
        for col in range(k):
            region = layout.object_region(row, col)
            total += region.mask
            rows, cols = np.nonzero(region.mask)
            assert {layout.band(int(r)) for r in rows} == {row}
            assert {layout.band(int(c)) for c in cols} == {col}
            y, x = rows.min() * 14, cols.min() * 14
            side = layout.object_tokens * 14
            assert painted[y : y + side, x : x + side].any()
            painted[y : y + side, x : x + side] = False
    assert total.max() == 1
    assert not painted.any()
    bands = [layout.band(token) for token in range(n_tokens)]
    assert bands == sorted(bands) and set(bands) == set(range(k))


def test_cells_are_seeded_and_of_every_kind() -> None:
    drawn = [random_cells(3, random.Random(seed)) for seed in range(40)]
    assert drawn[3] == random_cells(3, random.Random(3))
    flat = [cell for picture in drawn for row in picture for cell in row]
    assert {shape for shape, _ in flat} == set(shapes.PAINT)
    assert len({color for _, color in flat}) == 6


@pytest.mark.parametrize(
    ("n_tokens", "k", "published"),
    [
        (12, 2, [(3, 5), (7, 9)]),
        (12, 3, [(1, 3), (5, 7), (9, 11)]),
        (16, 2, [(3, 6), (9, 12)]),
        (16, 3, [(0, 3), (6, 9), (12, 15)]),
    ],
)
def test_b3_cells_are_the_published_ones(
    n_tokens: int, k: int, published: list[tuple[int, int]]
) -> None:
    layout = GridLayout(k, n_tokens, 14)
    assert [layout.span(index) for index in range(k)] == published


@pytest.mark.parametrize("n_tokens", [6, 12, 16, 24])
def test_b3_a_grid_of_three_has_the_places_and_strips_of_rows(n_tokens: int) -> None:
    layout, row = GridLayout(3, n_tokens, 14), geometry_for(n_tokens, 14)
    assert [layout.span(index) for index in range(3)] == [row.place_span(i) for i in range(3)]
    edges = [sum(row.strips[:place]) for place in range(3)]
    bands = [layout.band(token) for token in range(n_tokens)]
    assert [bands.index(place) for place in range(3)] == edges


@given(st.integers(2, 8), st.integers(4, 40))
def test_b3_larger_grids_fit_or_are_refused(k: int, n_tokens: int) -> None:
    if n_tokens < 2 * k - 1:
        with pytest.raises(DataError, match=f"there are {n_tokens} tokens"):
            GridLayout(k, n_tokens, 14)
        return
    layout = GridLayout(k, n_tokens, 14)
    edges = [edge for index in range(k) for edge in layout.span(index)]
    assert edges == sorted(set(edges)) and edges[0] >= 0 and edges[-1] <= n_tokens
    assert edges[0] - (n_tokens - edges[-1]) in (0, -1)  # centred


def test_grids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="1 token apart; there are 4"):
        GridLayout(3, 4, 14)
    with pytest.raises(DataError, match="has 0 to 1"):
        GridLayout(2, 12, 14).span(2)
    with pytest.raises(DataError, match="2x2 cells"):
        draw(random_cells(3, random.Random(0)), GridLayout(2, 12, 14))


def by(table: Any, **wanted: Any) -> dict[str, float]:
    for column, value in wanted.items():
        table = table[table[column] == value]
    return dict(zip(table["quantity"], table["value"], strict=True))


def test_column_and_row_are_read_where_they_were_planted() -> None:
    # The planted encoder writes a code of the strip (of three) that a token lies in.
    config = grid_probes.Config(ks=(3,), images=32, batch_size=32)
    result = grid_probes.run(planted("background"), config, lambda *_: None)
    for label in ("column", "row"):
        found = by(result.table, kind="3x3", axis=label)
        assert found["accuracy"] == found["converged"] == 1
        assert found["background"] == 1
        assert found["shuffled"] < 0.6 and found["background, shuffled"] < 0.6
    assert result.verdict.count(": read (5 of 5 probes with other") == 2


def test_nothing_is_read_from_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        grid_probes,
        "_projected",
        lambda model, images: torch.randn(len(images), 36, 16, generator=noise),
    )
    config = grid_probes.Config(ks=(2,), images=60, batch_size=60)
    result = grid_probes.run(planted("object"), config, lambda *_: None)
    assert result.verdict.count("undecided") == 2  # of few pictures, and never "read"


@pytest.mark.filterwarnings("ignore:Too few tuples")  # on photographs, of "below"
@pytest.mark.parametrize("coded", [pytest.param("object", marks=pytest.mark.slow), "background"])
def test_white_and_photographs_stand_side_by_side(coded: str) -> None:
    told: list[tuple[int, int]] = []
    config = photographs.Config(setting="squares", pairs=2, batch_size=60)
    result = photographs.run(planted(coded), config, lambda *step: told.append(step))
    assert told[0][0] == 0 and [d for d, _ in told] == sorted(d for d, _ in told)
    white = by(result.table, ground="white", axis="horizontal", part="ordering-probes")
    assert white["accuracy"] == 1
    assert (white["background"] > 0.7) == (coded == "background")
    assert set(result.table["ground"]) == {"white", "photographs", photographs.BOTH}
    less = result.table[result.table["ground"] == photographs.BOTH]
    assert set(less["quantity"]) == {"paired difference"}
    assert "strip - object" not in set(less["kind"].dropna())
    assert "strip - object" not in result.verdict
    assert set(less["axis"].dropna()) == {"horizontal", "vertical"}
    swaps = result.table[(result.table["part"] == "strip-swap")]
    assert set(swaps[swaps["ground"] == "white"]["kind"]) >= {"strip", "object"}
    assert "on white" in result.verdict

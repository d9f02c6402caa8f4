import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_vlm.errors import DataError
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.geometry import AXES, PAPER_GEOMETRY, Geometry, Shifted, geometry_for


# Worked out by hand from the paper's table (2.1): canvas in pixels, first token of each place
# along the axis, first token across it, and the pixel box of place 2 in a row.
BY_HAND = {
    "qwen2-vl": (336, (1, 5, 9), 5, (252, 140, 308, 196)),
    "gemma-3": (896, (0, 6, 12), 6, (672, 336, 840, 504)),
    "pixtral": (240, (2, 6, 10), 6, (160, 96, 192, 128)),
}
STRIPS = {"qwen2-vl": (0, 4, 8, 12), "gemma-3": (0, 5, 11, 16), "pixtral": (0, 5, 10, 15)}
geometries = st.builds(geometry_for, st.integers(5, 40), st.integers(1, 56))


@pytest.mark.parametrize("family", PAPER_GEOMETRY)
def test_the_paper_s_numbers(family):
    geometry = PAPER_GEOMETRY[family]
    canvas, starts, across, box = BY_HAND[family]
    size = geometry.object_tokens
    assert geometry.canvas == canvas
    assert [geometry.place_span(place) for place in range(3)] == [(s, s + size) for s in starts]
    assert geometry.cross_span() == (across, across + size)
    assert geometry.place_box("horizontal", 2) == box


@pytest.mark.parametrize("family", PAPER_GEOMETRY)
def test_the_paper_s_strips_hold_every_row_of_their_columns(family):
    geometry, edges, n = PAPER_GEOMETRY[family], STRIPS[family], PAPER_GEOMETRY[family].n_tokens
    for place in range(3):
        columns = range(edges[place], edges[place + 1])
        cells = {(row, col) for row in range(n) for col in columns}
        assert set(geometry.strip_region("horizontal", place).cells) == cells
        transposed = {(col, row) for row, col in cells}
        assert set(geometry.strip_region("vertical", place).cells) == transposed


def test_regions_of_an_object_by_hand():
    geometry = PAPER_GEOMETRY["qwen2-vl"]
    assert geometry.object_region("horizontal", 0).cells == ((5, 1), (5, 2), (6, 1), (6, 2))
    assert geometry.object_region("vertical", 0).cells == ((1, 5), (1, 6), (2, 5), (2, 6))
    assert geometry.object_region("vertical", 2).name == "object 2"
    assert len(geometry.background("horizontal")) == 144 - 12


@pytest.mark.parametrize("family", PAPER_GEOMETRY)
def test_a_token_count_of_the_paper_gets_the_paper_s_row(family):
    paper = PAPER_GEOMETRY[family]
    assert geometry_for(paper.n_tokens, paper.token_px) == paper
    small = geometry_for(paper.n_tokens, 7)
    assert small.strips == paper.strips and small.canvas == 7 * paper.n_tokens


@given(geometries, st.sampled_from(AXES))
def test_every_object_stands_in_its_own_strip(geometry, axis):
    for place in range(3):
        thing, strip = geometry.object_region(axis, place), geometry.strip_region(axis, place)
        assert thing <= strip, f"place {place} of {geometry}"


@given(geometries, st.sampled_from(AXES))
def test_strips_tile_the_grid_and_the_outer_ones_can_be_swapped(geometry, axis):
    first, middle, last = (geometry.strip_region(axis, place) for place in range(3))
    assert first | middle | last == Region.everything(geometry.shape)
    assert len(first) + len(middle) + len(last) == geometry.n_tokens**2
    assert len(first) == len(last)


@given(geometries, st.sampled_from(AXES))
def test_objects_and_background_cover_the_grid_once(geometry, axis):
    parts = [geometry.object_region(axis, place) for place in range(3)] + [
        geometry.background(axis)
    ]
    assert sum(len(part) for part in parts) == geometry.n_tokens**2
    assert parts[0] | parts[1] | parts[2] | parts[3] == Region.everything(geometry.shape)


@given(geometries, st.integers(0, 2))
def test_pixel_boxes_are_the_objects_cells_and_vertical_is_the_transpose(geometry, place):
    x0, y0, x1, y1 = geometry.place_box("horizontal", place)
    px = geometry.token_px
    cells = {(r, c) for r in range(y0 // px, y1 // px) for c in range(x0 // px, x1 // px)}
    assert {x0 % px, y0 % px, x1 % px, y1 % px} == {0}
    assert set(geometry.object_region("horizontal", place).cells) == cells
    assert geometry.place_box("vertical", place) == (y0, x0, y1, x1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"\(4, 4, 3\) do not tile 12"):
        Geometry(12, 28, 2, 2, (4, 4, 3))
    with pytest.raises(DataError, match="do not fit in 12 tokens"):
        Geometry(12, 28, 3, 2, (4, 4, 4))
    with pytest.raises(DataError, match="4 tokens a side"):
        geometry_for(4, 16)


@pytest.mark.parametrize("axis", AXES)
def test_shifted_objects_leave_the_strips_where_they_are(axis):
    usual = PAPER_GEOMETRY["gemma-3"]
    edge = Shifted(16, 56, 3, 1, usual.strips, first=5)
    assert [edge.place_span(place) for place in range(3)] == [(5, 8), (9, 12), (13, 16)]
    assert edge.cross_span() == usual.cross_span()
    x0, y0, x1, y1 = edge.place_box(axis, 2)
    along = (x0, x1) if axis == "horizontal" else (y0, y1)
    assert along == (13 * 56, 16 * 56)
    assert len(edge.background(axis)) == 16**2 - 3 * 3**2
    for place in range(3):
        assert edge.strip_region(axis, place) == usual.strip_region(axis, place)
    for first in (-1, 6):
        with pytest.raises(DataError, match=f"begin at token {first} of 16"):
            Shifted(16, 56, 3, 1, usual.strips, first=first)


@pytest.mark.parametrize("call", ["place_box", "object_region", "strip_region"])
def test_unknown_places_and_axes_are_refused(call):
    geometry = PAPER_GEOMETRY["qwen2-vl"]
    with pytest.raises(DataError, match="Place 3 does not exist"):
        getattr(geometry, call)("horizontal", 3)
    with pytest.raises(DataError, match=r"No axis 'vertica'.*Did you mean 'vertical'"):
        getattr(geometry, call)("vertica", 0)

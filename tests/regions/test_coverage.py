import numpy as np

from hooked_vlm.regions.coverage import box_coverage, mask_coverage


X, Y = np.array([0.0, 2.5, 5.0]), np.array([0.0, 4.0])


def test_box_coverage_is_exact_where_cells_are_no_whole_number_of_pixels():
    found = box_coverage(X, Y, (1.0, 0.0, 3.0, 2.0))
    assert np.allclose(found.part, [[1.5 * 2 / 10, 0.5 * 2 / 10]])
    assert found.center.tolist() == [[False, False]]  # the centres are at y = 2, just outside


def test_mask_coverage_equals_box_coverage_and_shares_pixels_between_cells():
    mask = np.zeros((4, 5), dtype=bool)
    mask[0:3, 2] = True  # one column of pixels, half in each cell
    assert np.allclose(mask_coverage(X, Y, mask).part, [[0.15, 0.15]])
    assert np.allclose(
        mask_coverage(X, Y, mask).part, box_coverage(X, Y, (2.0, 0.0, 3.0, 3.0)).part
    )


def test_an_edge_that_is_off_by_rounding_covers_no_further_cell():
    found = box_coverage(X, Y, (0.0, 0.0, 2.5 + 1e-9, 4.0))
    assert found.select("any").tolist() == [[True, False]]
    assert box_coverage(X, Y, (1e-9, 0.0, 2.5, 4.0)).select(1.0).tolist() == [[True, False]]


def test_a_cell_without_area_is_never_covered():
    edges = np.array([0.0, 0.0, 5.0])
    found = box_coverage(edges, Y, (0.0, 0.0, 5.0, 4.0))
    assert found.part.tolist() == [[0.0, 1.0]]
    for rule in ("any", "center", 1.0):
        assert found.select(rule).tolist() == [[False, True]]

"""The definition against loops, and what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from helpers.kernel_cases import DTYPES, arguments, assert_close, truth
from hooked_vlm.analysis.directions import add, scale_projections
from hooked_vlm.engine import kernels
from hooked_vlm.engine.kernels import patched_rows, triton, way_for
from hooked_vlm.engine.kernels.checks import Asked, check
from hooked_vlm.errors import InterventionError, MissingExtraError


def small(**changes: Any) -> dict[str, Any]:
    """Two prompts, three sources, four rows of five tokens; steered."""
    made = {
        "clean": torch.randn(2, 5, 8),
        "source": torch.randn(3, 6, 8),
        "token_map": torch.tensor([[-1, 0, 5, -1, 2]]).repeat(4, 1),
        "clean_row": torch.tensor([0, 1, 0, 1]),
        "source_row": torch.tensor([2, 0, 1, 2]),
        "steer_at": torch.tensor([[True, True, False, False, True]]).repeat(4, 1),
        "directions": torch.randn(2, 8),
        "direction_row": torch.tensor([0, 1, -1, 1]),
        "strength": torch.tensor([1.5, -2.0, 3.0, 0.0]),
    }
    return made | changes


# What it means


@given(arguments(dtypes=(torch.float64,)))
@settings(max_examples=40, deadline=None)
def test_the_definition_is_what_loops_do(given):
    rows = truth(given)
    for r in range(rows.shape[0]):
        for p in range(rows.shape[1]):
            h = given["clean"][int(given["clean_row"][r]), p]
            token = int(given["token_map"][r, p])
            if token >= 0:
                h = given["source"][int(given["source_row"][r]), token]
            k = int(given["direction_row"][r]) if "mode" in given else -1
            if k >= 0 and given["steer_at"][r, p]:
                w, a = given["directions"][k].double(), given["strength"][r].double()
                h = h + a * w if given["mode"] == "add" else h + a * (h @ w) / (w @ w) * w
            torch.testing.assert_close(rows[r, p], h, rtol=1e-9, atol=1e-9)


def test_steering_is_what_the_interventions_do():
    given: dict[str, Any] = small(token_map=torch.full((4, 5), -1))
    w, a = given["directions"], given["strength"]
    for mode, way in (("add", lambda h, w, a: add(h, w[0], a)), ("project", scale_projections)):
        rows = patched_rows(**given, mode=mode, by="reference")
        for r, k in ((0, 0), (1, 1)):
            clean = given["clean"][given["clean_row"][r]]
            moved = way(clean, w[k : k + 1], float(a[r]))
            at = given["steer_at"][r]
            torch.testing.assert_close(rows[r, at], moved[at], rtol=1e-6, atol=1e-6)
            assert torch.equal(rows[r, ~at], clean[~at])


@given(arguments((*DTYPES, torch.float64)))
@settings(max_examples=80, deadline=None)
def test_the_definition_rounds_once_and_writes_to_out_alone(given):
    before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
    rows = patched_rows(**given, by="reference")
    assert_close(rows, given)
    if "out" in given:
        assert rows.data_ptr() == given["out"].data_ptr()
    assert all(torch.equal(given[name], x) for name, x in before.items() if name != "out")


def test_copies_keep_every_bit():
    odd = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38, 1.0, 0.0])
    given: dict[str, Any] = small(
        clean=odd.expand(2, 5, 8).clone(), source=odd.flip(0).expand(3, 6, 8).clone()
    )
    given["direction_row"] = torch.tensor([-1, -1, -1, 1])  # the last has no strength
    rows = patched_rows(**given, by="reference").view(torch.int32)
    assert (rows[:, 0] == odd.view(torch.int32)).all()
    assert (rows[:, 1] == odd.flip(0).view(torch.int32)).all()


def test_nothing_to_write_is_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    places = torch.zeros(0, 5, dtype=torch.int64)
    rows = patched_rows(
        torch.randn(2, 5, 8), torch.randn(1, 3, 8), places, clean_row=none, source_row=none
    )
    assert rows.shape == (0, 5, 8)


def test_way_is_chosen_by_device():
    assert way_for(torch.zeros(1, 1, 1)) == "reference"
    assert way_for(torch.zeros(1, 1, 1, device="meta")) == "reference"
    assert set(kernels.WAYS) == {"reference", "triton"}


# What is refused


def asked(**changes: Any) -> Asked:
    return Asked(**small(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": torch.zeros(5, 8)}, r"`clean` is \(5, 8\); expected \[prompt, pos, d\]"),
        ({"source": torch.zeros(3, 6, 7)}, r"\(3, 6, 7\); expected \[source, source_pos, 8\]"),
        (
            {"token_map": torch.zeros(4, 4, dtype=torch.int64)},
            r"`token_map` is \(4, 4\); expected \[row, 5\]",
        ),
        ({"clean_row": torch.zeros(1, dtype=torch.int64)}, r"\[4\]; nothing is broadcast"),
        ({"strength": torch.ones(1)}, r"`strength` is \(1,\)"),
        ({"strength": None}, "strength is not given; give all four or none"),
        ({"directions": torch.zeros(8)}, r"`directions` is \(8,\); expected \[direction, 8\]"),
        ({"directions": torch.zeros(2, 7)}, r"\[direction, 8\]"),
        ({"out": torch.zeros(4, 5, 7)}, r"\[4, 5, 8\]"),
        ({"mode": "projekt"}, "Did you mean 'project'"),
        ({"source": torch.zeros(3, 6, 8).half()}, "expected torch.float32; convert it first"),
        ({"clean": torch.zeros(2, 5, 8, dtype=torch.int64)}, "float32, float16"),
        ({"token_map": torch.zeros(4, 5)}, "torch.int64 or torch.int32"),
        ({"steer_at": torch.zeros(4, 5, dtype=torch.int32)}, "torch.bool"),
        ({"source": torch.zeros(3, 6, 8, device="meta")}, "clean's device, cpu"),
        ({"directions": torch.zeros(2, 8, requires_grad=True)}, "no backward pass"),
        ({"out": torch.zeros(1, 5, 8).expand(4, 5, 8)}, "a place in memory for every element"),
        ({"token_map": torch.full((4, 5), 6)}, r"between -1 and 5"),
        ({"token_map": torch.full((4, 5), -2)}, r"goes from -2 to -2, and there are 6 source"),
        ({"clean_row": torch.full((4,), 2)}, "there are 2 prompts"),
        ({"source_row": torch.full((4,), -1)}, "between 0 and 2"),
        ({"direction_row": torch.full((4,), 2)}, "-1 for none"),
        ({"directions": torch.zeros(2, 8), "mode": "project"}, r"Directions \[0, 1\] of 2 are"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(InterventionError, match=message):
        check(asked(**changes))


def test_writing_over_what_is_read_is_refused():
    both = torch.randn(4, 5, 8)
    with pytest.raises(InterventionError, match="`out` lies over `clean`"):
        patched_rows(**small(clean=both[:2], out=both))
    shared = torch.randn(6, 5, 8)  # side by side is well
    patched_rows(**small(clean=shared[:2], out=shared[2:]))


def test_values_are_looked_at_unless_told_otherwise():
    check(asked(token_map=torch.full((4, 5), 6)), values=False)
    with pytest.raises(InterventionError, match="nothing is broadcast"):
        check(asked(clean_row=torch.zeros(1, dtype=torch.int64)), values=False)


def test_an_unknown_or_unusable_way_is_refused(monkeypatch):
    with pytest.raises(InterventionError, match="Did you mean 'triton'"):
        patched_rows(**small(), by="tritn")
    monkeypatch.setattr(triton, "triton", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hooked-vlm\[gpu\]'"):
        patched_rows(**small(), by="triton")

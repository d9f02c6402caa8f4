"""What the formulas promise: projections, ranks, exact replays, and controls that match."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.analysis.directions import (
    Direction,
    add,
    orthonormalise,
    projection_energy,
    random_controls,
    scale_projections,
    stack,
)
from hooked_vlm.analysis.probes import LinearProbe, class_directions
from hooked_vlm.errors import DataError


D = 24


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(seed: int = 0) -> torch.Tensor:
    """Tokens `[batch, pos, d]` with a mean and a few dimensions much larger than the rest."""
    scale = torch.logspace(1, -2, D)
    return gaussian(8, 30, D, seed=seed) * scale + 0.5


def softmax_weights(n_classes: int) -> torch.Tensor:
    y = np.arange(90) % n_classes
    X = gaussian(90, D) + 3 * gaussian(n_classes, D, seed=1)[y]
    return stack(class_directions(LinearProbe(lr=0.05).fit(X, y)))


def test_add_moves_along_one_direction_and_back():
    h, w = activations(), gaussian(D, seed=2)
    moved = add(h, w, 3.0)
    torch.testing.assert_close(moved - h, (3 * w).expand_as(h), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(add(moved, w, -3.0), h, atol=1e-5, rtol=1e-5)


def test_scale_projections_is_the_released_formula():
    h, w, alpha = activations(), gaussian(3, D, seed=2), 2.5
    expected = h.clone()
    for batch in range(h.shape[0]):
        for pos in range(h.shape[1]):
            for k in range(3):
                inner = sum(h[batch, pos, i] * w[k, i] for i in range(D))
                expected[batch, pos] += alpha * inner * w[k] / sum(w[k, i] ** 2 for i in range(D))
        if batch == 1:
            break
    torch.testing.assert_close(scale_projections(h, w, alpha)[:2], expected[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_strength_is_an_exact_replay_and_dtypes_stay(dtype):
    h, w = activations().to(dtype), gaussian(3, D)
    h[0, 0, 0] = -0.0
    for same in (scale_projections(h, w, 0.0), add(h, w[0], 0)):
        assert torch.equal(same, h)
        assert torch.equal(same.signbit(), h.signbit())
    assert scale_projections(h, w, 1.0).dtype == add(h, w[0], 1.0).dtype == dtype


def test_lengths_do_not_matter_to_scale_projections():
    h, w = activations(), gaussian(3, D)
    lengths = torch.tensor([[0.1], [7.0], [1.0]])
    torch.testing.assert_close(scale_projections(h, lengths * w, 2.0), scale_projections(h, w, 2.0))


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 6), seed=st.integers(0, 50))
def test_orthonormal_projection_is_idempotent_and_erases(rank, seed):
    h, basis = activations().double(), orthonormalise(gaussian(rank, D, seed=seed), center=False)
    basis = orthonormalise(basis.double(), center=False)
    torch.testing.assert_close(basis @ basis.T, torch.eye(rank, dtype=torch.float64))
    erased = scale_projections(h, basis, -1.0)
    torch.testing.assert_close(scale_projections(erased, basis, -1.0), erased)
    assert projection_energy(erased, basis) < 1e-20
    # What is orthogonal to the directions is left as it was, at any strength.
    complement = torch.linalg.qr(torch.cat([basis, gaussian(D, D).double()]).T).Q[:, rank:]
    moved = scale_projections(h, basis, 7.0)
    torch.testing.assert_close(moved @ complement, h @ complement)
    torch.testing.assert_close(moved @ basis.T, 8 * (h @ basis.T))


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_orthonormalised_softmax_has_one_direction_fewer_and_reads_the_same(n_classes):
    w = softmax_weights(n_classes)
    basis = orthonormalise(w)
    assert basis.shape == (n_classes - 1, D)
    # Theorem: class probabilities are a function of the basis' coordinates alone.
    h = activations()
    reading = (h @ w.T).softmax(-1)
    inside = (h @ basis.T) @ basis
    torch.testing.assert_close((inside @ w.T).softmax(-1), reading, atol=1e-4, rtol=1e-3)
    erased = scale_projections(h, basis, -1.0)
    torch.testing.assert_close(
        (erased @ w.T).softmax(-1), torch.full_like(reading, 1 / n_classes), atol=1e-4, rtol=1e-3
    )
    # The first row is the first class against the mean of all, sign included.
    first = w[0] - w.mean(dim=0)
    torch.testing.assert_close(basis[0], first / first.norm())


def test_two_softmax_classes_count_their_axis_twice():
    """The flaw that orthonormalising mends: w and -w scale one axis by 1 + 2 alpha."""
    axis = gaussian(D) / gaussian(D).norm()
    h = activations()
    released = scale_projections(h, torch.stack([axis, -axis]), 1.0)
    torch.testing.assert_close(released @ axis, 3 * (h @ axis), atol=1e-4, rtol=1e-4)
    mended = scale_projections(h, orthonormalise(torch.stack([axis, -axis])), 1.0)
    torch.testing.assert_close(mended @ axis, 2 * (h @ axis), atol=1e-4, rtol=1e-4)


def test_dependent_directions_are_left_out_wherever_they_stand():
    a, b = gaussian(2, D)
    rows = torch.stack([a, 2 * a, b, a - b])
    basis = orthonormalise(rows, center=False)
    assert basis.shape == (2, D)
    torch.testing.assert_close((rows @ basis.T) @ basis, rows)


def test_projection_energy_is_what_one_unit_of_alpha_adds():
    h, w = activations(), gaussian(3, D, seed=5)
    added = scale_projections(h, w, 1.0) - h
    assert projection_energy(h, w) == pytest.approx(
        added.square().sum(dim=-1).mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("with_energy", [False, True])
def test_controls_keep_norms_and_angles(with_energy):
    w, h = softmax_weights(3), activations()
    controls = random_controls(w, range(4), match_energy_on=h if with_energy else None)
    assert controls.shape == (4, 3, D)
    for control in controls:
        torch.testing.assert_close(control @ control.T, w @ w.T, atol=1e-4, rtol=1e-4)
    assert len({round(float(control[0, 0]), 5) for control in controls}) == 4


@pytest.mark.parametrize("n_directions", [1, 2, 3])
@pytest.mark.parametrize("where", ["large", "small", "anywhere"])
def test_matched_controls_move_activations_as_far(n_directions, where):
    h = activations().double()
    w = gaussian(n_directions, D, seed=3).double()
    # Lean towards the activations' largest or smallest axes, without lying in them.
    w *= {"large": torch.logspace(0.3, -0.3, D), "small": torch.logspace(-1, 1, D)}.get(
        where, torch.ones(D)
    )
    target = projection_energy(h, w)
    for control in random_controls(w, range(5), match_energy_on=h):
        assert projection_energy(h, control) == pytest.approx(target, rel=1e-6)
        moved = scale_projections(h, control, 4.0) - h
        assert moved.square().sum(-1).mean().item() == pytest.approx(16 * target, rel=1e-6)
    unmatched = [projection_energy(h, control) for control in random_controls(w, range(5))]
    assert max(abs(energy / target - 1) for energy in unmatched) > 0.05


def test_matching_also_holds_in_float32():
    h, w = activations(), softmax_weights(3)
    control = random_controls(w, [0], match_energy_on=h)[0]
    assert control.dtype == torch.float32
    assert projection_energy(h, control) == pytest.approx(projection_energy(h, w), rel=1e-6)


def test_controls_are_seeded_one_by_one():
    w, h = gaussian(2, D), activations()
    both = random_controls(w, [3, 8], match_energy_on=h)
    assert torch.equal(both[1], random_controls(w, [8], match_energy_on=h)[0])


def test_uniform_controls_have_the_isotropic_energy_on_average():
    w, h = gaussian(2, D), activations()
    basis = orthonormalise(w, center=False)
    energies = [projection_energy(h, each) for each in random_controls(basis, range(400))]
    expected = 2 / D * h.square().sum(dim=-1).mean().item()
    standard_error = np.std(energies) / 20
    assert abs(np.mean(energies) - expected) < 4 * standard_error


def test_class_directions_follow_the_probes_classes():
    X, y = gaussian(30, D), np.array(["left", "middle", "right"] * 10)
    probe = LinearProbe().fit(X, y)
    directions = class_directions(probe, provenance="hook_merged_embed, seed 0")
    assert [each.name for each in directions] == ["class left", "class middle", "class right"]
    assert torch.equal(stack(directions), probe.weight_)
    assert directions[0].provenance == "hook_merged_embed, seed 0"


def test_direction_has_a_scale():
    direction = Direction(torch.tensor([3.0, 4.0]), "w")
    assert direction.scale == 5.0
    assert repr(direction) == "Direction('w', d=2, norm=5)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthonormalise(torch.ones(3, 4)), "all equal"),
        (lambda: orthonormalise(torch.zeros(2, 4), center=False), "all zero"),
        (lambda: scale_projections(torch.ones(2, 4), torch.eye(4)[:2] * 0, 1.0), "zero"),
        (lambda: stack([]), "at least one"),
        (
            lambda: stack([Direction(torch.ones(2), "a"), Direction(torch.ones(3), "b")]),
            r"widths \[2, 3\]",
        ),
        (
            lambda: random_controls(torch.eye(4)[:1], [0], match_energy_on=torch.zeros(5, 4)),
            "match norms only",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()

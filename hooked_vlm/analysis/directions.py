"""Directions in activation space, and pure functions that move activations along them.

A probe's class weights are directions w_k.  The paper amplifies them in two ways (protocol
2.6, E7): its text has h + alpha w (`add`); its released experiment used
h + alpha sum_k <h, w_k> w_k / |w_k|^2 (`scale_projections`).

The second formula treats the w_k as orthogonal, but the weights of a softmax are not.  With
two classes they are nearly anti-parallel, so the single axis that separates them is counted
twice.  With any number of classes, adding one vector to every w_k changes no probability.
This common component comes from the initialisation, has no information about the classes, and
is amplified too.  `orthonormalise` corrects both: it centres the w_k (a softmax depends only
on their differences) and returns an orthonormal basis of the result, with one direction fewer
than there are classes.

A control must move activations as far as the real directions do, or a smaller effect of random
directions means nothing.  `random_controls` rotates the directions at random, which keeps
their norms and angles; with activations given, it also matches the projection energy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.anatomy.devices import sent
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Finite, Seed
from hooked_vlm.errors import DataError


# A direction shorter than this share of the longest one is a rounding error.
_RANK_TOLERANCE = 1e-6
# Powers of the second moment to try; beyond them float64 cannot distinguish the columns of a
# tilted frame.
_TILTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@checked(DataError)
@dataclass(frozen=True, eq=False)
class Direction:
    """One vector in a site's activation space, with its origin."""

    vector: Float[Tensor, " d_model"]
    name: str
    provenance: str = ""
    """How it was made: probe, site, data, seed."""

    @property
    def scale(self) -> float:
        """The vector's norm."""
        return float(_double(self.vector).norm())

    def __repr__(self) -> str:
        return f"Direction({self.name!r}, d={len(self.vector)}, norm={self.scale:.4g})"


@checked(DataError)
def stack(directions: Sequence[Direction]) -> Float[Tensor, "direction d_model"]:
    """Returns the vectors of several directions as the rows of one matrix.

    Raises:
        DataError: no direction, or directions of different spaces.
    """
    widths = sorted({len(direction.vector) for direction in directions})
    if len(widths) != 1:
        raise DataError(
            f"Cannot stack {len(directions)} directions of widths {widths}. "
            "Give at least one direction, all from the same site."
        )
    return torch.stack([direction.vector for direction in directions])


@checked(DataError)
def add(
    h: Float[Tensor, "*batch d_model"], w: Float[Tensor, " d_model"], alpha: Finite
) -> Float[Tensor, "*batch d_model"]:
    """Returns `h + alpha * w`; for alpha = 0, `h` itself.

    Computed in at least float32 and returned in `h`'s dtype.
    """
    return added(h, w, alpha)


def added(h: Tensor, w: Tensor, alpha: float | int) -> Tensor:
    """Returns what `add` does, without comparing arguments: for hook functions."""
    if alpha == 0:
        return h
    return (_wide(h) + alpha * sent(_wide(w), h.device)).to(h.dtype)


@checked(DataError)
def scale_projections(
    h: Float[Tensor, "*batch d_model"],
    directions: Float[Tensor, "direction d_model"],
    alpha: Finite,
) -> Float[Tensor, "*batch d_model"]:
    """Returns `h + alpha * sum_k <h, w_k> w_k / |w_k|^2`; for alpha = 0, `h` itself.

    The directions' lengths do not matter.  For orthonormal directions, alpha = -1 erases their
    span.  Computed in at least float32 and returned in `h`'s dtype.

    Raises:
        DataError: a direction is zero.
    """
    return with_scaled_projections(h, directions, alpha)


def with_scaled_projections(h: Tensor, directions: Tensor, alpha: float | int) -> Tensor:
    """Returns what `scale_projections` does, without comparing arguments: for hook functions."""
    if alpha == 0:
        return h
    unit = _unit_rows(_wide(directions)).to(h.device, _wide(h).dtype)
    return (_wide(h) + alpha * (_wide(h) @ unit.T) @ unit).to(h.dtype)


@checked(DataError)
def orthonormalise(
    directions: Float[Tensor, "direction d_model"], *, center: bool = True
) -> Float[Tensor, "rank d_model"]:
    """Returns an orthonormal basis of the directions' span; by default they are centred first.

    It is the Q of a QR decomposition with positive diagonal, so the first row has the sign and
    meaning of the first (centred) direction.  Linearly dependent rows are left out.  Centre the
    class weights of a softmax: K classes give at most K - 1 directions.

    Raises:
        DataError: directions of integers or NaN, or none is left, because all are equal (or
            zero, if not centred).

    >>> orthonormalise(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    tensor([[1., 0., 0.]])
    """
    rows = _double(directions)
    _require_numbers(rows)
    if center:
        rows = rows - rows.mean(dim=0)
    # Lengths before centring, so that the rounding error of equal directions counts as zero.
    longest = _double(directions).norm(dim=1).max()
    basis: list[Tensor] = []
    for row in rows:
        rest = row
        for _ in range(2):  # the second pass removes rounding errors: "twice is enough" (Kahan)
            for kept in basis:
                rest = rest - (rest @ kept) * kept
        if rest.norm() > _RANK_TOLERANCE * longest:
            basis.append(rest / rest.norm())
    if not basis:
        raise DataError(
            f"{len(rows)} directions leave nothing to orthonormalise: they are all "
            f"{'equal' if center else 'zero'}. Give directions of a probe of at least two classes."
        )
    return torch.stack(basis).to(directions.device, directions.dtype)


@checked(DataError)
def projection_energy(
    h: Float[Tensor, "*batch d_model"], directions: Float[Tensor, "direction d_model"]
) -> float:
    """Returns the mean over tokens of `|sum_k <h, w_k> w_k / |w_k|^2|^2`.

    This is the squared length of the change by `scale_projections` per unit of alpha.  For
    orthonormal directions it is the energy of `h` inside their span.
    """
    tokens = _double(h).reshape(-1, h.shape[-1])
    unit = _unit_rows(_double(directions)).to(tokens.device)
    moved = (tokens @ unit.T) @ unit
    return float(moved.square().sum(dim=1).mean())


@checked(DataError)
def random_controls(
    directions: Float[Tensor, "direction d_model"],
    seeds: Sequence[Seed],
    *,
    match_energy_on: Float[Tensor, "*batch d_model"] | None = None,
) -> Float[Tensor, "seed direction d_model"]:
    """Returns for each seed a random rotation of the directions, with the same norms and angles.

    Without `match_energy_on` the rotations are uniform.  With it (activations `h` at the
    site) each control also has the directions' `projection_energy` on `h`.  Its axes are
    drawn from a Gaussian whose covariance is the activations' second moment to a power t, and
    t is computed to match the energy.  t = 0 is the uniform rotation; t towards infinity and
    -infinity gives the most and the least energetic placements, so the solution is between.

    Raises:
        DataError: a direction is zero, or no placement of a seed reaches the energy to one
            part in a million.
    """
    # Write the directions in their own axes; a control has the same coordinates in other axes.
    if not len(seeds):
        raise DataError("No control was asked for: seeds is empty. Give at least one seed.")
    rows = _double(directions.detach())
    strengths, axes = _spectrum(rows)
    matcher = None
    if match_energy_on is not None:
        matcher = _EnergyMatcher.of(rows, strengths, match_energy_on.detach().to(rows))
    controls = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        shape = (rows.shape[1], len(strengths))
        gaussian = torch.randn(shape, generator=generator, dtype=torch.float64).to(rows.device)
        frame = matcher.frame(gaussian, seed) if matcher else _orthonormal(gaussian)
        controls.append(rows @ axes @ frame.T)
    return torch.stack(controls).to(directions.device, directions.dtype)


@dataclass(frozen=True, eq=False)
class _EnergyMatcher:
    """Computes the tilt at which a random frame has the directions' energy."""

    moments: Tensor
    """Eigenvalues `[d_model]`, rising, of the second moment of the activations."""
    eigenvectors: Tensor
    strengths: Tensor
    """Eigenvalues `[rank]`, falling, of h -> sum_k <h, w_k> w_k / |w_k|^2."""
    target: float

    @classmethod
    def of(cls, rows: Tensor, strengths: Tensor, h: Tensor) -> "_EnergyMatcher":
        tokens = h.reshape(-1, h.shape[-1])
        moments, eigenvectors = torch.linalg.eigh(tokens.T @ tokens / len(tokens))
        return cls(moments.clamp(min=0), eigenvectors, strengths, projection_energy(tokens, rows))

    def frame(self, gaussian: Tensor, seed: int) -> Tensor:
        def excess(t: float) -> float:
            inside = self._tilted(gaussian, t).square() * self.moments[:, None]
            return float((inside.sum(dim=0) @ self.strengths.square()) / self.target) - 1

        t = _root(excess) if self.target > 0 else None
        if t is None or abs(excess(t)) > 1e-6:
            raise DataError(
                f"No random placement of seed {seed} has the directions' projection energy "
                f"{self.target:.4g}, which is at the limit of these activations' variation. "
                "Use another seed or more activations, or match norms only."
            )
        return self.eigenvectors @ self._tilted(gaussian, t)

    def _tilted(self, gaussian: Tensor, t: float) -> Tensor:
        """Returns the frame of `gaussian` with covariance moments^t, in the eigenvectors' basis."""
        # The logarithm is floored where no token varies; any floor keeps the order.
        tilt = t / 2 * (self.moments / self.moments[-1]).clamp(min=1e-12).log()
        return _orthonormal((tilt - tilt.max()).exp()[:, None] * gaussian)


def _root(excess: Callable[[float], float]) -> float | None:
    """Returns the tilt at which the energy has its target value, or None.

    The search goes outwards from 0 to a bracket, and then bisects it.
    """
    sign = 1.0 if excess(0.0) <= 0 else -1.0
    reach = next((each for each in _TILTS if sign * excess(sign * each) >= 0), None)
    if reach is None:
        return None
    low, high = 0.0, reach
    for _ in range(60):  # to the last bit of a float64
        middle = (low + high) / 2
        low, high = (middle, high) if sign * excess(sign * middle) < 0 else (low, middle)
    return sign * high


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns strengths `[rank]`, descending, and axes `[d_model, rank]` of the scaling formula."""
    _, singular, axes = torch.linalg.svd(_unit_rows(rows), full_matrices=False)
    kept = singular > _RANK_TOLERANCE * singular[0]
    return singular[kept].square(), axes[kept].T


def _orthonormal(columns: Tensor) -> Tensor:
    q, r = torch.linalg.qr(columns)
    # With fixed signs of R's diagonal, Q depends continuously on the columns.
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _unit_rows(directions: Tensor) -> Tensor:
    _require_numbers(directions)
    norms = directions.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        zero = (norms[:, 0] == 0).nonzero()[:, 0].tolist()
        raise DataError(
            f"Directions {zero} of {len(directions)} are zero. Give directions with a norm above 0."
        )
    return directions / norms


def _require_numbers(directions: Tensor) -> None:
    """Raises `DataError` for no direction, and for some that are NaN or infinite."""
    if not directions.numel():
        raise DataError(
            f"There is no direction in a tensor of shape {tuple(directions.shape)}. Give one or "
            "more, [direction, d_model]."
        )
    finite = directions.isfinite().all(dim=1)
    if not finite.all():
        wrong = (~finite).nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
        raise DataError(
            f"{len(wrong)} of {len(directions)} directions have values that are NaN or infinite "
            f"(number {shown}). Give directions of finite numbers."
        )


def _double(tensor: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _wide(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))

"""What is asked of `patched_rows`, and whether it can be done: one check for every implementation.

Nothing is broadcast.  A row that shares a prompt, a source or a direction says so by its number;
a tensor of the wrong shape is a mistake, not a shorthand.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hooked_vlm.errors import InterventionError, did_you_mean


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MODES = ("add", "project")
_ORTHONORMAL = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By the basis's dtype, how far its Gram matrix may be from the identity."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The arguments of one call; `reference.patched_rows` says what they mean."""

    clean: Tensor
    """`[prompt, pos, d]`."""
    source: Tensor
    """`[source, source_pos, d]`."""
    token_map: Tensor
    """`[row, pos]`, integers: -1 keeps the clean token, else the source position to take."""
    clean_row: Tensor
    """`[row]`, integers: which prompt."""
    source_row: Tensor
    """`[row]`, integers: which source."""
    steer_at: Tensor | None = None
    """`[row, pos]`, booleans."""
    directions: Tensor | None = None
    """`[direction, d]`."""
    direction_row: Tensor | None = None
    """`[row]`, integers: which direction, -1 for none."""
    strength: Tensor | None = None
    """`[row]`."""
    mode: str = "add"
    basis: Tensor | None = None
    """`[axis, d]`, orthonormal."""
    out: Tensor | None = None
    """`[row, pos, d]`: where to write."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, positions and width of what is written."""
        return (*self.token_map.shape, self.clean.shape[-1])  # type: ignore[return-value]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of all arithmetic: float32, or float64 for float64 activations."""
        return torch.promote_types(self.clean.dtype, torch.float32)

    @property
    def moved(self) -> Tensor | None:
        """`[row, pos]`: which tokens are steered."""
        if self.steer_at is None or self.direction_row is None or self.strength is None:
            return None
        does = (self.direction_row >= 0) & (self.strength != 0)
        return self.steer_at & does[:, None]

    def new_out(self) -> Tensor:
        """Returns `out`, or room for it."""
        return self.clean.new_empty(self.shape) if self.out is None else self.out

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields what was given, by name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value


def check(asked: Asked, values: bool = True) -> None:
    """Raises `InterventionError` for whatever cannot be done as asked.

    With `values`, what the tensors hold is looked at too (index ranges, directions of no
    length, a basis that is not orthonormal).  On a GPU that waits for everything that is
    queued; leave it out where the caller has made the numbers itself.
    """
    _check_shapes(asked)
    _check_kinds(asked)
    _check_out(asked)
    if values:
        _check_indices(asked)
        _check_vectors(asked)


def _check_shapes(asked: Asked) -> None:
    for name, n_axes in (("clean", 3), ("source", 3), ("token_map", 2)):
        given = getattr(asked, name)
        if given.ndim != n_axes:
            raise _wrong(name, tuple(given.shape), f"{n_axes} axes")
    rows, pos, d = asked.shape
    if asked.source.shape[-1] != d:
        raise _wrong("source", tuple(asked.source.shape), f"clean's width {d} as its last axis")
    if asked.token_map.shape[1] != asked.clean.shape[1]:
        raise _wrong(
            "token_map",
            (rows, pos),
            f"[row, {asked.clean.shape[1]}], a column for each of clean's positions",
        )
    steering = {
        name: getattr(asked, name)
        for name in ("steer_at", "directions", "direction_row", "strength")
    }
    missing = [name for name, given in steering.items() if given is None]
    if missing and len(missing) < len(steering):
        raise InterventionError(
            f"patched_rows steers with {', '.join(steering)}, and {', '.join(missing)} "
            "is not given; give all four or none."
        )
    expected = {"clean_row": (rows,), "source_row": (rows,), "direction_row": (rows,)}
    expected |= {"strength": (rows,), "steer_at": (rows, pos), "out": (rows, pos, d)}
    for name, shape in expected.items():
        given = getattr(asked, name)
        if given is not None and tuple(given.shape) != shape:
            raise _wrong(name, tuple(given.shape), f"{list(shape)}; nothing is broadcast")
    for name in ("directions", "basis"):
        given = getattr(asked, name)
        if given is not None and (given.ndim != 2 or given.shape[1] != d):
            raise _wrong(name, tuple(given.shape), f"[n, {d}]: one vector of clean's width a row")


def _check_kinds(asked: Asked) -> None:
    if asked.mode not in MODES:
        raise InterventionError(
            f"patched_rows(mode={asked.mode!r}) is not known; use 'add' or 'project'."
            f"{did_you_mean(asked.mode, MODES)}"
        )
    dtype = asked.clean.dtype
    if dtype not in DTYPES:
        raise _wrong("clean", dtype, "float32, float16, bfloat16 or float64")
    allowed: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(("source", "out"), (dtype,))
    # Directions and bases may keep the precision in which they were found.
    allowed |= dict.fromkeys(("directions", "basis"), (dtype, torch.float32))
    integers = (torch.int64, torch.int32)
    allowed |= dict.fromkeys(("token_map", "clean_row", "source_row", "direction_row"), integers)
    allowed |= {"steer_at": (torch.bool,), "strength": (torch.float32, asked.wide)}
    for name, tensor in asked.tensors():
        kinds = tuple(dict.fromkeys(allowed.get(name, (dtype,))))
        if tensor.dtype not in kinds:
            raise _wrong(name, tensor.dtype, f"{' or '.join(map(str, kinds))}; convert it first")
        if tensor.device != asked.clean.device:
            raise _wrong(name, tensor.device, f"clean's device, {asked.clean.device}; move it")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise InterventionError(
                f"patched_rows has no backward pass, and `{name}` requires a gradient; call it "
                "under torch.no_grad(), or write the tokens with torch's own operations."
            )


def _check_out(asked: Asked) -> None:
    """Each place of `out` is written once, and nothing that is read lies under it."""
    if asked.out is None:
        return
    first, last = _span(asked.out)
    if _reach(asked.out) < asked.out.numel():
        raise _wrong("out", asked.out.stride(), "a place in memory for every element")
    for name, tensor in asked.tensors():
        start, end = _span(tensor)
        if name != "out" and start < last and first < end:
            raise InterventionError(
                f"`out` lies over `{name}` in memory, which would be read while it is written "
                "to; write into a tensor of its own."
            )


def _reach(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + _reach(tensor) * tensor.element_size()


def _check_indices(asked: Asked) -> None:
    n_sources, n_source_pos, _ = asked.source.shape
    limits = [
        ("clean_row", 0, len(asked.clean), "prompts"),
        ("source_row", 0, n_sources, "sources"),
        ("token_map", -1, n_source_pos, "source positions, or -1 for the clean token"),
    ]
    if asked.directions is not None:
        limits.append(("direction_row", -1, len(asked.directions), "directions, or -1 for none"))
    for name, least, end, what in limits:
        given = getattr(asked, name)
        if given.numel() == 0:
            continue
        low, high = (int(each) for each in given.aminmax())
        if low < least or high >= end:
            raise InterventionError(
                f"`{name}` goes from {low} to {high}, and there are {end} {what}; "
                f"its numbers must lie between {least} and {end - 1}."
            )


def _check_vectors(asked: Asked) -> None:
    if asked.directions is not None and asked.mode == "project":
        zero = (asked.directions == 0).all(dim=1).nonzero()[:, 0].tolist()
        if zero:
            raise InterventionError(
                f"Directions {zero} of {len(asked.directions)} are zero, and mode='project' "
                "divides by their length; leave them out, with direction_row -1."
            )
    if asked.basis is not None:
        basis = asked.basis.double() if asked.basis.device.type != "mps" else asked.basis
        gram = basis @ basis.T
        off = float((gram - torch.eye(len(gram)).to(gram)).abs().max()) if len(gram) else 0.0
        if not off <= _ORTHONORMAL[asked.basis.dtype]:
            raise InterventionError(
                f"The rows of `basis` are not orthonormal: products of two of them are off by "
                f"{off:.2g}. Pass them through directions.orthonormalise(rows, center=False)."
            )


def _wrong(name: str, given: object, expected: str) -> InterventionError:
    return InterventionError(f"patched_rows: `{name}` is {given}; expected {expected}.")

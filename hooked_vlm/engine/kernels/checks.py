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
AXES = {
    "clean": ("prompt", "pos", "d"),
    "source": ("source", "source_pos", "d"),
    "token_map": ("row", "pos"),
    "clean_row": ("row",),
    "source_row": ("row",),
    "steer_at": ("row", "pos"),
    "directions": ("direction", "d"),
    "direction_row": ("row",),
    "strength": ("row",),
    "out": ("row", "pos", "d"),
}
"""The axes of each tensor: a name that several tensors share is one size."""
STEERING = ("steer_at", "directions", "direction_row", "strength")


@dataclass(frozen=True, eq=False)
class Asked:
    """The arguments of one call, as `patched_rows` describes them; `AXES` has their shapes."""

    clean: Tensor
    source: Tensor
    token_map: Tensor
    clean_row: Tensor
    source_row: Tensor
    steer_at: Tensor | None = None
    directions: Tensor | None = None
    direction_row: Tensor | None = None
    strength: Tensor | None = None
    mode: str = "add"
    out: Tensor | None = None

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
    length).  On a GPU that waits for everything that is
    queued; leave it out where the caller has made the numbers itself.
    """
    _check_shapes(asked)
    _check_kinds(asked)
    _check_out(asked)
    if values:
        _check_indices(asked)
        _check_vectors(asked)


def _check_shapes(asked: Asked) -> None:
    missing = [name for name in STEERING if getattr(asked, name) is None]
    if missing and len(missing) < len(STEERING):
        raise InterventionError(
            f"patched_rows steers with {', '.join(STEERING)}, and {', '.join(missing)} "
            "is not given; give all four or none."
        )
    sizes: dict[str, int] = {}
    for name, tensor in asked.tensors():
        axes, shape = AXES[name], tuple(tensor.shape)
        found = dict(zip(axes, shape, strict=False))
        if len(axes) != len(shape) or any(sizes.get(axis, n) != n for axis, n in found.items()):
            expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise _wrong(name, shape, f"[{expected}]; nothing is broadcast")
        sizes |= found


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
    allowed["directions"] = (dtype, torch.float32)  # may keep the precision they were found in
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


def _wrong(name: str, given: object, expected: str) -> InterventionError:
    return InterventionError(f"patched_rows: `{name}` is {given}; expected {expected}.")

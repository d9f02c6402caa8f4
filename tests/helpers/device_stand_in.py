"""A stand-in for a CUDA device that computes, on machines that have none.

    with StandIn() as device:
        model = wrap(device.move(hf_model))
        model(inputs)
    device.syncs  # {(why, "engine/run.py:57"): how often}

Each tensor "on the device" says that it is on `cuda:0` and carries a tensor of the CPU.  What CUDA
refuses, mostly operations that mix devices, is refused with its words; where a host waits for the
device is counted, with the line of the library.  A refusal is recorded also where code catches it.

Not imitated: streams, memory, the speed of anything, and kernels: attention runs by its definition.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
TWO_DEVICES = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
)
WAITS = ("nonzero", "masked_select", "_unique", "unique", "_local_scalar_dense", "equal")
"""Operations after which the host must know a value of the device."""


class OnDevice(Tensor):
    """A tensor that is on the stand-in device; its numbers are in `carried`."""

    carried: Tensor

    @staticmethod
    def __new__(cls, carried: Tensor) -> "OnDevice":
        # torch's own code sees `meta`, which needs no driver; Python code sees the property below.
        self: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            carried.shape,
            strides=carried.stride(),
            storage_offset=carried.storage_offset(),
            dtype=carried.dtype,
            device=torch.device("meta"),
            requires_grad=False,
        )
        self.carried = carried
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return StandIn.now().dispatch(func, args, dict(kwargs or {}))

    device = property(lambda self: CUDA)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]
    is_meta = property(lambda self: False)  # pyright: ignore[reportAssignmentType]
    is_cpu = property(lambda self: False)  # pyright: ignore[reportAssignmentType]

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"


class StandIn:
    """The device while it is there: a `with` block in which `cuda:0` can be used."""

    _current: "StandIn | None" = None

    def __init__(self) -> None:
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.operations = 0
        self._patches = ExitStack()
        self._modes = (_Dispatch(), _Functions())

    @classmethod
    def now(cls) -> "StandIn":
        """Returns the device of the open block."""
        if cls._current is None:
            raise RuntimeError("A tensor of the stand-in device is used outside its block.")
        return cls._current

    def __enter__(self) -> "StandIn":
        StandIn._current = self
        for name, told in _TOLD.items():
            self._patches.enter_context(patch(name, told))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        self._patches.close()
        StandIn._current = None

    @property
    def n_syncs(self) -> int:
        """How often the host waited for the device."""
        return sum(self.syncs.values())

    def move(self, module: nn.Module) -> nn.Module:
        """Puts all parameters and buffers of a module on the device, in place."""
        moved: dict[int, Any] = {}  # tied weights stay tied
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    new = nn.Parameter(OnDevice(parameter.data), requires_grad=False)
                    part._parameters[name] = moved.setdefault(id(parameter), new)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = OnDevice(buffer)
        return module

    def wait(self, why: str) -> None:
        """Counts a synchronisation."""
        self.syncs[why, _line()] += 1

    def refuse(self, why: str) -> None:
        """Raises what CUDA would, and records it."""
        self.refused[why, _line()] += 1
        raise RuntimeError(why)

    def dispatch(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs an operation of which the device may be a part."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if isinstance(x, OnDevice)]
        # `meta` with tensors of the host alone is asked for by name: shapes without numbers.
        if not on_device and (tensors or not _is_meta(kwargs.get("device"))):
            return func(*args, **kwargs)
        self.operations += 1
        if func is aten._to_copy.default and on_device:
            return self._copied(args[0], kwargs)
        name = func._schema.name.split("::")[1]
        self._check_devices(func, name, args, tensors)
        if name.startswith(WAITS):
            self.wait(name)
        if func is aten.copy_.default and len(on_device) == 1:
            self.wait("copy_ between devices")
        bare_args, bare_kwargs = pytree.tree_map(_bare, (args, kwargs))
        if bare_kwargs.get("device") is not None:
            bare_kwargs["device"] = torch.device("cpu")
        found = func(*bare_args, **bare_kwargs)
        if func._schema.is_mutable and args and name.endswith("_"):
            return args[0]
        if isinstance(kwargs.get("out"), OnDevice):
            return kwargs["out"]
        return pytree.tree_map(_put, found)

    def _copied(self, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """A copy within the device, or from it to the host."""
        target = kwargs.get("device")
        rest = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        found = aten._to_copy.default(_bare(tensor), **rest)
        if target is not None and torch.device(target).type == "cpu":
            self.wait("copy to the host")
            return found
        return OnDevice(found)

    def _check_devices(self, func: Any, name: str, args: tuple, tensors: list[Tensor]) -> None:
        """Refuses operations on tensors of two devices, but for those that torch allows."""
        on_host = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim > 0]
        if name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], list):
            self._check_index(args, name)
        elif on_host and func is not aten.copy_.default:
            self.refuse(f"{TWO_DEVICES} ({name})")

    def _check_index(self, args: tuple, name: str) -> None:
        indexed, given = args[0], [x for x in args[1] if x is not None]
        values = args[2] if len(args) > 2 and isinstance(args[2], Tensor) else None
        if not isinstance(indexed, OnDevice):
            if any(isinstance(x, OnDevice) for x in given):
                self.refuse(
                    "indices should be either on cpu or on the same device as the indexed "
                    "tensor (cpu)"
                )
            self.refuse(f"{TWO_DEVICES} ({name})")
        if values is not None and not isinstance(values, OnDevice) and values.ndim:
            self.refuse(f"{TWO_DEVICES} ({name})")
        if any(not isinstance(x, OnDevice) for x in given):
            self.wait("index from the host")
        if any(x.dtype == torch.bool for x in given):
            self.wait("boolean index")


class _Generator(torch.Generator):
    """A generator of the host, also where one of the device is asked for."""

    def __new__(cls, device: Any = "cpu") -> Any:
        new: Any = super().__new__
        return new(cls, "cpu" if _is_cuda(device) else device)


_TOLD: dict[str, Any] = {
    "torch.Generator": _Generator,
    "torch.cuda.mem_get_info": lambda device=None: (2**34, 2**35),
    "torch.cuda.memory_reserved": lambda device=None: 0,
    "torch.cuda.memory_allocated": lambda device=None: 0,
}
"""What stands in for calls that need a driver."""


class _Dispatch(TorchDispatchMode):
    """Sees operations whose tensors are all of the host, which may name the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return StandIn.now().dispatch(func, args, dict(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Answers calls that would ask for a driver before any operation is dispatched."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func in (Tensor.to, Tensor.cuda) and not isinstance(first, OnDevice):
            return self._to(func, args, kwargs)
        if func is Tensor.to and isinstance(first, OnDevice):
            return self._from(args, kwargs)
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(first, OnDevice):
            if func is torch.Tensor.numpy:
                StandIn.now().refuse(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()"
                )
            StandIn.now().wait("tolist")
            return first.carried.tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(first, OnDevice):
            args = (first, _indices(args[1]), *args[2:])
        if func is nn.functional.scaled_dot_product_attention and isinstance(first, OnDevice):
            return _attention(*args, **kwargs)
        if _is_cuda(kwargs.get("device")):
            return self._made(func, args, kwargs)
        return func(*args, **kwargs)

    def _to(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Moves a tensor of the host, where the device is asked for."""
        tensor, *rest = args
        wanted = [*rest, *kwargs.values()]
        like = next((x for x in wanted if isinstance(x, OnDevice)), None)
        if func is Tensor.to and like is None and not any(map(_is_cuda, wanted)):
            return func(*args, **kwargs)
        if not kwargs.get("non_blocking"):
            StandIn.now().wait("copy to the device")
        dtype = like.dtype if like is not None else None
        for x in wanted:
            dtype = x if isinstance(x, torch.dtype) else dtype
        return OnDevice(tensor.detach().to(dtype or tensor.dtype, copy=True))

    def _from(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`to` of a tensor on the device: on it, or to the host."""
        tensor, *rest = args
        wanted = [*rest, *(v for k, v in kwargs.items() if k in ("device", "dtype", "other"))]
        dtype, device = tensor.dtype, CUDA
        for x in wanted:
            if isinstance(x, torch.dtype):
                dtype = x
            elif isinstance(x, Tensor):
                dtype, device = x.dtype, x.device
            elif x is not None and not isinstance(x, bool):
                device = torch.device(x)
        if device.type == "cuda":
            if dtype == tensor.dtype and not kwargs.get("copy"):
                return tensor
            return aten._to_copy.default(tensor, dtype=dtype)
        return aten._to_copy.default(tensor, dtype=dtype, device=device)

    def _made(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Makes on the host what was to be made on the device, and puts it there."""
        kwargs["device"] = torch.device("cpu")
        if func in (torch.tensor, torch.as_tensor):
            if isinstance(args[0], OnDevice):
                return args[0]
            scalars = [x for x in pytree.tree_leaves(args[0]) if isinstance(x, OnDevice)]
            if scalars:
                StandIn.now().wait("torch.tensor of values on the device")
            args = (pytree.tree_map(_number, args[0]), *args[1:])
            StandIn.now().wait("torch.tensor on the device")
        is_leaf = kwargs.pop("requires_grad", False)
        bare_args, bare_kwargs = pytree.tree_map(_bare, (args, kwargs))
        found = pytree.tree_map(_put, func(*bare_args, **bare_kwargs))
        return found.requires_grad_() if is_leaf else found


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch's own entry does
        hidden = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = hidden.masked_fill(~attn_mask, -torch.inf)
    kernel = aten._scaled_dot_product_attention_math
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    return kernel(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]


def _indices(given: Any) -> Any:
    """Returns an index with its lists as tensors of the host, as torch makes them."""
    if isinstance(given, tuple):
        return tuple(map(_indices, given))
    return torch.tensor(given) if isinstance(given, list) else given


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _bare(x: Any) -> Any:
    return x.carried if isinstance(x, OnDevice) else x


def _put(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


def _number(x: Any) -> Any:
    return x.carried.item() if isinstance(x, OnDevice) else x


def _line() -> str:
    """Returns the innermost line of the library, `package/module.py:line`, that is running.

    Or "transformers", where that runs further inside.
    """
    frame = sys._getframe(1)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        if "transformers" in parts:
            return "transformers"
        if "hooked_vlm" in parts and "tests" not in parts:
            at = len(parts) - 1 - parts[::-1].index("hooked_vlm")
            return f"{'/'.join(parts[at + 1 :])}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"

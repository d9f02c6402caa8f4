"""Device and dtype in which a module computes, and free memory of a device.

The weights alone do not determine them.  Offloaded weights are on the `meta` device between
passes, and accelerate's hooks hold the device they are fetched to.  Quantised weights are
packed integers, or no parameters at all.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def execution_device(module: nn.Module) -> torch.device | None:
    """Returns the device on which a module computes; None when it has no tensors.

    The result is `meta` only when no hook fetches the module's weights to another device.
    """
    found = _first_tensor(module)
    if found is not None and not found.is_meta:
        return found.device
    told = next((device for part in module.modules() for device in _told(part)), None)
    if told is not None:
        return torch.device(told)
    return None if found is None else found.device


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor on a device; from the host to a GPU without waiting for what runs there."""
    return x.to(device, non_blocking=x.device.type == "cpu" and device.type == "cuda")


def compute_dtype(*modules: nn.Module) -> torch.dtype:
    """Returns the dtype of the first parameter that is neither packed nor 8-bit; else fp32.

    The modules are searched in the given order.
    """
    dtypes = (p.dtype for module in modules for p in module.parameters())
    return next((dtype for dtype in dtypes if dtype in _COMPUTED_IN), torch.float32)


def free_bytes(device: torch.device) -> int | None:
    """Returns the free memory of a device in bytes; None when it is unknown."""
    if device.type == "cuda":
        # Memory that torch has reserved but not allocated is free for this process.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    if device.type != "cpu":
        return None
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available


def _first_tensor(module: nn.Module) -> torch.Tensor | None:
    found = next(module.parameters(), None)
    return next(module.buffers(), None) if found is None else found


def _told(module: nn.Module) -> Iterator[Any]:
    """Yields the devices to which accelerate's hooks on a module fetch its weights."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            yield device

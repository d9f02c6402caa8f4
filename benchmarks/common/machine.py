"""The machine and the versions that a benchmark's numbers were measured with."""

import platform

import torch
import transformers


def machine() -> dict[str, str]:
    """Returns processor, device, number of threads and versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }

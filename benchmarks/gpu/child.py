"""Runs one part in this process.

python -m benchmarks.gpu.child MODULE:FUNCTION --file FILE --limit SECONDS [--device cpu] [--tiny]
"""

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.gpu.given import Given


def main() -> None:
    """Calls the function with its settings, and notes that it has come to its end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child")
    parser.add_argument("function")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--questions", type=int, default=1)
    asked = parser.parse_args()
    given = Given(asked.file, asked.device, asked.tiny, asked.limit, asked.questions)
    if given.on_gpu:
        require_cuda()
    module, name = asked.function.split(":")
    getattr(importlib.import_module(module), name)(given)
    given.write(finished=True)


def require_cuda() -> None:
    """Ends the process where there is no GPU to measure."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here; --device cpu --tiny tries the program out")


if __name__ == "__main__":
    main()

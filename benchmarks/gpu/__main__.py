"""The command of `benchmarks.gpu`; see the package's documentation.

python -m benchmarks.gpu [--minutes 10] [--out DIR] [--parts 0,3] [--resume]
    [--questions 2] [--device cpu --tiny]
"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.gpu.parent import Benchmark, CannotStart, Settings
from benchmarks.gpu.parts import PARTS, chosen


def main(arguments: list[str] | None = None) -> int:
    """Runs what was asked for; returns the exit code."""
    known = ", ".join(f"{i} {part.name}" for i, part in enumerate(PARTS))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=f"Parts: {known}."
    )
    parser.add_argument("--minutes", type=float, default=10, help="for everything together")
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"))
    parser.add_argument("--parts", default="", help="numbers or names, with commas; all if empty")
    parser.add_argument("--resume", action="store_true", help="keep parts that came to their end")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it out")
    parser.add_argument(
        "--questions", type=int, default=1, choices=(1, 2), help="about each image, in sweeps"
    )
    asked = parser.parse_args(arguments)
    if asked.device == "cpu" and not asked.tiny:
        parser.error("--device cpu needs --tiny: the real shapes take hours without a GPU")
    # So that the part that runs ends as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        numbers = chosen(asked.parts)
        settings = Settings(asked.device, asked.tiny, asked.questions)
        benchmark = Benchmark(asked.out, settings, PARTS, asked.minutes)
        code = benchmark.run(numbers, asked.resume)
    except ValueError as wrong:
        parser.error(str(wrong))
    except CannotStart as reason:
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    print((asked.out / "table.md").read_text())
    return code


if __name__ == "__main__":
    sys.exit(main())

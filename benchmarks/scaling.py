"""How much faster an experiment is with several worker processes (`--executor processes:N`).

    python -m benchmarks.scaling [--model tiny-qwen2-vl] [--experiment strip-swap] [--pairs 40]

The experiment runs once with each number of worker processes, on as many threads each as are
given, and the tables are compared byte by byte.  Times are of the whole job after the first
loading of the model: workers load theirs within it.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from hooked_vlm.experiments.options import Config
from hooked_vlm.report.job import Job, run


def measured(job: Job, processes: int) -> tuple[float, bytes]:
    """Returns the seconds of a job with this many workers, and its table."""
    start = time.perf_counter()
    if processes == 0:
        report = run(job)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            report = run(job, executor=pool)
    seconds = time.perf_counter() - start
    return seconds, report.results[0].table.to_csv(index=False).encode()


def main() -> None:
    """Parses the command line, runs and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="tiny-qwen2-vl")
    parser.add_argument("--experiment", default="strip-swap")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = Config(pairs=given.pairs, batch_size=given.batch_size)
    first: tuple[float, bytes] | None = None
    print("| worker processes | seconds | times as fast | table |")
    print("|---|---:|---:|---|")
    for processes in given.processes:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(given.experiment, given.model, Path(folder), config=config)
            seconds, table = measured(job, processes)
        first = first or (seconds, table)
        same = "the same bytes" if table == first[1] else "DIFFERENT"
        name = processes or "none"
        print(f"| {name} | {seconds:.0f} | {first[0] / seconds:.2f} | {same} |", flush=True)


if __name__ == "__main__":
    main()

"""How much faster an experiment is with several worker processes (`--executor processes:N`).

    python -m benchmarks.scaling [--model tiny-qwen2-vl] [--experiment strip-swap] [--pairs 40]

The experiment runs once in this process and once with each number of worker processes, on as many
threads each as are given, and the tables are compared byte by byte.  Seconds are those of the
experiment in its record: without the loading of the model in this process and the report, with the
start of workers and their loading.  The last column has the processor cores that other programs
used meanwhile (Linux alone): above 0.1 the seconds are not this experiment's own.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from hooked_vlm.experiments.options import Config
from hooked_vlm.report.job import Job, run
from hooked_vlm.report.progress import quiet


MOST_BESIDE = 0.1
"""Cores of other programs beside which a measurement still counts."""


@dataclass(frozen=True)
class Measured:
    """One run."""

    seconds: float
    table: bytes
    beside: float | None
    """Cores that other programs used; None where the system does not tell."""


def machine_cpu_s() -> float | None:
    """Returns the processor seconds of all programs since the start of the machine."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system = map(int, stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def measured(job: Job, processes: int) -> Measured:
    """Returns a run of a job with this many workers; 0: in this process."""
    start, before, own = time.perf_counter(), machine_cpu_s(), sum(os.times()[:4])
    if processes == 0:
        report = run(job)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            report = run(job, executor=pool)
    wall, after, mine = time.perf_counter() - start, machine_cpu_s(), sum(os.times()[:4])
    beside = None
    if before is not None and after is not None:
        beside = max(0.0, (after - before - (mine - own)) / wall)
    table = report.results[0].table.to_csv(index=False).encode()
    return Measured(sum(report.provenance.seconds.values()), table, beside)


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
    found: list[Measured] = []
    print("| worker processes | seconds | times as fast | table | cores used by others |")
    print("|---|---:|---:|---|---:|")
    for processes in given.processes:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(given.experiment, given.model, Path(folder), config=config)
            with quiet():
                found.append(measured(job, processes))
        one, first = found[-1], found[0]
        same = "the same bytes" if one.table == first.table else "DIFFERENT"
        beside = "unknown" if one.beside is None else f"{one.beside:.2f}"
        faster = f"{first.seconds / one.seconds:.2f}"
        name = processes or "none"
        print(f"| {name} | {one.seconds:.1f} | {faster} | {same} | {beside} |", flush=True)
    print(f"\nOn {os.cpu_count()} cores, {given.threads} threads for each process.")
    if any(one.beside is not None and one.beside > MOST_BESIDE for one in found):
        print("NOT TO BE PUBLISHED: other programs used the processor meanwhile.")


if __name__ == "__main__":
    main()

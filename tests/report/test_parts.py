"""Units of work on disk: any cut into parts, any interruption and any executor give equal bits.

Most tests run a made-up experiment of three loops without a model; one runs E4 in processes that
are killed.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_vlm.errors import DataError, HookedVLMError, HookedVLMWarning, MissingExtraError
from hooked_vlm.experiments.loop import (
    Loop,
    UnfinishedError,
    independent,
    once,
    over,
    over_batches,
    working_by,
)
from hooked_vlm.experiments.options import Config
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.report import job as job_runner
from hooked_vlm.report import values, workers
from hooked_vlm.report.engines import engine_of
from hooked_vlm.report.job import SILENT, Job
from hooked_vlm.report.merge import merge
from hooked_vlm.report.parts import Parts, Share, file_of
from hooked_vlm.report.results import FORMAT
from hooked_vlm.report.shares import run_share
from hooked_vlm.report.values import packed, unpacked
from hooked_vlm.report.workers import Task


VALUES: dict[str, Any] = {
    "numbers": {"a": [1, -0.0, float("inf"), True, None, "ü"], "b": ("x", 2.5)},
    "no texts as keys": {(0, "left"): [], 3: {}},
    "arrays": [np.arange(6.0).reshape(2, 3).T, np.array(["ab", "c"]), np.zeros((0, 2), bool)],
    "tensors": {"x": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16), "s": torch.ones(())},
    "one number": np.float32(0.1),
    "labelled": xr.DataArray(
        np.arange(4, dtype=np.float32).reshape(2, 2),
        dims=("pair", "quantity"),
        coords={"quantity": ["p", "log odds"], "axis": ("pair", ["h", "v"])},
    ),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(
            itertools.starmap(same, zip(one, other, strict=True))
        )
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.equal(one) == other.equal(other)
            and (one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)))
        )
    if isinstance(one, xr.DataArray):
        return one.identical(other) and one.dtype == other.dtype
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and repr(one) == repr(other)


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_with_their_bits(name: str) -> None:
    assert same(VALUES[name], unpacked(packed(VALUES[name], "u", "c"), "u", "c"))


def test_other_values_are_refused() -> None:
    with pytest.raises(DataError, match=r"returned set; expected dicts, lists"):
        packed({1}, "u", "c")


class Made:
    """A made-up experiment: chosen items, features, and two independent loops at its end."""

    def __init__(self) -> None:
        self.computed: list[str] = []

    def run(self) -> dict[str, Any]:
        chosen = once("chosen", lambda: self.note("chosen", [3, 1, 2, 5, 4]))
        features = over_batches(
            "features",
            {"left": chosen, "right": chosen[::-1]},
            2,
            lambda d, batch, _: self.note(f"features {d}", np.array(batch) / 3),
        )
        found = {}
        with independent() as parts:
            for part in ("one", "two"):
                with parts.part(part):
                    found[part] = over(
                        "scores",
                        {str(i): i for i in range(5)},
                        lambda i, _: self.note("scores", features["left"][0] * i),
                        last=True,
                    )
        return found

    def note(self, what: str, value: Any) -> Any:
        self.computed.append(what)
        return value


def run(*folders: Path, **how: Any) -> tuple[dict[str, Any], Made]:
    made = Made()
    with working_by(Parts(folders, **how)):
        return made.run(), made


UNITS = 1 + 6 + 10


@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_number_of_parts_gives_what_one_process_gives(n: int, tmp_path: Path) -> None:
    whole = Made().run()
    computed = []
    for i in reversed(range(n)):
        made = Made()
        try:
            with working_by(Parts([tmp_path], share=Share(i, n))):
                made.run()
        except UnfinishedError as error:
            assert error.missing and i > 0
        computed += made.computed
    assert len(computed) == UNITS  # nothing twice, as one ran after the other
    merged, made = run(tmp_path, read_only=True)
    assert same(merged, whole) and not made.computed


def test_parts_at_the_same_time_need_nothing_of_each_other(tmp_path: Path) -> None:
    for i in range(3):
        with (
            working_by(Parts([tmp_path / str(i)], share=Share(i, 3))),
            pytest.raises(UnfinishedError, match=r"units of work missing: one/scores"),
        ):
            Made().run()
    merged, _ = run(*(tmp_path / str(i) for i in range(3)), read_only=True)
    assert same(merged, Made().run())


def test_an_interruption_costs_one_unit(tmp_path: Path) -> None:
    made, done = Made(), []
    for at in range(UNITS):
        again = Made()

        def stop(what: str, value: Any, again: Made = again) -> Any:
            if again.computed:
                raise KeyboardInterrupt
            again.computed.append(what)
            return value

        again.note = stop  # type: ignore[method-assign]
        try:
            with working_by(Parts([tmp_path])):
                again.run()
        except KeyboardInterrupt:
            pass
        done += again.computed
        assert len(done) == at + 1
    assert same(run(tmp_path)[0], made.run()) and done == made.computed


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda data: data[:-3], "cannot be used"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "differs from its checksum"),
        (lambda _: b"", "cannot be used"),
        (lambda _: packed(1, "features: left 0", "other items"), "on other items"),
    ],
    ids=["cut", "one bit", "empty", "of another choice of items"],
)
def test_a_damaged_unit_is_computed_again(harm: Any, said: str, tmp_path: Path) -> None:
    whole, _ = run(tmp_path)
    (path,) = tmp_path.glob("features-left-0-*")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.warns(HookedVLMWarning, match=said):
        again, made = run(tmp_path)
    assert same(again, whole) and made.computed == ["features left"]


def test_two_processes_may_write_one_folder_and_remove_it(tmp_path: Path) -> None:
    made, parts = Made(), Parts([tmp_path / "parts" / "one"])
    note = made.note

    def removed(what: str, value: Any) -> Any:  # as another process does that has finished
        parts.remove()
        return note(what, value)

    made.note = removed  # type: ignore[method-assign]
    with working_by(parts):
        found = made.run()
    assert same(found, Made().run())


def test_a_folder_that_vanishes_while_a_unit_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, tried = values.write_file, []

    def vanishing(path: Path, data: bytes) -> None:
        tried.append(path)
        if len(tried) < 3:
            raise FileNotFoundError
        usual(path, data)

    monkeypatch.setattr(values, "write_file", vanishing)
    values.write_value(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1" and len(tried) == 3


def test_two_loops_of_one_name_are_refused(tmp_path: Path) -> None:
    with working_by(Parts([tmp_path])), pytest.raises(DataError, match="have the name 'x'"):
        [once("x", lambda: 1) for _ in range(2)]


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "a/b", "0/0", "1/2/3", ""])
def test_shares_are_checked(text: str) -> None:
    with pytest.raises(DataError, match=r"expected I/N with I from 0 to N - 1"):
        Share.read(text)


def test_names_of_files_are_free_of_folders_and_differ() -> None:
    units: dict[str, Any] = dict.fromkeys(("c d", "c-d", "c/d"))
    loop = Loop(name="a/../b", units=units, score=lambda *_: None, steps=1, last=False)
    names = {file_of(loop, unit) for unit in units}
    assert len(names) == 3 and not any("/" in name or " " in name for name in names)


# --- E4 -------------------------------------------------------------------------------------

E4 = ("run", "strip-swap", "--model", "tiny-qwen2-vl", "--pairs", "2", "--batch-size", "2")


def started(out: Path, *words: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "hooked_vlm", *E4, "--out", str(out), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def files(out: Path) -> Sequence[bytes]:
    (folder,) = (out / "results").iterdir()
    return [(folder / name).read_bytes() for name in ("table.csv", "arrays.safetensors")]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_a_run_that_is_killed_again_and_again_gives_the_same_tables(tmp_path: Path) -> None:
    assert started(tmp_path / "whole").wait(300) == 0
    out = tmp_path / "killed"
    seen = -1
    for _ in range(20):
        process = started(out)
        while process.poll() is None:
            time.sleep(0.05)
            now = len(list(out.glob("parts/*/*.safetensors")))
            if now > max(seen, 0):
                seen = now
                process.send_signal(signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            break
    assert process.returncode == 0 and seen > 1
    assert files(out) == files(tmp_path / "whole")
    assert not (out / "parts").exists()


@pytest.mark.slow
def test_e2_in_processes_and_merged_has_the_bits_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooked_vlm.report.page.drawings", lambda _: [])  # slow, and tested there
    monkeypatch.setattr(
        HookedVLM, "from_pretrained", cache(HookedVLM.from_pretrained)
    )  # this process loads the model once
    config = Config(pairs=2, batch_size=4)
    job = Job("final-token", "tiny-qwen2-vl", tmp_path / "whole", config=config)
    job_runner.run(job)
    by_pool = replace(job, out=tmp_path / "pool")
    with engine_of("processes:1", tmp_path) as engine:
        job_runner.run(by_pool, executor=engine.executor)
    assert files(by_pool.out) == files(job.out)
    # In parts: one that is missing, parts of another job, and parts of another version.
    cut = replace(job, out=tmp_path / "parts")
    assert run_share(cut, SILENT, Share(0, 2)).missing
    with pytest.raises(DataError, match=r"unit of work missing .*: sweep: .* Run the other parts"):
        merge(cut.out, SILENT)
    with pytest.raises(DataError, match="has parts of another job"):
        run_share(replace(cut, config=Config(pairs=3)), SILENT, Share(1, 2))
    with pytest.raises(DataError, match="--fresh and --part were both given"):
        run_share(replace(cut, fresh=True), SILENT, Share(1, 2))
    # The other process names its device by itself, as two cards of one machine are named.
    assert not run_share(replace(cut, device="cpu"), SILENT, Share(1, 2)).missing
    (about,) = (cut.out / "parts").glob("*/about.json")
    changed = about.read_text().replace('"device": "cpu"', '"device": "cuda"')
    about.write_text(changed.replace('"torch": "', '"torch": "9'))
    with pytest.raises(DataError, match=r"were computed differently: torch 9.* --allow-mixed"):
        merge(cut.out, SILENT)
    about.write_text(changed.replace('"pairs": 2', '"pairs": 9'))
    with pytest.raises(DataError, match=r"are of other data, options or weights .* pairs 9 and 2"):
        merge(cut.out, SILENT)
    about.write_text(changed.replace('"torch": "', '"torch": "9'))
    record = merge(cut.out, SILENT, allow_mixed=True).provenance
    assert "device cuda and cpu" in record.elsewhere["final-token on squares"]
    assert record.seconds["final-token on squares"] > record.wall_seconds  # the parts' with it
    assert files(cut.out) == files(job.out)


def test_a_worker_with_another_version_refuses() -> None:
    config = Config(pairs=2)
    task = Task(
        model="tiny-qwen2-vl",
        dtype="auto",
        device="cpu",
        experiment="strip-swap",
        config=config,
        depends_on={"source": "another"},
        folder=Path("nowhere"),
    )
    failed = workers.compute(task).failed
    assert failed is not None and failed.unit == "" and failed.kind == "DataError"
    assert failed.said.startswith(f"it refuses the task, for it has format {FORMAT} and None")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("threads", "expected one of 'processes'"),
        ("processes:0", "expected a number from 1"),
        ("slurm:x", "expected NAME=VALUE|needs the package submitit"),
        ("slurm:jobs=0", "expected a number from 1 for jobs|needs the package submitit"),
        ("dask://127.0.0.1:1", "no Dask scheduler at|needs the package distributed"),
    ],
)
def test_executors_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(HookedVLMError, match=said), engine_of(text, tmp_path):
        pass


def test_a_number_of_tasks_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tasks=0 was given; expected a whole number from 1"):
        job_runner.run(Job("final-token", "tiny-qwen2-vl", tmp_path), tasks=0)


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = r"--executor ray needs the package ray.*pip install 'hooked-vlm\[ray\]'"
    with pytest.raises(MissingExtraError, match=said), engine_of("ray://", tmp_path):
        pass


def test_dask_gives_the_same(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    job = Job("final-token", "tiny-qwen2-vl", tmp_path / "whole", config=Config(pairs=2))
    job_runner.run(job)
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None)
    with cluster, engine_of(f"dask:{cluster.scheduler_address[4:]}", tmp_path) as engine:
        by_dask = replace(job, out=tmp_path / "dask")
        job_runner.run(by_dask, executor=engine.executor)
    assert files(by_dask.out) == files(job.out)

"""Command lines with one bad value each, run in the process; no shipped model is loaded."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hooked_vlm import cli, zoo
from hooked_vlm.model import vlm
from hooked_vlm.report import job, viewing


MOST = 400
"""Characters of a message."""

NAME = st.text("xyz_-.", min_size=1, max_size=6).map(lambda text: f"q{text}")
NUMBER = st.sampled_from(["", "x", "-1", "1.5", "nan", "1e3", "0x10", "9" * 30, "none", "1 2"])
LIMIT = st.sampled_from(["", "x", "0", "1", "-3", "1.5"])
CONFIG = st.sampled_from(["", " ", "nowhere.json", "file.txt", "empty"])
JOBS = st.sampled_from(["", "x", "-1", "1.5", "nan"])
PART = st.sampled_from(["", "1", "1/1", "-1/2", "a/b", "0/0", "0.5/2"])
EXECUTOR = st.sampled_from(["", "dask", "processes:0", "processes:x", "slurm:x", "threads"]) | NAME
DEVICE = st.sampled_from(["", "gpu", "meta", "cpu:x", "cuda:99", "CPU ", "0"]) | NAME
DTYPE = st.sampled_from(["", "f32", "int8", "auto,", "Float32"]) | NAME
SETTING = st.sampled_from(["", "shaps", "squares-", "whatsup-chair", "SQUARES"]) | NAME
FOLDER = st.sampled_from(["", " ", "nowhere", "file.txt", "empty"])
MODEL = st.sampled_from(["", " ", "tiny-gemma", "nowhere/x", "/nowhere", "empty", "a b"]) | NAME
EXPERIMENT = st.sampled_from(["", "behavior", "all", "-x", "run"]) | NAME
OPTION = st.sampled_from(["", "=", "alphas", "=3", "alphas=x", "pairs=3", "seed=x"]) | NAME
NUMBERS = st.sampled_from(["", "x", "-1", "1.5", ",", "0;1"])
PANELS = st.sampled_from(["", "lense", "lens;patches"]) | NAME
FILE = st.sampled_from(["", " ", "file.txt", "file.txt/x"])

_COMMON = {"--pairs": NUMBER, "--seed": NUMBER, "--batch-size": NUMBER, "--device": DEVICE}
_FOLDERS = {"--cutouts": FOLDER, "--backgrounds": FOLDER, "--data": FOLDER}
LINES: dict[str, dict[str, st.SearchStrategy[str]]] = {
    "run {EXPERIMENT} --model tiny-gemma-3 --out out": {
        **_COMMON,
        "--limit": LIMIT,
        "--config": CONFIG,
        **_FOLDERS,
        "EXPERIMENT": EXPERIMENT,
        "--model": MODEL,
        "--setting": SETTING,
        "--part": PART,
        "--executor": EXECUTOR,
        "--set": OPTION,
        "--dtype": DTYPE,
        "--out": FILE,
    },
    "demo --out out": {**_COMMON, "--jobs": JOBS, "--out": FILE},
    "reproduce --out out": {
        **_COMMON,
        **_FOLDERS,
        "--jobs": JOBS,
        "--part": PART,
        "--executor": EXECUTOR,
        "--model": MODEL,
        "--dtype": DTYPE,
        "--set": OPTION,
        "--out": FILE,
    },
    "sites {MODEL}": {"MODEL": MODEL},
    "check {MODEL}": {"MODEL": MODEL, "--device": DEVICE, "--dtype": DTYPE},
    "view {MODEL} --out v.html": {
        "MODEL": MODEL,
        "--device": DEVICE,
        "--dtype": DTYPE,
        "--panels": PANELS,
        "--layers": NUMBERS,
        "--slots": NUMBERS,
        "--answers": st.sampled_from(["", " ", ",", " , "]),
        "--limit-mb": st.sampled_from(["", "x", "-1", "nan"]),
        "--image": FILE,
        "--source": FILE,
        "--out": st.sampled_from(["", " ", "file.txt/x", "empty"]),
    },
    "merge {PARTS}": {"PARTS": FOLDER, "--device": DEVICE},
    "report {PARTS}": {"PARTS": FOLDER},
    "compare {PARTS} empty": {"PARTS": FOLDER, "--out": FILE},
    "options {EXPERIMENT}": {"EXPERIMENT": EXPERIMENT},
    "list": {},
}
"""Commands, and their options with bad values; words in braces are arguments without a name."""
GOOD = {"PARTS": "empty", "EXPERIMENT": "behaviour", "MODEL": "tiny-gemma-3"}


def lines() -> st.SearchStrategy[tuple[str, str, list[str]]]:
    """Returns a strategy of (command, option, words): a bad value, or an unknown option."""
    places = [(line, option) for line, options in LINES.items() for option in [*options, "?"]]

    def worded(place: tuple[str, str]) -> st.SearchStrategy[tuple[str, str, list[str]]]:
        line, option = place
        strange = st.sampled_from([["--pair", "3"], ["--sede=1"], ["extra"], ["-z"]])
        words = strange if option == "?" else LINES[line][option].map(lambda value: [value])
        return words.map(lambda bad: (line.split()[0], option, _words(line, option, bad)))

    return st.sampled_from(places).flatmap(worded)


def _words(line: str, option: str, bad: list[str]) -> list[str]:
    filled = {**GOOD, **({option: bad[0]} if option in GOOD else {})}
    words = [filled[word[1:-1]] if word.startswith("{") else word for word in line.split()]
    if option == "?":
        return [*words, *bad]
    return words if option in GOOD else [*words, f"{option}={bad[0]}"]


class _LoadedError(Exception):
    """A shipped model would have been loaded: the bad value was not noticed before."""


@contextmanager
def without_models() -> Iterator[None]:
    """Lets the loading of a shipped model raise `_LoadedError`, within a `with` block."""
    real = vlm.HookedVLM

    class Loader:
        @staticmethod
        def from_pretrained(name: Any, **options: Any) -> Any:
            if name in zoo.available():
                raise _LoadedError
            return real.from_pretrained(name, **options)

    def apart(*_: Any) -> None:
        raise _LoadedError

    run_apart = cli.running._run_apart
    cli.running._run_apart = apart  # else other processes would load it
    vlm.HookedVLM = job.HookedVLM = viewing.HookedVLM = Loader  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        vlm.HookedVLM = job.HookedVLM = viewing.HookedVLM = real
        cli.running._run_apart = run_apart


def make_files(folder: Path) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "file.txt").write_text("no picture")


def outcome(words: list[str]) -> str:
    """Returns `"ours"`, or what came in place of one line and exit status 2."""
    kept, sys.argv = sys.argv, ["hooked-vlm", *words]
    said, out = io.StringIO(), io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(out):
            cli.main()
    except SystemExit as end:
        text = said.getvalue()
        _, _, after = text.rpartition("--help")  # typer's own, after the usage
        after = after.removeprefix("hooked-vlm: ").strip()
        if end.code != 2:
            return f"exit status {end.code}: {text[:150]}"
        if "Traceback" in text or not text.strip():
            return f"said {text[:150]!r}"
        return "ours" if len(after) <= MOST + 200 * ("│" in text) else f"{len(after)} characters"
    except Exception as error:  # noqa: BLE001 - whatever it is, the user sees its traceback
        return f"raw {type(error).__name__}: {str(error)[:150]}"
    finally:
        sys.argv = kept
    return f"exit status 0: {out.getvalue()[:100]}"

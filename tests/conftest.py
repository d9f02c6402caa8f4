"""What every test runs under: `OMP_NUM_THREADS` threads (1 unless set), fixed seeds, no network."""

import os


# Before torch and huggingface_hub are imported, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import random

import numpy as np
import pytest
import torch
from older_transformers import skip_what_cannot_be_built

from helpers.shape_checks import ShapeChecks


# One thread is the fastest for tiny models.  With more, the order of sums differs; tests pass then
# too, so that a test that asserts equal bits asserts them of the same sums.
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Kernels are interpreted or compiled once and for all when they are imported.
collect_ignore = (
    [] if os.environ.get("TRITON_INTERPRET") == "1" else ["helpers/interpreted_kernels.py"]
)


_SHAPES = pytest.StashKey[ShapeChecks]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--check-shapes",
        choices=("first", "all"),
        default="first",
        help="compare annotated shapes in the first case of each test (default) or in every call",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--check-shapes") == "first":
        config.stash[_SHAPES] = ShapeChecks()
    # Not in pyproject.toml: there it would import the package before its shapes can be checked.
    config.addinivalue_line("filterwarnings", "error::hooked_vlm.errors.HookedVLMWarning")


@pytest.hookimpl(tryfirst=True)  # before anything of a test is set up
def pytest_runtest_setup(item: pytest.Item) -> None:
    if (shapes := item.config.stash.get(_SHAPES, None)) is not None:
        shapes.begin(item)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_what_cannot_be_built(items)
    if (shapes := config.stash.get(_SHAPES, None)) is not None:
        shapes.mark_first_cases(items)
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs CUDA, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


def pytest_collection_finish() -> None:
    # What was imported stays: with it left out, a collection takes a tenth of the time, and
    # statsmodels asks for one in each correction of p-values.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for each test, whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that still draw from the global state
    torch.manual_seed(0)

"""Features of a data set, written to disk batch by batch, or summed without being kept."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import Count, File
from hooked_vlm.errors import DataError, HookedVLMError, counted
from hooked_vlm.features.batches import (
    Task,
    features_of,
    require_pool,
    require_task,
    sites_of,
)
from hooked_vlm.features.described import described
from hooked_vlm.features.identity import model_digest, processor_digest
from hooked_vlm.features.items import (
    Columns,
    Item,
    length_of,
    raw_items,
    read_item,
    text_and_label,
    told,
)
from hooked_vlm.features.shards import (
    FORMAT,
    Shard,
    finish,
    open_folder,
    read_header,
    reopen,
    shard_path,
    write_shard,
)
from hooked_vlm.features.stored import Features
from hooked_vlm.features.sums import Sums
from hooked_vlm.model.vlm import HookedVLM


@checked(DataError, but=("dataset", "sites", "at"))
def extract(
    model: HookedVLM,
    dataset: Any,
    sites: Any,
    *,
    at: Any = None,
    out: File,
    batch: Count = 8,
    pool: str = "none",
    dtype: torch.dtype | None = None,
    text: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    on_error: str = "raise",
    progress: bool | Callable[[int, int | None], None] = True,
    **prepare: Any,
) -> Features:
    """Computes activations of a data set, writes them to the folder `out`, and returns them.

    `dataset` is a sequence or an iterable of `(image, text)`, `(image, text, label)` or mappings
    (a Hugging Face data set), whose columns are found by their usual names; `text` is a prompt for
    all items.  Images are what `prepare` takes, or paths.  `sites` are names, patterns or slots,
    and `at` a place, as interventions take it, or a function `(item, grids) -> place` of the item
    as it was given and the grids of its images.  `pool="mean"` averages the place's positions.
    Other keywords go to `prepare`.

    Every batch is one safetensors file, written under a temporary name first.  The same call on
    the same folder resumes an interrupted one, at the cost of one batch.  `progress` prints a
    line with the time left every ten seconds, or calls `progress(done, total)`.

    Raises `DataError` for an empty data set, under open `model.hooks(…)`, and for an item that
    cannot be read, prepared, or is not finite: the message has its number.  With `on_error="skip"`,
    such items are left out and listed in `Features.problems`.  Raises it for a folder of another
    model, processor, sites, place, options or items (of a batch, the first picture is compared, and
    texts and labels of all items of a list), and where a function for the place reads values that
    cannot be compared.

    >>> import tempfile
    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM, LastToken, extract
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> items = [
    ...     (Image.new("RGB", (32, 32), color), "What is it?", color) for color in ("red", "blue")
    ... ]
    >>> folder = tempfile.mkdtemp() + "/features"
    >>> features = extract(
    ...     model,
    ...     items,
    ...     ["blocks.2.hook_resid_post"],
    ...     at=LastToken(),
    ...     out=folder,
    ...     pool="mean",
    ...     progress=False,
    ... )
    >>> features["blocks.2.hook_resid_post"].shape, features.labels
    (torch.Size([2, 128]), ['red', 'blue'])
    """
    _require_choices(on_error)
    require_pool(pool)
    total = length_of(dataset)
    task = Task(model, sites_of(model, sites), at, pool, dtype, prepare)
    require_task(task)
    columns = Columns(image_column, text_column, label_column)
    # 1. The folder: a new one, or one of the same task.
    folder = Path(out)
    open_folder(folder, _manifest(task, folder, batch, text, columns, total))
    reopen(folder)
    done = {k: header for k in _numbers(folder) if (header := read_header(shard_path(folder, k)))}
    # 2. Batches that are not there, and a comparison of those that are.
    wanted = _Wanted(folder, batch, done)
    shown_progress = _Progress(progress, total, sum(map(_n_items, done.values())))
    new = wanted.new(raw_items(dataset, wanted), columns, text)
    for part in _batched(new, batch):
        write_shard(folder, part[0][0] // batch, _computed(task, part, columns, text, on_error))
        shown_progress.add(len(part))
    wanted.require_all_seen()
    finish(folder)
    return Features(folder)


class _Wanted:
    """Which items of a data set are read: those of batches not there, and some to compare."""

    def __init__(self, folder: Path, batch: int, done: Mapping[int, dict[str, Any]]) -> None:
        self._folder, self._batch, self._done = folder, batch, done
        self._n_seen = 0

    def __call__(self, index: int) -> bool:
        header = self._done.get(index // self._batch)
        return header is None or index % self._batch in (0, header["n_items"])

    def new(
        self, items: Iterator[tuple[int, Any]], columns: Columns, text: str | None
    ) -> Iterator[tuple[int, Any]]:
        """Yields the items of batches that are not there, comparing the first of the others."""
        for index, given in items:
            self._n_seen = index + 1
            header = self._done.get(index // self._batch)
            if header is None:
                yield index, given
            else:
                self._require_same(header, index, given, columns, text)

    def _require_same(
        self, header: dict[str, Any], index: int, given: Any, columns: Columns, text: str | None
    ) -> None:
        """Raises `DataError` where an item of a finished batch is another than before.

        The first one is compared with its pictures, others that are at hand by text and label.
        """
        if index % self._batch == header["n_items"]:
            raise DataError(
                f"'{self._folder}' holds features of {counted(index, 'item')}, and this data set "
                "has more. Give the same data set, or another folder."
            )
        before = header["first"]
        try:
            if index % self._batch == 0:
                found = read_item(index, given, columns, text).digest()
            elif index in header["indices"]:
                kept = header["indices"].index(index)
                before = told(header["texts"][kept], header["labels"][kept])
                found = told(*text_and_label(given, columns, text))
            else:  # it was left out
                return
        except DataError:
            found = ""
        if found != before:
            raise DataError(
                f"'{self._folder}' holds features of another data set: its item {index} has "
                "another picture, text or label. Give the same data set in the same order, or "
                "another folder."
            )

    def require_all_seen(self) -> None:
        """Raises `DataError` for a data set that is empty, or shorter than what is stored."""
        if not self._n_seen:
            raise DataError("The data set is empty: it gave no item. Give at least one.")
        if any(number * self._batch >= self._n_seen for number in self._done):
            raise DataError(
                f"'{self._folder}' holds features of more items than this data set has. Give the "
                "same data set, or another folder."
            )


@checked(DataError, but=("dataset", "sites", "at"))
def dataset_means(
    model: HookedVLM,
    dataset: Any,
    sites: Any,
    *,
    at: Any = None,
    batch: Count = 8,
    text: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    on_error: str = "raise",
    progress: bool | Callable[[int, int | None], None] = True,
    **prepare: Any,
) -> dict[str, Tensor]:
    """Returns the mean activation of each site over all positions of a place in a data set.

    Nothing is kept: sums are in float64.  Arguments are those of `extract`.  A mean is what
    `Ablate(site, at=…, to=means[site])` writes.  Raises `DataError` as `extract` does.

    >>> from PIL import Image
    >>> from hooked_vlm import Ablate, HookedVLM, LastToken, dataset_means
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> items = [(Image.new("RGB", (32, 32), color), "What is it?") for color in ("red", "blue")]
    >>> means = dataset_means(model, items, [1], at=LastToken(), progress=False)
    >>> means["blocks.0.hook_resid_post"].shape
    torch.Size([128])
    """
    _require_choices(on_error)
    total = length_of(dataset)
    task = Task(model, sites_of(model, sites), at, "none", None, prepare)
    require_task(task)
    sums = {site.name: Sums() for site in task.sites}
    columns, shown_progress = Columns(image_column, text_column, None), _Progress(progress, total)
    for batch_of in _batched(raw_items(dataset, lambda _: True), batch):
        shard = _computed(task, batch_of, columns, text, on_error)
        for features in shard.features:
            for name, value in features.items():
                sums[name].add(value)
        shown_progress.add(len(batch_of))
    if not any(total.n for total in sums.values()):
        raise DataError("The data set gave no item with features. Give at least one.")
    return {name: total.mean().float() for name, total in sums.items()}


def _require_choices(on_error: str) -> None:
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error={shown(on_error)} was given; expected 'raise' or 'skip'.")


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _computed(
    task: Task,
    batch: Sequence[tuple[int, Any]],
    columns: Columns,
    text: str | None,
    on_error: str,
) -> Shard:
    """Returns the features of a batch; raises, or lists, what has none."""
    problems: dict[int, str] = {}
    items: list[Item] = []
    for index, given in batch:
        try:
            items.append(read_item(index, given, columns, text))
        except DataError as error:
            _note(problems, index, error, on_error)
    found = features_of(task, items) if items else []
    kept, features = [], []
    for item, made in zip(items, found, strict=True):
        if isinstance(made, HookedVLMError):
            _note(problems, item.index, made, on_error)
            continue
        kept.append(item)
        features.append(made)
    first = next((item for item in items if item.index == batch[0][0]), None)
    return Shard(
        indices=[item.index for item in kept],
        labels=[item.label for item in kept],
        texts=[item.text for item in kept],
        features=features,
        problems=problems,
        first="" if first is None else first.digest(),
        n_items=len(batch),
    )


def _note(problems: dict[int, str], index: int, error: Exception, on_error: str) -> None:
    said = str(error) if str(error).startswith("Item ") else f"Item {index}: {error}"
    if on_error == "raise":
        raise DataError(f"{said} Use on_error='skip' to leave such items out.") from None
    problems[index] = said


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("shard-*.safetensors"))


def _n_items(header: dict[str, Any]) -> int:
    return header["n_items"]


def _manifest(
    task: Task, folder: Path, batch: int, text: str | None, columns: Columns, total: int | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "hooked_vlm": version("hooked-vlm"),
        "model": task.model.cfg.model_name,
        "weights": model_digest(task.model.hf_model),
        "training": task.model.hf_model.training,
        "processor": processor_digest(task.model.processor),
        "sites": [site.name for site in task.sites],
        "n_layers": task.model.cfg.n_layers,
        "at": _about(task, folder),
        "pool": task.pool,
        "dtype": str(task.dtype),
        "batch": batch,
        "text": text,
        "columns": vars(columns),
        "prepare": json.loads(json.dumps(dict(task.prepare), default=repr)),
        "n_items": total,
    }


def _about(task: Task, folder: Path) -> str:
    """Returns what a place is, as no other place is.

    Raises `DataError` where that cannot be said, and the folder has features already.
    """
    model = task.model
    known = {"model": model, "hf_model": model.hf_model, "processor": model.processor}
    known["tokenizer"] = model.tokenizer
    try:
        return described(task.at, {id(value): name for name, value in known.items()})
    except DataError as error:
        if any(folder.glob("shard-*.safetensors")):
            raise DataError(
                f"'{folder}' holds features, perhaps of another place: {error}. Give another "
                "folder, or a function that reads only numbers, texts, tensors and places. "
                "Features(folder) reads what is there."
            ) from None
        return f"not comparable: {error}"


class _Progress:
    """Prints how far a data set is, with the time left, or calls a function of the user's."""

    def __init__(self, how: Any, total: int | None, done: int = 0) -> None:
        self._how, self._total, self._done, self._before = how, total, done, done
        self._start = self._said = time.monotonic()

    def add(self, n: int) -> None:
        self._done += n
        if callable(self._how):
            self._how(self._done, self._total)
        elif self._how and time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            sys.stderr.write(f"{self._line()}\n")
            sys.stderr.flush()

    def _line(self) -> str:
        spent, new = time.monotonic() - self._start, self._done - self._before
        if self._total is None:
            return f"features: {counted(self._done, 'item')} after {spent:.0f} s"
        left = spent / max(new, 1) * (self._total - self._done)
        return f"features: {self._done} of {self._total} items, {left:.0f} s left"

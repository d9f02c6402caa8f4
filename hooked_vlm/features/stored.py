"""Features read back from disk by site, and what is fitted to them: means, axes, probes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vlm.analysis.directions import Direction
from hooked_vlm.analysis.probes import Examples, LinearProbe, held_out_accuracy, split_by_image
from hooked_vlm.analysis.statistics import Interval
from hooked_vlm.arguments.checked import checked, shown
from hooked_vlm.arguments.kinds import Count, File, Seed, Share
from hooked_vlm.errors import DataError, counted
from hooked_vlm.features.shards import (
    read_header,
    read_manifest,
    read_site,
    require_complete,
)
from hooked_vlm.features.sums import Sums
from hooked_vlm.hooks.names import resolve_name, slot_name


@dataclass(frozen=True, eq=False)
class Components:
    """The principal axes of features."""

    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "component d"]
    """Unit vectors, of falling variance; the largest entry of each is positive."""
    variance: Float[Tensor, " component"]
    share: Float[Tensor, " component"]
    """The variance along each axis as a share of the whole."""

    def project(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row component"]:
        """Returns the coordinates of rows along the axes, about the mean."""
        return (rows.double() - self.mean.double()) @ self.axes.double().T


@dataclass(frozen=True, eq=False)
class Probed:
    """A probe that was fitted to a part of the items, and its accuracy on the others."""

    probe: Any
    accuracy: Interval
    """The mean over held-out items of the share of correct rows."""
    classes: tuple[Any, ...]
    """The label of each class of the probe."""
    held_out: Int[np.ndarray, " item"]
    """The rows of `Features` that the probe was not fitted to."""


class Features(Mapping[str, Any]):
    """The features that `extract` wrote to a folder, read by site when they are asked for.

    `features["blocks.2.hook_resid_post"]` is `[item, d]` where positions were pooled and
    `[item, n, d]` where they were not, or a list by item where items have different numbers.
    `labels`, `texts` and `indices` (numbers in the data set) are in the same order.
    """

    @checked(DataError)
    def __init__(self, folder: File, partial: bool = False) -> None:
        """Opens a folder; with `partial`, also one whose extraction was interrupted.

        Raises `DataError` for a folder that `extract` did not write, or that is damaged.
        """
        self.folder = Path(folder)
        self.about = read_manifest(self.folder)
        """What the features are of: model, sites, place, options."""
        if partial:
            self._paths = sorted(self.folder.glob("shard-*.safetensors"))
        else:
            self._paths = require_complete(self.folder)
        headers = []
        for path in self._paths:
            header = read_header(path)
            if header is None:
                raise DataError(
                    f"'{path}' is damaged. Run extract again with the same arguments: it makes "
                    "damaged batches again."
                )
            headers.append(header)
        self._held = [bool(header["indices"]) for header in headers]
        self.indices: list[int] = [i for header in headers for i in header["indices"]]
        self.labels: list[Any] = [label for header in headers for label in header["labels"]]
        self.texts: list[str] = [text for header in headers for text in header["texts"]]
        self.problems: dict[int, str] = {
            int(i): said for header in headers for i, said in header["problems"].items()
        }
        """What was wrong with the items that were left out, by their number in the data set."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites."""
        return tuple(self.about["sites"])

    @property
    def n_items(self) -> int:
        """Number of items with features."""
        return len(self.indices)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        left_out = f", {len(self.problems)} left out" if self.problems else ""
        return (
            f"Features({counted(self.n_items, 'item')}{left_out}, "
            f"{counted(len(self.sites), 'site')}, {self.about['model']!r}, '{self.folder}')"
        )

    def __getitem__(self, site: str | int) -> Any:
        """Returns a site's features of all items; raises `UnknownHookError` for another site."""
        parts = [value for _, value in self._parts(site)]
        if not parts:
            raise DataError(f"'{self.folder}' holds no item with features.")
        whole = all(isinstance(part, Tensor) for part in parts)
        if whole and len({part.shape[1:] for part in parts}) == 1:
            return torch.cat(parts)
        return [item for part in parts for item in part]

    def batches(self, site: str | int) -> Iterator[Tensor]:
        """Yields a site's features as rows `[row, …]`, one file at a time: more than memory holds.

        A row is an item, or a position of one where positions were not pooled.
        """
        for _, value in self._parts(site):
            if self.about["pool"] == "mean":
                yield value
            else:
                yield value.flatten(0, 1) if isinstance(value, Tensor) else torch.cat(value)

    def mean(self, site: str | int) -> Tensor:
        """Returns the mean row of a site, `[d]` (or `[head, d_head]`): a reference to ablate to.

        `Ablate(site, at=…, to=features.mean(site))` writes it.  Sums are in float64.
        """
        return self._sums(site, second=False).mean().float()

    @checked(DataError)
    def pca(self, site: str | int, n_components: Count) -> Components:
        """Returns the principal axes of a site's rows, from their covariance in float64.

        Raises `DataError` for more components than rows or features allow.
        """
        sums = self._sums(site, second=True)
        mean, covariance = sums.mean().flatten(), sums.covariance()
        most = min(sums.n - 1, len(mean))
        if n_components > most:
            raise DataError(
                f"n_components={n_components} was given; {counted(sums.n, 'row')} of "
                f"{counted(len(mean), 'feature')} have at most {most}."
            )
        variance, axes = torch.linalg.eigh(covariance)
        axes, variance = axes.T.flip(0), variance.flip(0).clamp(min=0)
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        axes = axes * largest.sign()
        share = variance / variance.sum().clamp(min=torch.finfo(torch.float64).tiny)
        k = n_components
        return Components(mean.float(), axes[:k].float(), variance[:k].float(), share[:k].float())

    @checked(DataError, but=("label", "other"))
    def difference_of_means(self, site: str | int, label: Any, other: Any = None) -> Direction:
        """Returns the mean row of items with a label minus that of `other` (None: all others).

        Raises `DataError` for a label that no item has.
        """
        chosen = self._with_label(label)
        rest = self._with_label(other) if other is not None else [not c for c in chosen]
        means = [self._sums(site, second=False, items=np.array(part)) for part in (chosen, rest)]
        if not means[1].n:
            raise DataError(f"All items have the label {label!r}, so there is no difference.")
        vector = (means[0].mean() - means[1].mean()).flatten().float()
        against = f" minus {other!r}" if other is not None else " minus the others"
        return Direction(vector, f"{label!r}{against}", f"{site} of {self.folder}")

    @checked(DataError, but=("probe",))
    def probe(
        self, site: str | int, probe: Any = None, *, test_size: Share = 0.25, seed: Seed = 0
    ) -> Probed:
        """Fits a probe of the labels to a part of the items, and scores it on the others.

        `probe` is a scikit-learn classifier (default: `LinearProbe()`).  Without pooling, each
        position is an example with its item's label; the split is by item.

        Raises `DataError` for items without a label, or with one label only.
        """
        if probe is not None and not (hasattr(probe, "fit") and hasattr(probe, "predict")):
            raise DataError(
                f"probe={shown(probe)} was given; expected a classifier of scikit-learn, or None "
                "for LinearProbe()."
            )
        if any(label is None for label in self.labels):
            raise DataError(
                "Some items have no label. Give items (image, text, label), or label_column='…'."
            )
        names = [label if isinstance(label, str | int) else str(label) for label in self.labels]
        classes = sorted(set(names), key=str)
        codes = np.array([classes.index(name) for name in names])
        value = self[site]
        items = value if isinstance(value, list) or self.about["pool"] == "none" else value[:, None]
        lengths = [len(item) for item in items]
        rows = torch.cat(list(items)).flatten(1).float()
        item_of = np.repeat(np.arange(len(lengths)), lengths)
        examples = Examples(rows, codes[item_of], item_of, item_of)
        train, test = split_by_image(len(lengths), test_size=test_size, seed=seed)
        fitted = (LinearProbe() if probe is None else probe).fit(
            examples.of_images(train).X, examples.of_images(train).y
        )
        accuracy = held_out_accuracy(fitted, examples.of_images(test), seed=seed)
        return Probed(fitted, accuracy, tuple(classes), np.sort(test))

    def _parts(self, site: str | int) -> Iterator[tuple[slice, Any]]:
        """Yields the items of each file, as a slice of all, and their features."""
        name = self._name(site)
        start = 0
        for path, held in zip(self._paths, self._held, strict=True):
            if held:
                value = read_site(path, name)
                yield slice(start, start + len(value)), value
                start += len(value)

    def _name(self, site: str | int) -> str:
        if isinstance(site, int):
            blocks = int(self.about["n_layers"])
            site = slot_name(site, blocks)
        return resolve_name(str(site), self.sites)

    def _with_label(self, label: Any) -> list[bool]:
        is_label = isinstance(label, str | int | float | bool | list)
        chosen = [is_label and own == label for own in self.labels]
        if not any(chosen):
            known = sorted({str(own) for own in self.labels})
            raise DataError(
                f"No item has the label {shown(label)}; there are {', '.join(known)[:150]}."
            )
        return chosen

    def _sums(self, site: str | int, second: bool, items: Any = None) -> Sums:
        sums = Sums(second)
        for part, value in self._parts(site):
            kept: Sequence[Tensor] | Tensor = value
            if items is not None:
                here = np.flatnonzero(items[part])
                if not len(here):
                    continue
                kept = value[here] if isinstance(value, Tensor) else [value[i] for i in here]
            if self.about["pool"] != "mean":
                kept = kept.flatten(0, 1) if isinstance(kept, Tensor) else torch.cat(list(kept))
            assert isinstance(kept, Tensor)
            sums.add(kept)
        return sums

"""Reads the order of objects from visual tokens: the probes of E3 and their controls.

A linear probe is fitted to object tokens, with the object's place as its label, on three quarters
of the pictures, and applied to every token of the others.  Its controls are fitted to labels
shuffled within pictures; `converged` is a logistic regression on the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression

from hooked_vlm.analysis.probes import (
    Examples,
    LinearProbe,
    held_out_shares,
    mean_of_shares,
    object_examples,
    shuffled_labels,
    split_by_image,
)
from hooked_vlm.analysis.statistics import bootstrap
from hooked_vlm.experiments.batches import left_out, none_left
from hooked_vlm.experiments.tables import interval_rows
from hooked_vlm.regions.region import Region
from hooked_vlm.stimuli.geometry import Layout


PROBES = ("paper", "converged")
"""The paper's recipe (200 small steps), and a logistic regression fitted to convergence."""
RIGID = 1e-4
"""The standard deviation, as a part of the largest, below which a feature has no weight."""
UNREAD = -1
"""The place of tokens in pictures whose tokens are not numbers."""
Shuffle = Callable[..., Examples]
"""`shuffle(examples, seed=…)` returns the examples with other labels."""
SHOWN = 3
"""Number of held-out pictures whose single maps are kept."""


def read_order(
    geometry: Layout,
    axis: str,
    features: torch.Tensor,
    seed: int,
    n_seeds: int = 1,
    n_shuffles: int = 1,
) -> dict[str, Any]:
    """Fits the paper's probe and its controls to features `[image, token, d]` of one axis.

    Returns table `rows`, `maps` `[test image, class, row, col]`, each test image's background
    `shares`, which images are `test`, the `fitted` probes, and a sentence on pictures that are
    left out because their tokens are not numbers.
    """
    shown = [(0, 1, 2)] * len(features)
    fitted, rows, shares = _fit_and_read(geometry, axis, features, shown, seed, n_seeds, n_shuffles)
    n, test = geometry.shape[0], fitted.test
    wrong = int((~whole_pictures(features)).sum())
    grids = features[torch.as_tensor(test)].unflatten(1, (n, n))
    maps = fitted.probes[0].probability_map(grids).permute(0, 3, 1, 2).numpy()
    return {
        "rows": rows,
        "maps": maps,
        "shares": shares,
        "test": test,
        "shown": range(min(SHOWN, len(test))),
        "fitted": fitted,
        "grids": grids,
        "left_out": left_out(wrong, "picture", axis, "tokens"),
    }


def whole_pictures(features: Float[torch.Tensor, "image ..."]) -> Bool[np.ndarray, " image"]:
    """Returns which pictures' tokens are all numbers."""
    return features.isfinite().flatten(1).all(1).cpu().numpy()


def probe_regions(geometry: Layout, axis: str) -> list[Region]:
    """Returns the cells of each place's object that probes are fitted to."""
    # What'sUp's boxes for probes are not those for swaps (protocol 2.7).
    region = getattr(geometry, "probe_region", geometry.object_region)
    return [region(axis, place) for place in range(3)]


def read_some(
    geometry: Layout,
    axis: str,
    features: torch.Tensor,
    shown: Sequence[Sequence[int]],
    seed: int,
) -> list[dict]:
    """Returns the table rows of `read_order` for pictures in which only some places are filled."""
    return _fit_and_read(geometry, axis, features, shown, seed)[1]


@dataclass(frozen=True)
class Fitted:
    """Probes of one axis or label, and their controls."""

    probes: list[LinearProbe]
    """From different initialisations."""
    controls: list[LinearProbe]
    """Fitted to labels shuffled within images."""
    test: np.ndarray
    """The held-out images."""
    accuracies: Float[np.ndarray, "probe image"]
    """The share of each held-out image's object tokens that each probe gets right."""
    converged: LogisticRegression
    """A logistic regression on the same examples."""
    converged_accuracies: Float[np.ndarray, "1 image"]

    def read_by(self, probe: str) -> tuple[list[Any], Float[np.ndarray, "probe image"]]:
        """Returns the `"paper"`'s probes or the `"converged"` one, and their accuracies."""
        if probe == "converged":
            return [self.converged], self.converged_accuracies
        return list(self.probes), self.accuracies


def _fit_and_read(
    geometry: Layout,
    axis: str,
    features: torch.Tensor,
    shown: Sequence[Sequence[int]],
    seed: int,
    n_seeds: int = 1,
    n_shuffles: int = 1,
) -> tuple[Fitted, list[dict], np.ndarray]:
    """Returns the probes, table rows, and the background shares of the held-out images."""
    examples = object_examples(features, probe_regions(geometry, axis))
    examples = examples.of_images(np.flatnonzero(whole_pictures(features)))
    filled = np.array([y in shown[i] for y, i in zip(examples.y, examples.images, strict=True)])
    if not filled.all():
        rows_ = torch.from_numpy(filled).to(examples.X.device)
        examples = Examples(
            examples.X[rows_], examples.y[filled], examples.images[filled], examples.objects[filled]
        )
    fitted, rows = fit_with_controls(examples, len(features), seed, n_seeds, n_shuffles)
    n = geometry.shape[0]
    grids = features[torch.as_tensor(fitted.test)].unflatten(1, (n, n))
    strip, background = strips(geometry, axis)
    shares = {}
    for quantity, probes in (
        ("background", fitted.probes),
        ("background, shuffled", fitted.controls),
    ):
        maps = (probe.probability_map(grids) for probe in probes)
        shares[quantity] = np.mean([background_shares(m, strip, background) for m in maps], axis=0)
        rows += interval_rows(bootstrap(shares[quantity], seed=seed), {}, quantity=quantity)
    return fitted, [{**row, "axis": axis} for row in rows], shares["background"]


def strips(geometry: Layout, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the strip of each cell, and which cells are background."""
    strip = np.zeros(geometry.shape, dtype=int)
    for place in range(3):
        strip[geometry.strip_region(axis, place).mask] = place
    return strip, geometry.background(axis).mask


def fit_with_controls(
    examples: Examples,
    n_images: int,
    seed: int,
    n_seeds: int = 1,
    n_shuffles: int = 1,
    test_size: float = 0.25,
    parts: tuple[np.ndarray, np.ndarray] | None = None,
    shuffle: Shuffle = shuffled_labels,
) -> tuple[Fitted, list[dict]]:
    """Returns probes and their controls, and rows of held-out accuracies.

    `test_size` is the share of images that are held out; `parts` are the images to fit to and to
    hold out, if they are given.  The controls are fitted and scored on the labels of `shuffle`, by
    default shuffled within images; `converged` is a logistic regression on the same examples.
    Images without examples are in neither part.  Raises `CannotRunError` where a part has none.
    """
    # Split all images first, so that one that is left out moves no other to another part.
    parts = parts or split_by_image(n_images, test_size=test_size, seed=seed)
    train, test = (part[np.isin(part, examples.images)] for part in parts)
    if not len(train) or not len(test):
        raise none_left("picture")
    part, held = examples.of_images(train), examples.of_images(test)
    probes = [LinearProbe(seed=seed + i).fit(part.X, part.y) for i in range(n_seeds)]
    right = np.stack([held_out_shares(probe, held) for probe in probes])
    controls, chance = [], []
    for i in range(n_shuffles):
        shuffled = shuffle(examples, seed=seed + i)
        own = shuffled.of_images(train)
        controls.append(LinearProbe(seed=seed + i).fit(own.X, own.y))
        chance.append(held_out_shares(controls[-1], shuffled.of_images(test)))
    converged = _converged(part)
    converged_right = held_out_shares(converged, held)
    rows = accuracy_rows(right, converged_right, np.stack(chance), seed)
    return Fitted(probes, controls, test, right, converged, converged_right[None]), rows


def accuracy_rows(
    right: Float[np.ndarray, "probe image"],
    converged: Float[np.ndarray, " image"],
    chance: Float[np.ndarray, "control image"],
    seed: int,
) -> list[dict]:
    """Returns the rows of accuracies of probes, of the converged one and of the controls.

    The last one is the permutation p-value of the probes' accuracy among the controls'.
    """
    rows = []
    for quantity, values in (
        ("accuracy", right.mean(0)),
        ("converged", converged),
        ("shuffled", chance.mean(0)),
    ):
        rows += interval_rows(mean_of_shares(values, seed=seed), {}, quantity=quantity)
    at_least = int((chance.mean(1) >= right.mean()).sum())
    p = (1 + at_least) / (1 + len(chance))
    rows.append({"quantity": "p, shuffled", "value": p, "low": p, "high": p, "n": len(chance)})
    return rows


def _converged(examples: Examples) -> LogisticRegression:
    """Returns a logistic regression on standardised features, fitted until it converges.

    It separates two cases: features without the order, and features for which the paper's 200
    small steps, chosen for thousands of features, are too few.
    """
    X = examples.X.numpy()
    mean, scale = X.mean(0), X.std(0)
    # Of features that only rounding varies here, other tokens would have values without bounds.
    scale[scale < RIGID * scale.max()] = np.inf
    fitted = LogisticRegression(max_iter=5000).fit((X - mean) / scale, examples.y)
    # Fold the standardisation into the weights, so that the probe takes raw features.
    fitted.coef_ = fitted.coef_ / scale
    fitted.intercept_ = fitted.intercept_ - fitted.coef_ @ mean
    return fitted


def places_read(
    probes: Sequence[Any], grids: Float[torch.Tensor, "image row col d"]
) -> Int[np.ndarray, "probe image row col"]:
    """Returns the place as which each probe (or scikit-learn classifier) reads each token.

    It is `UNREAD` throughout pictures whose tokens are not numbers.
    """
    whole = whole_pictures(grids)
    tokens = grids[torch.from_numpy(whole)].flatten(0, 2).numpy()
    read = np.full((len(probes), *grids.shape[:3]), UNREAD)
    for own, probe in zip(read, probes, strict=True) if len(tokens) else ():
        own[whole] = probe.predict(tokens).reshape(-1, *grids.shape[1:3])
    return read


def is_read(read: Int[np.ndarray, "probe image row col"]) -> Bool[np.ndarray, " image"]:
    """Returns which pictures are read, of what `places_read` returned."""
    return (read != UNREAD).all((0, 2, 3))


def background_shares(maps: torch.Tensor, own: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Returns, by picture, the share of background tokens assigned to their own class.

    `maps` are probabilities `[image, row, col, class]`, `own` the class of each cell.
    """
    given = maps.argmax(-1).cpu().numpy()
    return (given == own)[:, background].mean(1)

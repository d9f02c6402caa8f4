"""Linear probes on activations, and their examples, splits and controls.

`LinearProbe` is the paper's probe (protocol 2.7) with scikit-learn's interface: multinomial
logistic regression, fitted by 200 full-batch AdamW steps from a random start, in torch on
any device.  It is deliberately not fitted to convergence, and features are not standardised.
For another protocol, any scikit-learn classifier takes the same arrays.

The tokens of one object are nearly equal and the tokens of one image are correlated.
Therefore splits are by image (`split_by_image`), and each image counts as one trial
(`held_out_accuracy`).

High accuracy may only mean that the features are rich.  `shuffled_labels` is the control: it
shuffles the labels among the objects of each image.  All tokens of an object still share a
label, and each image has the same labels, but the relation between place and label is removed.
A probe that is fitted and scored on such labels is at chance.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from hooked_vlm.analysis.directions import Direction
from hooked_vlm.analysis.statistics import Interval, bootstrap, wilson
from hooked_vlm.arguments.checked import checked, require, shown
from hooked_vlm.arguments.displayed import OneLine
from hooked_vlm.arguments.kinds import (
    Count,
    NotNegative,
    OptionalDevice,
    Seed,
    Share,
    has_values,
)
from hooked_vlm.errors import DataError, HookedVLMError, counted
from hooked_vlm.regions.region import Region


_OPTIONS: dict[str, Any] = {
    "lr": NotNegative,
    "weight_decay": NotNegative,
    "n_steps": Count,
    "seed": Seed,
    "device": OptionalDevice,
}
"""What a probe's options may be: scikit-learn wants any value kept, and checked in `fit`."""


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Multinomial linear probe, fitted as the paper fits it (protocol 2.7).

    Logits are `X @ weight_.T + bias_`.  The start is `weight_ ~ N(0, 1) / sqrt(d)` from a
    generator seeded with `seed` (drawn on the CPU, so the start is the same on every device)
    and `bias_ = 0`.  AdamW decays weights and biases, torch's default.

    `X` is `[example, d]` and `y` `[example]`, as tensors or any type that scikit-learn takes; a
    tensor is fitted on its own device unless `device` is given.  Fitted attributes:
    `classes_` (sorted labels), `weight_` `[class, d]` and `bias_` `[class]` (float32 tensors
    on the CPU), `loss_curve_` (mean cross-entropy before each step), `n_features_in_`.

    >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(10, 1)
    >>> probe = LinearProbe(lr=0.1).fit(X, ["left", "right"] * 10)
    >>> list(probe.predict(X[:2])), probe.score(X, ["left", "right"] * 10)
    ([np.str_('left'), np.str_('right')], 1.0)
    """

    # Without annotations: scikit-learn requires that any value is stored and checked in fit.
    @checked(DataError, only_names=True)
    def __init__(self, *, lr=1e-3, weight_decay=1e-4, n_steps=200, seed=0, device=None):
        self.lr = lr
        self.weight_decay = weight_decay
        self.n_steps = n_steps
        self.seed = seed
        self.device = device

    @checked(DataError, only_names=True)
    def fit(self, X: Any, y: Any) -> "LinearProbe":
        """Fits to features `[example, d]` and labels `[example]`; returns the probe.

        Raises:
            DataError: features or labels that scikit-learn refuses, or an option out of range.
        """
        require("LinearProbe", vars(self), _OPTIONS, DataError)
        device = self._device(X)
        with _refusals():
            X, y = validate_data(self, _array(X), _array(y), dtype=np.float32)
            check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(
                f"The labels hold one class only, {self.classes_[0]!r}. Give labels of two or more "
                "classes."
            )
        # Parameters made in a caller's inference_mode could not be trained.
        with torch.inference_mode(False), torch.enable_grad():
            features, targets = torch.tensor(X, device=device), torch.tensor(codes, device=device)
            self.weight_, self.bias_, self.loss_curve_ = self._descend(features, targets)
        return self

    @checked(DataError, only_names=True)
    def decision_function(self, X: Any) -> Float[np.ndarray, "example *class"]:
        """Returns logits `[example, class]`; for two classes their difference `[example]`."""
        logits = self._scores(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    @checked(DataError, only_names=True)
    def predict_proba(self, X: Any) -> Float[np.ndarray, "example class"]:
        """Returns class probabilities, in the order of `classes_`."""
        return torch.from_numpy(self._scores(X)).softmax(dim=-1).numpy()

    @checked(DataError, only_names=True)
    def predict(self, X: Any) -> Shaped[np.ndarray, " example"]:
        """Returns the most probable label of each example."""
        best = self._scores(X).argmax(axis=1)
        return self.classes_[best]

    @checked(DataError, only_names=True)
    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Returns the accuracy over examples; for an interval see `held_out_accuracy`."""
        with _refusals():
            return float(super().score(X, _array(y), sample_weight))

    @checked(DataError)
    def logits(self, features: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch class"]:
        """Returns the logits of features of any leading shape, on the features' device."""
        check_is_fitted(self)
        if features.shape[-1] != self.weight_.shape[1]:
            raise DataError(
                f"The probe was fitted to {self.weight_.shape[1]} features and given "
                f"{features.shape[-1]} (shape {tuple(features.shape)}). Give features with d as "
                "the last axis."
            )
        weight, bias = self.weight_.to(features.device), self.bias_.to(features.device)
        return features.float() @ weight.T + bias

    @checked(DataError)
    def probability_map(
        self, features: Float[Tensor, "*image row col d"]
    ) -> Float[Tensor, "*image row col class"]:
        """Returns class probabilities at every cell of a grid of tokens (E3's heat maps).

        The probe was fitted to object tokens; the map also shows its result at all other tokens.
        """
        return self.logits(features).softmax(dim=-1)

    def _descend(self, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
        classes, d = len(self.classes_), X.shape[1]
        generator = torch.Generator().manual_seed(int(self.seed))
        start = torch.randn(classes, d, generator=generator) / math.sqrt(d)
        weight = start.to(X.device).requires_grad_()
        bias = torch.zeros(classes, device=X.device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], lr=self.lr, weight_decay=self.weight_decay)
        losses = []
        for _ in range(self.n_steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(X @ weight.T + bias, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())  # copied at the end: one GPU synchronisation, not 200
        return weight.detach().cpu(), bias.detach().cpu(), torch.stack(losses).cpu().numpy()

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        with _refusals():
            X = validate_data(self, _array(X), dtype=np.float32, reset=False)
        # In float64, because a float32 product depends, by 2e-6, on the processor and on the
        # number of rows that are scored together.
        weight, bias = self.weight_.double().numpy(), self.bias_.double().numpy()
        return X.astype(np.float64) @ weight.T + bias

    def _device(self, X: Any) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return X.device if isinstance(X, Tensor) else torch.device("cpu")


@checked(DataError)
@dataclass(frozen=True, eq=False, repr=False)
class Examples(OneLine):
    """Probe examples, with the image and the object of each."""

    X: Float[Tensor, "example d"]
    y: Int[np.ndarray, " example"]
    """The place (0, 1, 2, ...) of the token's object."""
    images: Int[np.ndarray, " example"]
    objects: Int[np.ndarray, " example"]
    """One number per object of an image; its examples share a label."""

    @checked(DataError)
    def of_images(self, images: Int[np.ndarray, " image"] | Sequence[int]) -> "Examples":
        """Returns the examples of these images, in their current order."""
        kept = np.isin(self.images, np.asarray(images))
        rows = torch.from_numpy(kept).to(self.X.device)
        return Examples(self.X[rows], self.y[kept], self.images[kept], self.objects[kept])


@checked(DataError)
def object_examples(
    features: Float[Tensor, "image token d"], regions: Sequence[Region], *, pooled: bool = False
) -> Examples:
    """Returns the tokens of each place's object as examples, labelled by place.

    `regions[place]` lies on the token grid of every image; background tokens are left out.
    With `pooled`, an object's tokens are averaged to one example (COCO, protocol 2.7).

    Raises:
        RegionError: an empty region.
        DataError: a region of another grid, or a region inside another one.  A token of two
            regions is an example of both places, as in the paper, whose boxes of What'sUp share
            a column on 12 tokens.

    >>> places = [Region.column_band((4, 4), 0, 1), Region.column_band((4, 4), 3, 4)]
    >>> object_examples(torch.zeros(5, 16, 32), places).X.shape
    torch.Size([40, 32])
    """
    if not len(regions):
        raise DataError("No region was given: regions is empty. Give one for each place.")
    n_images, n_tokens, _ = features.shape
    _check_regions(regions, n_tokens)
    tokens = [region.tokens.to(features.device) for region in regions]
    blocks = [features[:, index] for index in tokens]
    if pooled:
        blocks = [block.mean(dim=1, keepdim=True) for block in blocks]
    places = np.repeat(np.arange(len(blocks)), [block.shape[1] for block in blocks])
    images = np.repeat(np.arange(n_images), len(places))
    y = np.tile(places, n_images)
    return Examples(torch.cat(blocks, dim=1).flatten(0, 1), y, images, images * len(blocks) + y)


@checked(DataError)
def split_by_image(
    n_images: Count, *, test_size: Share = 0.25, seed: Seed = 0
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """Returns image indices (train, test), shuffled with `seed`: the last share is the test.

    The train part is rounded down: 120 images give 90 and 30.

    Raises:
        DataError: one of the parts would be empty.
    """
    n_train = math.floor(n_images * (1 - test_size) + 1e-9)  # 0.95 * 20 is 19, not 18.99...
    if not 0 < n_train < n_images:
        raise DataError(
            f"Of {counted(n_images, 'image')}, test_size={test_size} leaves {n_train} to train on "
            f"and {n_images - n_train} to test on; both must be at least 1."
        )
    order = list(range(n_images))
    random.Random(int(seed)).shuffle(order)
    return np.array(order[:n_train]), np.array(order[n_train:])


@checked(DataError)
def shuffled_labels(examples: Examples, *, seed: Seed = 0) -> Examples:
    """Returns the same examples with labels shuffled among each image's objects.

    Fit *and score* the control on these examples.  With strong features, a probe fitted to
    shuffled labels gives every place one label, so its accuracy on the true labels is 0, 1/3 or
    1 by chance, while its accuracy on shuffled labels is at chance level.

    Raises:
        DataError: an object with several labels, or no image with two labels to exchange.
    """
    objects, first, member = np.unique(examples.objects, return_index=True, return_inverse=True)
    labels, image_of = examples.y[first], examples.images[first]
    if not np.array_equal(labels[member], examples.y):
        raise DataError(
            "An object's examples have different labels, and the control shuffles labels by "
            "object. Give every example of an object the same label."
        )
    rng = np.random.default_rng(seed)
    dealt = labels.copy()
    for image in np.unique(image_of):
        mine = image_of == image
        dealt[mine] = rng.permutation(labels[mine])
    if all(len(np.unique(labels[image_of == image])) < 2 for image in np.unique(image_of)):
        raise DataError(
            f"None of {len(objects)} objects shares its image with an object of another label, so "
            "shuffling labels within images changes nothing. Give images with several labels."
        )
    return replace(examples, y=dealt[member])


@checked(DataError)
def held_out_accuracy(
    probe: BaseEstimator, examples: Examples, *, level: Share = 0.95, seed: Seed = 0
) -> Interval:
    """Returns the mean over images of the share of correct tokens, with its interval.

    The probe may be any fitted scikit-learn classifier, also a pipeline or a search that ends in
    one.

    Raises:
        DataError: an estimator that is no classifier.
    """
    if not is_classifier(probe):
        raise DataError(
            f"{type(probe).__name__} is no classifier, so its predictions are neither right nor "
            "wrong. Give a LinearProbe or a classifier of scikit-learn."
        )
    return mean_of_shares(held_out_shares(probe, examples), level=level, seed=seed)


def held_out_shares(probe: BaseEstimator, examples: Examples) -> Float[np.ndarray, " image"]:
    """Returns the share of each image's tokens that a probe gets right: one observation each."""
    right = probe.predict(examples.X) == examples.y  # type: ignore[attr-defined]
    _, member = np.unique(examples.images, return_inverse=True)
    return np.bincount(member, weights=right) / np.bincount(member)


def mean_of_shares(
    shares: Float[np.ndarray, " image"], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Returns the mean over images of shares of tokens, with its interval.

    It is a bootstrap over images.  Wilson's interval takes every share for the sum of yes/no
    outcomes, and is about five times too wide for probes.  Where all images have one share, a
    bootstrap has no width, and Wilson's interval is given.
    """
    if len(shares) < 2 or np.ptp(shares) == 0:
        return wilson(float(shares.sum()), len(shares), level=level)
    return bootstrap(shares, level=level, seed=seed)


@checked(DataError)
def class_directions(probe: LinearProbe, provenance: str = "") -> list[Direction]:
    """Returns a fitted probe's class weights w_k, in the order of `probe.classes_`.

    They are uncentred, as the paper uses them; see `directions.orthonormalise`.
    """
    return [
        Direction(weight, f"class {label}", provenance)
        for label, weight in zip(probe.classes_, probe.weight_, strict=True)
    ]


@contextmanager
def _refusals() -> Iterator[None]:
    """Converts scikit-learn's errors about data to `DataError`, with its words."""
    try:
        yield
    except (HookedVLMError, NotFittedError):
        raise
    except (ValueError, TypeError) as error:
        kind = _WrongTypeError if isinstance(error, TypeError) else DataError
        raise kind(str(error)[:390]) from error


class _WrongTypeError(DataError, TypeError):
    """Data of a type that scikit-learn refuses, which its own checks expect as a `TypeError`."""


def _array(values: Any) -> Any:
    """Returns a tensor as a numpy array (bfloat16 as float32); other values unchanged."""
    if not isinstance(values, Tensor):
        return values
    if not has_values(values):
        raise DataError(f"The probe was given {shown(values)}; expected one with values.")
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _check_regions(regions: Sequence[Region], n_tokens: int) -> None:
    for place, region in enumerate(regions):
        rows, cols = region.shape
        if rows * cols != n_tokens:
            raise DataError(
                f"The region of place {place}, {region!r}, is on a grid of {rows * cols} tokens, "
                f"and the features have {n_tokens} per image. Make it from the images' grid."
            )
        for other in regions[:place]:
            shared = len(region & other)
            if shared == min(len(region), len(other)):
                raise DataError(
                    f"{region!r} and {other!r} share {shared} cells, so one has no token of its "
                    "own. Give disjoint regions."
                )

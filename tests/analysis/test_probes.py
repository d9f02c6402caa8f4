"""The probe finds what was planted, finds nothing where nothing was, and is scikit-learn's."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from hooked_vlm.analysis.probes import (
    LinearProbe,
    held_out_accuracy,
    object_examples,
    shuffled_labels,
    split_by_image,
)
from hooked_vlm.errors import DataError, RegionError
from hooked_vlm.regions.region import Region


GRID = (6, 6)
PLACES = [Region.rectangle(GRID, rows=(2, 4), cols=(c, c + 2)) for c in (0, 2, 4)]


def coded_images(n_images: int = 60, strength: float = 3.0) -> torch.Tensor:
    """Noise `[image, token, d]` with a direction per column third, on every token of it."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n_images, *GRID, 32, generator=generator)
    code = torch.randn(3, 32, generator=generator)
    for place in range(3):
        features[:, :, 2 * place : 2 * place + 2] += strength * code[place]
    return features.flatten(1, 2)


def fitted(features: torch.Tensor, *, shuffle: bool = False):
    examples = object_examples(features, PLACES)
    if shuffle:
        examples = shuffled_labels(examples)
    train, test = split_by_image(len(features))
    probe = LinearProbe(lr=1e-2).fit(examples.of_images(train).X, examples.of_images(train).y)
    return probe, examples.of_images(test)


# The paper's 200 small steps leave scikit-learn's toy data, of two features and long
# distances, underfitted on purpose; its checks are about the interface.
@parametrize_with_checks([LinearProbe(lr=0.3)])
@pytest.mark.filterwarnings("default")
def test_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def test_works_in_scikit_learns_tools():
    X, y = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 2
    X[:, 0] += 8 * y
    assert cross_val_score(clone(LinearProbe(lr=0.1)), X, y, cv=3).min() > 0.9


def test_finds_a_planted_code_on_held_out_images():
    probe, held_out = fitted(coded_images())
    accuracy = held_out_accuracy(probe, held_out)
    assert accuracy.estimate == 1.0
    assert accuracy.n == 15  # images, not tokens
    assert accuracy.low == pytest.approx(0.796, abs=1e-3)
    assert probe.score(held_out.X, held_out.y) == 1.0


def test_any_classifier_of_scikit_learn_is_scored_also_in_a_pipeline():
    train, test = split_by_image(60)
    examples = object_examples(coded_images(), PLACES)
    fit, held_out = examples.of_images(train), examples.of_images(test)
    probe = make_pipeline(StandardScaler(), LogisticRegression()).fit(fit.X, fit.y)
    assert held_out_accuracy(probe, held_out).estimate == 1.0
    with pytest.raises(DataError, match="LinearRegression is no classifier"):
        held_out_accuracy(LinearRegression().fit(fit.X, fit.y), held_out)


def test_does_not_find_a_code_that_is_not_there():
    probe, held_out = fitted(coded_images(strength=0.0))
    assert held_out_accuracy(probe, held_out).covers(1 / 3)


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_shuffled_control_is_at_chance_however_strong_the_code(strength):
    probe, held_out = fitted(coded_images(strength=strength), shuffle=True)
    assert held_out_accuracy(probe, held_out).covers(1 / 3)


def test_shuffling_keeps_images_balanced_and_objects_whole():
    examples = object_examples(coded_images(40), PLACES)
    dealt = shuffled_labels(examples, seed=1)
    assert dealt.X is examples.X
    for image in range(40):
        mine = dealt.images == image
        np.testing.assert_array_equal(np.bincount(dealt.y[mine]), [4, 4, 4])
    for each in np.unique(dealt.objects):
        assert len(set(dealt.y[dealt.objects == each])) == 1
    assert 0.15 < (dealt.y == examples.y).mean() < 0.55
    # Each image is dealt its own way: one way for all would leave the code decodable.
    deals = {tuple(dealt.y[dealt.images == image][[0, 4, 8]]) for image in range(40)}
    assert deals == set(itertools.permutations(range(3)))
    np.testing.assert_array_equal(dealt.y, shuffled_labels(examples, seed=1).y)


def test_probability_map_shows_strips_though_fitted_on_objects():
    features = coded_images()
    probe, _ = fitted(features)
    maps = probe.probability_map(features.unflatten(1, GRID))
    assert maps.shape == (60, 6, 6, 3)
    torch.testing.assert_close(maps.sum(-1), torch.ones(60, 6, 6))
    by_column = torch.arange(6) // 2
    assert (maps.argmax(-1) == by_column).float().mean() > 0.99


def test_fit_is_the_papers_recipe():
    """An independent loop in float64 with torch's own modules arrives at the same probe."""
    examples = object_examples(coded_images(20), PLACES)
    probe = LinearProbe(seed=3).fit(examples.X, examples.y)
    layer = torch.nn.Linear(32, 3).double()
    start = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)) / 32**0.5
    with torch.no_grad():
        layer.weight.copy_(start)
        layer.bias.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=1e-4)
    X, y = examples.X.double(), torch.from_numpy(examples.y)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = -layer(X).log_softmax(dim=1)[torch.arange(len(y)), y].mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(probe.weight_.double(), layer.weight.data, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(probe.bias_.double(), layer.bias.data, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(probe.loss_curve_, losses, rtol=1e-4)


def test_start_has_the_papers_spread():
    X = np.random.default_rng(0).normal(size=(4, 4000))
    probe = LinearProbe(n_steps=1, lr=0.0).fit(X, [0, 1, 2, 0])
    assert probe.weight_.std().item() * 4000**0.5 == pytest.approx(1, abs=0.03)
    assert not probe.bias_.any()


def test_tensors_arrays_and_lists_give_the_same_probe():
    examples = object_examples(coded_images(10), PLACES)
    X, y = examples.X, examples.y
    first = LinearProbe().fit(X, torch.from_numpy(y))
    for other in (LinearProbe().fit(X.numpy(), y), LinearProbe().fit(X.tolist(), y.tolist())):
        torch.testing.assert_close(first.weight_, other.weight_)
    np.testing.assert_array_equal(first.predict(X), first.predict(X.numpy()))
    assert LinearProbe().fit(X.bfloat16(), y).score(X.bfloat16(), torch.from_numpy(y)) > 0


def test_labels_may_be_words_and_probabilities_follow_their_order():
    examples = object_examples(coded_images(20), PLACES)
    words = np.array(["middle", "right", "left"])[examples.y]
    probe = LinearProbe(lr=1e-2).fit(examples.X, words)
    assert probe.classes_.tolist() == ["left", "middle", "right"]
    best = probe.classes_[probe.predict_proba(examples.X).argmax(axis=1)]
    np.testing.assert_array_equal(best, probe.predict(examples.X))
    assert probe.score(examples.X, words) > 0.95


def test_two_classes_give_one_decision_value():
    X = np.random.default_rng(0).normal(size=(30, 5))
    y = (X[:, 0] > 0).astype(int)
    probe = LinearProbe(lr=0.1).fit(X, y)
    assert probe.decision_function(X).shape == (30,)
    np.testing.assert_array_equal(probe.decision_function(X) > 0, probe.predict(X) == 1)
    log_odds = np.log(probe.predict_proba(X)[:, 1] / probe.predict_proba(X)[:, 0])
    np.testing.assert_allclose(probe.decision_function(X), log_odds, atol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fits_inside_a_callers_no_grad(mode):
    with mode():
        features = coded_images(10) * 1.0
        probe, _ = fitted(features)
        maps = probe.probability_map(features.unflatten(1, GRID))
    assert probe.loss_curve_[-1] < probe.loss_curve_[0]
    assert maps.shape[-1] == 3
    assert not probe.weight_.is_inference()


def test_object_examples_know_their_image_place_and_object():
    features = torch.arange(2 * 36, dtype=torch.float32).reshape(2, 36, 1)
    examples = object_examples(features, PLACES)
    assert examples.X.shape == (2 * 12, 1)
    assert examples.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4
    assert examples.images.tolist() == [0] * 12 + [1] * 12
    assert examples.objects.tolist() == np.repeat(range(6), 4).tolist()
    # Image 1, place 2 covers rows 2-3, columns 4-5 of the second 36 numbers.
    assert examples.X[-4:, 0].tolist() == [36 + 16, 36 + 17, 36 + 22, 36 + 23]
    pooled = object_examples(features, PLACES, pooled=True)
    assert pooled.y.tolist() == [0, 1, 2, 0, 1, 2]
    assert pooled.X[-1].item() == 36 + (16 + 17 + 22 + 23) / 4


@pytest.mark.parametrize(
    ("n", "test_size", "expected"), [(120, 0.25, 30), (20, 0.05, 1), (440, 0.05, 22), (10, 0.25, 3)]
)
def test_split_covers_every_image_once(n, test_size, expected):
    train, test = split_by_image(n, test_size=test_size)
    assert len(test) == expected
    assert sorted([*train, *test]) == list(range(n))
    assert list(split_by_image(n, test_size=test_size)[0]) == list(train)
    assert n < 20 or list(split_by_image(n, test_size=test_size, seed=1)[0]) != list(train)


def test_b5_a_shared_token_is_an_example_of_both_places():
    wide = [Region.column_band((6, 6), 0, 3), Region.column_band((6, 6), 2, 6)]
    examples = object_examples(torch.arange(36.0).reshape(1, 36, 1), wide)
    twice = examples.X[:, 0] % 6 == 2
    assert twice.sum() == 12 and sorted(examples.y[twice.numpy()]) == [0] * 6 + [1] * 6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LinearProbe().fit(np.zeros((3, 2)), [1, 1, 1]), DataError, "one class only"),
        (lambda: LinearProbe(n_steps=0).fit(np.zeros((2, 2)), [0, 1]), DataError, "n_steps=0"),
        (lambda: LinearProbe().fit(np.full((2, 2), np.nan), [0, 1]), ValueError, "NaN"),
        (
            lambda: LinearProbe().fit(np.eye(2), [0, 1]).logits(torch.zeros(2, 3)),
            DataError,
            "fitted to 2 features and given 3",
        ),
        (
            lambda: object_examples(torch.zeros(1, 35, 2), PLACES),
            DataError,
            "36 tokens, and the features have 35",
        ),
        (
            lambda: object_examples(torch.zeros(1, 36, 2), [PLACES[0], PLACES[0]]),
            DataError,
            "share 4 cells",
        ),
        (
            lambda: object_examples(torch.zeros(1, 36, 2), [PLACES[0] - PLACES[0]]),
            RegionError,
            "empty|no cell",
        ),
        (
            lambda: shuffled_labels(object_examples(torch.zeros(4, 36, 2), PLACES[:1])),
            DataError,
            "changes nothing",
        ),
        (lambda: split_by_image(1), DataError, "Of 1 image,"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()

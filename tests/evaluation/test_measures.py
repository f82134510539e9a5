"""Distances between sets of features: closed forms, definitions spelled out, and what few pictures do."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message

from mlx_starflow.evaluation import measures
from mlx_starflow.evaluation.measures import (
    LEAST,
    Estimate,
    Gaussian,
    frechet_distance,
    kernel_distance,
    nearest,
    neighbour_distances,
    precision_recall,
    squared_discrepancy,
)


def drawn(count: int, dimensions: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dimensions)) + shift).astype(np.float32)


def covariance(dimensions: int, seed: int, rank: int | None = None) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((dimensions, rank or dimensions))
    return root @ root.T


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.linalg.norm(first[:, None].astype(float) - second[None].astype(float), axis=-1)


# ---- the Fréchet distance


def test_gaussians_along_the_axes() -> None:
    """There the distance is that of the means and of the standard deviations."""
    means, stds = np.random.default_rng(1).uniform(0.1, 3, (2, 2, 40))
    first, second = (Gaussian(mean, np.diag(std**2)) for mean, std in zip(means, stds, strict=True))
    expected = np.square(means[0] - means[1]).sum() + np.square(stds[0] - stds[1]).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_turning_both_changes_nothing() -> None:
    stds = np.random.default_rng(2).uniform(0.1, 3, (2, 30))
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((30, 30)))[0]
    first, second = (Gaussian(np.zeros(30), turn @ np.diag(std**2) @ turn.T) for std in stds)
    assert frechet_distance(first, second) == pytest.approx(np.square(stds[0] - stds[1]).sum(), rel=1e-10)


@pytest.mark.parametrize("rank", [None, 5])
def test_the_root_of_the_product(rank: int | None) -> None:
    """As written: tr sqrt(C1 C2), whose square root scipy computes; also of covariances of few pictures."""
    linalg = pytest.importorskip("scipy.linalg")
    first, second = (Gaussian(np.zeros(24), covariance(24, seed, rank)) for seed in (4, 5))
    root = linalg.sqrtm(first.covariance @ second.covariance + 1e-12 * np.eye(24)).real
    expected = np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.trace(root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)


def test_a_set_is_at_no_distance_from_itself() -> None:
    """Also with fewer pictures than features, where eigenvalues of a product would leave the roots of roundings."""
    features = drawn(50, 200)
    gaussian = Gaussian.of(features)
    assert frechet_distance(gaussian, Gaussian.of(features[::-1])) < 1e-9 * np.trace(gaussian.covariance)


def test_statistics_of_features(monkeypatch) -> None:
    features = drawn(101, 7, shift=1e3)
    monkeypatch.setattr(measures, "_ROWS", 10)
    found = Gaussian.of(features)
    exact = features.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
    assert found.count == 101
    assert "2 pictures or more, not 1" in message(Gaussian.of, features[:1])


# ---- the kernel distance


def test_the_kernel_distance_as_it_is_defined() -> None:
    first, second = drawn(5, 3, 1), drawn(4, 3, 2)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x.astype(float) @ y.astype(float)) / 3 + 1) ** 3

    within = [
        sum(kernel(x, y) for i, x in enumerate(one) for j, y in enumerate(one) if i != j) / (len(one) * (len(one) - 1))
        for one in (first, second)
    ]
    between = sum(kernel(x, y) for x in first for y in second) / 20
    assert squared_discrepancy(first, second) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_pictures_of_one_kind_are_at_no_kernel_distance() -> None:
    """The estimate has no bias, and its error is what it claims: of 40 pairs of sets, few are two errors away."""
    found = [kernel_distance(drawn(200, seed=seed), drawn(200, seed=1000 + seed)) for seed in range(40)]
    means, errors = (np.array([getattr(each, name) for each in found]) for name in ("mean", "error"))
    assert abs(means.mean()) < 3 * means.std(ddof=1) / np.sqrt(40)
    assert (np.abs(means) > 2.3 * errors).sum() <= 6  # Student's t of 9 degrees: 5 % of them
    assert 0.7 < np.sqrt(np.square(errors).mean()) / means.std(ddof=1) < 1.4


def test_other_pictures_are_further() -> None:
    near, far = (kernel_distance(drawn(100), drawn(150, seed=9, shift=shift)) for shift in (0.1, 1.0))
    assert far.mean - 3 * far.error > near.mean + 3 * near.error


# ---- precision and recall


def test_precision_and_recall_as_they_are_defined(monkeypatch) -> None:
    real, samples = drawn(40, seed=1), drawn(30, seed=2, shift=0.5)
    expected = []
    for inside, of in ((samples, real), (real, samples)):
        own = np.sort(distances(of, of), axis=1)[:, 3]  # the picture itself comes first
        expected.append((distances(inside, of) <= own).any(axis=1).mean())
    for rows in (2048, 7):
        monkeypatch.setattr(measures, "_ROWS", rows)
        assert precision_recall(real, samples) == pytest.approx(tuple(expected))


def test_ends_of_precision_and_recall() -> None:
    real = drawn(40)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    assert precision_recall(real, np.repeat(real[:2], 20, axis=0))[0] == 1.0


def test_neighbours(monkeypatch) -> None:
    first, second = drawn(23, seed=3, shift=50), drawn(31, seed=4, shift=50)
    for rows in (2048, 5):
        monkeypatch.setattr(measures, "_ROWS", rows)
        found, which = nearest(first, second)
        np.testing.assert_allclose(found, distances(first, second).min(axis=1), rtol=1e-6)
        np.testing.assert_array_equal(which, distances(first, second).argmin(axis=1))
        own = np.sort(distances(second, second), axis=1)[:, 2]
        np.testing.assert_allclose(neighbour_distances(second, 2), own**2, rtol=1e-6)


# ---- few pictures, and broken ones


@pytest.mark.parametrize("measure", [kernel_distance, precision_recall])
def test_too_few_pictures(measure) -> None:
    enough = drawn(LEAST)
    assert f"need {LEAST} of each kind or more" in message(measure, enough, enough[:-1])
    measure(enough, enough)


def test_features_that_are_not_finite() -> None:
    broken = drawn(30)
    broken[3, 2] = np.nan
    assert "not finite" in message(precision_recall, drawn(30), broken)


def test_an_estimate_of_one_value() -> None:
    assert str(Estimate.of(np.array([1.5]))) == "1.5000"
    assert Estimate.of(np.array([1.5])).to_dict() == {"mean": 1.5, "standard_error": None}
    assert Estimate.of(np.array([1.0, 3.0])) == Estimate(2.0, 1.0)

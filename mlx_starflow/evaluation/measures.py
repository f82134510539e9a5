"""Distances between two sets of pictures, of features `[pictures, dimensions]`: Fréchet, kernel, precision and recall.

All of them are computed in float64, of features in float32, and in blocks, so that 50,000 pictures fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood import standard_error

LEAST = 20
"""Pictures of each kind; of fewer no distance means anything."""

KERNEL_BLOCK = 1000
"""Most pictures of each kind in a block of the kernel distance."""

KERNEL_BLOCKS = 10
"""Fewest blocks, whose spread gives the standard error."""

NEIGHBOURS = 3
"""Of precision and recall, as Kynkäänniemi et al. chose them."""

_ROWS = 2048
"""Pictures of each kind whose distances are computed at once: 32 MiB."""


@dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and covariance `[D, D]` of features, float64, and of how many pictures; 0 if nobody knows."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int = 0

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Of features `[N, D]`; the covariance is the unbiased one. Raises StarflowError for fewer than 2."""
        count, dimensions = features.shape
        if count < 2:
            raise StarflowError(f"a covariance needs 2 pictures or more, not {count}")
        mean = features.mean(axis=0, dtype=np.float64)
        scatter = np.zeros((dimensions, dimensions))
        for start in range(0, count, _ROWS):
            centred = features[start : start + _ROWS] - mean
            scatter += centred.T @ centred
        return cls(mean, scatter / (count - 1), count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared Fréchet distance of two Gaussians (FID: Heusel et al., arXiv 1706.08500).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)). With C = L L^T the last trace is the sum of the singular values
    of L1^T L2: none of them is the root of a number that rounding has made negative, as eigenvalues of C1 C2 may be,
    so covariances of few pictures need no correction either.
    """
    roots = [_root(each.covariance) for each in (first, second)]
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    means = np.square(first.mean - second.mean).sum()
    return float(max(means + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
    """L with C = L L^T."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * np.sqrt(np.maximum(values, 0))


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, NaN where there is no spread to tell it from."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """Of independent values `[N]`."""
        return cls(float(values.mean()), standard_error(values))

    def to_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "standard_error": None if math.isnan(self.error) else self.error}

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if math.isnan(self.error) else f" +- {self.error:.4f}")


def squared_discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy, with the kernel (x y / D + 1)^3.

    Features `[M, D]` and `[N, D]`, 2 or more of both (KID: Bińkowski et al., arXiv 1801.01401).
    """
    total = -2 * _kernel(first, second).mean()
    for one in (first, second):
        kernel = _kernel(one, one)
        total += (kernel.sum() - np.trace(kernel)) / (len(one) * (len(one) - 1))
    return float(total)


def _kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    products = first.astype(np.float64) @ second.astype(np.float64).T
    kernel: np.ndarray = (products / first.shape[1] + 1) ** 3
    return kernel


def kernel_distance(real: np.ndarray, samples: np.ndarray, seed: int = 0) -> Estimate:
    """KID: the mean of `squared_discrepancy` over blocks of pictures that share none, and its standard error.

    The estimate is unbiased for blocks of any size. Where others draw overlapping subsets, whose spread says little of
    the mean's error, these blocks are independent, so the error is what it claims to be.

    Raises StarflowError if there are fewer than `LEAST` pictures of a kind.
    """
    check_enough(real, samples)
    fewest = min(len(real), len(samples))
    size = min(KERNEL_BLOCK, fewest // KERNEL_BLOCKS)
    rng = np.random.Generator(np.random.Philox(seed))
    first, second = (rng.permutation(len(each)) for each in (real, samples))
    parts = [slice(start, start + size) for start in range(0, fewest - size + 1, size)]
    return Estimate.of(np.array([squared_discrepancy(real[first[p]], samples[second[p]]) for p in parts]))


def precision_recall(real: np.ndarray, samples: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Which share of the samples lies where real pictures are, and the other way round (arXiv 1904.06991).

    A picture covers the ball about it that reaches its third neighbour of its own kind.

    Raises StarflowError if there are fewer than `LEAST` pictures of a kind.
    """
    check_enough(real, samples)
    return _covered(samples, real, neighbours), _covered(real, samples, neighbours)


def _covered(pictures: np.ndarray, by: np.ndarray, neighbours: int) -> float:
    radii = neighbour_distances(by, neighbours)
    inside = np.zeros(len(pictures), bool)
    for rows, columns, distances in _blocks(pictures, by):
        inside[rows] |= (distances <= radii[columns]).any(axis=1)
    return float(inside.mean())


def neighbour_distances(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Squared distance of each picture from its nth neighbour among the others, `[N]`."""
    nearest = np.full((len(features), neighbours), np.inf)
    for rows, columns, distances in _blocks(features, features):
        if rows == columns:
            np.fill_diagonal(distances, np.inf)
        both = np.concatenate([nearest[rows], distances], axis=1)
        nearest[rows] = np.partition(both, neighbours - 1, axis=1)[:, :neighbours]
    return nearest.max(axis=1)


def nearest(pictures: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each picture from the nearest of the others, `[N]`, and which one that is."""
    least, which = np.full(len(pictures), np.inf), np.zeros(len(pictures), int)
    for rows, columns, distances in _blocks(pictures, others):
        found = distances.argmin(axis=1)
        values = distances[np.arange(len(found)), found]
        closer = values < least[rows]
        which[rows] = np.where(closer, columns.start + found, which[rows])
        least[rows] = np.minimum(least[rows], values)
    return np.sqrt(least), which


def _blocks(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Squared distances, block by block, with the rows and the columns that they belong to."""
    centre = second.mean(axis=0, dtype=np.float64)  # less is lost where large numbers are taken from each other
    for top in range(0, len(first), _ROWS):
        rows = slice(top, min(top + _ROWS, len(first)))
        x = first[rows] - centre
        for left in range(0, len(second), _ROWS):
            columns = slice(left, min(left + _ROWS, len(second)))
            y = second[columns] - centre
            squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)
            yield rows, columns, np.maximum(squares, 0)


def check_enough(*features: np.ndarray) -> None:
    """Raise StarflowError if there are too few pictures of a kind, or features are not finite."""
    for each in features:
        if len(each) < LEAST:
            raise StarflowError(
                f"distances between pictures need {LEAST} of each kind or more, and thousands to mean much, "
                f"not {len(each)}"
            )
        if not np.isfinite(each).all():
            raise StarflowError("features of the pictures are not finite: the weights that made them may be damaged")

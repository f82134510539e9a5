"""Learning rate, clipping, the moving average of weights, and weights by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_starflow.errors import StarflowError

Weights = dict[str, mx.array]


def cosine(progress: float, warm_up: float, floor: float = 0.02) -> float:
    """Learning-rate factor at `progress` 0..1: linear over the share `warm_up`, then a cosine down to `floor`."""
    if progress < warm_up:
        return progress / warm_up
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def ema_decay(limit: float, step: int) -> float:
    """Decay of the moving average at update `step` = 1, 2, ...: it ramps up, so that early weights are forgotten."""
    return min(limit, (1 + step) / (10 + step))


def update_average(average: Weights, weights: Mapping[str, mx.array], decay: mx.array) -> None:
    """Move `average` towards `weights`, in place: average + (1 - decay) * (weights - average)."""
    for name, weight in weights.items():
        average[name] = average[name] + (1 - decay).astype(weight.dtype) * (weight - average[name])


def clipped(
    gradients: Mapping[str, mx.array], limit: float, squares: mx.array | None = None
) -> tuple[Weights, mx.array]:
    """Gradients scaled so that their global norm is at most `limit`, and the norm they had.

    `squares` is the sum of their squares, where that is not what they themselves have.
    """
    if squares is None:
        squares = sum(mx.square(gradient.astype(mx.float32)).sum() for gradient in gradients.values())
    norm = mx.sqrt(squares)
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return {name: gradient * scale.astype(gradient.dtype) for name, gradient in gradients.items()}, norm


def trainable(model: Any) -> Weights:
    """The weights of a module that are trained, by name."""
    return dict(tree_flatten(model.trainable_parameters()))


def assign(model: Any, weights: Mapping[str, mx.array]) -> None:
    """Set weights of a module by name; the others stay."""
    model.update(tree_unflatten(list(weights.items())))


def check_same(found: Mapping[str, mx.array], expected: Mapping[str, mx.array], what: str) -> None:
    """Raise StarflowError unless both have the same names and shapes."""
    for name in sorted(set(found) ^ set(expected)):
        problem = "lacks" if name in expected else "has the unexpected"
        raise StarflowError(f"{what} {problem} {name}: it is of another model; use another output folder")
    for name, array in found.items():
        if array.shape != expected[name].shape:
            raise StarflowError(
                f"{what}: {name} is {list(array.shape)}, the model's is {list(expected[name].shape)}; "
                "it is of another model; use another output folder"
            )

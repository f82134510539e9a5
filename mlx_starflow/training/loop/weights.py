"""Weights by name: those of a module, compared, clipped and averaged."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_starflow.errors import StarflowError

Weights = dict[str, mx.array]


def update_average(average: Weights, weights: Mapping[str, mx.array], decay: mx.array) -> None:
    """Move `average` towards `weights`, in place: average + (1 - decay) * (weights - average)."""
    for name, weight in weights.items():
        average[name] = average[name] + (1 - decay).astype(weight.dtype) * (weight - average[name])


def clipped(
    gradients: Mapping[str, mx.array], limit: float, squares: mx.array | None = None
) -> tuple[Weights, mx.array]:
    """Gradients scaled so that their global norm is at most `limit`, and the norm they had.

    Args:
        squares: the sum of the squares of the whole gradient, where `gradients` are a process's share of it.
    """
    if squares is None:
        squares = sum((mx.square(g.astype(mx.float32)).sum() for g in gradients.values()), mx.array(0.0))
    norm = mx.sqrt(squares)
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return {name: gradient * scale.astype(gradient.dtype) for name, gradient in gradients.items()}, norm


def trainable(model: nn.Module) -> Weights:
    """The weights of a module that are trained, by name."""
    return dict(tree_flatten(model.trainable_parameters()))


def assign(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
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

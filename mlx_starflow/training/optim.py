"""Learning rate, AdamW with parameter groups, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx.optimizers import AdamW
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


class GroupedAdamW:
    """AdamW (arXiv 1711.05101, with bias correction) over weights by name, in two groups.

    Weights for which `is_fast(name)` learn `factor` times faster and do not decay. That suits embeddings: a row is
    touched only when its token occurs.
    """

    def __init__(
        self,
        weights: Mapping[str, mx.array],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        is_fast: Callable[[str], bool] = lambda name: False,
        factor: float = 1.0,
    ):
        fast = [name for name in weights if is_fast(name)]
        rest = [name for name in weights if not is_fast(name)]
        self._groups = [(rest, 1.0, self._adamw(betas, weight_decay)), (fast, factor, self._adamw(betas, 0.0))]
        for names, _, optimizer in self._groups:
            optimizer.init({name: weights[name] for name in names})

    @staticmethod
    def _adamw(betas: tuple[float, float], weight_decay: float) -> AdamW:
        return AdamW(0.0, betas=list(betas), weight_decay=weight_decay, bias_correction=True)

    def apply(self, gradients: Mapping[str, mx.array], weights: Mapping[str, mx.array], lr: mx.array) -> Weights:
        """New weights after one step at the learning rate `lr`, a scalar array."""
        updated: Weights = {}
        for names, factor, optimizer in self._groups:
            if names:
                optimizer.learning_rate = lr * factor
                chosen = [{name: arrays[name] for name in names} for arrays in (gradients, weights)]
                updated.update(optimizer.apply_gradients(*chosen))
        return updated

    @property
    def state(self) -> list[dict[str, Any]]:
        """Each group's MLX optimizer state, updated in place by `apply`."""
        return [optimizer.state for _, _, optimizer in self._groups]

    def flat_state(self) -> Weights:
        """The state by name, for a checkpoint."""
        flat: Weights = {}
        for index, (names, _, optimizer) in enumerate(self._groups):
            flat[f"{index}/step"] = optimizer.state["step"]
            flat[f"{index}/learning_rate"] = optimizer.state["learning_rate"]
            flat.update({f"{name}/{key}": value for name in names for key, value in optimizer.state[name].items()})
        return flat

    def load_flat_state(self, flat: Mapping[str, mx.array]) -> None:
        """Take up what `flat_state` gave. Raises StarflowError if it is of other weights."""
        check_same(flat, self.flat_state(), "the optimizer's state")
        for index, (names, _, optimizer) in enumerate(self._groups):
            optimizer.state["step"] = flat[f"{index}/step"]
            optimizer.state["learning_rate"] = flat[f"{index}/learning_rate"]
            for name in names:
                optimizer.state[name].update({key: flat[f"{name}/{key}"] for key in optimizer.state[name]})


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

"""Optimizers over weights by name: MLX's AdamW, Adafactor and Muon, and SinkGD, in groups that learn differently."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Adafactor, AdamW, Muon, Optimizer

from mlx_starflow.training.config import OPTIMIZERS
from mlx_starflow.training.loop.weights import Weights, check_same

SINKHORN_ROUNDS = 5
SINKGD_STEP = 0.05
"""SinkGD's step in units of the learning rate."""

MUON_RMS = 0.2
"""Root mean square of an entry of Muon's step in units of the learning rate: about that of AdamW's later steps."""


def multi_normalize(gradient: mx.array, rounds: int = SINKHORN_ROUNDS) -> mx.array:
    """Matrix `[m, n]` -> one whose rows and columns have a root mean square of nearly 1 (arXiv 2502.06742).

    Each round normalizes the rows and then the columns. Rows and columns of zeros stay zero.
    """
    x = gradient
    for _ in range(rounds):
        x = x * mx.rsqrt(mx.mean(mx.square(x), axis=1, keepdims=True) + 1e-30)
        x = x * mx.rsqrt(mx.mean(mx.square(x), axis=0, keepdims=True) + 1e-30)
    return x


class SinkGD(Optimizer):
    """Gradient descent with multi-normalized gradients, for matrices (arXiv 2502.06742): it keeps no state.

    w <- w - lr * weight_decay * w - 0.05 * lr * multi_normalize(gradient)
    """

    def __init__(self, learning_rate: float, weight_decay: float = 0.0):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Nothing is kept."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        lr = self.learning_rate.astype(parameter.dtype)
        step = multi_normalize(gradient.astype(mx.float32)).astype(parameter.dtype)
        return parameter * (1 - lr * self.weight_decay) - SINKGD_STEP * lr * step


class OrthogonalSteps(Muon):
    """MLX's Muon with decoupled weight decay and steps of the size of AdamW's (arXiv 2502.16982).

        v <- 0.95 v + 0.05 g          w <- w - lr * weight_decay * w - lr * factor * newton_schulz(0.95 v + 0.05 g)

    MLX scales by sqrt(max(1, m / n)) for a matrix `[m, n]`, so that a factor of 0.2 sqrt(n) makes the root mean square
    of an entry 0.2.
    """

    def __init__(self, learning_rate: float, weight_decay: float = 0.0):
        super().__init__(learning_rate, weight_decay=0.0)
        self.decoupled_decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        lr = self.learning_rate.astype(parameter.dtype)
        step = super().apply_single(gradient, mx.zeros_like(parameter), state)
        factor = MUON_RMS * math.sqrt(parameter.shape[1])
        return parameter * (1 - lr * self.decoupled_decay) + factor * step


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the weights of a module's embeddings, which are matrices that no vector is multiplied with."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


class GroupedOptimizer:
    """An optimizer over weights by name, in groups.

    kind "adamw" (arXiv 1711.05101, with bias correction) and "adafactor" (arXiv 1804.04235, without its relative steps
    and parameter scale, so that the learning rate is in the same units) are for all weights; "muon" and "sinkgd" are
    for the matrices, with AdamW for the rest: vectors, embeddings and whatever is not 2-dimensional.

    Weights for which `is_fast(name)` learn `factor` times faster and do not decay, always by AdamW or Adafactor. That
    suits embeddings: a row is touched only when its token occurs.
    """

    def __init__(
        self,
        weights: Mapping[str, mx.array],
        *,
        kind: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 1e-4,
        is_fast: Callable[[str], bool] = lambda name: False,
        factor: float = 1.0,
        embeddings: Collection[str] = (),
    ):
        assert kind in OPTIMIZERS
        self.kind = kind
        matrix: Optimizer | None = None
        if kind == "muon":
            matrix = OrthogonalSteps(0.0, weight_decay)
        elif kind == "sinkgd":
            matrix = SinkGD(0.0, weight_decay)

        def is_matrix(name: str) -> bool:
            return matrix is not None and weights[name].ndim == 2 and name not in embeddings

        def plain(decay: float) -> Optimizer:
            if kind == "adafactor":
                return Adafactor(0.0, weight_decay=decay, scale_parameter=False, relative_step=False)
            return AdamW(0.0, betas=list(betas), weight_decay=decay, bias_correction=True)

        fast = [name for name in weights if is_fast(name)]
        slow = [name for name in weights if not is_fast(name)]
        self._groups: list[tuple[list[str], float, Optimizer]] = [
            ([name for name in slow if not is_matrix(name)], 1.0, plain(weight_decay)),
            (fast, factor, plain(0.0)),
        ]
        if matrix is not None:
            self._groups.append(([name for name in slow if is_matrix(name)], 1.0, matrix))
        for names, _, optimizer in self._groups:
            optimizer.init({name: weights[name] for name in names})

    def apply(self, gradients: Mapping[str, mx.array], weights: Mapping[str, mx.array], lr: mx.array) -> Weights:
        """New weights after one step at the learning rate `lr`, a scalar array."""
        updated: Weights = {}
        for names, factor, optimizer in self._groups:
            if names:
                optimizer.learning_rate = lr * factor
                chosen = [{name: arrays[name] for name in names} for arrays in (gradients, weights)]
                updated.update(optimizer.apply_gradients(*chosen))
        return updated

    def rename(self, names: Mapping[str, str], function: Callable[[mx.array], mx.array]) -> None:
        """Weights are called by other names from now on, and `function` makes their new state of the old one."""
        for own, _, optimizer in self._groups:
            for index, old in enumerate(own):
                if old in names:
                    own[index] = names[old]
                    state = optimizer.state.pop(old)
                    optimizer.state[own[index]] = {key: function(value) for key, value in state.items()}

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
        """Take up what `flat_state` gave. Raises StarflowError if it is of other weights or another optimizer."""
        check_same(flat, self.flat_state(), "the optimizer's state")
        for index, (names, _, optimizer) in enumerate(self._groups):
            optimizer.state["step"] = flat[f"{index}/step"]
            optimizer.state["learning_rate"] = flat[f"{index}/learning_rate"]
            for name in names:
                optimizer.state[name].update({key: flat[f"{name}/{key}"] for key in optimizer.state[name]})

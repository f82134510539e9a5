"""The tokens of a flow block on a Linux CPU, in NumPy: a step computes so little besides the C++ network that building
and evaluating MLX's graph would take longer than the numbers do."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_starflow.cpu.network import NativeNetwork
from mlx_starflow.kernels.affine import LEAST_SCALE, SOFTPLUS_SHIFT, AffineMap, GuidanceMode, GuidanceTarget

quietly = np.errstate(over="ignore", divide="ignore", invalid="ignore")
"""Guesses may be far off: a result that is not finite is not for NumPy to report."""


class NativeInverter:
    """A `sampling.inverter.Inverter` with a `NativeNetwork`."""

    def __init__(
        self,
        network: NativeNetwork,
        z: mx.array,
        first_input: mx.array | None,
        affine: AffineMap,
        mode: GuidanceMode | None,
        weight: float | mx.array,
        target: GuidanceTarget,
    ):
        """Arguments as for `cpu.fast_inverter`."""
        self._network, self._affine, self._mode, self._target = network, affine, mode, target
        self._z = np.array(z.astype(mx.float32))
        self._x = self._z.copy()
        self._first_input = None if first_input is None else np.array(first_input.astype(mx.float32))
        self._weight = np.broadcast_to(np.array(weight, np.float64), (*self._z.shape[:2], 1))

    def data(self, start: int, stop: int) -> mx.array:
        return mx.array(self._x[:, start:stop])

    def write(self, start: int, tokens: mx.array) -> None:
        self._x[:, start : start + tokens.shape[1]] = np.asarray(tokens.astype(mx.float32))

    def remember(self, start: int, stop: int) -> None:
        self._network.parameters(self._inputs(start, stop, 0))

    @quietly
    def predict(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        mu, log_sigma = self._predict(start, stop, 0)
        return mx.array(mu.astype(np.float32)), mx.array(log_sigma.astype(np.float32))

    @quietly
    def invert(self, start: int, stop: int, lag: int = 0) -> None:
        mu, log_sigma = self._predict(start, stop, lag)
        self._x[:, start:stop] = self._z[:, start:stop] * np.exp(log_sigma) + mu

    @quietly
    def sweep(self, start: int, stop: int, lag: int = 0) -> float:
        new = self._x[:, start:stop]
        old = new.copy()
        self.invert(start, stop, lag)
        return float(np.square(new - old).mean() / np.square(new).mean())

    def _inputs(self, start: int, stop: int, lag: int) -> np.ndarray:
        inputs = self._x[:, max(start - 1, 0) - lag : stop - 1 - lag]
        inputs = np.concatenate([inputs] * (1 if self._mode is None else 2))
        if start == 0 and self._first_input is not None:
            inputs = np.concatenate([self._first_input, inputs], axis=1)
        return inputs

    def _predict(self, start: int, stop: int, lag: int) -> tuple[np.ndarray, np.ndarray]:
        parameters = self._network.parameters(self._inputs(start, stop, lag))
        return predict(parameters, self._affine, self._mode, self._weight[:, start:stop], self._target)


def predict(
    parameters: np.ndarray, affine: AffineMap, mode: GuidanceMode | None, weight: np.ndarray, target: GuidanceTarget
) -> tuple[np.ndarray, np.ndarray]:
    """`kernels.affine.predict` in NumPy, in double precision."""
    parameters = parameters.astype(np.float64)
    if affine.clip:
        parameters = affine.clip * np.tanh(parameters / affine.clip)
    channels, batch = parameters.shape[-1] // 2, len(parameters) // 2
    log_sigma, mu = parameters[..., :channels], parameters[..., channels:]
    if affine.softplus:
        log_sigma = np.log(np.logaddexp(log_sigma + SOFTPLUS_SHIFT, 0.0))
    if mode is None:
        return mu, log_sigma
    mu, shift = mu[:batch], mu[:batch] - mu[batch:]
    log_sigma, widening = log_sigma[:batch], log_sigma[:batch] - log_sigma[batch:]
    if mode == "starflow":
        excess = weight * -np.expm1(2 * np.minimum(widening, 0.0))
        return mu + (weight - excess) / (1 + excess) * shift, log_sigma - 0.5 * np.log1p(excess)
    if "b" in target:
        mu = mu + weight * shift
    if "a" in target and mode == "tarflow":
        log_sigma = log_sigma + weight * widening
    elif "a" in target:
        log_sigma = log_sigma + np.log1p(np.maximum(-weight * np.expm1(-widening), LEAST_SCALE - 1))
    return mu, log_sigma

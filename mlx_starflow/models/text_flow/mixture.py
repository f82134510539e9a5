"""The mixture coupling of text flows (arXiv 2507.00425): an invertible map that can represent a discrete choice.

A token is in groups of m numbers, and the density of a group is a mixture of K Gaussians with diagonal covariances,

    p(x) = sum_k w_k N(x; mu_k, sigma_k^2)          (w, mu, sigma) = net(tokens before)

Its numbers are mapped one after the other, each by the distribution function of the mixture given those before it in
the group, to uniform numbers and from there to normal ones (Rosenblatt's transformation; for m = 1 it is F alone):

    z_i = Phi^-1(F_i(x_i | x_<i))                   log|dz_i / dx_i| = log p(x_i | x_<i) - log N(z_i; 0, 1)

Everything is computed from logarithms of probabilities, of both tails: neither F near 0 nor F near 1 loses its digits,
and no z is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LOG_2 = math.log(2)

LEAST_LOG_STD, MOST_LOG_STD = math.log(1e-2), math.log(1e2)
"""Of the components: narrower ones would have densities that float32 cannot tell apart."""

POINTS, ROUNDS = 32, 5
"""Of the search for the inverse: each round looks at so many points, and goes on between two of them."""

# erfc(x) = t exp(-x^2 + P(t)) with t = 2 / (2 + x), to 1.2e-7 of itself for all x >= 0 (Numerical Recipes, 6.2).
_ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223,
    0.17087277,
)  # fmt: skip


def _polynomial(x: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    total = mx.full(x.shape, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def _log_outer(a: mx.array) -> mx.array:
    """log Phi(-a) for a >= 0."""
    x = a * math.sqrt(0.5)
    t = 2.0 / (2.0 + x)
    return mx.log(t) + _polynomial(t, _ERFC) - x * x - LOG_2


def _tails(x: mx.array) -> tuple[mx.array, mx.array]:
    outer = _log_outer(mx.abs(x))
    inner = mx.log1p(-mx.exp(outer))
    below = x < 0
    return mx.where(below, outer, inner), mx.where(below, inner, outer)


_log_tails = mx.custom_function(_tails)


@_log_tails.vjp
def _(primals: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
    density = -0.5 * mx.square(primals) - HALF_LOG_2PI
    return cotangents[0] * mx.exp(density - outputs[0]) - cotangents[1] * mx.exp(density - outputs[1])


log_tails = cast(Callable[[mx.array], tuple[mx.array, mx.array]], _log_tails)
"""x -> (log Phi(x), log Phi(-x)), to about 1e-7 of themselves, however small Phi is."""


def _quantile(lower: mx.array, upper: mx.array) -> mx.array:
    tail = mx.minimum(lower, upper)
    # A first guess to 4.5e-4 (Abramowitz and Stegun, 26.2.23), made exact by Newton's method for log Phi(-a) = tail.
    t = mx.sqrt(-2 * mx.minimum(tail, -1e-30))
    a = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    a = mx.maximum(a, 0.0)
    for _ in range(2):
        found = _log_outer(a)
        a = a + (found - tail) * mx.exp(found + 0.5 * a * a + HALF_LOG_2PI)
    return mx.where(lower <= upper, -a, a)


_log_quantile = mx.custom_function(_quantile)


@_log_quantile.vjp
def _(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    # dz = dF / phi(z): of the tail that z was computed from alone, whose logarithm has all digits.
    lower, upper = primals
    log_density = -0.5 * mx.square(output) - HALF_LOG_2PI
    below = lower <= upper
    slope = cotangent * mx.exp(mx.where(below, lower, upper) - log_density)
    return mx.where(below, slope, 0.0), mx.where(below, 0.0, -slope)


log_quantile = cast(Callable[[mx.array, mx.array], mx.array], _log_quantile)
"""(log F, log(1 - F)) -> Phi^-1(F)."""


@dataclass(frozen=True)
class Mixture:
    """How a block's outputs become the mixtures of its tokens.

    Attributes:
        components: Gaussians of a mixture, K.
        groups: of a token's numbers, each with a mixture of its own, independent of the others given the tokens before.
        size: numbers of a group, m.
    """

    components: int
    groups: int
    size: int

    @property
    def outputs(self) -> int:
        """Numbers that a token's mixtures are made of."""
        return self.groups * self.components * (1 + 2 * self.size)

    def parts(self, parameters: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Outputs `[..., outputs]` -> log-weights `[..., groups, K]`, means and log sigma `[..., groups, K, m]`."""
        shape = (*parameters.shape[:-1], self.groups, self.components)
        parameters = parameters.astype(mx.float32)
        count = self.groups * self.components
        logits, mean, log_std = mx.split(parameters, [count, count * (1 + self.size)], axis=-1)
        log_weights = logits.reshape(shape)
        log_weights = log_weights - mx.logsumexp(log_weights, axis=-1, keepdims=True)
        log_std = mx.clip(log_std, LEAST_LOG_STD, MOST_LOG_STD)
        return log_weights, mean.reshape(*shape, self.size), log_std.reshape(*shape, self.size)

    def outputs_of(self, log_weights: mx.array, mean: mx.array, log_std: mx.array) -> mx.array:
        """The inverse of `parts`, up to the scale of the weights and the limits of sigma."""
        rows = log_weights.shape[:-2]
        return mx.concatenate([each.reshape(*rows, -1) for each in (log_weights, mean, log_std)], axis=-1)

    def forward(self, parameters: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
        """Data -> noise.

        Args:
            parameters: outputs of the network, `[B, N, outputs]`.
            x: tokens `[B, N, groups * m]`.

        Returns:
            z and the per-dimension log-det, float32, both shaped as x.
        """
        log_weights, mean, log_std = self.parts(parameters)
        x = x.astype(mx.float32)
        grouped = x.reshape(*x.shape[:-1], self.groups, 1, self.size)
        standard = (grouped - mean) * mx.exp(-log_std)
        log_density = -0.5 * mx.square(standard) - log_std - HALF_LOG_2PI
        joint = log_weights[..., None] + mx.cumsum(log_density, axis=-1)
        before = joint - log_density  # log-weights times the densities of the numbers before
        whole, past = mx.logsumexp(joint, axis=-2), mx.logsumexp(before, axis=-2)
        lower, upper = log_tails(standard)
        z = log_quantile(mx.logsumexp(before + lower, axis=-2) - past, mx.logsumexp(before + upper, axis=-2) - past)
        log_det = whole - past + 0.5 * mx.square(z) + HALF_LOG_2PI
        return z.reshape(x.shape), log_det.reshape(x.shape)

    def inverse(self, parameters: mx.array, z: mx.array) -> mx.array:
        """Noise -> data: z as `forward` gives it -> x.

        A number lies between the least and the greatest of its components' quantiles; a search that narrows this
        interval `ROUNDS` times finds it, and a step of Newton's method within what is left makes it exact.
        """
        log_weights, mean, log_std = self.parts(parameters)
        z = z.astype(mx.float32)
        grouped = z.reshape(*z.shape[:-1], self.groups, 1, self.size)
        numbers: list[mx.array] = []
        for index in range(self.size):
            target, centre, log_scale = grouped[..., index], mean[..., index], log_std[..., index]
            x = _solve(log_weights, centre, log_scale, target)
            numbers.append(x)
            density = -0.5 * mx.square((x - centre) * mx.exp(-log_scale)) - log_scale
            log_weights = log_weights + density
            log_weights = log_weights - mx.logsumexp(log_weights, axis=-1, keepdims=True)
        return mx.concatenate(numbers, axis=-1).reshape(z.shape)

    def log_likelihood(self, parameters: mx.array, x: mx.array) -> mx.array:
        """log p(x) of tokens `[B, N, groups * m]`, `[B, N]`: without noise, for comparison."""
        log_weights, mean, log_std = self.parts(parameters)
        grouped = x.astype(mx.float32).reshape(*x.shape[:-1], self.groups, 1, self.size)
        density = -0.5 * mx.square((grouped - mean) * mx.exp(-log_std)) - log_std - HALF_LOG_2PI
        return mx.logsumexp(log_weights + density.sum(axis=-1), axis=-1).sum(axis=-1)


def _solve(log_weights: mx.array, mean: mx.array, log_std: mx.array, target: mx.array) -> mx.array:
    """x with Phi^-1(F(x)) = target `[..., 1]`, F that of one-dimensional mixtures `[..., K]`; `[..., 1]`."""
    std = mx.exp(log_std)
    quantiles = mean + std * target
    low, high = quantiles.min(axis=-1, keepdims=True), quantiles.max(axis=-1, keepdims=True)
    below = target < 0
    lower_target, upper_target = log_tails(target)
    # The smaller tail of the target is compared with the same tail of F.
    wanted = mx.where(below, lower_target, upper_target)

    def excess(x: mx.array) -> mx.array:
        """How much too large F is at points `[..., P]`, as a difference of logarithms; increasing in x."""
        tails = log_tails((x[..., None] - mean[..., None, :]) / std[..., None, :])
        lower, upper = (mx.logsumexp(log_weights[..., None, :] + tail, axis=-1) for tail in tails)
        return mx.where(below, lower - wanted, wanted - upper)

    places = mx.arange(1, POINTS + 1, dtype=mx.float32) / (POINTS + 1)
    for _ in range(ROUNDS):
        points = low + (high - low) * places
        under = (excess(points) < 0).sum(axis=-1, keepdims=True)
        width = (high - low) / (POINTS + 1)
        low, high = low + width * under, mx.minimum(low + width * (under + 1), high)
    x = 0.5 * (low + high)
    standard = (x - mean) / std
    log_density = mx.logsumexp(log_weights - 0.5 * mx.square(standard) - log_std - HALF_LOG_2PI, axis=-1, keepdims=True)
    step = excess(x) * mx.exp(mx.minimum(wanted - log_density, 60.0))
    return mx.clip(x - step, low, high)

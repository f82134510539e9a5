"""Classifier-free guidance for affine flows."""

from __future__ import annotations

import mlx.core as mx


def guide(
    mu: mx.array, log_sigma: mx.array, mu_null: mx.array, log_sigma_null: mx.array, weight: float
) -> tuple[mx.array, mx.array]:
    """STARFlow's rule (arXiv 2506.06276): (mu, log sigma) of the Gaussian p_cond^(1 + w) / p_null^w, made safe.

    Where the conditional Gaussian is the wider one, the quotient would not be normalizable: there the null's variance
    is taken to be the conditional's, and the rule becomes the usual extrapolation of the means.
    """
    ratio = mx.exp(2 * mx.minimum(log_sigma - log_sigma_null, 0.0))
    denominator = 1 + weight - weight * ratio
    guided = ((1 + weight) * mu - weight * ratio * mu_null) / denominator
    return guided, log_sigma - 0.5 * mx.log(denominator)


def extrapolate(
    mu: mx.array, log_sigma: mx.array, mu_null: mx.array, log_sigma_null: mx.array, weight: float, what: str = "ab"
) -> tuple[mx.array, mx.array]:
    """TarFlow's rule (arXiv 2412.06329): mean ("b") and log-scale ("a") move away from the null's by `weight`."""
    if "b" in what:
        mu = mu + weight * (mu - mu_null)
    if "a" in what:
        log_sigma = log_sigma + weight * (log_sigma - log_sigma_null)
    return mu, log_sigma

"""Classifier-free guidance for affine flows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_starflow.errors import StarflowError

GuidanceRule = Callable[[mx.array, mx.array, mx.array, mx.array, "float | mx.array"], tuple[mx.array, mx.array]]
"""(mu, log sigma) with the condition, (mu, log sigma) without it, weight -> guided (mu, log sigma)."""


def guide(
    mu: mx.array, log_sigma: mx.array, mu_null: mx.array, log_sigma_null: mx.array, weight: float | mx.array
) -> tuple[mx.array, mx.array]:
    """STARFlow's rule (arXiv 2506.06276): (mu, log sigma) of the Gaussian p_cond^(1 + w) / p_null^w, made safe.

    Where the conditional Gaussian is the wider one, the quotient would not be normalizable: there the null's variance
    is taken to be the conditional's, and the rule becomes the usual extrapolation of the means.
    """
    # With r = (sigma / sigma_null)^2, at most 1: mu' = ((1 + w) mu - w r mu_null) / d and sigma'^2 = sigma^2 / d, where
    # d = 1 + w - w r. As differences they lose no digits where the two predictions are close.
    excess = weight * -mx.expm1(2 * mx.minimum(log_sigma - log_sigma_null, 0.0))
    guided = mu + (weight - excess) / (1 + excess) * (mu - mu_null)
    return guided, log_sigma - 0.5 * mx.log1p(excess)


def extrapolate(
    mu: mx.array,
    log_sigma: mx.array,
    mu_null: mx.array,
    log_sigma_null: mx.array,
    weight: float | mx.array,
    what: str = "ab",
) -> tuple[mx.array, mx.array]:
    """TarFlow's rule (arXiv 2412.06329): mean ("b") and log-scale ("a") move away from the null's by `weight`."""
    if "b" in what:
        mu = mu + weight * (mu - mu_null)
    if "a" in what:
        log_sigma = log_sigma + weight * (log_sigma - log_sigma_null)
    return mu, log_sigma


RULES = ("quotient", "extrapolate")
"""Names of the rules: `guide`, STARFlow's, and `extrapolate`, TarFlow's."""


def guidance_rule(name: str, what: str = "ab") -> GuidanceRule:
    """The rule of a flow; `what` it guides, "a", "b" or "ab", can be chosen for `extrapolate` only.

    Raises:
        StarflowError: the rule does not know this `what`.
    """
    if what not in ("ab", "a", "b"):
        raise StarflowError(f"guide_what must be ab, a (scale) or b (mean), not {what!r}")
    if name == "extrapolate":
        return partial(extrapolate, what=what)
    if what != "ab":
        raise StarflowError("guide_what is a choice of TarFlow's guidance; this flow guides mean and scale together")
    return guide

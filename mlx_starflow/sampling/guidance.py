"""Classifier-free guidance for affine flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import affine_inverse, extrapolate, guide, predict
from mlx_starflow.kernels.plain import Array, namespace

GuidanceRule = Callable[[Array, Array, Array, Array, "float | Array"], tuple[Array, Array]]
"""(mu, log sigma) with the condition, (mu, log sigma) without it, weight -> guided (mu, log sigma)."""


def guidance_rule(name: str, what: str = "ab") -> GuidanceRule:
    """The rule of a flow by its name in `kernels.affine.RULES`; `what` is the choice of "extrapolate".

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


@dataclass
class Guidance:
    """How conditional and null predictions are combined.

    Attributes:
        rule: a name in `kernels.affine.RULES`, which is computed in one pass, or a function.
        weight: of guidance, a number, or an array that broadcasts to `[B, N, 1]`.
        annealed: grow the weight linearly over the sequence.
        what: what "extrapolate" guides.
    """

    rule: str | GuidanceRule
    weight: float | mx.array
    annealed: bool = False
    what: str = "ab"

    def __post_init__(self) -> None:
        if isinstance(self.rule, str):
            guidance_rule(self.rule, self.what)

    def at(self, start: int, count: int, total: int) -> float | mx.array:
        """The weight for `count` tokens from number `start` of `total` on."""
        if not self.annealed:
            return self.weight
        return self.weight * (mx.arange(start + 1, start + count + 1) / total)[None, :, None]

    def affine(self, raw: Array, clip: float, softplus: bool, weight: float | Array) -> tuple[Array, Array]:
        """Raw outputs `[2 * B, n, 2 * C]`, with the condition and then without -> (mu, log sigma) `[B, n, C]`."""
        if isinstance(self.rule, str):
            return predict(raw, clip, softplus, self.rule, weight, self.what)
        mu, log_sigma = predict(raw, clip, softplus)
        split = namespace(raw).split
        (mu, mu_null), (log_sigma, log_sigma_null) = split(mu, 2), split(log_sigma, 2)
        return self.rule(mu, log_sigma, mu_null, log_sigma_null, weight)

    def inverse(self, raw: Array, z: Array, clip: float, softplus: bool, weight: float | Array) -> Array:
        """Raw outputs, as `affine` takes them, and noise `[B, n, C]` -> data."""
        if isinstance(self.rule, str):
            return affine_inverse(raw, z, clip, softplus, self.rule, weight, self.what)
        mu, log_sigma = self.affine(raw, clip, softplus, weight)
        return z * namespace(z).exp(log_sigma) + mu

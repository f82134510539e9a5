"""Classifier-free guidance for affine flows, and the options of sampling that a guided flow depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.affine import (
    GUIDANCE_MODES,
    AffineMap,
    GuidanceMode,
    GuidanceTarget,
    affine_inverse,
    itarflow_guidance,
    predict,
    starflow_guidance,
    tarflow_guidance,
)
from mlx_starflow.models.configs import plain_fields
from mlx_starflow.sampling.cache import KV_BITS, KVBits

GuidanceFunction = Callable[[mx.array, mx.array, mx.array, mx.array, "float | mx.array"], "tuple[mx.array, mx.array]"]
"""(mu, log sigma) with the condition, (mu, log sigma) without it, weight -> guided (mu, log sigma)."""


@dataclass(frozen=True)
class SamplingOptions:
    """What a guided flow depends on besides its condition; `sample` explains each.

    Raises:
        StarflowError: the weight, the temperature or the number of blocks is out of range, or the mode is unknown.
    """

    guidance: float = 0.0
    attn_temp: float = 1.0
    annealed_guidance: bool = False
    guidance_target: GuidanceTarget = "ab"
    guidance_mode: GuidanceMode | None = None
    guided_blocks: int | None = None
    kv_bits: KVBits = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        if not 0 <= self.guidance < math.inf:
            raise StarflowError(f"guidance must be 0 or more, not {self.guidance:g}")
        if not 0 < self.attn_temp < math.inf:
            raise StarflowError(f"the attention temperature must be greater than 0, not {self.attn_temp:g}")
        if self.guidance_target not in ("ab", "a", "b"):
            raise StarflowError(f"guidance_target must be ab, a (scale) or b (mean), not {self.guidance_target!r}")
        if self.guidance_mode not in (None, *GUIDANCE_MODES):
            raise StarflowError(
                f"unknown guidance mode {self.guidance_mode!r}; it must be one of {', '.join(GUIDANCE_MODES)}"
            )
        if self.guided_blocks is not None and self.guided_blocks < 1:
            raise StarflowError(f"the number of guided blocks must be 1 or more, not {self.guided_blocks}")
        if self.kv_bits not in KV_BITS:
            raise StarflowError(
                "keys and values are cached in 8 or 4 bits, in (8, 4), the null branch's in 4, or 0 as they are, not "
                f"{self.kv_bits!r}"
            )


def guidance_function(mode: GuidanceMode, target: GuidanceTarget = "ab") -> GuidanceFunction:
    """The function of a guidance mode; `target` is a choice of the modes "tarflow" and "itarflow".

    Raises:
        StarflowError: the mode does not have this target.
    """
    if mode != "starflow":
        return partial(tarflow_guidance if mode == "tarflow" else itarflow_guidance, target=target)
    if target != "ab":
        raise StarflowError(
            "guidance_target is a choice of TarFlow's guidance; STARFlow's guides mean and scale together"
        )
    return starflow_guidance


@dataclass
class Guidance:
    """How the predictions with the condition and with the null condition are combined.

    Attributes:
        mode: a guidance mode, which is computed in one pass, or a function.
        weight: of guidance, a number, or an array that broadcasts to `[B, N, 1]`.
        annealed: grow the weight linearly over the sequence.
        target: what the modes "tarflow" and "itarflow" guide.
    """

    mode: GuidanceMode | GuidanceFunction
    weight: float | mx.array
    annealed: bool = False
    target: GuidanceTarget = "ab"

    def __post_init__(self) -> None:
        if isinstance(self.mode, str):
            guidance_function(self.mode, self.target)  # its errors

    def at(self, start: int, count: int, total: int) -> float | mx.array:
        """The weight for `count` tokens from number `start` of `total` on."""
        if not self.annealed:
            return self.weight
        return self.weight * (mx.arange(start + 1, start + count + 1) / total)[None, :, None]

    def predict(self, parameters: mx.array, affine: AffineMap, weight: float | mx.array) -> tuple[mx.array, mx.array]:
        """Affine parameters `[2 * B, n, 2 * C]`, with the condition and then without -> (mu, log sigma) `[B, n, C]`."""
        if isinstance(self.mode, str):
            return predict(parameters, affine, self.mode, weight, self.target)
        mu, log_sigma = predict(parameters, affine)
        (mu, mu_null), (log_sigma, log_sigma_null) = mx.split(mu, 2), mx.split(log_sigma, 2)
        return self.mode(mu, log_sigma, mu_null, log_sigma_null, weight)

    def inverse(self, parameters: mx.array, z: mx.array, affine: AffineMap, weight: float | mx.array) -> mx.array:
        """Affine parameters, as `predict` takes them, and noise `[B, n, C]` -> data."""
        if isinstance(self.mode, str):
            return affine_inverse(parameters, z, affine, self.mode, weight, self.target)
        mu, log_sigma = self.predict(parameters, affine, weight)
        return z * mx.exp(log_sigma) + mu

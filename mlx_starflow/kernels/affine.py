"""From a flow block's affine parameters to its affine map: soft clip, softplus or exp, guidance, and the map itself.

Affine parameters `[B, N, 2 * C]` are what a block's network gives: for each token what becomes log sigma, then mu.

    log sigma = s, or log softplus(s + SOFTPLUS_SHIFT)      (s, mu) = parameters, or clip * tanh(parameters / clip)

Everything is float32, whatever the network's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, cast

import mlx.core as mx

from mlx_starflow.kernels import Arrays, enabled, with_gradient

SOFTPLUS_SHIFT = math.log(math.e - 1)
"""softplus(0 + this) = 1: an untrained block is the identity."""

GuidanceMode = Literal["starflow", "tarflow", "itarflow"]
"""How guidance combines two predictions: by `starflow_guidance`, `tarflow_guidance` or `itarflow_guidance`."""

GUIDANCE_MODES: tuple[GuidanceMode, ...] = ("starflow", "tarflow", "itarflow")

GuidanceTarget = Literal["ab", "a", "b"]
"""What the modes "tarflow" and "itarflow" guide: the scale ("a"), the mean ("b") or both."""

LEAST_SCALE = 1e-3
"""Least share of sigma that the mode "itarflow" leaves of it."""

THREADGROUP = 256


@dataclass(frozen=True)
class AffineMap:
    """How a block's affine parameters become (mu, log sigma).

    Attributes:
        clip: limit of the soft clip; 0: none.
        softplus: sigma is a softplus rather than an exponential.
    """

    clip: float = 0.0
    softplus: bool = False


def affine_forward(parameters: mx.array, x: mx.array, affine: AffineMap) -> tuple[mx.array, mx.array]:
    """Data -> noise: z = (x - mu) / sigma and per-dimension log|det dz/dx| = -log sigma.

    Args:
        parameters: affine parameters, `[B, N, 2 * C]`.
        x: tokens `[B, N, C]`.
        affine: the map that the parameters are of.

    Returns:
        z and the log-det, float32 `[B, N, C]`.
    """
    x = x.astype(mx.float32)
    if enabled():
        z, log_det = _fused("forward", affine)(parameters, _limit(affine.clip), x)
        return z, log_det
    return _forward(*affine_plain(parameters, affine), x)


def predict(
    parameters: mx.array,
    affine: AffineMap,
    mode: GuidanceMode | None = None,
    weight: float | mx.array = 0.0,
    target: GuidanceTarget = "ab",
) -> tuple[mx.array, mx.array]:
    """(mu, log sigma), float32 `[B, N, C]`, guided if there is a guidance mode.

    Args:
        parameters: affine parameters, `[B, N, 2 * C]`; with guidance `[2 * B, N, 2 * C]`: of all samples with the
            condition and then of all samples with the null condition.
        affine: the map that the parameters are of.
        mode: of guidance; None: no guidance.
        weight: of guidance, a number or an array that broadcasts to `[B, N, 1]`.
        target: what the modes "tarflow" and "itarflow" guide.
    """
    if enabled():
        inputs = (parameters, _limit(affine.clip), *_weights(parameters, mode, weight))
        mu, log_sigma = _fused("predict", affine, mode, target)(*inputs)
        return mu, log_sigma
    return affine_plain(parameters, affine, mode, weight, target)


def affine_inverse(
    parameters: mx.array,
    z: mx.array,
    affine: AffineMap,
    mode: GuidanceMode | None = None,
    weight: float | mx.array = 0.0,
    target: GuidanceTarget = "ab",
) -> mx.array:
    """Noise -> data: x = z * sigma + mu, float32, for z `[B, N, C]`; the other arguments are those of `predict`."""
    z = z.astype(mx.float32)
    if enabled():
        inputs = (parameters, _limit(affine.clip), *_weights(parameters, mode, weight), z)
        return _fused("inverse", affine, mode, target)(*inputs)[0]
    return _inverse(*affine_plain(parameters, affine, mode, weight, target), z)[0]


def affine_plain(
    parameters: mx.array,
    affine: AffineMap,
    mode: GuidanceMode | None = None,
    weight: float | mx.array = 0.0,
    target: GuidanceTarget = "ab",
) -> tuple[mx.array, mx.array]:
    """`predict` in plain MLX."""
    parameters = parameters.astype(mx.float32)
    if affine.clip:
        parameters = affine.clip * mx.tanh(parameters / affine.clip)
    log_sigma, mu = mx.split(parameters, 2, axis=-1)
    if affine.softplus:
        log_sigma = mx.log(mx.logaddexp(log_sigma + SOFTPLUS_SHIFT, 0.0))
    if mode is None:
        return mu, log_sigma
    (mu, mu_null), (log_sigma, log_sigma_null) = mx.split(mu, 2), mx.split(log_sigma, 2)
    if mode == "starflow":
        return starflow_guidance(mu, log_sigma, mu_null, log_sigma_null, weight)
    combine = tarflow_guidance if mode == "tarflow" else itarflow_guidance
    return combine(mu, log_sigma, mu_null, log_sigma_null, weight, target)


def starflow_guidance(
    mu: mx.array, log_sigma: mx.array, mu_null: mx.array, log_sigma_null: mx.array, weight: float | mx.array
) -> tuple[mx.array, mx.array]:
    """STARFlow's guidance (arXiv 2506.06276): (mu, log sigma) of the Gaussian p_cond^(1 + w) / p_null^w, made safe.

    Where the conditional Gaussian is the wider one, that quotient could not be normalized: there the null's variance is
    taken to be the conditional's, and what is left is the usual extrapolation of the means.
    """
    # With r = (sigma / sigma_null)^2, at most 1: mu' = ((1 + w) mu - w r mu_null) / d and sigma'^2 = sigma^2 / d, where
    # d = 1 + w - w r. As differences they lose no digits where the two predictions are close.
    excess = weight * -mx.expm1(2 * mx.minimum(log_sigma - log_sigma_null, 0.0))
    guided = mu + (weight - excess) / (1 + excess) * (mu - mu_null)
    return guided, log_sigma - 0.5 * mx.log1p(excess)


def tarflow_guidance(
    mu: mx.array,
    log_sigma: mx.array,
    mu_null: mx.array,
    log_sigma_null: mx.array,
    weight: float | mx.array,
    target: GuidanceTarget = "ab",
) -> tuple[mx.array, mx.array]:
    """TarFlow's guidance (arXiv 2412.06329): mean ("b") and log-scale ("a") move away from the null's by `weight`."""
    if "b" in target:
        mu = mu + weight * (mu - mu_null)
    if "a" in target:
        log_sigma = log_sigma + weight * (log_sigma - log_sigma_null)
    return mu, log_sigma


def itarflow_guidance(
    mu: mx.array,
    log_sigma: mx.array,
    mu_null: mx.array,
    log_sigma_null: mx.array,
    weight: float | mx.array,
    target: GuidanceTarget = "ab",
) -> tuple[mx.array, mx.array]:
    """iTARFlow's guidance (arXiv 2604.20041): mean ("b") and sigma itself ("a") move away from the null's by `weight`.

    Where the null's sigma is so much the larger one that nothing or less would be left, `LEAST_SCALE` of sigma stays.
    """
    if "b" in target:
        mu = mu + weight * (mu - mu_null)
    if "a" in target:
        growth = -weight * mx.expm1(log_sigma_null - log_sigma)
        log_sigma = log_sigma + mx.log1p(mx.maximum(growth, LEAST_SCALE - 1))
    return mu, log_sigma


def _forward(mu: mx.array, log_sigma: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    return (x - mu) * mx.exp(-log_sigma), -log_sigma


def _inverse(mu: mx.array, log_sigma: mx.array, z: mx.array) -> tuple[mx.array]:
    return (z * mx.exp(log_sigma) + mu,)


def _predict(mu: mx.array, log_sigma: mx.array) -> tuple[mx.array, mx.array]:
    return mu, log_sigma


@cache
def _limit(clip: float) -> mx.array:
    return mx.array([clip], mx.float32)


def _weights(parameters: mx.array, mode: GuidanceMode | None, weight: float | mx.array) -> tuple[mx.array, ...]:
    """Guidance's weight as the kernels read it: one number, or one a token of all samples; none without guidance."""
    if mode is None:
        return ()
    if not isinstance(weight, mx.array):
        return (mx.array([weight], mx.float32),)
    weight = weight.astype(mx.float32)
    if weight.size > 1:
        weight = mx.broadcast_to(weight, (parameters.shape[0] // 2, parameters.shape[1], 1))
    return (weight.reshape(-1),)


class _Map(NamedTuple):
    """What is done with (mu, log sigma): in plain MLX, and as a kernel's last lines with the names in these."""

    plain: Callable[..., tuple[mx.array, ...]]
    inputs: list[str]
    outputs: list[str]
    source: str


_MAPS = {
    "forward": _Map(
        _forward,
        ["x"],
        ["z", "log_det"],
        "z[i] = (x[i] - mu) * metal::precise::exp(-log_sigma); log_det[i] = -log_sigma;",
    ),
    "inverse": _Map(_inverse, ["z"], ["x"], "x[i] = z[i] * metal::precise::exp(log_sigma) + mu;"),
    "predict": _Map(_predict, [], ["mean", "log_scale"], "mean[i] = mu; log_scale[i] = log_sigma;"),
}


@cache
def _fused(
    direction: str, affine: AffineMap, mode: GuidanceMode | None = None, target: GuidanceTarget = "ab"
) -> Callable[..., Arrays]:
    """A kernel of (parameters, limit of the clip, weights if there is guidance, what the map reads), with gradient."""
    kernel, outputs = _kernel(direction, mode), _MAPS[direction].outputs
    targeted = mode in ("tarflow", "itarflow")
    guidance = [("MEAN", "b" in target), ("SCALE", "a" in target)] if targeted else []

    def fused(parameters: mx.array, *others: mx.array) -> Arrays:
        batch, length, width = parameters.shape
        shape = (batch // (2 if mode else 1), length, width // 2)
        size = math.prod(shape)
        return kernel(
            inputs=[parameters, *others],
            template=[("T", parameters.dtype), ("CLIP", bool(affine.clip)), ("SOFTPLUS", affine.softplus), *guidance],
            grid=(size, 1, 1),
            threadgroup=(min(size, THREADGROUP), 1, 1),
            output_shapes=[shape] * len(outputs),
            output_dtypes=[mx.float32] * len(outputs),
        )

    def plain(parameters: mx.array, limit: mx.array, *others: mx.array) -> Arrays:
        weight: float | mx.array = 0.0
        if mode:
            weight, others = others[0], others[1:]
            weight = weight if weight.size == 1 else weight.reshape(parameters.shape[0] // 2, parameters.shape[1], 1)
        return _MAPS[direction].plain(*affine_plain(parameters, affine, mode, weight, target), *others)

    return with_gradient(fused, plain)


@cache
def _kernel(direction: str, mode: GuidanceMode | None) -> Callable[..., list[mx.array]]:
    the_map = _MAPS[direction]
    kernel = mx.fast.metal_kernel(
        name=f"starflow_affine_{direction}" + (f"_{mode}" if mode else ""),
        input_names=["parameters", "limit"] + ["weights"] * bool(mode) + the_map.inputs,
        output_names=the_map.outputs,
        header=_HEADER,
        source=_SOURCE + (_NULL + _GUIDANCE[mode] if mode else "") + the_map.source,
    )
    return cast(Callable[..., list[mx.array]], kernel)


# Metal has no log1p and no expm1. Both correct the rounding of 1 + x (resp. e^x) by the logarithm of what it became
# (Higham, Accuracy and Stability of Numerical Algorithms, section 1.14.1).
_HEADER = f"""
inline float starflow_log1p(float x) {{
    const float u = 1.0f + x;
    return u == 1.0f ? x : metal::precise::log(u) * (x / (u - 1.0f));
}}

inline float starflow_expm1(float x) {{
    const float u = metal::precise::exp(x);
    if (u == 1.0f) {{
        return x;
    }}
    return u - 1.0f == -1.0f ? -1.0f : (u - 1.0f) * (x / metal::precise::log(u));
}}

inline float starflow_log_sigma(float s, bool softplus) {{
    if (!softplus) {{
        return s;
    }}
    s += {SOFTPLUS_SHIFT!r}f;
    return metal::precise::log(metal::max(s, 0.0f) + starflow_log1p(metal::precise::exp(-metal::abs(s))));
}}

inline float starflow_clip(float parameter, float limit, bool clip) {{
    return clip ? limit * metal::precise::tanh(parameter / limit) : parameter;
}}
"""

# One thread a number of the output. The launch has no more threads than that.
_SOURCE = """
    const size_t i = thread_position_in_grid.x;
    const int channels = parameters_shape[2] / 2;
    const size_t token = i / channels;
    const size_t own = token * 2 * channels + i % channels;
    float log_sigma = starflow_log_sigma(starflow_clip(static_cast<float>(parameters[own]), limit[0], CLIP), SOFTPLUS);
    float mu = starflow_clip(static_cast<float>(parameters[own + channels]), limit[0], CLIP);
"""

_NULL = """
    const size_t tokens = size_t(parameters_shape[0] / 2) * parameters_shape[1];
    const size_t null = own + tokens * 2 * channels;
    const float log_sigma_null =
        starflow_log_sigma(starflow_clip(static_cast<float>(parameters[null]), limit[0], CLIP), SOFTPLUS);
    const float mu_null = starflow_clip(static_cast<float>(parameters[null + channels]), limit[0], CLIP);
    const float weight = weights[weights_shape[0] == 1 ? 0 : token];
"""

_GUIDANCE: dict[GuidanceMode, str] = {
    "starflow": """
    const float gap = log_sigma - log_sigma_null;
    const float excess = weight * -starflow_expm1(gap > 0.0f ? 0.0f : 2.0f * gap);  // a NaN stays one
    mu += (weight - excess) / (1.0f + excess) * (mu - mu_null);
    log_sigma -= 0.5f * starflow_log1p(excess);
""",
    "tarflow": """
    mu += MEAN ? weight * (mu - mu_null) : 0.0f;
    log_sigma += SCALE ? weight * (log_sigma - log_sigma_null) : 0.0f;
""",
    "itarflow": f"""
    mu += MEAN ? weight * (mu - mu_null) : 0.0f;
    const float gap = log_sigma_null - log_sigma;
    const float growth = -weight * starflow_expm1(gap > 60.0f ? 60.0f : gap);  // which exp can be taken of
    const float least = {LEAST_SCALE - 1!r}f;
    log_sigma += SCALE ? starflow_log1p(growth < least ? least : growth) : 0.0f;  // a NaN stays one
""",
}

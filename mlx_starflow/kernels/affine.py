"""From a flow block's raw outputs to its affine map: soft clip, softplus or exp, guidance, and the map itself.

Raw outputs `[B, N, 2 * C]` hold what becomes log sigma, then mu:

    log sigma = s, or log softplus(s + SOFTPLUS_SHIFT)      (s, mu) = raw, or clip * tanh(raw / clip)

Everything is float32, whatever the network's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_starflow.kernels import Arrays, enabled, with_gradient
from mlx_starflow.kernels.plain import Array, namespace

SOFTPLUS_SHIFT = math.log(math.e - 1)
"""softplus(0 + this) = 1: an untrained block is the identity."""

RULES = ("quotient", "extrapolate")
"""Names of guidance's rules: `guide`, STARFlow's, and `extrapolate`, TarFlow's."""

THREADGROUP = 256


def affine_forward(raw: mx.array, x: mx.array, clip: float, softplus: bool) -> tuple[mx.array, mx.array]:
    """Data -> noise: z = (x - mu) / sigma and per-dimension log|det dz/dx| = -log sigma.

    Args:
        raw: what the network gives for each token, `[B, N, 2 * C]`.
        x: tokens `[B, N, C]`.
        clip: limit of the soft clip; 0: none.
        softplus: sigma is a softplus rather than an exponential.

    Returns:
        z and the log-det, float32 `[B, N, C]`.
    """
    x = x.astype(mx.float32)
    if enabled():
        return tuple(_fused("forward", bool(clip), softplus)(raw, _limit(clip), x))
    return _forward(*affine_plain(raw, clip, softplus), x)


def predict(
    raw: Array,
    clip: float,
    softplus: bool,
    rule: str | None = None,
    weight: float | Array = 0.0,
    what: str = "ab",
) -> tuple[Array, Array]:
    """(mu, log sigma), float32 `[B, N, C]`, guided if there is a rule. NumPy arrays give float64 ones.

    Args:
        raw: what the network gives for each token, `[B, N, 2 * C]`; with a rule `[2 * B, N, 2 * C]`: of all samples
            with the condition and then of all samples with the null condition.
        clip, softplus: see `affine_forward`.
        rule: None, or one of `RULES`.
        weight: guidance's weight w, a number or an array that broadcasts to `[B, N, 1]`.
        what: what "extrapolate" guides: mean ("b"), log-scale ("a") or both ("ab").
    """
    if enabled():
        return tuple(
            _fused("predict", bool(clip), softplus, rule, what)(raw, _limit(clip), *_weights(raw, rule, weight))
        )
    return affine_plain(raw, clip, softplus, rule, weight, what)


def affine_inverse(
    raw: Array,
    z: Array,
    clip: float,
    softplus: bool,
    rule: str | None = None,
    weight: float | Array = 0.0,
    what: str = "ab",
) -> Array:
    """Noise -> data: x = z * sigma + mu for z `[B, N, C]`; other arguments and dtypes as for `predict`."""
    if isinstance(z, mx.array):
        z = z.astype(mx.float32)
    if enabled():
        inputs = (raw, _limit(clip), *_weights(raw, rule, weight), z)
        return _fused("inverse", bool(clip), softplus, rule, what)(*inputs)[0]
    return _inverse(*affine_plain(raw, clip, softplus, rule, weight, what), z)[0]


def affine_plain(
    raw: Array,
    clip: float | mx.array,
    softplus: bool,
    rule: str | None = None,
    weight: float | Array = 0.0,
    what: str = "ab",
) -> tuple[Array, Array]:
    """`predict` in plain MLX, or in NumPy: there in float64, since a few numbers cost nothing, and what is rounded here
    the network may multiply in the tokens that follow."""
    arrays = namespace(raw)
    raw = raw.astype(mx.float32 if arrays is mx else np.float64)
    if isinstance(clip, mx.array) or clip:
        raw = clip * arrays.tanh(raw / clip)
    log_sigma, mu = arrays.split(raw, 2, axis=-1)
    if softplus:
        log_sigma = arrays.log(arrays.logaddexp(log_sigma + SOFTPLUS_SHIFT, 0.0))
    if rule is None:
        return mu, log_sigma
    (mu, mu_null), (log_sigma, log_sigma_null) = arrays.split(mu, 2), arrays.split(log_sigma, 2)
    combine = {"quotient": guide, "extrapolate": partial(extrapolate, what=what)}[rule]
    return combine(mu, log_sigma, mu_null, log_sigma_null, weight)


def guide(
    mu: Array, log_sigma: Array, mu_null: Array, log_sigma_null: Array, weight: float | Array
) -> tuple[Array, Array]:
    """STARFlow's rule (arXiv 2506.06276): (mu, log sigma) of the Gaussian p_cond^(1 + w) / p_null^w, made safe.

    Where the conditional Gaussian is the wider one, the quotient would not be normalizable: there the null's variance
    is taken to be the conditional's, and the rule becomes the usual extrapolation of the means.
    """
    # With r = (sigma / sigma_null)^2, at most 1: mu' = ((1 + w) mu - w r mu_null) / d and sigma'^2 = sigma^2 / d, where
    # d = 1 + w - w r. As differences they lose no digits where the two predictions are close.
    arrays = namespace(mu)
    excess = weight * -arrays.expm1(2 * arrays.minimum(log_sigma - log_sigma_null, 0.0))
    guided = mu + (weight - excess) / (1 + excess) * (mu - mu_null)
    return guided, log_sigma - 0.5 * arrays.log1p(excess)


def extrapolate(
    mu: Array,
    log_sigma: Array,
    mu_null: Array,
    log_sigma_null: Array,
    weight: float | Array,
    what: str = "ab",
) -> tuple[Array, Array]:
    """TarFlow's rule (arXiv 2412.06329): mean ("b") and log-scale ("a") move away from the null's by `weight`."""
    if "b" in what:
        mu = mu + weight * (mu - mu_null)
    if "a" in what:
        log_sigma = log_sigma + weight * (log_sigma - log_sigma_null)
    return mu, log_sigma


def _forward(mu: mx.array, log_sigma: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    return (x - mu) * mx.exp(-log_sigma), -log_sigma


def _inverse(mu: Array, log_sigma: Array, z: Array) -> tuple[Array]:
    return (z * namespace(z).exp(log_sigma) + mu,)


def _predict(mu: mx.array, log_sigma: mx.array) -> tuple[mx.array, mx.array]:
    return mu, log_sigma


@cache
def _limit(clip: float) -> mx.array:
    return mx.array([clip], mx.float32)


def _weights(raw: mx.array, rule: str | None, weight: float | mx.array) -> tuple[mx.array, ...]:
    """Guidance's weight as the kernels read it: one number, or one a token of all samples; none without a rule."""
    if rule is None:
        return ()
    if not isinstance(weight, mx.array):
        return (mx.array([weight], mx.float32),)
    weight = weight.astype(mx.float32)
    if weight.size > 1:
        weight = mx.broadcast_to(weight, (raw.shape[0] // 2, raw.shape[1], 1))
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
    direction: str, clipped: bool, softplus: bool, rule: str | None = None, what: str = "ab"
) -> Callable[..., Arrays]:
    """A kernel of (raw, limit of the clip, weights if there is a rule, what the map reads), with its gradient."""
    kernel, outputs = _kernel(direction, rule), _MAPS[direction].outputs
    guidance = [("MEAN", "b" in what), ("SCALE", "a" in what)] * (rule == "extrapolate")

    def fused(raw: mx.array, *others: mx.array) -> Arrays:
        batch, length, width = raw.shape
        shape = (batch // (2 if rule else 1), length, width // 2)
        size = math.prod(shape)
        return kernel(
            inputs=[raw, *others],
            template=[("T", raw.dtype), ("CLIP", clipped), ("SOFTPLUS", softplus), *guidance],
            grid=(size, 1, 1),
            threadgroup=(min(size, THREADGROUP), 1, 1),
            output_shapes=[shape] * len(outputs),
            output_dtypes=[mx.float32] * len(outputs),
        )

    def plain(raw: mx.array, limit: mx.array, *others: mx.array) -> Arrays:
        weight = 0.0
        if rule:
            weight, *others = others
            weight = weight if weight.size == 1 else weight.reshape(raw.shape[0] // 2, raw.shape[1], 1)
        clip = limit if clipped else 0.0
        return _MAPS[direction].plain(*affine_plain(raw, clip, softplus, rule, weight, what), *others)

    return with_gradient(fused, plain)


@cache
def _kernel(direction: str, rule: str | None) -> Callable[..., list[mx.array]]:
    the_map = _MAPS[direction]
    return mx.fast.metal_kernel(
        name=f"starflow_affine_{direction}" + (f"_{rule}" if rule else ""),
        input_names=["raw", "limit"] + ["weights"] * bool(rule) + the_map.inputs,
        output_names=the_map.outputs,
        header=_HEADER,
        source=_SOURCE + (_GUIDANCE + _RULES[rule] if rule else "") + the_map.source,
    )


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

inline float starflow_clip(float raw, float limit, bool clip) {{
    return clip ? limit * metal::precise::tanh(raw / limit) : raw;
}}
"""

# One thread a number of the output. The launch has no more threads than that.
_SOURCE = """
    const size_t i = thread_position_in_grid.x;
    const int channels = raw_shape[2] / 2;
    const size_t token = i / channels;
    const size_t own = token * 2 * channels + i % channels;
    float log_sigma = starflow_log_sigma(starflow_clip(static_cast<float>(raw[own]), limit[0], CLIP), SOFTPLUS);
    float mu = starflow_clip(static_cast<float>(raw[own + channels]), limit[0], CLIP);
"""

_GUIDANCE = """
    const size_t tokens = size_t(raw_shape[0] / 2) * raw_shape[1];
    const size_t null = own + tokens * 2 * channels;
    const float log_sigma_null =
        starflow_log_sigma(starflow_clip(static_cast<float>(raw[null]), limit[0], CLIP), SOFTPLUS);
    const float mu_null = starflow_clip(static_cast<float>(raw[null + channels]), limit[0], CLIP);
    const float weight = weights[weights_shape[0] == 1 ? 0 : token];
"""

_RULES = {
    "quotient": """
    const float gap = log_sigma - log_sigma_null;
    const float excess = weight * -starflow_expm1(gap > 0.0f ? 0.0f : 2.0f * gap);  // a NaN stays one
    mu += (weight - excess) / (1.0f + excess) * (mu - mu_null);
    log_sigma -= 0.5f * starflow_log1p(excess);
""",
    "extrapolate": """
    mu += MEAN ? weight * (mu - mu_null) : 0.0f;
    log_sigma += SCALE ? weight * (log_sigma - log_sigma_null) : 0.0f;
""",
}

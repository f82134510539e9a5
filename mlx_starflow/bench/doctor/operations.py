"""What networks are computed with: fused kernels beside their plain versions, and MLX's operations beside NumPy's."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow import cpu
from mlx_starflow.bench.doctor.checks import Check, Finding, NotApplicable, at_most, within
from mlx_starflow.kernels import switched, switched_off
from mlx_starflow.kernels.affine import GUIDANCE_MODES, AffineMap, affine_forward, affine_inverse, predict
from mlx_starflow.kernels.attention import attention
from mlx_starflow.kernels.devices import backend
from mlx_starflow.kernels.qkv import split_rotate
from mlx_starflow.kernels.quantized_attention import QuantizedRows
from mlx_starflow.model_dir.quantization import QuantizedLinear, quantize_module
from mlx_starflow.model_dir.weights import MLX_DTYPES, cast_weights
from mlx_starflow.models.flow import BlockConfig, Condition, FlowBlock
from mlx_starflow.models.rope import line_frequencies
from mlx_starflow.sampling.network import CompiledNetwork

KERNEL_BOUNDS = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Largest difference of a kernel from its plain version, relative to the largest number: Metal's own exp, log and tanh
are good to 4 units in the last place; results in half precision may be rounded to neighbours."""

AFFINE_BOUNDS = dict.fromkeys(KERNEL_BOUNDS, 1e-5)
"""The same of affine maps, which are float32 in every precision."""

OPERATION_BOUNDS = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error of MLX's operations, relative to the largest number."""

NETWORK_BOUNDS = {"dense": 2e-5, "8 bits": 2e-5}

LONG = 33_390
"""Positions of a whole 480p video: more than fit into 15 bits."""

HEADS = ((48, 48, 64, False, 7), (6, 2, 64, True, 33), (3, 3, 24, False, 1))
"""Heads, heads of keys, their width, how pairs are split, and tokens: as in the released image model, as in language
models, and odd ones."""

MAPS = [AffineMap(0.0, False), AffineMap(4.0, True)]


def checks() -> list[Check]:
    advice = "Set MLX_STARFLOW_KERNELS=0, which gives right results without the kernels, and report this line."
    return [
        *(
            Check(f"kernel {name}", at_most(bounds), advice, look)
            for name, bounds, look in (
                ("qkv", KERNEL_BOUNDS, rotation),
                ("qkv, norms", KERNEL_BOUNDS, rotation_with_norms),
                ("affine_forward", AFFINE_BOUNDS, forward),
                ("affine_inverse", AFFINE_BOUNDS, inverse),
                ("predict", AFFINE_BOUNDS, prediction),
                ("gradients", KERNEL_BOUNDS, gradients),
            )
        ),
        Check(
            "C++ network",
            at_most(NETWORK_BOUNDS),
            "Set MLX_STARFLOW_KERNELS=0, which samples in MLX, and report this line.",
            cpp_network,
        ),
        *(
            Check(name, at_most(OPERATION_BOUNDS), "Report this line: MLX computes wrongly here.", look)
            for name, look in (
                ("attention", short_attention),
                (f"attention to {LONG:,}", long_attention),
                ("attention, 8-bit keys", lambda: quantized_attention(8)),
                ("attention, 4-bit keys", lambda: quantized_attention(4)),
                ("products, 8 bits", lambda: quantized_products(8)),
                ("products, 4 bits", lambda: quantized_products(4)),
                ("convolution, 2-D", lambda: convolution(2)),
                ("convolution, 3-D", lambda: convolution(3)),
            )
        ),
    ]


def normal(key: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(key)).astype(dtype)


def exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def relative_error(actual: Sequence[mx.array], expected: Sequence[np.ndarray]) -> float:
    """The largest difference, relative to the largest number of each expected array; infinite for what is not one."""
    worst = 0.0
    for found, wanted in zip(actual, expected, strict=True):
        error = float(np.max(np.abs(exact(found) - wanted)) / max(np.max(np.abs(wanted)), 1e-30))
        worst = max(worst, error) if np.isfinite(error) else float("inf")
    return worst


# ---- kernels


def compare(arrays: Callable[[mx.Dtype], list[list[mx.array]]], bounds: dict[str, float]) -> Finding:
    """Run the same with kernels and without, in every dtype; `arrays` gives what comes of each of several inputs."""
    if backend() != "Metal":
        raise NotApplicable(f"Metal kernels do not run on {backend()}")
    errors = {}
    for name, dtype in MLX_DTYPES.items():
        with switched(True):
            fused = arrays(dtype)
            mx.eval(fused)
        with switched(False):
            plain = arrays(dtype)
            mx.eval(plain)
        pairs = zip(fused, plain, strict=True)
        errors[name] = max(relative_error(found, [exact(each) for each in wanted]) for found, wanted in pairs)
    return within(errors, bounds)


def _rotated(dtype: mx.Dtype, norms: bool) -> list[list[mx.array]]:
    results = []
    for num_heads, num_kv_heads, dim, half_split, length in HEADS:
        qkv = normal(0, 2, length, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype)
        weights = [0.3 * normal(key, dim, dtype=dtype) for key in (1, 2)] if norms else []
        rope_frequencies = line_frequencies(dim, length + 3)[3:]
        results.append(
            list(
                split_rotate(
                    qkv,
                    rope_frequencies,
                    *weights,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    half_split=half_split,
                )
            )
        )
    return results


def rotation() -> Finding:
    return compare(lambda dtype: _rotated(dtype, False), KERNEL_BOUNDS)


def rotation_with_norms() -> Finding:
    return compare(lambda dtype: _rotated(dtype, True), KERNEL_BOUNDS)


def forward() -> Finding:
    def arrays(dtype: mx.Dtype) -> list[list[mx.array]]:
        parameters, x = normal(0, 3, 37, 2 * 11, dtype=dtype), normal(1, 3, 37, 11)
        return [list(affine_forward(parameters, x, affine)) for affine in MAPS]

    return compare(arrays, AFFINE_BOUNDS)


def _guided(dtype: mx.Dtype, function: Callable[..., Sequence[mx.array]]) -> list[list[mx.array]]:
    results = []
    for affine in MAPS:
        for mode in (None, *GUIDANCE_MODES):
            parameters = normal(0, 6 if mode else 3, 37, 2 * 11, dtype=dtype)
            for weight in (1.7, mx.arange(37)[None, :, None] / 20):
                results.append(list(function(parameters, affine, mode, weight)))
    return results


def inverse() -> Finding:
    z = normal(1, 3, 37, 11)
    return compare(
        lambda dtype: _guided(dtype, lambda parameters, *rest: [affine_inverse(parameters, z, *rest)]), AFFINE_BOUNDS
    )


def prediction() -> Finding:
    return compare(lambda dtype: _guided(dtype, predict), AFFINE_BOUNDS)


def gradients() -> Finding:
    def arrays(dtype: mx.Dtype) -> list[list[mx.array]]:
        qkv, rope_frequencies = normal(0, 2, 5, 6 * 16, dtype=dtype), line_frequencies(16, 5)
        parameters, x = normal(1, 2, 5, 2 * 7, dtype=dtype), normal(2, 2, 5, 7)

        def rotated(qkv: mx.array) -> mx.array:
            parts = split_rotate(qkv, rope_frequencies, num_heads=2, num_kv_heads=2)
            return sum((mx.sin(part.astype(mx.float32)).sum() for part in parts), mx.zeros(()))

        def mapped(parameters: mx.array, x: mx.array) -> mx.array:
            z, log_det = affine_forward(parameters, x, MAPS[1])
            return mx.square(z).sum() - log_det.sum() + affine_inverse(parameters, x, MAPS[1]).sum()

        return [[mx.grad(rotated)(qkv)], list(mx.grad(mapped, argnums=[0, 1])(parameters, x))]

    return compare(arrays, KERNEL_BOUNDS)


# ---- the CPU's own


def cpp_network() -> Finding:
    if sys.platform != "linux" or backend() != "CPU":
        raise NotApplicable("it runs where MLX computes on a Linux CPU")
    if switched_off():
        raise NotApplicable("MLX_STARFLOW_KERNELS turns it off")
    if shutil.which("g++") is None:
        raise NotApplicable("g++ is not installed; with it sampling takes a fraction of the time")
    if not cpu.has_fast_networks():
        return Finding("g++ is installed, but does not compile it", False)
    config = BlockConfig(
        in_channels=8, channels=128, num_layers=2, head_dim=64, num_heads=2, num_kv_heads=1,
        norm_type="rms_norm", use_swiglu=True, use_qk_norm=True, soft_clip=4.0,
    )  # fmt: skip
    errors = {}
    for name in NETWORK_BOUNDS:
        mx.random.seed(0)
        block = FlowBlock(config)
        block.proj_out.weight = 0.1 * normal(0, *block.proj_out.weight.shape)
        if name == "8 bits":
            quantize_module(block, 8)
        x, frequencies = normal(3, 2, 40, 8), line_frequencies(64, 40)
        arguments = (block, 2, 40, frequencies, Condition(), 1.0)
        in_cpp, in_mlx = cpu.fast_network(*arguments), CompiledNetwork(*arguments)
        if in_cpp is None:
            return Finding(f"it does not know a block with {name} weights", False)
        steps = ((0, 1), (1, 5), (5, 22), (22, 40))
        pairs = [(in_cpp(x[:, start:stop]), exact(in_mlx(x[:, start:stop]))) for start, stop in steps]
        errors[name] = max(relative_error([found], [wanted]) for found, wanted in pairs)
    return within(errors, NETWORK_BOUNDS)


# ---- MLX's operations


def each_dtype(error: Callable[[mx.Dtype], float]) -> Finding:
    return within({name: error(dtype) for name, dtype in MLX_DTYPES.items()}, OPERATION_BOUNDS)


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: str | None) -> np.ndarray:
    """In float64."""
    scores = scale * q @ k.swapaxes(-1, -2)
    if mask == "causal":
        scores += np.triu(np.full(scores.shape[-2:], -np.inf), 1 + k.shape[2] - q.shape[2])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ v)


def attention_error(dtype: mx.Dtype, queries: int, keys: int, mask: str | None) -> float:
    q, k, v = (normal(key, 1, 2, count, 64, dtype=dtype) for key, count in enumerate((queries, keys, keys)))
    found = attention(q, k, v, scale=0.125, mask=mask)
    return relative_error([found], [softmax_attention(exact(q), exact(k), exact(v), 0.125, mask)])


def short_attention() -> Finding:
    shapes = ((1, 300, None), (8, 300, "causal"), (70, 300, "causal"), (70, 70, None))
    return each_dtype(lambda dtype: max(attention_error(dtype, *shape) for shape in shapes))


def long_attention() -> Finding:
    shapes = ((1, LONG, None), (4, LONG, "causal"), (16, LONG, "causal"))
    return each_dtype(lambda dtype: max(attention_error(dtype, *shape) for shape in shapes))


def quantized_attention(bits: int) -> Finding:
    """To keys and values of which the last ones are dense, for one query and several, with as many heads and fewer."""

    def rows(a: mx.array) -> tuple[QuantizedRows, np.ndarray]:
        size, most = 64, a.shape[2] - 40
        words, scales, biases = mx.quantize(a[:, :, :most], group_size=size, bits=bits)
        unpacked = mx.dequantize(words, scales, biases, group_size=size, bits=bits, stream=mx.cpu)
        dense = a[:, :, most:]
        read = np.concatenate([exact(unpacked), exact(dense)], axis=2)
        return QuantizedRows((words, scales, biases), dense, size, bits), read

    def error(dtype: mx.Dtype) -> float:
        worst = 0.0
        for heads, queries, mask in ((2, 1, None), (4, 1, None), (2, 8, "causal"), (4, 70, "causal")):
            q = normal(0, 1, heads, queries, 64, dtype=dtype)
            (k, keys), (v, values) = (rows(normal(key, 1, 2, 300, 64, dtype=dtype)) for key in (1, 2))
            keys, values = (np.repeat(each, heads // 2, axis=1) for each in (keys, values))
            wanted = softmax_attention(exact(q), keys, values, 0.125, mask)
            worst = max(worst, relative_error([attention(q, k, v, scale=0.125, mask=mask)], [wanted]))
        return worst

    return each_dtype(error)


def quantized_products(bits: int) -> Finding:
    """For few rows and many, and for columns that are whole groups but not whole 64s."""

    def error(dtype: mx.Dtype) -> float:
        worst = 0.0
        for columns, group_size in ((512, 64), (96, 32)):
            dense = nn.Linear(columns, 130, bias=False)
            dense.weight = normal(0, 130, columns, dtype=dtype)
            layer = QuantizedLinear.of(nn.QuantizedLinear.from_linear(dense, group_size, bits))
            cast_weights(nn.Sequential(layer), dtype)  # as networks are loaded: on a CPU scales are float32
            weight = mx.dequantize(
                layer.weight, layer.scales, layer.biases, group_size=group_size, bits=bits, stream=mx.cpu
            )
            for rows in (1, 5, 40):
                x = normal(1, rows, columns, dtype=dtype)
                worst = max(worst, relative_error([layer(x)], [exact(x) @ exact(weight).T]))
        return worst

    return each_dtype(error)


def convolution(dims: int) -> Finding:
    """With 3 taps in each dimension and no padding, channels last."""
    size, channels = (24, 24) if dims == 2 else (5, 12, 12), 32
    function = mx.conv2d if dims == 2 else mx.conv3d

    def error(dtype: mx.Dtype) -> float:
        x = normal(0, 1, *size, channels, dtype=dtype)
        weight = normal(1, channels, *(3,) * dims, channels, dtype=dtype)
        inner, data, taps = tuple(side - 2 for side in size), exact(x)[0], np.moveaxis(exact(weight), 0, -1)
        expected = np.zeros((1, *inner, channels))
        for shift in np.ndindex(*(3,) * dims):
            seen = data[tuple(slice(start, start + side) for start, side in zip(shift, inner, strict=True))]
            expected += seen @ taps[shift]
        return relative_error([function(x, weight)], [expected])

    return each_dtype(error)

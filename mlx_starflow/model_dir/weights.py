"""Weights into modules: dtypes, strict checks of names and shapes, quantized layers where the weights are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.model_dir.precision import DTYPES
from mlx_starflow.model_dir.quantization import quantize_as, quantized_layers

M = TypeVar("M", bound=nn.Module)

MLX_DTYPES = {name: getattr(mx, name) for name in DTYPES}

# ---- dtypes


def default_dtype() -> mx.Dtype:
    """float32 on CPU, where half precision is slow; bfloat16 on a GPU."""
    return mx.float32 if _on_cpu() else mx.bfloat16


@overload
def parse_dtype(dtype: str | mx.Dtype) -> mx.Dtype: ...
@overload
def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None: ...
def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    """The dtype called "float32", "bfloat16" or "float16"; None and these dtypes themselves come back as they are.

    Raises:
        StarflowError: it is none of these.
    """
    if dtype is None or (isinstance(dtype, mx.Dtype) and dtype in MLX_DTYPES.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in MLX_DTYPES:
        raise StarflowError(f"dtype {dtype!r} is not one of {', '.join(MLX_DTYPES)}")
    return MLX_DTYPES[dtype]


def _on_cpu() -> bool:
    return mx.default_device().type == mx.cpu


# ---- modules


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """A module's tensors by name. Those of a new module are not computed as long as nobody evaluates them."""
    return dict(tree_flatten(module.parameters()))


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str | Path
) -> None:
    """Every tensor that is needed, no other, and of its shape.

    Raises:
        StarflowError: naming the first tensor that is missing, unexpected or of another shape.
    """
    if missing := [name for name in expected if name not in found]:
        raise StarflowError(
            f"{what} lacks the tensor {missing[0]}{_and_more(missing)}; is it complete, and is the config its own?"
        )
    if unexpected := sorted(found.keys() - expected.keys()):
        raise StarflowError(
            f"{what} has a tensor that its config does not account for: {unexpected[0]}{_and_more(unexpected)}"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise StarflowError(f"{what}: {name} has shape {tuple(found[name])}, but its config says {tuple(shape)}")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def place_weights(
    module: nn.Module,
    weights: Mapping[str, mx.array],
    what: str | Path,
    *,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """`load_module` that reads nothing: each tensor comes from its file when it is evaluated, in the file's dtype."""
    quantize_as(module, weights, what, quantization)
    expected = parameters(module)
    check_shapes({n: w.shape for n, w in weights.items()}, {n: w.shape for n, w in expected.items()}, what)
    for name, placeholder in expected.items():
        if _is_floating(weights[name]) != _is_floating(placeholder):
            raise StarflowError(f"{what}: {name} is {_dtype_name(weights[name])}, not {_dtype_name(placeholder)}")
    module.load_weights(list(weights.items()))


def load_module(
    module: M,
    weights: Mapping[str, mx.array],
    what: str | Path,
    dtype: mx.Dtype | None = None,
    *,
    quantization: Mapping[str, Any] | None = None,
) -> M:
    """Put weights into a module, and read them. Layers whose `.scales` the weights hold become quantized ones.

    Args:
        module: the network, newly made.
        weights: its tensors by name.
        what: what to call the weights in error messages, such as their directory.
        dtype: of floating tensors; packed weights stay as they are. None: theirs. On CPU, quantized layers' scales are
            float32 whatever is asked for, because half-precision sums there lose two digits.
        quantization: `quantization` of the config.

    Returns:
        `module`.

    Raises:
        StarflowError: a tensor is missing, unexpected, of another shape or kind, or cannot be read; or the weights are
            quantized and `quantization` does not say how.
    """
    place_weights(module, weights, what, quantization=quantization)
    cast_weights(module, dtype)
    try:
        mx.eval(module.parameters())
    except RuntimeError as error:
        raise StarflowError(f"cannot read {what}: {one_line(error)}") from error
    return module


def cast_weights(module: nn.Module, dtype: mx.Dtype | None) -> None:
    """Give a module's weights the dtype that `load_module` says, without reading them."""
    scales = {f"{path}.{kind}" for path in quantized_layers(module) for kind in ("scales", "biases")}
    cast = []
    for name, weight in parameters(module).items():
        if _is_floating(weight):
            weight = weight.astype(mx.float32 if name in scales and _on_cpu() else dtype or weight.dtype)
        cast.append((name, weight))
    module.load_weights(cast)


def _is_floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _dtype_name(array: mx.array) -> str:
    return str(array.dtype).rpartition(".")[2]

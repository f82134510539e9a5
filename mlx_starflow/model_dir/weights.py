"""Weights into modules: dtypes, strict checks of names and shapes, quantized layers where the weights are quantized."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.kernels.devices import backend
from mlx_starflow.model_dir.precision import AUTO, DTYPES, Device, Precision, automatic
from mlx_starflow.model_dir.quantization import quantize_as, quantized_layers
from mlx_starflow.models.flow import is_layer_weight
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.student import Student
from mlx_starflow.models.tarflow import PixelFlow
from mlx_starflow.models.text_flow import TextFlow

M = TypeVar("M", bound=nn.Module)

MLX_DTYPES = {name: getattr(mx, name) for name in DTYPES}

# ---- dtypes


def device() -> Device:
    """What MLX computes on by default."""
    return cast(Device, backend().lower())


def chip_generation() -> int | None:
    """That of an Apple GPU, 1 for an M1; None where it is another one, or does not say."""
    name = str(mx.device_info().get("device_name", "")) if device() == "metal" else ""
    found = re.match(r"Apple M(\d+)\b", name)
    return int(found[1]) if found else None


def automatic_precision(*, quantized_flow: bool = False) -> Precision:
    """`precision.automatic` on this machine."""
    return automatic(device(), chip_generation(), quantized_flow=quantized_flow)


def automatic_dtype(*, quantized_flow: bool = False) -> mx.Dtype:
    """The dtype of `automatic_precision`."""
    return MLX_DTYPES[automatic_precision(quantized_flow=quantized_flow).dtype]


def training_dtype() -> mx.Dtype:
    """What weights that are not trained themselves are held in while training: float32 on a CPU, bfloat16 on a GPU.
    Gradients leave float16's range."""
    return mx.float32 if device() == "cpu" else mx.bfloat16


def parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    """The dtype called "float32", "bfloat16" or "float16"; these dtypes themselves come back as they are, and None does
    for "auto" and None.

    Raises:
        StarflowError: it is none of these.
    """
    if dtype == AUTO:
        return None
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


def check_floating(found: Mapping[str, mx.Dtype], what: str | Path) -> None:
    """Raise StarflowError, naming it, if a tensor of a network is not of real numbers: weights of 8-bit integers, for
    instance, mean nothing without the scales that go with them."""
    for name, dtype in found.items():
        if not mx.issubdtype(dtype, mx.floating):
            raise StarflowError(
                f"{what}: {name} is {dtype_name(dtype)}, not real numbers; use a checkpoint in float32, bfloat16, "
                "float16 or float8_e4m3fn"
            )


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
            raise StarflowError(
                f"{what}: {name} is {dtype_name(weights[name].dtype)}, not {dtype_name(placeholder.dtype)}"
            )
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
        read_weights(module)
    except RuntimeError as error:
        raise StarflowError(f"cannot read {what}: {one_line(error)}") from error
    return module


READ_AT_ONCE = 2**28
"""Bytes."""


def read_weights(module: nn.Module) -> None:
    """Evaluate a module's weights, some of them at a time: a GPU's work on those that are cast waits for the disk, and
    macOS ends what takes seconds."""
    group: list[mx.array] = []
    for weight in parameters(module).values():
        group.append(weight)
        if sum(each.nbytes for each in group) >= READ_AT_ONCE:
            mx.eval(group)
            group = []
    mx.eval(group)


def cast_weights(module: nn.Module, dtype: mx.Dtype | None) -> None:
    """Give a module's weights the dtypes that `weight_dtypes` says, without reading them."""
    dtypes = weight_dtypes(module, dtype)
    module.load_weights([(name, weight.astype(dtypes[name])) for name, weight in parameters(module).items()])


def weight_dtypes(module: nn.Module, dtype: mx.Dtype | None) -> dict[str, mx.Dtype]:
    """The dtype of each tensor of a network that is to compute in `dtype`; None: as they are.

    Packed weights stay as they are. Of a flow in half precision the small tensors are float32 (see
    `models.flow.is_layer_weight`). On a CPU quantized layers' scales are float32 too: half-precision sums there lose
    two digits.
    """
    scales = {f"{path}.{kind}" for path in quantized_layers(module) for kind in ("scales", "biases")}
    mixed = isinstance(module, STARFlow | PixelFlow | TextFlow | Student)
    dtypes = {}
    for name, weight in parameters(module).items():
        if not _is_floating(weight):
            dtypes[name] = weight.dtype
        elif (name in scales and _on_cpu()) or (dtype is not None and mixed and not is_layer_weight(name)):
            dtypes[name] = mx.float32
        else:
            dtypes[name] = dtype or weight.dtype
    return dtypes


def _is_floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def dtype_name(dtype: mx.Dtype) -> str:
    """A dtype's name without MLX's module: "float32", for instance."""
    return str(dtype).rpartition(".")[2]


def forget_draws() -> None:
    """Let go of what a network's first weights would have been drawn with, if they are not drawn.

    MLX's random key is computed lazily, and holds all the keys that it follows from until then: each network that is
    made, only to be looked at or filled from a file, would leave some behind.
    """
    mx.eval(*cast(Sequence[mx.array], mx.random.state))

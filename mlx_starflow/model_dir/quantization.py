"""Quantized layers: the settings there are, making a network's layers quantized and dense again.

How a network is quantized stands in its `config.json` under `quantization`: what mlx-lm writes there,
`{"group_size": 64, "bits": 4, "mode": "affine"}`, with settings of single layers under their paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.kernels.devices import backend, multiplies_quantized
from mlx_starflow.model_dir.precision import MIXED, QUANTIZATIONS
from mlx_starflow.models.trees import flattened

SHALLOW_BITS = 6

DENSE_LAYERS = ("proj_in", "proj_out", "relative_attention_bias")
"""Layers that stay as they are: small ones that hand over tokens and affine parameters, and T5's position bias."""

UNPACK_ROWS = 16
"""From this many rows on, the CPU multiplies by the unpacked weight: see `QuantizedLinear`."""

Choice = bool | dict[str, Any]
"""Whether to quantize a layer, or settings of its own."""

Module = TypeVar("Module", bound=nn.Module)

_KEYS = ("group_size", "bits", "mode")


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's layer, faster on the CPU, where the quantized product costs as much for a few rows as unpacking does, and
    dense in products that MLX's CUDA backend lacks, see `kernels.devices`."""

    @classmethod
    def of(cls, layer: nn.QuantizedLinear) -> QuantizedLinear:
        rows, packed = layer.weight.shape
        made = cls(packed * 32 // layer.bits, rows, "bias" in layer, **_settings(layer))
        made.update(layer.parameters())
        return made

    def __call__(self, x: mx.array) -> mx.array:
        where = backend()
        if where == "CPU":
            unpack = x.size >= UNPACK_ROWS * x.shape[-1]
        else:
            unpack = not multiplies_quantized(x.shape[-1], self.group_size, where)
        if not unpack:
            return super().__call__(mx.contiguous(x) if where == "CUDA" else x)
        weight = mx.dequantize(self.weight, self.scales, self.get("biases"), **_settings(self), dtype=x.dtype)
        return mx.addmm(self.bias, x, weight.T) if "bias" in self else x @ weight.T


def _quantize(module: nn.Module, choose: Callable[[str, nn.Module], Choice]) -> None:
    nn.quantize(module, class_predicate=choose)
    layers = quantized_layers(module).items()
    linear = [(path, QuantizedLinear.of(layer)) for path, layer in layers if isinstance(layer, nn.QuantizedLinear)]
    module.update_modules(tree_unflatten(linear))


def quantized_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers by path."""
    layers = flattened(module.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: layer for path, layer in layers if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)}


def quantize_module(
    module: nn.Module,
    how: int | str,
    group_size: int | None = None,
    predicate: Callable[[str, nn.Module], Choice] | None = None,
) -> dict[str, Any]:
    """Quantize a module's linear and embedding layers in place.

    Layers that are quantized already are dequantized first; those whose settings stay the same are left as they are.

    Args:
        module: a network. Its numbers are computed when somebody evaluates them.
        how: bits of MLX's affine mode, 8, 6 or 4, or "mxfp8", "mxfp4", "nvfp4" or "mixed".
        group_size: weights that share a scale; None: 64 in the affine mode, the mode's own in the others, and layers
            whose rows are not whole groups are left out.
        predicate: from a layer's path and the layer, whether to quantize it, or settings of its own
            (`group_size`, `bits`, `mode`). None: all but `DENSE_LAYERS`, as `how` says.

    Returns:
        `quantization` for the module's config.

    Raises:
        StarflowError: `how` or `group_size` is not known or does not fit the network, or no layer can be quantized.
    """
    if str(how) not in QUANTIZATIONS:
        raise StarflowError(f"cannot quantize to {how!r}; it must be one of {', '.join(QUANTIZATIONS)}")
    mode, bits, default_group_size = QUANTIZATIONS[str(how)]
    settings: dict[str, Any] = {"group_size": group_size or default_group_size, "bits": bits, "mode": mode}
    predicate = predicate or _recipe(module, how)
    before = quantized_layers(module)
    dequantize_module(module)
    own: dict[str, Any] = {}

    def choose(path: str, layer: nn.Module) -> Choice:
        if not hasattr(layer, "to_quantized") or not (chosen := predicate(path, layer)):
            return False
        chosen = settings | chosen if isinstance(chosen, dict) else settings
        width, size = layer.weight.shape[-1], chosen["group_size"]
        if width % size:
            if group_size is None:
                return False
            raise StarflowError(
                f"cannot quantize to {how!r}: groups of {size} do not divide the {width} columns of {path}; "
                f"the usual size is {default_group_size}"
            )
        if chosen != settings:
            own[path] = chosen
        return chosen

    try:
        _quantize(module, choose)
    except ValueError as error:
        raise StarflowError(f"cannot quantize to {how!r}: {error}") from error
    layers = quantized_layers(module)
    if not layers:
        raise StarflowError(
            f"cannot quantize to {how!r}: no layer is a multiple of {settings['group_size']} wide; leave it as it is"
        )
    # Packed again, the same numbers would come out a little different.
    same = [path for path in layers.keys() & before.keys() if _settings(layers[path]) == _settings(before[path])]
    module.update_modules(tree_unflatten([(path, before[path]) for path in same]))
    return settings | own


def dequantize_module(module: nn.Module) -> None:
    """Make dense layers of a module's quantized ones, in place and in the dtype of the module's other weights."""
    layers = quantized_layers(module)
    floating = [value.dtype for _, value in flattened(module.parameters()) if mx.issubdtype(value.dtype, mx.floating)]
    dense = []
    for path, layer in layers.items():
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.get("biases"), **_settings(layer), dtype=next(iter(floating), mx.float32)
        )
        rows, columns = weight.shape
        if isinstance(layer, nn.QuantizedEmbedding):
            made: nn.Embedding | nn.Linear = nn.Embedding(rows, columns)
        else:
            made = nn.Linear(columns, rows, bias="bias" in layer)
            if "bias" in layer:
                made.bias = layer.bias
        made.weight = weight
        dense.append((path, made))
    module.update_modules(tree_unflatten(dense))


def dense_on_cpu(module: Module, room: int) -> Module:
    """Where MLX computes on a CPU, a copy of a module whose quantized layers are dense, if that takes less than `room`
    bytes; or else the module itself. The copy shares all other weights.

    MLX's CPU backend multiplies a few rows by a quantized matrix more slowly than by a dense one: what inverts a flow
    again and again runs two to four times as fast. The numbers differ by rounding.
    """
    layers = quantized_layers(module) if mx.default_device().type == mx.cpu else {}
    if layers and sum(layer.weight.nbytes * 32 // layer.bits for layer in layers.values()) < room:
        module = deepcopy(module)
        dequantize_module(module)
        mx.eval(module.parameters())
    return module


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {key: getattr(layer, key) for key in _KEYS}


def _recipe(module: nn.Module, how: int | str) -> Callable[[str, nn.Module], Choice]:
    """Which layers are quantized, and which of them have settings of their own."""
    shallow: tuple[str, ...] = ()
    if how == MIXED:
        depths = [len(block.get("attn_blocks", ())) for block in module.get("blocks", ())]
        shallow = tuple(f"blocks.{i}." for i, depth in enumerate(depths) if depth < max(depths))
        if not shallow:
            raise StarflowError("mixed quantization is for flows with shallow blocks and a deep one; use 8, 6 or 4")

    def choose(path: str, layer: nn.Module) -> Choice:
        if path.rpartition(".")[2] in DENSE_LAYERS:
            return False
        return {"bits": SHALLOW_BITS} if shallow and path.startswith(shallow) else True

    return choose


def quantize_as(
    module: nn.Module, weights: Mapping[str, mx.array], what: str | Path, quantization: Mapping[str, Any] | None
) -> None:
    """Make quantized layers of those whose `.scales` the weights hold; their numbers are yet to be loaded.

    Args:
        module: the dense network.
        weights: tensors by name.
        what: what to call the weights in error messages.
        quantization: `quantization` of the config.

    Raises:
        StarflowError: weights are quantized, and `quantization` does not say how.
    """
    if not any(name.endswith(".scales") for name in weights):
        return
    if not isinstance(quantization, Mapping):
        raise StarflowError(f"{what}: the weights are quantized, but config.json has no quantization; convert again")

    def choose(path: str, layer: nn.Module) -> Choice:
        if not hasattr(layer, "to_quantized") or f"{path}.scales" not in weights:
            return False
        own = quantization.get(path)
        settings = own if isinstance(own, dict) else quantization
        settings = {key: settings[key] for key in _KEYS if key in settings}
        mode, bits, size = settings.get("mode", "affine"), settings.get("bits"), settings.get("group_size")
        if mode not in [each for each, _, _ in QUANTIZATIONS.values()] or bits not in (None, 2, 3, 4, 5, 6, 8):
            raise ValueError(f"{path}: mode and bits are not known")
        if size not in (None, 16, 32, 64, 128):
            raise ValueError(f"{path}: group_size must be 16, 32, 64 or 128")
        return settings

    try:
        _quantize(module, choose)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise StarflowError(f"{what}: quantization of config.json: {one_line(error)}") from error

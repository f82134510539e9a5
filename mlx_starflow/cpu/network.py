"""The network of a flow block on a Linux CPU, in C++: sampling takes it a token, or a few, at a time.

A token goes through all layers in one call: the weights are read once and where they lie, norms, rotation, attention
and activations in between cost next to nothing, no graph is built and no other thread is woken. MLX compiles fused
operations with g++ wherever that is installed; network.cpp is compiled with it too, once, into the user's cache.
Without g++, on other systems and for weights that are neither float32 nor MLX's affine quantization of it,
`sampling.network.CompiledNetwork` does the same in MLX.

This is network.cpp seen from Python: the structures that both share, and what fills them.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow.cpu import library
from mlx_starflow.model_dir.adapters import AdaptedLinear
from mlx_starflow.models.flow import Condition, FlowBlock
from mlx_starflow.models.transformer import RMSNorm, TransformerLayer

LANES = 16
"""Numbers that C++ computes with at once: the width of a head must be a multiple of it."""

MOST_ROWS = 128
"""So many positions of all sequences go through the layers together; more gain nothing, and take more memory."""


class _Norm(Structure):
    _fields_ = (("kind", c_int32), ("epsilon", c_float), ("weight", c_void_p), ("bias", c_void_p))


class _Linear(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("inputs", "outputs", "bits", "group")),
        *((name, c_void_p) for name in ("weight", "scales", "zeros", "bias")),
    )


_NORMS = ("attention_norm", "query_norm", "key_norm", "attention_post", "mlp_norm", "mlp_post")
_LINEARS = ("qkv", "proj", "gate", "up", "down")
_SIZES = ("count", "channels", "num_heads", "num_kv_heads", "head_dim", "half_split", "batch", "capacity")


class _Layer(Structure):
    _fields_ = (
        *((name, _Norm) for name in _NORMS),
        *((name, _Linear) for name in _LINEARS),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class _Block(Structure):
    _fields_ = (
        *((name, c_int32) for name in _SIZES),
        ("layers", POINTER(_Layer)),
        ("input", _Linear),
        ("norm", _Norm),
        ("output", _Linear),
    )


class _Tokens(Structure):
    _fields_ = (
        ("length", c_int32),
        ("offset", c_int32),
        ("rope_frequencies", c_void_p),
        ("scales", c_void_p),
        ("inputs", c_void_p),
        ("added", c_void_p),
        ("added_step", c_int64),
        ("hidden", c_void_p),
        ("outputs", c_void_p),
    )


class Unsuitable(Exception):
    """network.cpp does not know such a block, or cannot be compiled."""


class NativeNetwork:
    """A `sampling.network.CachedNetwork`; what it is given is evaluated, and what it gives is computed already."""

    def __init__(
        self,
        block: FlowBlock,
        batch: int,
        length: int,
        rope_frequencies: mx.array | None,
        condition: Condition,
        temperature: float | mx.array,
    ):
        """Arguments as for `cpu.fast_network`.

        Raises Unsuitable for a block with sharded weights, or others than float32 and MLX's affine quantization of it,
        and where network.cpp cannot be compiled.
        """
        config, prefix = block.config, condition.prefix
        if config.head_dim % LANES or config.num_heads % config.num_kv_heads or not config.num_layers:
            raise Unsuitable
        self._config, self._input_size = config, block.input_size
        self.batch, self.prefix_length, self.position = batch, 0 if prefix is None else prefix.shape[1], 0
        self.capacity = self.prefix_length + length
        mx.eval(block.parameters())
        self._held: list[Any] = []  # what C++ has addresses of
        self._layers = (_Layer * config.num_layers)(*(self._layer(layer) for layer in block.layers))
        shape = (batch, config.num_kv_heads, self.capacity, config.head_dim)
        for layer in self._layers:
            layer.keys, layer.values = self._hold(mx.zeros(shape), shape), self._hold(mx.zeros(shape), shape)
        self.cache_bytes = 8 * len(self._layers) * math.prod(shape)
        self._block = _Block(
            count=config.num_layers,
            channels=config.channels,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            half_split=config.hf_style_rope,
            batch=batch,
            capacity=self.capacity,
            layers=self._layers,
            input=self._linear(block.input_layer, block.input_size, config.channels, transposed=True),
            norm=self._norm(block.get("final_norm"), config.channels),
            output=self._linear(block.proj_out, config.channels),
        )
        self._rope_frequencies = None
        if rope_frequencies is not None:
            self._rope_frequencies = np.array(rope_frequencies, order="C")
            _demand(self._rope_frequencies, np.complex64, (self.capacity, config.head_dim // 2))
        self._scales = np.empty(batch, np.float32)
        self._scales[:] = config.head_dim**-0.5 / np.array(temperature).reshape(-1)
        self._added: np.ndarray | None = None
        if (added := block.added(0, length, condition.offset)) is not None:
            self._added = np.array(mx.broadcast_to(added, (batch, length, config.channels)), order="C")
        self._complete = None if type(block).complete is FlowBlock.complete else block.complete
        if (loaded := library.load()) is None:
            raise Unsuitable
        self._library = loaded
        if prefix is not None:
            for start, stop in self._parts(self.prefix_length):
                part = np.array(prefix[:, start:stop], order="C")
                self._run(_Tokens(), part)

    @property
    def known(self) -> int:
        return self.position - self.prefix_length

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.array(self.parameters(np.asarray(tokens)))

    def parameters(self, inputs: np.ndarray) -> np.ndarray:
        """The same for NumPy arrays."""
        parts = [self._evaluate(np.ascontiguousarray(inputs[:, a:b])) for a, b in self._parts(inputs.shape[1])]
        outputs = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return outputs if self._complete is None else np.asarray(self._complete(mx.array(outputs)))

    def remember(self, tokens: mx.array) -> None:
        self(tokens)

    def trim(self, n: int) -> None:
        self.position -= n

    def multiply(self, length: int) -> None:
        """Only multiply `length` positions with the weights, and remember nothing: for measurements."""
        tokens = _Tokens(length=length)
        self._library.starflow_products(ctypes.byref(self._block), ctypes.byref(tokens))

    def _parts(self, length: int) -> list[tuple[int, int]]:
        step = max(1, MOST_ROWS // self.batch)
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def _evaluate(self, inputs: np.ndarray) -> np.ndarray:
        """Tokens `[B, n, C]` -> outputs of the last layer, `[B, n, outputs]`."""
        _demand(inputs, np.float32, (self.batch, inputs.shape[1], self._input_size))
        hidden = np.empty((*inputs.shape[:2], self._block.channels), np.float32)
        outputs = np.empty((*inputs.shape[:2], self._block.output.outputs), np.float32)
        tokens = _Tokens(inputs=_address(inputs), outputs=_address(outputs))
        if self._added is not None:
            tokens.added, tokens.added_step = _address(self._added[:, self.known :]), self._added[0].size
        self._run(tokens, hidden)
        return outputs

    def _run(self, tokens: _Tokens, hidden: np.ndarray) -> None:
        """All layers over embedded positions, float32 `[B, n, channels]`, which are replaced by what comes out."""
        length = hidden.shape[1]
        _demand(hidden, np.float32, (self.batch, length, self._config.channels))
        if self.position + length > self.capacity:
            raise ValueError(f"{self.position} + {length} positions; there is room for {self.capacity}")
        tokens.length, tokens.offset = length, self.position
        tokens.scales, tokens.hidden = _address(self._scales), _address(hidden)
        if self._rope_frequencies is not None:
            tokens.rope_frequencies = _address(self._rope_frequencies[self.position :])
        self._library.starflow_network(ctypes.byref(self._block), ctypes.byref(tokens))
        self.position += length

    def _layer(self, layer: TransformerLayer) -> _Layer:
        if type(layer) is not TransformerLayer:
            raise Unsuitable
        config, attention, mlp = self._config, layer.attention, layer.mlp
        width, dim, queries = config.channels, config.head_dim, config.num_heads * config.head_dim
        norms = [
            self._norm(attention.get(name), size)
            for name, size in (("norm", width), ("query_norm", dim), ("key_norm", dim), ("post_norm", width))
        ]
        norms += [self._norm(mlp.norm, width), self._norm(mlp.get("post_norm"), width)]
        gated = "gate_proj" in mlp
        gate, up, down = (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if gated else (None, mlp.main[0], mlp.main[2])
        inner = width * config.expansion
        linears = (
            self._linear(attention.qkv, width, queries + 2 * config.num_kv_heads * dim),
            self._linear(attention.proj, queries, width),
            self._linear(gate, width, inner),
            self._linear(up, width, inner),
            self._linear(down, inner, width),
        )
        return _Layer(*norms, *linears)

    def _norm(self, norm: nn.Module | None, width: int) -> _Norm:
        if norm is None:
            return _Norm()
        if type(norm) is RMSNorm:
            return _Norm(kind=2, epsilon=norm.eps, weight=self._hold(norm.weight, (width,)))
        if type(norm) is nn.LayerNorm:
            weight, bias = self._hold(norm.weight, (width,)), self._hold(norm.bias, (width,))
            return _Norm(kind=1, epsilon=norm.eps, weight=weight, bias=bias)
        raise Unsuitable

    def _linear(
        self, linear: nn.Module | None, inputs: int, outputs: int | None = None, transposed: bool = False
    ) -> _Linear:
        """A projection from so many inputs to so many outputs; None: to as many as it has."""
        if linear is None:
            return _Linear()
        if type(linear) is AdaptedLinear:
            linear = linear.fuse(dequantize=True)
        if not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            raise Unsuitable
        outputs = linear.weight.shape[0] if outputs is None else outputs
        bias = self._hold(linear.bias, (outputs,)) if "bias" in linear else None
        if isinstance(linear, nn.QuantizedLinear) and not transposed:
            return self._quantized(linear, inputs, outputs, bias)
        if type(linear) is not nn.Linear:
            raise Unsuitable
        if transposed:
            weight = self._hold(mx.contiguous(linear.weight.T), (inputs, outputs))
        else:
            weight = self._hold(linear.weight, (outputs, inputs))
        return _Linear(inputs, outputs, weight=weight, bias=bias)

    def _quantized(self, linear: nn.QuantizedLinear, inputs: int, outputs: int, bias: int | None) -> _Linear:
        bits, group = linear.bits, linear.group_size
        known = linear.mode == "affine" and bits in (4, 6, 8) and group > 0 and group % LANES == 0
        if not known or inputs % group or linear.biases is None:
            raise Unsuitable
        scales = outputs, inputs // group
        weight = self._hold(linear.weight, (outputs, inputs * bits // 32), mx.uint32)
        return _Linear(
            inputs,
            outputs,
            bits,
            group,
            weight,
            self._hold(linear.scales, scales),
            self._hold(linear.biases, scales),
            bias,
        )

    def _hold(self, array: mx.array, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> int:
        """Where the numbers of an array of this shape are, and stay while this lives. Raises Unsuitable for others."""
        mx.eval(array)
        view = np.asarray(array) if array.dtype == dtype and array.shape == shape else None
        if view is None or not view.flags.c_contiguous:
            raise Unsuitable
        self._held.append(array)
        return _address(view)


def _demand(array: np.ndarray, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    """Raise ValueError for an array that C++ would read or write beyond its end."""
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{array.dtype} {list(array.shape)} where {np.dtype(dtype)} {list(shape)} is needed")


def _address(array: np.ndarray) -> int:
    return array.ctypes.data

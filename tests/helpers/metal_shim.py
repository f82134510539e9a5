"""Runs Metal kernels without a Mac: the Metal source that MLX would compile, built as C++ and run on the CPU.

`metal_kernel` stands in for `mx.fast.metal_kernel`. A call hands its arguments to MLX's own function, takes the
complete source from what `mx.export_function` says of it, compiles that with g++ and a prelude that defines the part of
Metal which kernels use, and runs it over the whole grid. Each GPU thread is a fiber; simd reductions and barriers
switch fibers.

Beyond giving results, a run fails if a kernel does not write every byte of its outputs, writes outside of them or into
an input, depends on the order in which threads run, or lets some threads of a simdgroup or threadgroup miss a reduction
or barrier. What it reads outside of its inputs is NaN. The prelude's half and bfloat convert to and from other types
explicitly only, doubles are errors, and a pointer to constant memory is none to device memory: as strict as Metal, or
stricter.

What this cannot show: that Metal's compiler accepts the source, the accuracy of a GPU's own exp, log and tanh, and
speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

COMPILER = shutil.which("g++")

FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-attributes", "-Werror=double-promotion"]

PRELUDE = (Path(__file__).parent / "metal_prelude.h").read_text()

GUARD = 4096
"""Bytes before and behind each buffer: all 1s, a NaN in every floating-point type."""

THREAD_VARIABLES = {
    "thread_position_in_grid": "current->grid",
    "thread_position_in_threadgroup": "current->local",
    "threadgroup_position_in_grid": "current->group",
    "threads_per_grid": "grid_size",
    "thread_index_in_threadgroup": "current->index",
    "thread_index_in_simdgroup": "current->index % 32",
    "simdgroup_index_in_threadgroup": "current->index / 32",
}

MOST_THREADS = 1024
"""In a threadgroup."""

mlx_metal_kernel = mx.fast.metal_kernel


class ShimError(AssertionError):
    """A kernel did what a Metal kernel must not do."""


def metal_kernel(*, input_names: Sequence[str], output_names: Sequence[str], **definition: Any) -> Callable[..., list]:
    """Takes what `mx.fast.metal_kernel` takes. The result is called as that function's is, with arrays that can be
    evaluated, and returns evaluated arrays; it raises ShimError."""
    kernel = mlx_metal_kernel(input_names=input_names, output_names=output_names, **definition)

    def call(
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        **options: Any,
    ) -> list[mx.array]:
        options.update(grid=grid, threadgroup=threadgroup, output_shapes=output_shapes, output_dtypes=output_dtypes)
        source = metal_source(lambda *arrays: kernel(inputs=list(arrays), **options), *inputs)
        if not 0 < np.prod(threadgroup) <= MOST_THREADS or 0 in grid:
            raise ShimError(f"Metal cannot launch a grid {grid} in threadgroups {threadgroup}")
        read = {name: _row_contiguous(array) for name, array in zip(input_names, inputs, strict=True)}
        sizes = [int(np.prod(shape)) * dtype.size for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        written = dict(zip(output_names, sizes, strict=True))
        # Twice, with other rubbish in the outputs and the threads in opposite order.
        first, second = (_run(source, read, written, grid, threadgroup, backwards) for backwards in (False, True))
        results = []
        for a, b, shape, dtype in zip(first, second, output_shapes, output_dtypes, strict=True):
            if not np.array_equal(a, b):
                raise ShimError(f"of an output {shape}, {(a != b).sum()} bytes were not written, or not always alike")
            results.append(mx.array(a.view(f"u{dtype.size}").reshape(shape)).view(dtype))
        return results

    return call


def metal_source(function: Callable[..., Any], *inputs: mx.array) -> str:
    """The complete Metal source of the one custom kernel that `function` calls."""
    sources: list[str] = []

    def collect(event: dict[str, Any]) -> None:
        if event["type"] == "primitive":
            sources.extend(argument for argument in event["arguments"] if "[[kernel]]" in str(argument))

    mx.export_function(collect, function, *inputs)
    (source,) = sources
    return source


def _row_contiguous(array: mx.array) -> np.ndarray:
    """An array as MLX gives it to a kernel, its numbers as whole ones of the same size."""
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.itemsize]
    return np.ascontiguousarray(np.array(array.view(words)))


def _run(
    source: str,
    inputs: dict[str, np.ndarray],
    outputs: dict[str, int],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    backwards: bool,
) -> list[np.ndarray]:
    """Run a kernel; `outputs` says how many bytes they have."""
    guard = np.full(GUARD, 0xFF, np.uint8)
    rubbish = 0xA5 if backwards else 0x00
    buffers: dict[str, np.ndarray] = {}
    for name, array in inputs.items():
        buffers[name] = np.concatenate([guard, array.reshape(-1).view(np.uint8), guard])
        buffers[f"{name}_shape"] = np.array(array.shape, np.int32)
        buffers[f"{name}_strides"] = np.array(array.strides, np.int64) // array.itemsize
        buffers[f"{name}_ndim"] = np.array([array.ndim], np.int32)
    for name, size in outputs.items():
        buffers[name] = np.concatenate([guard, np.full(size, rubbish, np.uint8), guard])
    before = {name: array.copy() for name, array in buffers.items()}

    names = re.findall(r"(\w+) \[\[buffer\(\d+\)\]\]", source)
    starts = [buffers[name].ctypes.data + GUARD * (name in inputs or name in outputs) for name in names]
    error = _build(source)(
        (ctypes.c_void_p * len(starts))(*starts),
        (ctypes.c_uint * 3)(*grid),
        (ctypes.c_uint * 3)(*map(min, grid, threadgroup)),
        backwards,
    )
    if error:
        raise ShimError("some threads missed a simd reduction or a barrier that others wait at")
    for name, array in buffers.items():
        if name not in outputs and not np.array_equal(array, before[name]):
            raise ShimError(f"{name}, an input, was written to")
        if name in outputs and not all(
            np.array_equal(array[part], guard) for part in (slice(GUARD), slice(-GUARD, None))
        ):
            raise ShimError(f"{name} was written to outside of its bounds")
    return [buffers[name][GUARD:-GUARD] for name in outputs]


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="metal_shim")


@cache
def _build(source: str) -> Callable[..., int]:
    if COMPILER is None:
        raise ShimError("g++ is not installed")
    text = translate(source)
    stem = Path(_directory().name) / hashlib.sha256(text.encode()).hexdigest()[:20]
    stem.with_suffix(".cpp").write_text(text)
    command = [COMPILER, *FLAGS, str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ShimError(f"g++ does not accept the kernel:\n{result.stderr}\n{source}")
    return ctypes.CDLL(str(stem.with_suffix(".so"))).run


def translate(source: str) -> str:
    """Metal source as MLX generates it -> C++ with a function `run` (see the end of the prelude)."""
    body, _, instantiation = source.partition("template [[host_name(")
    (name,) = re.findall(r"decltype\((.+)\) ", instantiation) or re.findall(r"\[\[kernel\]\] void (\w+)\(", body)
    (signature,) = re.findall(r"\[\[kernel\]\] void \w+\((.*?)\) \{", body, re.DOTALL)
    arguments = []
    for parameter in signature.split(","):
        kind, attribute = re.fullmatch(r"\s*(.+?)\s*\w+\s*\[\[(.+)\]\]\s*", parameter).groups()
        if number := re.fullmatch(r"buffer\((\d+)\)", attribute):
            pointer = kind.replace("&", "*")
            arguments.append(f"{'*' if pointer != kind else ''}reinterpret_cast<{pointer}>(buffers[{number[1]}])")
        else:
            arguments.append(THREAD_VARIABLES[attribute])
    return f"{PRELUDE}\n{body}\nstatic void body() {{\n    {name}({', '.join(arguments)});\n}}\n"

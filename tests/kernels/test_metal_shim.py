"""What proves the kernels: the shim computes as Metal does, and notices what Metal would not forgive."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from helpers import metal_shim
from helpers.metal_shim import ShimError

pytestmark = pytest.mark.skipif(metal_shim.COMPILER is None, reason="g++ is not installed")

HALVES = [mx.float16, mx.bfloat16]


def run(
    source: str,
    a: mx.array,
    *,
    dtype: mx.Dtype = mx.float32,
    threads: int | None = None,
    size: int | None = None,
    width: int = 256,
    **template: object,
) -> np.ndarray:
    """A kernel's output of `size` numbers; as many of these and of threads as of the input, unless told otherwise."""
    kernel = metal_shim.metal_kernel(name="test", input_names=["a"], output_names=["out"], source=source)
    (out,) = kernel(
        inputs=[a],
        template=list(template.items()),
        grid=(threads or a.size, 1, 1),
        threadgroup=(width, 1, 1),
        output_shapes=[(size or a.size,)],
        output_dtypes=[dtype],
    )
    return np.array(out if dtype == mx.float16 else out.astype(mx.float32))


def test_the_source_is_what_mlx_prints(capfd):
    kernel = mx.fast.metal_kernel(
        name="twice", input_names=["a"], output_names=["out"], header="// above", source="out[0] = T(2) * a[N];"
    )

    def call(a: mx.array, verbose: bool = False) -> mx.array:
        return kernel(
            inputs=[a],
            template=[("T", mx.float32), ("N", 3)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            verbose=verbose,
        )[0]

    source = metal_shim.metal_source(call, mx.zeros(9))
    metal_shim.metal_source(lambda a: call(a, verbose=True), mx.zeros(9))
    printed = re.search(r"```\n(.*)\n```", capfd.readouterr().out, re.DOTALL)[1]
    assert source.strip() == printed.strip()
    assert "// above" in source and "const device float* a" in source and "<float, 3>" in source


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_that_of_the_type(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    # Everything a half holds, the ties between neighbours, and numbers a hair off the ties.
    every = np.array(mx.arange(2**16).astype(mx.uint16).view(dtype).astype(mx.float32))
    finite = np.sort(every[np.isfinite(every)]).astype(np.float64)
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    limits = np.array([np.inf, -np.inf, np.nan, 65519.99, 65520, 3.4e38, 1e-45, -0.0], np.float32)
    values = np.concatenate([values, every, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), limits])
    source = "for (uint i = thread_position_in_grid.x; i < uint(a_shape[0]); i += 1000) { out[i] = T(a[i]); }"
    rounded = run(source, mx.array(values), dtype=dtype, threads=1000, T=dtype)
    expected = np.array(mx.array(values).astype(dtype).astype(mx.float32))
    assert np.array_equal(rounded.astype(np.float32), expected, equal_nan=True)
    if dtype == mx.float16:
        with np.errstate(over="ignore", invalid="ignore"):
            assert np.array_equal(rounded, values.astype(np.float16), equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_read_exactly(dtype):
    every = mx.arange(2**16).astype(mx.uint16).view(dtype)
    read = run("out[thread_position_in_grid.x] = float(a[thread_position_in_grid.x]);", every)
    assert np.array_equal(read, np.array(every.astype(mx.float32)), equal_nan=True)


def test_threads_know_where_they_are():
    kernel = metal_shim.metal_kernel(
        name="places",
        input_names=["a"],
        output_names=["out"],
        source="""
            uint3 g = thread_position_in_grid;
            uint3 l = thread_position_in_threadgroup;
            uint3 t = threadgroup_position_in_grid;
            uint lane = simdgroup_index_in_threadgroup * 32 + thread_index_in_simdgroup;
            bool good = g.x == t.x * 5 + l.x && g.y == t.y * 3 + l.y && g.z == t.z * 4 + l.z
                && lane == thread_index_in_threadgroup;
            out[(g.z * a_shape[1] + g.y) * a_shape[2] + g.x] = good ? lane : -1;
        """,
    )
    # 60 threads a threadgroup; fewer at the far edges of the grid, where lanes are numbered anew.
    (out,) = kernel(
        inputs=[mx.zeros((6, 7, 8))],
        grid=(8, 7, 6),
        threadgroup=(5, 3, 4),
        output_shapes=[(6, 7, 8)],
        output_dtypes=[mx.int32],
    )
    out = np.array(out)
    assert np.array_equal(out[:4, :3, :5].reshape(-1), np.arange(60))
    assert np.array_equal(out[4:, 6:, 5:].reshape(-1), np.arange(6))


@pytest.mark.parametrize("width", [32, 100, 256])
def test_reductions_and_shared_memory(width):
    x = mx.random.normal((700,), key=mx.random.key(0))
    out = run(
        """
        threadgroup float sums[32];
        const float sum = simd_sum(a[thread_position_in_grid.x]);
        const float most = simd_max(a[thread_position_in_grid.x]);
        if (thread_index_in_simdgroup == 0) {
            sums[simdgroup_index_in_threadgroup] = sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const int left = threads_per_grid.x - threadgroup_position_in_grid.x * WIDTH;
        float total = 0.0f;
        for (int i = 0; i * 32 < (left < WIDTH ? left : WIDTH); ++i) {
            total += sums[i];
        }
        out[thread_position_in_grid.x] = total + 1000.0f * most;
        """,
        x,
        width=width,
        WIDTH=width,
    )
    x = np.array(x, np.float64)
    for start in range(0, 700, width):
        group = x[start : start + width]
        for lane in range(0, len(group), 32):
            expected = group.sum() + 1000 * group[lane : lane + 32].max()
            found = out[start : start + width][lane : lane + 32]
            assert np.abs(found - expected).max() < 1e-2


AT = "thread_position_in_grid.x"


@pytest.mark.parametrize(
    ("fault", "source", "options"),
    [
        ("out was written to outside", f"out[{AT} + 1] = a[0];", {}),
        ("out was written to outside", f"out[int({AT}) - 1] = a[0];", {}),
        ("4 bytes were not written", f"if ({AT} != 99) out[{AT}] = a[0];", {}),
        ("4 bytes were not written", f"out[{AT}] = a[0];", {"threads": 299}),
        ("not always alike", f"out[0] = a[{AT}];", {"size": 1}),
        ("missed", f"out[{AT}] = {AT} == 77 ? 0.0f : simd_sum(a[{AT}]);", {}),
        ("missed", f"if ({AT} != 77) threadgroup_barrier(mem_flags::mem_threadgroup); out[{AT}] = 0.0f;", {}),
        ("an input, was written", f"const_cast<float*>(a)[{AT}] = 1.0f; out[{AT}] = 0.0f;", {}),
        ("cannot launch", f"out[{AT}] = a[0];", {"width": 2048}),
        ("does not accept", f"out[{AT}] = 2.0 * a[{AT}];", {}),  # a double
        ("does not accept", f"out[{AT}] = 1.5f;", {"dtype": mx.bfloat16}),  # rounds without saying so
        ("does not accept", f"const device float* p = a_shape[0] ? a : a; out[{AT}] = *p;", {"short": True}),
    ],
)
def test_faults_are_found(fault, source, options):
    options = dict(options)
    # MLX puts arrays of fewer than 8 numbers into constant memory.
    a = mx.arange(7.0 if options.pop("short", False) else 300.0)
    with pytest.raises(ShimError, match=fault):
        run(source, a, **options)


def test_reading_outside_of_an_input_shows():
    for place in (f"int({AT}) - 1", f"{AT} + 1"):
        out = run(f"out[{AT}] = float(a[{place}]);", mx.zeros(300, mx.bfloat16))
        assert np.isnan(out).sum() == 1

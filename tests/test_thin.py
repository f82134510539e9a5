"""Products of a few rows by thin.cpp. Each case has a process of its own: the choice is made once, at import."""

from __future__ import annotations

import shutil
import sys

import pytest
from test_blas import output, packaged

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="made with g++, on Linux")

PRODUCTS = """
import mlx.core as mx, numpy as np
from mlx_starflow import blas, linkage, thin
assert thin.installed()
assert "thin-" in linkage.file_of(linkage.read(blas._pointers()["cblas_sgemm"]))
rng = np.random.default_rng(0)

def close(got, want):
    assert np.abs(np.array(got) - want).max(initial=0) <= 2e-6 * np.abs(want).max(initial=1), (got.shape, want.shape)

for rows in (*range(1, 10), 16, 17, 40):
    for inner, outputs in ((1, 1), (7, 5), (8, 4), (64, 130), (67, 41), (300, 1000), (512, 512)):
        x, w, b = (rng.standard_normal(shape) for shape in ((rows, inner), (outputs, inner), outputs))
        want = x @ w.T
        x, w, b = (array.astype(np.float32) for array in (x, w, b))
        close(mx.array(x) @ mx.array(w).T, want)
        close(mx.addmm(mx.array(b), mx.array(x), mx.array(w).T), want + b)
        close(mx.addmm(mx.array(b), mx.array(x), mx.array(w).T, alpha=0.5, beta=2.0), 0.5 * want + 2 * b)
        half = inner // 2
        close(mx.array(x)[:, :half] @ mx.array(w)[::2, :half].T, x[:, :half] @ w[::2, :half].T)
        queries, keys = (mx.broadcast_to(mx.array(each), (2, 3, *each.shape)) for each in (x, w))
        close(queries @ keys.swapaxes(-1, -2), np.broadcast_to(want, (2, 3, *want.shape)))

# Two streams at the same time, and the same numbers every time, whichever thread computes them.
x, w = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in ((3, 500), (900, 500)))
streams = [mx.new_stream(mx.cpu) for _ in range(2)]
outs = [mx.matmul(x, w.T, stream=stream) for _ in range(300) for stream in streams]
mx.eval(outs)
assert all(mx.array_equal(out, outs[0]) for out in outs)
close(outs[0], np.array(x) @ np.array(w).T)
print("right")
"""


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_products(threads):
    assert output(PRODUCTS, packaged(), OPENBLAS_NUM_THREADS=threads) == "right\n"


def test_it_is_built_once(tmp_path):
    code = "import mlx_starflow\nfrom mlx_starflow import thin\nprint(thin.installed())"
    times = set()
    for _ in range(2):
        assert output(code, packaged(), XDG_CACHE_HOME=str(tmp_path)) == "True\n"
        (built,) = (tmp_path / "mlx-starflow").iterdir()
        times.add(built.stat().st_mtime_ns)
    assert len(times) == 1


@pytest.mark.parametrize("environment", [{"PATH": "/nowhere"}, {"XDG_CACHE_HOME": "/proc/nowhere"}])
def test_without_a_compiler_or_a_cache_nothing_changes(tmp_path, environment):
    code = """
import mlx_starflow, mlx.core as mx
from mlx_starflow import blas, linkage, thin
print(thin.installed(), "openblas" in linkage.file_of(linkage.read(blas._pointers()["cblas_sgemm"])))
assert (mx.ones((1, 30)) @ mx.ones((30, 5))).tolist() == [[30.0] * 5]
"""
    given = {"XDG_CACHE_HOME": str(tmp_path), **environment}
    assert output(code, packaged(), **given) == "False True\n"


def test_other_libraries_are_left_alone():
    assert output("import mlx_starflow\nfrom mlx_starflow import thin\nprint(thin.installed())", "off") == "False\n"

"""When network.cpp is compiled and used. Each case has a process of its own: the choice is made once."""

from __future__ import annotations

import shutil
import sys

import pytest
from test_blas import output, packaged

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="made with g++, on Linux")

AVAILABLE = "from mlx_starflow import native\nprint(native.available())"

SAMPLE = """
import hashlib, mlx.core as mx, numpy as np
from mlx_starflow import native
from mlx_starflow.models.flow import BlockConfig, Condition, FlowBlock
from mlx_starflow.sampling.network import cached_network
mx.random.seed(0)
config = BlockConfig(in_channels=4, num_layers=2, channels=192, head_dim=64, num_heads=3, num_kv_heads=3)
block = FlowBlock(config)
block.proj_out.weight = mx.random.normal(block.proj_out.weight.shape)
network = cached_network(block, 2, 60, None, Condition(), 1.0)
x = network.own(mx.random.normal((2, 60, 4)))
raw = np.concatenate([np.array(network(x[:, a:b])) for a, b in ((0, 1), (1, 20), (20, 60))], axis=1)
print(type(network).__name__, hashlib.sha256(raw.tobytes()).hexdigest(), float(np.abs(raw).sum()))
"""


def test_as_many_threads_as_you_like_give_the_same_numbers():
    results = {output(SAMPLE, packaged(), OPENBLAS_NUM_THREADS=threads) for threads in ("1", "2", "5")}
    assert len(results) == 1 and results.pop().startswith("NativeNetwork ")


def test_it_is_built_once(tmp_path):
    times = set()
    for _ in range(2):
        assert output(AVAILABLE, packaged(), XDG_CACHE_HOME=str(tmp_path)) == "True\n"
        (built,) = (tmp_path / "mlx-starflow").iterdir()
        times.add(built.stat().st_mtime_ns)
    assert len(times) == 1


@pytest.mark.parametrize(
    "environment",
    [{"PATH": "/nowhere"}, {"XDG_CACHE_HOME": "/proc/nowhere"}, {"MLX_STARFLOW_KERNELS": "0"}],
    ids=["no_compiler", "no_cache", "switched_off"],
)
def test_without_it_mlx_computes_the_same(tmp_path, environment):
    name, _, size = output(SAMPLE, packaged(), XDG_CACHE_HOME=str(tmp_path)).split()
    other, _, other_size = output(SAMPLE, packaged(), **{"XDG_CACHE_HOME": str(tmp_path / "2"), **environment}).split()
    assert (name, other) == ("NativeNetwork", "CompiledNetwork")
    assert abs(float(size) - float(other_size)) < 1e-4 * float(size)

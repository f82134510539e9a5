"""When network.cpp is compiled and used. Each case has a process of its own: the choice is made once."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import pytest
from cpu.test_blas import output, packaged

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="made with g++, on Linux")

AVAILABLE = "from mlx_starflow import cpu\nprint(cpu.has_fast_networks())"

SAMPLE = """
import hashlib, mlx.core as mx, numpy as np
from mlx_starflow.models.flow import BlockConfig, Condition, FlowBlock
from mlx_starflow.sampling.network import cached_network
mx.random.seed(0)
config = BlockConfig(in_channels=4, num_layers=2, channels=192, head_dim=64, num_heads=3, num_kv_heads=3)
block = FlowBlock(config)
block.proj_out.weight = mx.random.normal(block.proj_out.weight.shape)
network = cached_network(block, 2, 60, None, Condition(), 1.0)
x = mx.random.normal((2, 60, 4))
outputs = np.concatenate([np.array(network(x[:, a:b])) for a, b in ((0, 1), (1, 20), (20, 60))], axis=1)
print(type(network).__name__, hashlib.sha256(outputs.tobytes()).hexdigest(), float(np.abs(outputs).sum()))
"""


@pytest.fixture(scope="module")
def usual() -> str:
    """What it gives on this machine."""
    return output(SAMPLE, packaged())


def test_as_many_threads_as_you_like_give_the_same_numbers(usual):
    results = {usual} | {output(SAMPLE, packaged(), OPENBLAS_NUM_THREADS=threads) for threads in ("1", "5")}
    assert len(results) == 1 and results.pop().startswith("NativeNetwork ")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of one family")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_other_processors_give_the_same_numbers(tmp_path, processor, usual):
    """Registers of 4, 8 and 16 numbers; the last digit depends on whether there is a fused multiplication and sum."""
    needed = {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}.get(processor, "sse2")
    if needed not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this processor has no {needed}")
    chosen = f"""
from mlx_starflow.cpu import library
library.COMPILE = tuple("-march={processor}" if word == "-march=native" else word for word in library.COMPILE)
"""
    name, _, size = output(chosen + SAMPLE, packaged(), XDG_CACHE_HOME=str(tmp_path)).split()
    assert name == "NativeNetwork"
    assert abs(float(size) - float(usual.split()[2])) < 1e-5 * float(size)


@pytest.fixture(scope="module")
def built(compiled: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, in a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    assert output(AVAILABLE, packaged(), XDG_CACHE_HOME=str(folder), **compiled) == "True\n"
    (library,) = (folder / "mlx-starflow").iterdir()
    return library


def test_it_is_built_once(built):
    before = built.stat().st_mtime_ns
    assert output(AVAILABLE, packaged(), XDG_CACHE_HOME=str(built.parents[1])) == "True\n"
    assert list(built.parent.iterdir()) == [built] and built.stat().st_mtime_ns == before


def test_a_damaged_library_is_built_again(built, compiled, usual):
    cache = {"XDG_CACHE_HOME": str(built.parents[1]), **compiled}
    for half in (built.read_bytes()[:5000], b""):
        built.write_bytes(half)
        assert output(SAMPLE, packaged(), **cache) == usual


@pytest.mark.parametrize(
    "environment",
    [{"PATH": "/nowhere"}, {"XDG_CACHE_HOME": "/proc/nowhere"}, {"MLX_STARFLOW_KERNELS": "0"}],
    ids=["no_compiler", "no_cache", "switched_off"],
)
def test_without_it_mlx_computes_the_same(tmp_path, environment, usual):
    name, _, size = usual.split()
    other, _, other_size = output(SAMPLE, packaged(), **{"XDG_CACHE_HOME": str(tmp_path), **environment}).split()
    assert (name, other) == ("NativeNetwork", "CompiledNetwork")
    assert abs(float(size) - float(other_size)) < 1e-4 * float(size)

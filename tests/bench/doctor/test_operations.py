"""Each line about kernels and operations fails when what it compares is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import pytest
from helpers import metal_shim

import mlx_starflow
from mlx_starflow import cpu
from mlx_starflow.bench.doctor import operations
from mlx_starflow.bench.doctor.operations import QuantizedLinear
from mlx_starflow.kernels import affine, qkv
from mlx_starflow.kernels.devices import multiplies_quantized
from mlx_starflow.kernels.quantized_attention import QuantizedRows

KERNELS = ["qkv", "qkv, norms", "affine_forward", "affine_inverse", "predict", "gradients"]

PACKAGE = Path(mlx_starflow.__file__).parent


def line(name):
    return next(check for check in operations.checks() if check.name == name).run()


@pytest.fixture
def shim(monkeypatch):
    """As on Metal, with the kernels in the shim; gives the names of those that ran, and how to spoil some."""
    if not mx.metal.is_available() and metal_shim.COMPILER is None:
        pytest.skip("there is neither a Metal GPU nor g++")
    make = mx.fast.metal_kernel if mx.metal.is_available() else metal_shim.metal_kernel
    ran, wrong = set(), set()

    def metal_kernel(*, name, **definition):
        kernel = make(name=name, **definition)

        def call(**arguments):
            ran.add(name)
            first, *rest = kernel(**arguments)
            return [first * 1.05 if name in wrong else first, *rest]

        return call

    def forget():
        for function in (qkv._kernel, qkv._fused, affine._kernel, affine._fused):
            function.cache_clear()

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    monkeypatch.setattr(operations, "backend", lambda: "Metal")
    forget()
    yield ran, wrong
    forget()


def test_every_kernel_of_the_package_is_compared(shim, monkeypatch):
    """In one precision, to save time; tests/kernels compares them in all."""
    ran, _ = shim
    monkeypatch.setattr(operations, "MLX_DTYPES", {"bfloat16": mx.bfloat16})
    for name in KERNELS:
        found = line(f"kernel {name}")
        assert found.verdict == "ok" and found.values.keys() == {"bfloat16"}
    maps = {
        f"starflow_affine_{way}{mode}"
        for way in ("inverse", "predict")
        for mode in ("", "_starflow", "_tarflow", "_itarflow")
    }
    assert ran == {"starflow_qkv", "starflow_qkv_norm", "starflow_affine_forward", *maps}
    sources = {path.stem for path in PACKAGE.rglob("*.py") if "fast.metal_kernel(" in path.read_text()}
    assert sources == {"qkv", "affine"}, "another kernel: doctor must compare it too"


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("qkv", "starflow_qkv"),
        ("qkv, norms", "starflow_qkv_norm"),
        ("affine_forward", "starflow_affine_forward"),
        ("affine_inverse", "starflow_affine_inverse_tarflow"),
        ("predict", "starflow_affine_predict_starflow"),
    ],
)
def test_a_kernel_that_is_wrong(shim, name, kernel):
    shim[1].add(kernel)
    assert line(f"kernel {name}").failed


@pytest.mark.parametrize("module", [qkv, affine])
def test_a_gradient_that_is_wrong(shim, monkeypatch, module):
    with_gradient = module.with_gradient

    def wrong(fused, plain):
        return with_gradient(fused, lambda *inputs: [1.05 * x for x in plain(*inputs)])

    monkeypatch.setattr(module, "with_gradient", wrong)
    assert line("kernel gradients").failed


def test_a_kernel_that_metal_does_not_compile(shim, monkeypatch):
    def refuse(**definition):
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    monkeypatch.setattr(mx.fast, "metal_kernel", refuse)
    for name in KERNELS:
        found = line(f"kernel {name}")
        assert found.failed and "Unable to build" in found.measured


@pytest.mark.parametrize("where", ["CPU", "CUDA"])
def test_no_metal(monkeypatch, where):
    monkeypatch.setattr(operations, "backend", lambda: where)
    for name in KERNELS:
        assert line(f"kernel {name}").verdict == "not applicable"


# ---- the C++ network


@pytest.fixture
def compiled():
    if not cpu.has_fast_networks():
        pytest.skip("there is no compiler, or no Linux CPU")


def test_the_cpp_network(compiled):
    assert line("C++ network").verdict == "ok"


def test_a_cpp_network_that_is_wrong(compiled, monkeypatch):
    make = cpu.fast_network

    def wrong(*arguments):
        network = make(*arguments)
        return lambda tokens: network(tokens) * 1.001

    monkeypatch.setattr(cpu, "fast_network", wrong)
    assert line("C++ network").failed


@pytest.mark.parametrize("name", ["has_fast_networks", "fast_network"])
def test_a_cpp_network_that_is_not_there(compiled, monkeypatch, name):
    monkeypatch.setattr(cpu, name, lambda *arguments: None)
    assert line("C++ network").failed


def test_without_a_compiler(compiled, monkeypatch):
    monkeypatch.setattr(operations.shutil, "which", lambda name: None)
    assert line("C++ network").verdict == "not applicable"
    monkeypatch.setattr(operations, "switched_off", lambda: True)
    assert "turns it off" in line("C++ network").measured


# ---- MLX's operations


OPERATIONS = ["attention", "attention to 33,390", "attention, 8-bit keys", "attention, 4-bit keys", "products, 8 bits",
              "products, 4 bits", "convolution, 2-D", "convolution, 3-D"]  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation(name):
    assert line(name).verdict == "ok"


def test_a_mask_that_is_one_off(monkeypatch):
    attend = operations.attention

    def wrong(q, k, v, *, scale, mask):
        if mask == "causal":
            k, v = k[:, :, :-1], v[:, :, :-1]
        return attend(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(operations, "attention", wrong)
    assert line("attention").failed


def test_positions_in_16_bits(monkeypatch):
    """As MLX had it before 0.31.2 on some GPUs: what is beyond 32,767 is not seen."""
    attend = operations.attention
    monkeypatch.setattr(
        operations,
        "attention",
        lambda q, k, v, *, scale, mask: attend(q, k[:, :, :32768], v[:, :, :32768], scale=scale, mask=mask),
    )
    assert line("attention").verdict == "ok"
    assert line("attention to 33,390").failed


def test_quantized_keys_that_are_read_wrongly(monkeypatch):
    weighted = QuantizedRows.weighted
    monkeypatch.setattr(QuantizedRows, "weighted", lambda rows, weights: 1.05 * weighted(rows, weights))
    assert line("attention, 8-bit keys").failed and line("attention").verdict == "ok"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_products_that_are_wrong(monkeypatch, bits):
    call = QuantizedLinear.__call__

    def wrong(layer, x):  # what a kernel for whole 64s would make of 96 columns
        return call(layer, mx.concatenate([x[..., :64], 0 * x[..., 64:]], axis=-1) if x.shape[-1] % 64 else x)

    monkeypatch.setattr(QuantizedLinear, "__call__", wrong)
    assert line(f"products, {bits} bits").failed


@pytest.mark.parametrize("dims", [2, 3])
def test_convolutions_that_are_wrong(monkeypatch, dims):
    convolve = getattr(mx, f"conv{dims}d")
    monkeypatch.setattr(mx, f"conv{dims}d", lambda x, weight: convolve(x[:, ::-1], weight)[:, ::-1])
    assert line(f"convolution, {dims}-D").failed


def test_quantized_products_on_cuda_are_dense_where_it_has_none(monkeypatch):
    """The dense product is used for the columns that MLX's CUDA backend does not know, and only there."""
    from mlx_starflow.model_dir import quantization

    asked = []

    def quantized(self, x):
        asked.append(x.shape[-1])
        return call(self, x)

    call = operations.nn.QuantizedLinear.__call__
    monkeypatch.setattr(operations.nn.QuantizedLinear, "__call__", quantized)
    monkeypatch.setattr(quantization, "backend", lambda: "CUDA")
    assert line("products, 8 bits").verdict == "ok"
    assert set(asked) == {512}
    assert multiplies_quantized(96, 32, "Metal") and multiplies_quantized(96, 32, "CPU")
    assert not multiplies_quantized(64, 128, "CUDA") and multiplies_quantized(256, 128, "CUDA")


@pytest.mark.parametrize("text", ["mx.linalg.inv(a)", "mx.linalg.qr(a, stream=mx.cpu)"])
def test_how_linear_algebra_is_found(text):
    assert bool(_on_gpu(text)) is ("stream" not in text)


def test_no_linear_algebra_on_a_gpu():
    """Neither Metal nor CUDA has it."""
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "convert").glob("*.py")):
        assert not _on_gpu(path.read_text()), path


def _on_gpu(source: str) -> list[str]:
    from mlx_starflow.kernels.devices import CPU_ONLY

    calls = re.findall(r"mx\.linalg\.(\w+)\(([^()]*)", source)
    return [name for name, given in calls if name in CPU_ONLY and "stream=mx.cpu" not in given]

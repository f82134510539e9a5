"""The BLAS that MLX's CPU backend calls. Each case has a process of its own: the choice is made once, at import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_starflow.cli import main
from mlx_starflow.cpu import blas

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have a fast BLAS")

WITHOUT_SYSTEM = f"""
import os, sys
from mlx_starflow.cpu import blas
assert "off" in blas.describe()
del os.environ["{blas.VARIABLE}"]
blas.SYSTEM = ()
"""
"""To run with MLX_STARFLOW_BLAS=off: `blas.install()` then chooses as on a system that has no BLAS."""

PRODUCTS = """
import mlx.core as mx, numpy as np
rng = np.random.default_rng(0)

def same(a, b, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    want = a.astype(np.complex128) @ b.astype(np.complex128)
    got = mx.matmul(*(mx.array(each, dtype=getattr(mx, dtype)) for each in (a, b)), stream=mx.cpu)
    worst = np.abs(np.array(got) - want).max(initial=0)
    assert got.shape == want.shape and worst <= 1e-5 * np.abs(want).max(initial=1e-30), (a.shape, b.shape, dtype, worst)

for rows, inner, columns in [(1, 1, 1), (1, 300, 17), (3, 5, 7), (129, 67, 255), (64, 64, 64), (500, 1, 3), (4, 0, 2)]:
    for dtype in ("float32", "float64", "complex64"):
        a, b = rng.standard_normal((rows, inner)), rng.standard_normal((inner, columns))
        if dtype == "complex64":
            a, b = a + 1j * rng.standard_normal(a.shape), b - 1j * rng.standard_normal(b.shape)
        same(a, b, dtype)
        same(np.stack([a, 2 * a, -a]), b, dtype)
        same(np.stack([a, a])[:, None], np.stack([b, 3 * b, b]), dtype)

# Views: transposed, strided, broadcast, with the stride of a larger array.
a, b = rng.standard_normal((40, 60)).astype(np.float32), rng.standard_normal((50, 60)).astype(np.float32)
x, y = mx.array(a), mx.array(b)
for got, want in [
    (x @ y.T, a @ b.T), (y @ x.T, b @ a.T), (x.T @ x, a.T @ a),
    (x[::2, 3:50] @ y[:, 3:50].T, a[::2, 3:50] @ b[:, 3:50].T),
    (x[:, ::3] @ y[::5, ::3].T, a[:, ::3] @ b[::5, ::3].T), (x[0] @ y.T, a[0] @ b.T), (y @ x[1], b @ a[1]),
    (mx.addmm(x @ y.T, x, y.T, alpha=0.5, beta=2.0), 2.5 * (a @ b.T)),
    (mx.broadcast_to(x, (3, 40, 60)) @ y.T, np.broadcast_to(a, (3, 40, 60)) @ b.T),
]:
    np.testing.assert_allclose(np.array(got), want, rtol=0, atol=1e-5 * np.abs(want).max())

# Two streams multiply at the same time.
streams = [mx.new_stream(mx.cpu) for _ in range(2)]
outs = [mx.matmul(x, y.T, stream=stream) for _ in range(50) for stream in streams]
mx.eval(outs)
assert all(mx.array_equal(out, outs[0]) for out in outs)
print("right")
"""

CALLED = """
from mlx_starflow.cpu import linkage
for pointer in blas._pointers().values():
    print(linkage.file_of(linkage.read(pointer)))
"""


def run(code: str, setting: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with MLX_STARFLOW_BLAS set, or left out."""
    inherited = {name: value for name, value in os.environ.items() if name != blas.VARIABLE}
    given = environment if setting is None else {blas.VARIABLE: setting, **environment}
    return subprocess.run([sys.executable, "-c", code], env=inherited | given, capture_output=True, text=True)


def output(code: str, setting: str | None = None, **environment: str) -> str:
    done = run(code, setting, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def packaged() -> str:
    package = find_spec("scipy_openblas32")
    assert package and package.origin
    return str(Path(package.origin).parent / "lib/libscipy_openblas.so")


def test_info_says_which_and_how_fast():
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("BLAS "))
    assert blas.describe() in line and line.endswith(" GFLOPS on the CPU")
    assert float(line.split()[-5]) > 0


@linux
@pytest.mark.parametrize("setting", [None, "packaged", "off"])
def test_products(setting):
    text = output(f"from mlx_starflow.cpu import blas\n{PRODUCTS}", packaged() if setting == "packaged" else setting)
    assert text == "right\n"


@linux
def test_found_without_any_setting():
    assert (
        "OpenBLAS" in (text := output("import mlx_starflow\nprint(mlx_starflow.cpu.blas.describe())")) or "MKL" in text
    )


@linux
@pytest.mark.parametrize("before", ["", "import mlx.core as mx\nmx.eval(mx.ones((9, 9)) @ mx.ones((9, 9)))\n"])
def test_the_package_is_used_where_the_system_has_none(before):
    code = f"{before}{WITHOUT_SYSTEM}blas.install()\nprint(blas.describe())\n{CALLED}{PRODUCTS}blas.hint_if_slow()"
    done = run(code, "off")
    assert done.returncode == 0, done.stderr
    name, *called, right = done.stdout.splitlines()
    assert name.startswith("OpenBLAS 0.") and name.endswith(" (scipy-openblas32)")
    assert called == [packaged()] * 3
    assert right == "right"
    assert done.stderr == ""


@linux
def test_mlx_calls_what_its_pointer_says():
    code = """
import ctypes
from mlx_starflow.cpu import blas, linkage
import mlx.core as mx

calls = []
@ctypes.CFUNCTYPE(None, *[ctypes.c_int] * 6)
def product(order, transpose_a, transpose_b, m, n, k):
    calls.append((m, n, k))

linkage.write(blas._pointers()["cblas_sgemm"], ctypes.cast(product, ctypes.c_void_p).value)
mx.eval(mx.matmul(mx.ones((3, 4)), mx.ones((4, 5)), stream=mx.cpu))
print(calls)
"""
    assert output(code) == "[(3, 5, 4)]\n"


@linux
def test_off_leaves_the_process_as_it_is():
    code = f"import sys\nfrom mlx_starflow.cpu import blas\n{CALLED}print('openblas' in open('/proc/self/maps').read())"
    *called, loaded = output(code, "off").splitlines()
    assert all("mlx" in path for path in called)
    assert loaded == "False"


@linux
def test_nothing_becomes_visible_to_others():
    code = "import ctypes\nbefore = hasattr(ctypes.CDLL(None), '{0}')\nimport mlx_starflow\n"
    code += "assert mlx_starflow.cpu.blas.describe().startswith(('OpenBLAS', 'MKL'))\n"
    code += "assert hasattr(ctypes.CDLL(None), '{0}') == before"
    for name in ("cblas_sgemm", "sgemm_", "scipy_sgemm_"):
        output(code.format(name))


@linux
def test_a_protected_linkage_table():
    code = f"""{WITHOUT_SYSTEM}
import ctypes, mmap
from mlx_starflow.cpu import linkage
pages = {{pointer - pointer % mmap.PAGESIZE for pointer in blas._pointers().values()}}
for page in pages:
    linkage._protect(page, mmap.PROT_READ)
blas.install()
assert all(linkage._protection(page) == mmap.PROT_READ for page in pages)
print(blas.describe())
{CALLED}
for page in pages:
    linkage._protect(page, mmap.PROT_READ | mmap.PROT_WRITE)  # as it was: other data of the library lies there too
"""
    name, *called = output(code, "off").splitlines()
    assert "scipy-openblas32" in name and called == [packaged()] * 3


@linux
def test_threads_leave_a_cpu_to_mlx():
    code = """
import ctypes, os
os.sched_setaffinity(0, {0})
from mlx_starflow.cpu import blas
print(ctypes.CDLL({1!r}).scipy_openblas_get_num_threads(), blas.cpus())
"""
    unset = dict.fromkeys(blas.THREADS, "")
    cpus = sorted(os.sched_getaffinity(0))
    for some in {1, len(cpus)}:
        threads, usable = map(int, output(code.format(cpus[:some], packaged()), packaged(), **unset).split())
        assert threads == max(1, min(usable - 1, 64))
    environment = {**unset, "OMP_NUM_THREADS": str(len(cpus))}
    assert int(output(code.format(cpus, packaged()), packaged(), **environment).split()[0]) == min(len(cpus), 64)


@linux
@pytest.mark.parametrize(
    ("text", "cpus"), [("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("max 100000", 8), ("", 8)]
)
def test_cpus_of_a_container(tmp_path, monkeypatch, text, cpus):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(blas, "CPU_QUOTA", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert blas.cpus() == cpus


@linux
@pytest.mark.parametrize(
    ("setting", "message"),
    [("/no/such/libblas.so", "No such file"), ("libm.so.6", "cblas_sgemm"), (__file__, "invalid ELF header")],
)
def test_a_setting_that_cannot_be_used(setting, message):
    done = run("from mlx_starflow.cli import main\nmain(['info'])", setting)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"Error: {blas.VARIABLE}: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and "unset it" in done.stderr
    done = run("import mlx_starflow\nprint('imported')\nmlx_starflow.load", setting)
    assert done.stdout == "imported\n" and "StarflowError" in done.stderr and message in done.stderr


@linux
def test_a_library_with_64_bit_integers_is_refused():
    code = f"{WITHOUT_SYSTEM}config = blas._openblas_config\n"
    code += "blas._openblas_config = lambda library: config(library) and config(library) + ' USE64BITINT'\n"
    text = output(f"{code}blas.install()\nprint(blas.describe())", "off")
    assert text == "MLX's own (no faster one was found)\n"


@linux
def test_without_any_there_is_one_hint_and_everything_works(tmp_path):
    code = f"""{WITHOUT_SYSTEM}
sys.modules["scipy_openblas32"] = None
blas.install()
from mlx_starflow.cli import main
for words in (["generate", "a red apple", "--seed", "1", "-o", {str(tmp_path / "apple.png")!r}],) * 2 + (["info"],):
    main(words, standalone_mode=False)
"""
    done = run(code, "off")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "apple.png").is_file()
    (hint,) = (line for line in done.stderr.splitlines() if line.startswith("Hint: "))
    assert "pip install scipy-openblas32" in hint and "apt install libopenblas0-pthread" in hint
    assert "MLX's own (no faster one was found)" in done.stdout


@linux
@pytest.mark.torch
@pytest.mark.parametrize("order", ["import torch, mlx_starflow", "import mlx_starflow, torch"])
def test_beside_torch(order):
    code = f"""
{order}
from mlx_starflow.cpu import blas
{PRODUCTS}
theirs = torch.from_numpy(a) @ torch.from_numpy(b).T
np.testing.assert_allclose(theirs.numpy(), np.array(x @ y.T), rtol=0, atol=1e-4)
"""
    assert output(code) == "right\n"


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "2"}, 2),
        ({"MKL_NUM_THREADS": "many"}, None),
    ],
)
def test_threads_that_the_environment_asks_for(monkeypatch, variables, threads):
    for name in blas.THREADS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert blas.chosen_threads() == threads

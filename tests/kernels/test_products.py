"""TF32 is off unless it is asked for. Each case has a process of its own: MLX reads the variable once."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_starflow.kernels import products

VARIABLE = "MLX_ENABLE_TF32"

BEFORE = "import mlx_starflow, mlx.core as mx"
AFTER = "import mlx.core as mx, mlx_starflow"  # nothing has been computed yet

ASK = """
import os
from mlx_starflow.kernels.products import tf32
print(os.environ["MLX_ENABLE_TF32"], tf32())
"""


@pytest.mark.parametrize("imports", [BEFORE, AFTER])
@pytest.mark.parametrize(("given", "kept"), [(None, "0"), ("0", "0"), ("1", "1")])
def test_off_unless_asked_for(imports, given, kept):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {} if given is None else {VARIABLE: given}
    done = subprocess.run([sys.executable, "-c", imports + ASK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    variable, found = done.stdout.split()
    assert variable == kept
    if given != "1" or mx.default_device() == mx.cpu:  # with 1 it depends on the GPU
        assert found == "False"


@pytest.mark.parametrize(("kept_bits", "found"), [(23, False), (10, True)])
def test_a_product_shows_it(monkeypatch, kept_bits, found):
    """Factors with fewer bits, as TF32 takes them, are noticed; float32's own are not."""
    full = mx.full

    def rounded(shape, value):
        steps = 2.0**kept_bits
        return full(shape, round(value * steps) / steps)

    monkeypatch.setattr(mx, "full", rounded)
    products.tf32.cache_clear()
    try:
        assert products.tf32() is found
    finally:
        products.tf32.cache_clear()

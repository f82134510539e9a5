"""What an evaluation launches on a GPU: the report's table, and no more operations than it is said to have."""

from __future__ import annotations

import pytest
from helpers.examples import example_module, run_example

LAYER = {
    "norm": 2,
    "attention": 1,
    "product": 4,
    "into the cache": 2,
    # Residual stream and norms are float32: what the norms give is rounded for the products.
    "change of precision": 2,
    # The activation, and twice the sum with the residual stream.
    "elementwise": 3,
}
"""Of a layer in half precision on any GPU, rotary positions aside."""

ROTARY = {True: {"fused rotary positions": 1}, False: {"change of precision": 2, "elementwise": 1}}
"""These, with Metal's kernel and without."""


@pytest.fixture(scope="module")
def operations():
    return example_module("reports/operations.py")


@pytest.mark.parametrize("metal", [True, False])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_layer(operations, metal, tokens):
    found = operations.per_layer(tokens, metal)
    assert found == {name: LAYER.get(name, 0) + ROTARY[metal].get(name, 0) for name in {**LAYER, **ROTARY[metal]}}


@pytest.mark.parametrize("layers", [2, 6])
def test_the_time_of_python(operations, layers):
    first, whole = operations.python_time(layers, 2)
    assert 0 < first < whole < 1e6


def test_the_table():
    lines = run_example("reports/operations.py").splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)}
    assert rows["operations of a layer"] == ["Metal", "CUDA"]
    assert rows["together"] == ["15", "17"]
    assert rows["24 layers, and around them"] == ["363", "411"]
    assert lines[-1].startswith("Python, from the number of finished tokens on: ")

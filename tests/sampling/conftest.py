"""Everything about sampling holds for both ways of computing a block's network: in C++ and in MLX, as on a Mac."""

from __future__ import annotations

import pytest

from mlx_starflow import cpu


@pytest.fixture(autouse=True, params=["cpp", "mlx"])
def computed_by(request: pytest.FixtureRequest) -> str:
    """Which of the two computes."""
    if request.param == "mlx":
        request.getfixturevalue("in_mlx")
    elif not cpu.has_fast_networks():
        pytest.skip("there is no compiler")
    return request.param

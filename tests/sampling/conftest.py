"""Everything about sampling holds for both ways of computing a block's network: in C++ and in MLX, as on a Mac."""

from __future__ import annotations

import pytest

from mlx_starflow.cpu import native


@pytest.fixture(autouse=True, params=["native", "mlx"])
def computed_by(request: pytest.FixtureRequest) -> str:
    """Which of the two computes."""
    if request.param == "mlx":
        request.getfixturevalue("in_mlx")
    elif not native.available():
        pytest.skip("there is no compiler")
    return request.param

"""These tests are about the C++ network, also where the rest of the suite runs without it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def switched_on() -> Iterator[None]:
    """Tests that switch it off say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLX_STARFLOW_KERNELS", raising=False)
        yield

"""Bounds that hang on what networks compute in where a test does not say: `--dtype`, see conftest.py."""

from __future__ import annotations

import mlx.core as mx

from mlx_starflow.model_dir.weights import automatic_dtype


def bound(whole: float, half: float) -> float:
    """The bound in float32, or that in half precision."""
    return whole if automatic_dtype() == mx.float32 else half

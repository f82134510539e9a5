"""STARFlow in MLX: text to pictures by one autoregressive normalizing flow, with exact likelihood and inversion.

from mlx_starflow import load

pipe = load("demo")
pipe.generate("a slice of pizza", seed=7).images[0].save("pizza.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_starflow import cpu

if TYPE_CHECKING:
    from mlx_starflow.model_dir.directory import load_flow as load_flow
    from mlx_starflow.pipelines.pipeline import load as load
    from mlx_starflow.sampling import sample as sample

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_flow", "sample"]

_HOMES = {"load": "pipelines.pipeline", "load_flow": "model_dir.directory", "sample": "sampling"}

cpu.install()


def __getattr__(name: str) -> Any:
    # Loaded on first use: `mlx-starflow --help` and converters need not wait for MLX.
    if name in _HOMES:
        cpu.check()
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""PyTorch checkpoints to MLX model directories, and back; no PyTorch needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_starflow.convert.export import export_model as export_model
    from mlx_starflow.convert.flow import convert_flow as convert_flow
    from mlx_starflow.convert.pth import read_checkpoint as read_checkpoint
    from mlx_starflow.convert.release import convert_release as convert_release
    from mlx_starflow.convert.t5 import convert_t5 as convert_t5
    from mlx_starflow.convert.vae import convert_vae as convert_vae

__all__ = ["convert_flow", "convert_release", "convert_t5", "convert_vae", "export_model", "read_checkpoint"]

_HOMES = {
    "convert_flow": "flow",
    "convert_release": "release",
    "convert_t5": "t5",
    "convert_vae": "vae",
    "export_model": "export",
    "read_checkpoint": "pth",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

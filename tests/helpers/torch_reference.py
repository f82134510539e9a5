"""Comparing the MLX networks with the PyTorch reference."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def devices() -> list[str]:
    """Where the reference is run: on the CPU always, and with CUDA where there is one."""
    if find_spec("torch") is None:
        return ["cpu"]
    import torch

    # Convolutions in float32 are to be just that.
    torch.backends.cudnn.allow_tf32 = False
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


DEVICES = devices()


def to_numpy(array: Any) -> np.ndarray:
    """Of an MLX array, or of a tensor on any device."""
    return np.array(array) if isinstance(array, mx.array) else array.detach().float().cpu().numpy()


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference."""
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def relative(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the largest value."""
    return difference(ours, theirs) / max(float(np.abs(to_numpy(theirs)).max()), 1e-6)


def both(array: np.ndarray | None, device: str) -> tuple[mx.array | None, Any]:
    """An array for MLX and for PyTorch."""
    import torch

    return (None, None) if array is None else (mx.array(array), torch.from_numpy(array).to(device))


def to_torch(array: mx.array | np.ndarray, device: str = "cpu") -> Any:
    """A weight in PyTorch's layout, in which convolutions are `[out, in, height, width]`."""
    import torch

    values = np.array(array)
    return torch.from_numpy(values.transpose(0, 3, 1, 2) if values.ndim == 4 else values).to(device)


def give_weights(torch_model: Any, network: Any, device: str = "cpu") -> Any:
    """The PyTorch network with the weights of an MLX network."""
    torch_model.load_state_dict({name: to_torch(value) for name, value in tree_flatten(network.parameters())})
    return torch_model.to(device)

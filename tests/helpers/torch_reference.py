"""Comparing the MLX networks with the PyTorch reference."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_starflow.sampling import JacobiSettings, SamplingTrace, sample

Pair = tuple[mx.array | None, Any]
"""An array for MLX and for PyTorch."""


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


def both(array: np.ndarray | None, device: str) -> Pair:
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


def check_forward(flow: Any, torch_model: Any, x: Pair, text: Pair) -> None:
    """z, log-dets, loss, and its gradients with respect to the weights and the data."""

    def loss(parameters: Any, x: mx.array) -> mx.array:
        flow.update(parameters)
        return flow(x, text[0]).loss()

    data = x[1].detach().requires_grad_()
    out, theirs = flow(x[0], text[0]), torch_model(data, text[1])
    assert relative(out.z, theirs.z) < 1e-5
    assert relative(out.log_det, theirs.log_det) < 1e-5
    for name in ("block_log_dets", "hidden"):
        for ours, other in zip(getattr(out, name), getattr(theirs, name), strict=True):
            assert relative(ours, other) < 1e-5, name
    assert relative(out.nll(), theirs.nll()) < 1e-5
    assert relative(out.loss(), theirs.loss()) < 1e-5

    theirs.loss().backward()
    _, (gradients, x_gradient) = mx.value_and_grad(loss, argnums=(0, 1))(flow.trainable_parameters(), x[0])
    assert relative(x_gradient, data.grad) < 1e-4
    gradients = dict(tree_flatten(gradients))
    expected = dict(torch_model.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, parameter in expected.items():
        # A layer that no output depends on, such as text keys that nothing attends to, has no gradient in PyTorch.
        gradient = np.zeros(parameter.shape) if parameter.grad is None else to_numpy(parameter.grad)
        assert np.abs(to_numpy(gradients[name]) - gradient).max() < 1e-4 * max(np.abs(gradient).max(), 1e-3), name


def check_sampling(flow: Any, torch_model: Any, z: Pair, text: Pair, null: Pair, options: dict[str, Any]) -> None:
    """Samples, their states after each block and evaluations; Jacobi blocks give what sequential sampling gives."""
    from mlx_starflow.reference import sampling as reference

    samples = []
    for method in ("sequential", JacobiSettings(block_size=3, threshold=1e-12)):
        traces = SamplingTrace(keep_states=True), SamplingTrace(keep_states=True)
        ours = sample(flow, z[0], text[0], null[0], method=method, trace=traces[0], **options)
        theirs = reference.sample(torch_model, z[1], text[1], null[1], method=method, trace=traces[1], **options)
        samples.append(theirs)
        assert difference(ours, theirs) < 2e-4
        for mine, other in zip(*(trace.states for trace in traces), strict=True):
            assert difference(mine, other) < 2e-4
        if method == "sequential":
            assert traces[0].evaluations == traces[1].evaluations
    assert difference(*samples) < 2e-4


def random_pixel_flows(flow: Any, reference: Any, seed: int, device: str) -> tuple[Any, Any]:
    """The same random flow over pixels twice, far enough from the identity to tell; the prior's variances lie about 1.

    Args:
        flow: in MLX; gets the weights.
        reference: the same in PyTorch; gets them too.
    """
    rng = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(flow.parameters()):
        noise = rng.standard_normal(value.shape).astype(np.float32)
        scale = 0.25 if value.ndim == 1 or name.endswith("_embed") else value.shape[-1] ** -0.5
        scale = 0.05 * scale if "proj_out" in name else scale
        weights.append((name, mx.exp(0.3 * mx.array(noise)) if name == "var" else value + scale * mx.array(noise)))
    flow.load_weights(weights)
    return flow, give_weights(reference, flow, device)

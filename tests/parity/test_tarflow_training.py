"""The gradients of a TarFlow's loss against the PyTorch reference, and against finite differences."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.training.loop.objective import batch_loss
from mlx_starflow.training.loop.weights import assign, trainable

LABELS = np.array([0, 2, -1, 1, 1], np.int32)


def make(**settings) -> tuple[TarFlow, dict[str, mx.array]]:
    """A flow with random weights, whose gradients say more than those of a new one, and a batch."""
    flow = TarFlow(
        TarFlowConfig(
            img_size=8,
            channel_size=3,
            patch_size=4,
            channels=32,
            blocks=2,
            layers_per_block=2,
            head_dim=32,
            num_classes=3,
            **settings,
        )
    )
    rng = np.random.default_rng(0)

    def draw(name: str, weight: mx.array) -> mx.array:
        noise = mx.array(rng.standard_normal(weight.shape, dtype=np.float32))
        if weight.ndim != 2 or "embed" in name:
            return weight + 0.1 * noise
        return noise * (0.1 if "proj_out" in name else 1) * weight.shape[1] ** -0.5

    assign(flow, {name: draw(name, weight) for name, weight in trainable(flow).items()})
    x = (rng.integers(0, 256, (5, 8, 8, 3)) / 127.5 - 1).astype(np.float32)
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    return flow, {"latents": mx.array(x), "noise": mx.array(noise), "text": mx.array(LABELS)}


def value_and_gradients(flow: TarFlow, batch: dict[str, mx.array]) -> tuple[float, dict[str, mx.array]]:
    loss, gradients = nn.value_and_grad(flow, lambda: batch_loss(flow, batch, gradient_checkpointing=True)[0])()
    return float(loss), dict(tree_flatten(gradients))


@pytest.mark.torch
@pytest.mark.parametrize("nvp", [True, False])
def test_gradients_are_those_of_the_reference(nvp):
    torch = pytest.importorskip("torch")
    from mlx_starflow.reference.tarflow import TarFlow as Reference

    flow, batch = make(nvp=nvp)
    torch_model = Reference(flow.config)
    weights = {name: torch.from_numpy(np.array(weight)) for name, weight in trainable(flow).items()}
    missing, unexpected = torch_model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"var"} and not unexpected
    value, gradients = value_and_gradients(flow, batch)
    noisy = np.array(batch["latents"]) + flow.config.noise_std * np.array(batch["noise"])
    loss = torch_model(torch.from_numpy(noisy), torch.from_numpy(LABELS).long()).nll().mean()
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in torch_model.named_parameters():
        if name not in gradients:
            assert not parameter.requires_grad or parameter.grad is None, name
            continue
        largest = parameter.grad.abs().max().item()
        assert largest > 0 and np.abs(np.array(gradients[name]) - parameter.grad.numpy()).max() <= 1e-4 * largest, name


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_gradient_is_the_slope(noise):
    flow, batch = make(noise_type=noise)
    weights = trainable(flow)
    _, gradients = value_and_gradients(flow, batch)
    length = np.sqrt(sum(float(mx.square(gradient).sum()) for gradient in gradients.values()))

    def loss(t: float) -> float:
        assign(flow, {name: weight + t / length * gradients[name] for name, weight in weights.items()})
        return float(batch_loss(flow, batch)[0])

    assert (loss(1e-3) - loss(-1e-3)) / 2e-3 == pytest.approx(length, rel=5e-3)

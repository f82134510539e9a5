"""Training against the PyTorch reference and PyTorch's AdamW."""

from __future__ import annotations

import contextlib
import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.examples import example_module
from helpers.tiny_training import FLOW, TEXT, TinyData
from helpers.torch_reference import DEVICES

from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data import dropout
from mlx_starflow.training.loop.optimizers import GroupedOptimizer
from mlx_starflow.training.loop.schedules import cosine, ema_decay
from mlx_starflow.training.loop.weights import assign, trainable, update_average
from mlx_starflow.training.recipes import autoencoder
from mlx_starflow.training.recipes.text import TextFlow

pytestmark = pytest.mark.torch

FLOWS = {
    "released": {},
    "demo": {"use_qk_norm": True, "norm_type": "rms_norm", "layers_per_block": [1, 2, 2], "top_block_channels": 64},
    "patches": {"patch_size": 2, "img_size": 8, "channel_size": 2},
    "modern": {"use_swiglu": True, "use_post_norm": True, "use_bias": False, "num_kv_heads": 1},
}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random weights of sensible sizes: fresh flows are the identity, whose gradients say little."""
    rng = np.random.default_rng(seed)

    def draw(name: str, weight: mx.array) -> mx.array:
        noise = rng.standard_normal(weight.shape, dtype=np.float32)
        if weight.ndim == 1:
            return weight + 0.1 * mx.array(noise)
        scale = 0.1 if "proj_out" in name else 1.0
        return mx.array(noise * scale * np.prod(weight.shape[1:]) ** -0.5)

    assign(model, {name: draw(name, weight) for name, weight in trainable(model).items()})


def to_torch(name: str, array: np.ndarray, torch):
    """MLX's layout -> PyTorch's."""
    return torch.from_numpy(np.array(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array))


def load_reference(torch_model, model: nn.Module, torch) -> None:
    torch_model.load_state_dict({name: to_torch(name, np.array(w), torch) for name, w in trainable(model).items()})


def assert_gradients_agree(gradients, torch_model, torch, bound: float) -> None:
    expected = {name: parameter.grad for name, parameter in torch_model.named_parameters()}
    found = {name: to_torch(name, np.array(g), torch).to(expected[name].device) for name, g in gradients.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        if name.endswith("to_k.bias"):
            # The same shift of all logits of a softmax: the gradient is 0, and what is left is rounding.
            assert largest < 1e-6 and found[name].abs().max() < 1e-6
            continue
        assert largest > 0, name
        assert (found[name] - gradient).abs().max() <= bound * largest, name


def flat_gradients(model: nn.Module, loss) -> tuple[float, dict[str, mx.array]]:
    from mlx.utils import tree_flatten

    (value, _), gradients = nn.value_and_grad(model, loss)()
    return float(value), dict(tree_flatten(gradients))


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def make_pair(name: str, torch, device: str):
    from mlx_starflow.reference.starflow import STARFlow as TorchFlow
    from mlx_starflow.reference.t5 import T5Encoder as TorchEncoder

    flow_config = FlowConfig(**{**FLOW, **FLOWS[name]})
    text_config = T5Config(**TEXT, feed_forward_proj="gated-gelu")
    model = TextFlow(STARFlow(flow_config), T5Encoder(text_config))
    randomize(model)
    torch_model = example_module("torch_training.py").TextFlow(TorchFlow(flow_config), TorchEncoder(text_config))
    load_reference(torch_model, model, torch)
    return model, torch_model.to(device)


def make_batch(config: FlowConfig) -> dict[str, np.ndarray]:
    batch = TinyData().batch(np.random.default_rng(1), TrainingConfig(steps=1, batch_size=6), 0.0)
    rng = np.random.default_rng(2)
    shape = (6, config.img_size, config.img_size, config.channel_size)
    batch["latents"], batch["noise"] = rng.standard_normal((2, *shape), dtype=np.float32)
    return batch


def torch_loss(torch_model, batch, torch):
    """The reference's flow_loss in float32, with the noise and the mask that MLX was given."""
    device = next(torch_model.parameters()).device
    t = {key: torch.from_numpy(value).to(device) for key, value in batch.items()}
    text = torch_model.text_encoder.encode(t["ids"].long(), t["mask"])
    return torch_model.flow(t["latents"] + 0.3 * t["noise"], text, t["context_mask"]).nll().mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FLOWS)
def test_gradients_of_flow_and_text_encoder(name, torch, device):
    model, torch_model = make_pair(name, torch, device)
    batch = make_batch(model.flow.config)
    value, gradients = flat_gradients(model, lambda: model.loss({k: mx.array(v) for k, v in batch.items()}))
    loss = torch_loss(torch_model, batch, torch)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_agree(gradients, torch_model, torch, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_three_steps_of_training(torch, device):
    """Gradient, clipping, AdamW's groups, schedule and average together, as the trainer does them."""
    from mlx.optimizers import clip_grad_norm

    model, torch_model = make_pair("demo", torch, device)
    batch = make_batch(model.flow.config)
    arrays = {k: mx.array(v) for k, v in batch.items()}
    average = dict(trainable(model))
    optimizer = GroupedOptimizer(
        average,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        is_fast=lambda name: name == "text_encoder.shared.weight",
        factor=8.0,
    )
    averaged = copy.deepcopy(torch_model)
    adamw = torch.optim.AdamW(torch_model.groups(1e-3, 8.0), betas=(0.9, 0.98), weight_decay=0.01)
    peaks = [group["lr"] for group in adamw.param_groups]
    for step in range(3):
        factor = cosine((step + 1) / 8, 0.3)
        _, gradients = flat_gradients(model, lambda: model.loss(arrays))
        gradients, norm = clip_grad_norm(gradients, 0.05)
        assign(model, optimizer.apply(gradients, trainable(model), mx.array(1e-3 * factor)))
        update_average(average, trainable(model), mx.array(ema_decay(0.999, step + 1)))

        for group, peak in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        adamw.zero_grad()
        torch_loss(torch_model, batch, torch).backward()
        torch_norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 0.05)
        adamw.step()
        with torch.no_grad():
            for mean, weight in zip(averaged.parameters(), torch_model.parameters(), strict=True):
                mean.lerp_(weight, 1 - min(0.999, (2 + step) / (11 + step)))
        assert float(norm) == pytest.approx(float(torch_norm), rel=1e-4) and float(norm) > 0.05
    for weights, other in ((trainable(model), torch_model), (average, averaged)):
        for name, parameter in other.named_parameters():
            # A gradient near 0 has a sign that is a matter of rounding, and AdamW makes a whole step of it.
            difference = np.abs(np.array(weights[name]) - parameter.detach().cpu().numpy())
            assert np.quantile(difference, 0.99) < 1e-5, name


def test_adamw_is_pytorchs(torch):
    rng = np.random.default_rng(0)
    start = {"a": rng.standard_normal((4, 5), dtype=np.float32), "e": rng.standard_normal((6,), dtype=np.float32)}
    weights = {name: mx.array(value) for name, value in start.items()}
    optimizer = GroupedOptimizer(weights, betas=(0.9, 0.98), weight_decay=0.1, is_fast=lambda n: n == "e", factor=8.0)
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    groups = [{"params": [parameters["a"]], "lr": 0.01}, {"params": [parameters["e"]], "lr": 0.08, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(10):
        gradients = {name: rng.standard_normal(value.shape, dtype=np.float32) for name, value in start.items()}
        weights = optimizer.apply({n: mx.array(g) for n, g in gradients.items()}, weights, mx.array(0.01))
        for name, gradient in gradients.items():
            parameters[name].grad = torch.from_numpy(gradient)
        adamw.step()
    for name, parameter in parameters.items():
        assert np.abs(np.array(weights[name]) - parameter.detach().numpy()).max() < 2e-6


def test_autoencoder_loss_and_gradients(torch, monkeypatch):
    from mlx_starflow.reference.autoencoder_kl import AutoencoderKL as Reference

    torch_training = example_module("torch_training.py")
    config = AutoencoderKLConfig((8, 16), 1, norm_num_groups=4)
    model = AutoencoderKL(config)
    randomize(model)
    torch_model = Reference(config)
    load_reference(torch_model, model, torch)
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (6, 16, 16, 3)).astype(np.float32)
    noise = autoencoder.autoencoder_noise(rng, 6, (8, 8, 4), 0.3)
    arrays = {key: mx.array(value) for key, value in noise.items()}
    loss = lambda: autoencoder.autoencoder_loss(model, mx.array(pictures), **arrays, kl_weight=0.1)  # noqa: E731
    value, gradients = flat_gradients(model, loss)

    draws = iter([noise["posterior"], noise["latent"]])
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.from_numpy(next(draws).transpose(0, 3, 1, 2).copy()))
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.from_numpy(noise["level"][:2] / 0.3).reshape(shape))
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    images = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    expected, numbers = torch_training.autoencoder_loss(torch_model, images, kl_weight=0.1, noise_std=0.3)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    metrics = loss()[1]
    assert {name: float(metric) for name, metric in metrics.items()} == pytest.approx(numbers, rel=1e-4)
    assert_gradients_agree(gradients, torch_model, torch, 1e-4)


def test_context_masks_are_distributed_alike(torch):
    torch.manual_seed(0)
    reference = example_module("torch_training.py").context_mask(20000, 8, 0.4, 0.3).numpy()
    ours = dropout.context_mask(np.random.default_rng(0), 20000, 8, 0.4, 0.3)
    counts = [np.bincount(mask.sum(axis=1).astype(int), minlength=9) / 20000 for mask in (reference, ours)]
    assert np.abs(counts[0] - counts[1]).max() < 0.012

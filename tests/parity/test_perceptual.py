"""VGG16's activations and LPIPS against PyTorch's own layers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.model_dir.weights import load_module, parameters
from mlx_starflow.models.perceptual import VGG16, feature_distance

pytestmark = pytest.mark.torch


def test_lpips(tmp_path) -> None:
    import torch
    from torch.nn import functional as F

    from mlx_starflow.training.recipes.decoder import _read_vgg

    rng = np.random.default_rng(0)
    vgg, lpips = {}, {}
    for name, each in parameters(VGG16()).items():
        if name.startswith("lin."):
            values = rng.random((1, each.size, 1, 1))
            lpips[f"lin{name[4:]}.model.1.weight"] = torch.tensor(values.astype(np.float32))
            continue
        shape = each.shape if each.ndim == 1 else (each.shape[0], each.shape[3], *each.shape[1:3])
        values = rng.standard_normal(shape) * (2 / np.prod(shape[1:]) if len(shape) > 1 else 0.01) ** 0.5
        vgg[name] = torch.tensor(values.astype(np.float32))
    torch.save(vgg | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16.pth")
    torch.save(lpips, tmp_path / "lpips.pth")
    network = _read_vgg([tmp_path / "vgg16.pth", tmp_path / "lpips.pth"])

    def activations(x) -> list:
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        found, place = [], 0
        for depth in (2, 2, 3, 3, 3):
            if found:
                x, place = F.max_pool2d(x, 2), place + 1
            for _ in range(depth):
                x = F.relu(F.conv2d(x, vgg[f"features.{place}.weight"], vgg[f"features.{place}.bias"], padding=1))
                place += 2
            found.append(x)
        return found

    pictures = rng.uniform(-1, 1, (2, 2, 32, 48, 3)).astype(np.float32)
    theirs = [activations(torch.tensor(each).permute(0, 3, 1, 2)) for each in pictures]
    ours = [network(mx.array(each)) for each in pictures]
    for one, other in zip(ours[0], theirs[0], strict=True):
        expected = other.permute(0, 2, 3, 1).numpy()
        assert np.abs(np.array(one) - expected).max() < 1e-4 * np.abs(expected).max()

    def distance(weights) -> np.ndarray:
        total = 0
        for index, (one, other) in enumerate(zip(*theirs, strict=True)):
            one, other = (each / (each.norm(dim=1, keepdim=True) + 1e-10) for each in (one, other))
            squares = (one - other) ** 2
            squares = squares if weights is None else squares * weights[f"lin{index}.model.1.weight"]
            total = total + squares.sum(1).mean(dim=(1, 2))
        return total.numpy()

    np.testing.assert_allclose(np.array(feature_distance(*ours, network.lin)), distance(lpips), rtol=1e-3)
    plain = load_module(VGG16(), VGG16().sanitize({n: mx.array(each.numpy()) for n, each in vgg.items()}), "vgg")
    assert all(mx.array_equal(each, mx.ones_like(each)) for each in plain.lin)
    np.testing.assert_allclose(np.array(feature_distance(*ours)), distance(None), rtol=1e-3)

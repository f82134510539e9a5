"""How different pictures look: distances between activations of a network (LPIPS: Zhang et al., arXiv 1801.03924)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError

# Widths of VGG16's convolutions; each row ends in a maximum over 2x2 pixels. Activations are taken at the end of a row.
_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# How LPIPS normalizes pictures in -1..1.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGG16(nn.Module):
    """The convolutions of VGG16 (arXiv 1409.1556), named as in torchvision, and LPIPS' weights of their channels.

    Attributes:
        lin: a weight for each channel of each of the five activations; ones until `sanitize` has found others.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for row in _WIDTHS:
            for width in row:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features = layers[:-1]
        self.lin = [mx.ones(row[-1]) for row in _WIDTHS]

    def __call__(self, images: mx.array) -> list[mx.array]:
        """Activations of pictures `[B, H, W, 3]` in -1..1, each `[B, h, w, width]`."""
        x, found = (images - mx.array(_SHIFT)) / mx.array(_SCALE), []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of torchvision's VGG16, and of LPIPS' own file if they are among them, as this module's.

        The classifier is left out. Raises StarflowError if weights of channels are not as LPIPS has them.
        """
        found = {f"lin.{index}": weight for index, weight in enumerate(self.lin)}
        for name, weight in weights.items():
            if name.startswith("features."):
                found[name] = mx.moveaxis(weight, 1, -1) if weight.ndim == 4 else weight
            elif name.startswith("lin") and name.endswith(".model.1.weight"):
                index = name[3:].partition(".")[0]
                if f"lin.{index}" not in found or weight.size != found[f"lin.{index}"].size:
                    raise StarflowError(f"the tensor {name} is not one of LPIPS for VGG16")
                found[f"lin.{index}"] = weight.reshape(-1)
            elif not name.startswith("classifier."):
                raise StarflowError(f"{name} is no tensor of VGG16, nor one of LPIPS for it")
        return found


def feature_distance(
    first: Sequence[mx.array], second: Sequence[mx.array], weights: Sequence[mx.array] | None = None
) -> mx.array:
    """Squared distance of activations whose channels are brought to unit length: `[B]`, summed over layers.

    `weights`: of the channels of each layer, see `VGG16.lin`; None: all the same.
    """
    total = mx.zeros(first[0].shape[0])
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        squares = mx.square(_unit(one) - _unit(other))
        total = total + (squares if weights is None else squares * weights[index]).sum(axis=-1).mean(axis=(1, 2))
    return total


def _unit(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    # Within the root, so that the gradient is finite where all channels are 0.
    return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + 1e-10)

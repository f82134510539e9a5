"""Inception-V3 as the Fréchet inception distance uses it: pictures of 299x299 pixels to 2048 features.

The network is TensorFlow's of 2015 (Szegedy et al., arXiv 1512.00567), whose weights pytorch-fid and torch-fidelity
share in one file. It differs from the one that others train: average pools leave the padding out of their means, and
the last block has a maximum where the paper has an average. Modules are named as in that file.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

SIDE = 299
"""Pixels of the pictures that it reads."""

FEATURES = 2048

CLASSES = 1008

_COUNTERS = ".num_batches_tracked"


class BasicConv2d(nn.Module):
    """A convolution without a bias, a batch norm and a ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm(outputs, eps=1e-3)

    def __call__(self, x: mx.array) -> mx.array:
        scale = self.bn.weight * mx.rsqrt(self.bn.running_var + self.bn.eps)
        shift = self.bn.bias - self.bn.running_mean * scale
        if self.conv.weight.shape[1:3] == (1, 1):  # a matrix product: a CPU's convolution copies its input first
            return nn.relu(mx.addmm(shift, x, (self.conv.weight[:, 0, 0] * scale[:, None]).T))
        return nn.relu(self.conv(x) * scale + shift)


def _average_pool(x: mx.array) -> mx.array:
    """Means over 3x3 pixels, of those that are there."""
    _, height, width, _ = x.shape
    padded = mx.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    rows = padded[:, :height] + padded[:, 1 : height + 1] + padded[:, 2:]
    sums = rows[:, :, :width] + rows[:, :, 1 : width + 1] + rows[:, :, 2:]
    return sums / (_neighbours(height)[:, None, None] * _neighbours(width)[:, None])


def _neighbours(side: int) -> mx.array:
    """How many of three pixels around each of a row's are there."""
    place = mx.arange(side)
    return (1 + (place > 0) + (place < side - 1)).astype(mx.float32)


def _maximum_pool(x: mx.array) -> mx.array:
    pooled: mx.array = nn.MaxPool2d(3, stride=2)(x)
    return pooled


class InceptionA(nn.Module):
    """35x35 pixels to 35x35."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 64)
        self.branch5x5_1 = BasicConv2d(inputs, 48)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(inputs, pooled)

    def __call__(self, x: mx.array) -> mx.array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        parts = [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average_pool(x))]
        return mx.concatenate(parts, axis=-1)


class InceptionB(nn.Module):
    """35x35 pixels to 17x17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return mx.concatenate([self.branch3x3(x), double, _maximum_pool(x)], axis=-1)


class InceptionC(nn.Module):
    """17x17 pixels to 17x17, by rows and columns."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 192)
        self.branch7x7_1 = BasicConv2d(inputs, width)
        self.branch7x7_2 = BasicConv2d(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = BasicConv2d(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = BasicConv2d(inputs, width)
        self.branch7x7dbl_2 = BasicConv2d(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = BasicConv2d(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = BasicConv2d(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = BasicConv2d(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = BasicConv2d(inputs, 192)

    def __call__(self, x: mx.array) -> mx.array:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return mx.concatenate([self.branch1x1(x), single, double, self.branch_pool(_average_pool(x))], axis=-1)


class InceptionD(nn.Module):
    """17x17 pixels to 8x8."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(inputs, 192)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(inputs, 192)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        wide = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return mx.concatenate([self.branch3x3_2(self.branch3x3_1(x)), wide, _maximum_pool(x)], axis=-1)


class InceptionE(nn.Module):
    """8x8 pixels to 8x8; `average` pools, or else takes maxima."""

    def __init__(self, inputs: int, average: bool):
        super().__init__()
        self.average = average
        self.branch1x1 = BasicConv2d(inputs, 320)
        self.branch3x3_1 = BasicConv2d(inputs, 384)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(inputs, 448)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(inputs, 192)

    def __call__(self, x: mx.array) -> mx.array:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _average_pool(x) if self.average else nn.MaxPool2d(3, stride=1, padding=1)(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return mx.concatenate(parts, axis=-1)


class InceptionV3(nn.Module):
    """Pictures `[B, 299, 299, 3]` in -1..1 to features `[B, 2048]`, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average=True)
        self.Mixed_7c = InceptionE(2048, average=False)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def __call__(self, images: mx.array) -> mx.array:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = _maximum_pool(x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = _maximum_pool(x)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(axis=(1, 2))

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of the file, in PyTorch's layout, as this module's. Counters of batches are left out.

        Names and shapes are checked where the result is loaded.
        """
        kept = {name: weight for name, weight in weights.items() if not name.endswith(_COUNTERS)}
        return {name: mx.moveaxis(each, 1, -1) if each.ndim == 4 else each for name, each in kept.items()}

"""What the networks that enlarge pictures have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.autoencoder_layers import Conv3x3
from mlx_starflow.models.upscalers.tiling import WHOLE, Tiles

Shape = tuple[int, ...]

MOST_BLOCKS = 256
MOST_CHANNELS = 1024
MOST_SCALE = 8
"""Far above those of the networks that there are."""

COLOURS = 3
"""Channels of pictures: red, green, blue."""


class Convolution(Conv3x3):
    """A 3x3 convolution. Tiles are small, and must not take more memory than the pictures that they are of."""

    large = 16 * 16


class UpscalingNetwork(nn.Module):
    """Pictures to pictures `scale` times as large: convolutions alone, so pictures may have any size.

    Attributes:
        architecture: what it is called.
        scale: pixels of the result to one of the picture, in each direction.
        unshuffle: a picture's squares of so many pixels are one position of the feature maps.
        channels: of the feature maps.
        stages: how often `features` goes over the maps.
        pixel_radius: how far, in positions of the maps, a pixel that `pixels` makes looks.
        held: channels of all maps that `features` holds at a time, or `pixels` reads.
        work: channels of what `features` needs for a tile beside them.
        pixel_work: of what `pixels` needs, for each position of the maps.
    """

    architecture: ClassVar[str]
    unshuffle: int = 1
    scale: int
    channels: int
    stages: int
    pixel_radius: int
    held: int
    work: int
    pixel_work: int

    # ---- checkpoints

    @classmethod
    @abstractmethod
    def recognizes(cls, names: Iterable[str]) -> bool:
        """Whether tensors of these names are such a network's."""

    @classmethod
    @abstractmethod
    def sources(cls, names: Iterable[str]) -> dict[str, str]:
        """The checkpoint's name of each tensor -> the network's."""

    @classmethod
    @abstractmethod
    def of(cls, shapes: Mapping[str, Shape]) -> UpscalingNetwork:
        """The network, newly made, whose tensors have these names, as `sources` gives them, and PyTorch's shapes.

        Raises:
            StarflowError: there is none.
        """

    @classmethod
    def sanitize(cls, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Tensors of such names in PyTorch's layout as the module's."""
        return {name: channels_last(tensor) for name, tensor in tensors.items()}

    # ---- computing

    @abstractmethod
    def features(self, x: mx.array, tiles: Tiles) -> tuple[mx.array, ...]:
        """Feature maps `[B, h, w, C]` of what `prepared` gives."""

    @abstractmethod
    def pixels(self, *maps: mx.array) -> mx.array:
        """Feature maps -> pixels, `[B, h * k, w * k, 3]` in float32, k being `scale * unshuffle`."""

    def pixel_side(self, side: int) -> int:
        """Side of the tiles of the maps that `pixels` is given, where `features` has tiles of `side`."""
        return side

    def prepared(self, images: mx.array) -> mx.array:
        """Pictures `[B, H, W, 3]` as `features` reads them: if need be mirrored beyond the right and the lower edge."""
        if self.unshuffle == 1:
            return images
        for axis in (1, 2):
            images = _mirrored(images, axis, -images.shape[axis] % self.unshuffle)
        return pixel_unshuffle(images, self.unshuffle)

    def __call__(self, images: mx.array) -> mx.array:
        """Pictures `[B, H, W, 3]` in 0..1 -> `[B, scale * H, scale * W, 3]` in float32, which are about in 0..1."""
        _, height, width, _ = images.shape
        made = self.pixels(*self.features(self.prepared(images), WHOLE))
        return made[:, : self.scale * height, : self.scale * width]


def channels_last(tensor: mx.array) -> mx.array:
    """A convolution's weight `[out, in, h, w]` as MLX has it, `[out, h, w, in]`; others as they are."""
    return mx.moveaxis(tensor, 1, -1) if tensor.ndim == 4 else tensor


def require(good: object, message: str) -> None:
    """Raise StarflowError with this message unless it is so."""
    if not good:
        raise StarflowError(message)


def shape_of(shapes: Mapping[str, Shape], name: str, ndim: int = 4) -> Shape:
    """The shape of a tensor that must be there and have so many axes. Raises StarflowError."""
    require(name in shapes, f"the tensor {name} is missing")
    shape = shapes[name]
    require(len(shape) == ndim and all(shape), f"the tensor {name} has the shape {list(shape)}")
    require(max(shape) <= MOST_CHANNELS * MOST_SCALE**2, f"the tensor {name} is too large: {list(shape)}")
    return shape


def check_network(blocks: int, channels: int, scale: float, colours: tuple[int, int]) -> None:
    """Raise StarflowError unless a network of this size, from so many colours to so many, can be made."""
    require(1 <= blocks <= MOST_BLOCKS, f"it has {blocks} blocks; 1 to {MOST_BLOCKS} can be read")
    require(channels <= MOST_CHANNELS, f"it has {channels} channels; at most {MOST_CHANNELS} can be read")
    require(
        colours == (COLOURS, COLOURS), f"it makes {colours[1]} channels of {colours[0]}, not a colour picture of one"
    )
    require(scale == int(scale) and 1 <= scale <= MOST_SCALE, f"it enlarges by {scale:g}; by 1 to {MOST_SCALE} can be")


def root(number: float) -> int:
    """The whole square root; 0 if there is none."""
    found = round(number**0.5)
    return found if found * found == number else 0


def count_blocks(numbers: Iterable[str]) -> int:
    """How many there are, which must be numbered from 0 without gaps. Raises StarflowError."""
    found = set(numbers)
    missing = [number for number in range(len(found)) if str(number) not in found]
    require(not missing, f"of its {len(found)} numbered blocks number {(missing or [0])[0]} is missing")
    return len(found)


# ---- pictures and positions


def pixel_shuffle(x: mx.array, scale: int) -> mx.array:
    """`[B, H, W, C * scale * scale]` -> `[B, scale * H, scale * W, C]`, in PyTorch's order of channels."""
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, C // scale**2, scale, scale)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, H * scale, W * scale, C // scale**2)


def pixel_unshuffle(x: mx.array, scale: int) -> mx.array:
    """The inverse of `pixel_shuffle`."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // scale, scale, W // scale, scale, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // scale, W // scale, C * scale**2)


def nearest(x: mx.array, scale: int) -> mx.array:
    """Each position of `[B, H, W, C]` as a square of `scale` by `scale` equal ones."""
    B, H, W, C = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None], (B, H, scale, W, scale, C))
    return x.reshape(B, H * scale, W * scale, C)


def _mirrored(x: mx.array, axis: int, count: int) -> mx.array:
    """`count` more rows or columns, mirrored at the last one; where there are too few, the first one again."""
    if not count:
        return x
    last = x.shape[axis] - 1
    return mx.take(x, mx.array([*range(last + 1), *(max(0, last - 1 - k) for k in range(count))]), axis=axis)

"""What pictures are compared by: Inception-V3's features, or those of the model's own autoencoder, or pixels."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_starflow.convert.common import open_tensors
from mlx_starflow.errors import StarflowError
from mlx_starflow.kernels.memory import available
from mlx_starflow.media.files import checksum, exists, is_regular
from mlx_starflow.media.pixels import scale_pixels
from mlx_starflow.model_dir.weights import load_module
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.inception import FEATURES, SIDE, InceptionV3
from mlx_starflow.pipelines.class_labels import ClassPipeline
from mlx_starflow.pipelines.image import ImagePipeline
from mlx_starflow.pipelines.image_maker import ImageMaker

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
"""As pytorch-fid calls it; torch-fidelity has the same file as `weights-...`. The name ends in its digest."""

INCEPTION_NAMES = (INCEPTION_FILE, "weights-inception-2015-12-05-6726825d.pth")
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_DIGEST = "6726825d"

RESIZES = ("tensorflow", "pytorch")
"""How pictures are brought to Inception's 299 pixels: see `resize_matrix`."""

PICTURE_BYTES = 1 << 27
"""About what a picture takes in Inception."""

MOST_AT_ONCE = 16

GRID = 8
"""Side of what pictures are averaged to where their pixels are the features."""


class Features(Protocol):
    """A way from pictures to features.

    Attributes:
        name: in reports: "Inception-V3", "autoencoder" or "pixels".
        identity: tells these features from others, with the weights that make them.
        dimensions: how many there are of a picture.
    """

    name: str
    identity: str
    dimensions: int

    @abstractmethod
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Pictures, uint8 `[B, H, W, 3]` -> float32 `[B, dimensions]`."""


# ---- Inception-V3


class InceptionFeatures:
    """Features of FID: Inception-V3's last average pool, 2048 a picture, in float32.

    Attributes:
        resize: one of `RESIZES`.
    """

    name = "Inception-V3"
    dimensions = FEATURES

    def __init__(self, path: Path, resize: str = RESIZES[0]):
        """Read the network from the file that pytorch-fid and torch-fidelity use.

        Raises:
            StarflowError: it is missing, damaged, or of another network.
        """
        if resize not in RESIZES:
            raise StarflowError(f"pictures are resized as {' or '.join(RESIZES)}, not as {resize!r}")
        if not is_regular(path):
            raise StarflowError(missing_inception(path))
        self.resize, self.digest = resize, checksum(path)
        self.identity = f"{self.name} {self.digest[:16]}, resized as {resize}"
        network = InceptionV3()
        weights = {name: tensor.read() for name, tensor in open_tensors(path).items()}
        self._network = load_module(network, network.sanitize(weights), path, mx.float32)
        self._network.eval()
        self._at_once = max(1, min(MOST_AT_ONCE, available() // (4 * PICTURE_BYTES)))

    @property
    def is_official(self) -> bool:
        """Whether the weights are those that everybody's FID is computed with."""
        return self.digest.startswith(INCEPTION_DIGEST)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        parts = [pixels[start : start + self._at_once] for start in range(0, len(pixels), self._at_once)]
        return np.concatenate([np.array(self._network(mx.array(inception_input(part, self.resize)))) for part in parts])


def missing_inception(path: Path | None) -> str:
    """The line that says which file is needed, and from where."""
    where = "is not on this machine" if path is None else f"is not at {path}"
    return (
        f"the weights of Inception-V3 that FID is computed with, {INCEPTION_FILE} (91 MB), {where}: download "
        f"{INCEPTION_URL} and give it with --inception, or use --features own"
    )


def find_inception() -> Path | None:
    """The weights of Inception-V3 where PyTorch's programs keep them, if they are there."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    try:
        folder = Path(home).expanduser() / "hub/checkpoints"
    except RuntimeError:  # nobody knows where the user's home is
        return None
    return next((folder / name for name in INCEPTION_NAMES if exists(folder / name)), None)


def inception_input(pixels: np.ndarray, resize: str) -> np.ndarray:
    """Pictures, uint8 `[B, H, W, 3]` -> `[B, 299, 299, 3]` in -1..1, float32.

    "tensorflow" is what the original FID and torch-fidelity do, and torchmetrics and ml-tarflow with it: pixels sampled
    from their corners on, then (x - 128) / 128. "pytorch" is what pytorch-fid does: from their middles, x / 127.5 - 1.
    Both are bilinear and neither averages what lies between: clean-fid's bicubic is another measure.
    """
    down, across = (resize_matrix(side, SIDE, resize) for side in pixels.shape[1:3])
    rows = np.einsum("oh,bhwc->bowc", down, pixels.astype(np.float32), optimize=True)
    resized = np.einsum("ow,bhwc->bhoc", across, rows, optimize=True)
    return ((resized - 128) / 128 if resize == "tensorflow" else resized / 127.5 - 1).astype(np.float32)


def resize_matrix(side: int, out: int, resize: str) -> np.ndarray:
    """The linear interpolation of a row of pixels `[side]`, as a matrix `[out, side]`, float32."""
    places = np.arange(out, dtype=np.float64)
    middle = 0.5 if resize == "pytorch" else 0.0
    places = np.maximum((places + middle) * (side / out) - middle, 0)
    lower = np.minimum(places.astype(int), side - 1)
    upper = np.minimum(lower + 1, side - 1)
    share = np.where(upper > lower, places - lower, 0)
    matrix = np.zeros((out, side), np.float32)
    np.add.at(matrix, (np.arange(out), lower), (1 - share).astype(np.float32))
    np.add.at(matrix, (np.arange(out), upper), share.astype(np.float32))
    return matrix


# ---- what every model has


class OwnFeatures:
    """Features of what the model has itself, for where Inception's weights are not at hand.

    Of a model with an autoencoder: mean and standard deviation over the picture of each channel of the encoder's middle
    block. Of a model over pixels: the picture averaged to 8x8. They tell the model's own pictures apart, and no figure
    made of them can be compared with another model's.
    """

    def __init__(self, model: ImageMaker, identity: str):
        """`identity` tells the model's weights from others."""
        self._encode: Callable[[np.ndarray], np.ndarray]
        if isinstance(model, ClassPipeline):
            self.name, self.dimensions, self._encode = "pixels", GRID * GRID * 3, averaged_pixels
        elif isinstance(model, ImagePipeline) and isinstance(model.vae, AutoencoderKL):
            self.name, self.dimensions = "autoencoder", 2 * model.vae.config.block_out_channels[-1]
            self._encode = lambda pixels: _encoder_features(model.vae, pixels)
        else:
            raise StarflowError(f"{model.name} has no autoencoder of images whose features could be used")
        self.identity = f"{self.name} of {identity}"

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return np.concatenate([self._encode(pixels[start : start + 8]) for start in range(0, len(pixels), 8)])


def _encoder_features(vae: object, pixels: np.ndarray) -> np.ndarray:
    assert isinstance(vae, AutoencoderKL)
    images = mx.array(scale_pixels(pixels)).astype(vae.encoder.conv_in.weight.dtype)
    hidden = vae.encoder.stages(images)[-1].astype(mx.float32)
    return np.array(mx.concatenate([hidden.mean(axis=(1, 2)), hidden.std(axis=(1, 2))], axis=-1))


def averaged_pixels(pixels: np.ndarray) -> np.ndarray:
    """Pictures, uint8 `[B, H, W, 3]` -> means over a grid of 8x8 parts, in -1..1, float32 `[B, 192]`."""
    down, across = (_average_matrix(side) for side in pixels.shape[1:3])
    means = np.einsum("ih,bhwc,jw->bijc", down, scale_pixels(pixels), across, optimize=True)
    return means.reshape(len(pixels), -1).astype(np.float32)


def _average_matrix(side: int) -> np.ndarray:
    edges = np.linspace(0, side, GRID + 1)
    pixel = np.arange(side)
    overlap = np.minimum(pixel + 1, edges[1:, None]) - np.maximum(pixel, edges[:-1, None])
    weights = np.maximum(overlap, 0)
    matrix: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return matrix

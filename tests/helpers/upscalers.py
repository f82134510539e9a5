"""Small upscalers with random weights, as files of the published ones hold them, and their networks in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.convert.archive import write_archive
from mlx_starflow.model_dir.files import Spec

Tensors = dict[str, np.ndarray]
"""By name, in PyTorch's layout."""


def write_upscaler(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """A `.pth` or a `.safetensors` file."""
    arrays = {name: mx.array(each) for name, each in tensors.items()}
    return write_archive(path, {name: Spec(each.shape, each.dtype) for name, each in arrays.items()}, arrays.items())


def _layers(seed: int, layers: Mapping[str, tuple[int, ...]], gain: float = 1.0) -> Tensors:
    rng = np.random.default_rng(seed)
    out: Tensors = {}
    for name, (outputs, inputs, side) in layers.items():
        scale = gain / np.sqrt(inputs * side * side)
        out[f"{name}.weight"] = scale * rng.standard_normal((outputs, inputs, side, side), np.float32)
        out[f"{name}.bias"] = 0.1 * rng.standard_normal(outputs, np.float32)
    return {name: each.astype(np.float32) for name, each in out.items()}


def rrdb_tensors(
    channels: int = 8, growth: int = 4, blocks: int = 2, unshuffle: int = 1, doublings: int = 2, seed: int = 0
) -> Tensors:
    """Real-ESRGAN's RRDBNet."""
    layers = {"conv_first": (channels, 3 * unshuffle**2, 3)}
    for block in range(blocks):
        for dense in (1, 2, 3):
            for conv in range(5):
                outputs = growth if conv < 4 else channels
                layers[f"body.{block}.rdb{dense}.conv{conv + 1}"] = (outputs, channels + conv * growth, 3)
    names = ["conv_body", *(f"conv_up{number + 1}" for number in range(doublings)), "conv_hr"]
    layers |= dict.fromkeys(names, (channels, channels, 3))
    return _layers(seed, layers | {"conv_last": (3, channels, 3)}, gain=1.5)


def srvgg_tensors(channels: int = 8, convolutions: int = 3, scale: int = 4, seed: int = 0) -> Tensors:
    """Real-ESRGAN's compact network."""
    last = 2 * (convolutions + 1)
    layers = {f"body.{2 * number}": (channels, channels if number else 3, 3) for number in range(convolutions + 1)}
    out = _layers(seed, layers | {f"body.{last}": (3 * scale**2, channels, 3)}, gain=1.4)
    rng = np.random.default_rng(seed + 1)
    slopes = {f"body.{number}.weight": rng.uniform(0, 0.5, channels) for number in range(1, last, 2)}
    return out | {name: each.astype(np.float32) for name, each in slopes.items()}


def span_tensors(channels: int = 6, scale: int = 4, seed: int = 0, normalized: bool = True) -> Tensors:
    """SPAN, as it is trained."""
    convs = {"conv_1": (3, channels), "conv_2": (channels, channels)}
    convs |= {f"block_{n}.c{k}_r": (channels, channels) for n in range(1, 7) for k in (1, 2, 3)}
    layers = {}
    for name, (inputs, outputs) in convs.items():
        layers[f"{name}.sk"] = (outputs, inputs, 1)
        layers[f"{name}.conv.0"] = (2 * inputs, inputs, 1)
        layers[f"{name}.conv.1"] = (2 * outputs, 2 * inputs, 3)
        layers[f"{name}.conv.2"] = (outputs, 2 * outputs, 1)
        layers[f"{name}.eval_conv"] = (outputs, inputs, 3)  # not what the others are together, as in some files
    layers |= {"conv_cat": (channels, 4 * channels, 1), "upsampler.0": (3 * scale**2, channels, 3)}
    out = _layers(seed, layers)
    if normalized:  # levels of 255 come in
        out["conv_1.sk.weight"] /= 100
        out["conv_1.conv.0.weight"] /= 100
    return out if normalized else out | {"no_norm": np.zeros(1, np.float32)}


# ---- in PyTorch


def rrdb_torch(tensors: Tensors, x: Any, unshuffle: int = 1) -> Any:
    """RRDBNet by PyTorch's functions, of pictures `[B, 3, H, W]`."""
    import torch
    import torch.nn.functional as F

    t = {name: torch.from_numpy(each) for name, each in tensors.items()}

    def conv(name: str, x: Any) -> Any:
        return F.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=1)

    height, width = x.shape[2:]
    if unshuffle > 1:
        x = F.pad(x, (0, -width % unshuffle, 0, -height % unshuffle), "reflect")
        x = F.pixel_unshuffle(x, unshuffle)
    first = h = conv("conv_first", x)
    for block in range(1 + max(int(name.split(".")[1]) for name in t if name.startswith("body."))):
        outer = h
        for dense in (1, 2, 3):
            parts = [h]
            for number in range(1, 6):
                y = conv(f"body.{block}.rdb{dense}.conv{number}", torch.cat(parts, 1))
                parts.append(F.leaky_relu(y, 0.2))
            h = h + 0.2 * y
        h = outer + 0.2 * h
    h = first + conv("conv_body", h)
    for number in range(1, 9):
        if f"conv_up{number}.weight" in t:
            h = F.leaky_relu(conv(f"conv_up{number}", F.interpolate(h, scale_factor=2, mode="nearest")), 0.2)
    made = conv("conv_last", F.leaky_relu(conv("conv_hr", h), 0.2))
    scale = 2 ** (sum(name.startswith("conv_up") for name in t) // 2) // unshuffle
    return made[:, :, : scale * height, : scale * width]


def srvgg_torch(tensors: Tensors, x: Any, scale: int) -> Any:
    """SRVGGNet."""
    import torch
    import torch.nn.functional as F

    t = {name: torch.from_numpy(each) for name, each in tensors.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in t)
    h = x
    for number in range(layers):
        weight = t[f"body.{number}.weight"]
        h = F.conv2d(h, weight, t[f"body.{number}.bias"], padding=1) if number % 2 == 0 else F.prelu(h, weight)
    return F.pixel_shuffle(h, scale) + F.interpolate(x, scale_factor=scale, mode="nearest")


def span_torch(tensors: Tensors, x: Any, scale: int) -> Any:
    """SPAN as it is trained: three convolutions beside one, after zeros around the picture."""
    import torch
    import torch.nn.functional as F

    t = {name: torch.from_numpy(each) for name, each in tensors.items()}

    def single(name: str, x: Any, padding: int = 0) -> Any:
        return F.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=padding)

    def conv(name: str, x: Any) -> Any:
        y = F.pad(x, (1, 1, 1, 1))
        for number in range(3):
            y = single(f"{name}.conv.{number}", y)
        return y + single(f"{name}.sk", x)

    if "no_norm" not in t:
        x = (x - torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)) * 255
    first = h = conv("conv_1", x)
    blocks = []
    for number in range(1, 7):
        inner = F.silu(conv(f"block_{number}.c1_r", h))
        y = conv(f"block_{number}.c3_r", F.silu(conv(f"block_{number}.c2_r", inner)))
        h = (y + h) * (torch.sigmoid(y) - 0.5)
        blocks.append(h)
    joint = single("conv_cat", torch.cat([first, conv("conv_2", h), blocks[0], inner], 1))
    return F.pixel_shuffle(single("upsampler.0", joint, padding=1), scale)


# ---- other names


def esrgan_names(tensors: Tensors) -> Tensors:
    """RRDBNet's tensors under the names of ESRGAN's first release: numbers of a list with all layers."""
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("body."))
    ups = sum(name.startswith("conv_up") for name in tensors) // 2
    places = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}"}
    places |= {f"conv_up{number}": f"model.{3 * number}" for number in range(1, ups + 1)}
    places |= {"conv_hr": f"model.{3 * ups + 2}", "conv_last": f"model.{3 * ups + 4}"}
    out = {}
    for name, each in tensors.items():
        path, kind = name.rsplit(".", 1)
        if path.startswith("body."):
            _, block, dense, conv = path.split(".")
            path = f"model.1.sub.{block}.{dense.upper()}.{conv}.0"
        out[f"{places.get(path, path)}.{kind}"] = each
    return out


def bsrgan_names(tensors: Tensors) -> Tensors:
    """RRDBNet's tensors under BSRGAN's names."""
    out = {}
    for name, each in tensors.items():
        for old, new in (
            ("body.", "RRDB_trunk."),
            ("conv_body", "trunk_conv"),
            ("conv_hr", "HRconv"),
            (".rdb", ".RDB"),
        ):
            name = name.replace(old, new) if not name.startswith("conv_body") or old == "conv_body" else name
        out[name.replace("conv_up", "upconv")] = each
    return out

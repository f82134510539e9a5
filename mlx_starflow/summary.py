"""A model directory in a few lines: architecture, sizes, defaults, licence."""

from __future__ import annotations

import platform
from pathlib import Path

import mlx.core as mx

from mlx_starflow import __version__
from mlx_starflow.hub import find_model
from mlx_starflow.weights import load_flow, load_weights, read_config

PARTS = {"flow": ".", "text encoder": "text_encoder", "autoencoder": "vae"}


def summarize(model: str) -> dict[str, str]:
    """Name -> one line of text about a model ("demo", a directory or a Hub repository). Raises StarflowError."""
    directory = find_model(model)
    config = read_config(directory)
    flow = load_flow(directory).config
    device = mx.default_device().type.name.upper()
    lines = {
        "mlx-starflow": f"{__version__}, MLX {mx.__version__} on the {device}, Python {platform.python_version()}",
        "model": f"{model} ({config['model_type']}) in {directory}",
    }
    for block in reversed(flow.blocks):
        kind = f"{block.num_layers} layers, width {block.channels}" if block.num_layers else "identity"
        order = "backwards" if block.flip else "forwards"
        text = ", reads text" if getattr(block, "txt_dim", 0) else ""
        lines[f"block {flow.blocks.index(block)}"] = f"{kind}, {order}{text}"
    side = flow.img_size // flow.patch_size
    lines["tokens"] = f"{side * side} of {flow.blocks[0].in_channels} numbers, patches of {flow.patch_size}"
    if getattr(flow, "txt_size", 0):
        lines["text"] = f"{flow.txt_size} tokens of {flow.txt_dim} numbers"
    for part, folder in PARTS.items():
        if (directory / folder / "config.json").is_file():
            lines[part] = _size(directory / folder)
    if quantization := config.get("quantization"):
        lines["quantized"] = f"{quantization.get('bits')} bits, groups of {quantization.get('group_size')}"
    for name, value in config.get("pipeline", {}).items():
        lines[name] = str(value)
    if licences := [path.name for path in sorted(directory.iterdir()) if path.stem.upper() in ("LICENSE", "NOTICE")]:
        lines["licence"] = f"see {', '.join(licences)} there"
    return lines


def _size(directory: Path) -> str:
    """Parameters as the file counts them (packed weights unpacked) and bytes on disk."""
    weights = load_weights(directory)
    quantization = read_config(directory).get("quantization") or {}
    count = 0
    for name, value in weights.items():
        if name.removesuffix(".scales") + ".weight" in weights and name.endswith(".scales"):
            continue
        if name.endswith(".biases") and name.removesuffix(".biases") + ".scales" in weights:
            continue
        packed = value.dtype == mx.uint32 and name.removesuffix(".weight") + ".scales" in weights
        count += value.size * 32 // quantization["bits"] if packed else value.size
    size = sum(value.nbytes for value in weights.values())
    return f"{count / 1e6:.2f} M parameters, {size / 2**20:.1f} MiB"

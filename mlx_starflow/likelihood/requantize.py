"""Model directories quantized anew, and what that costs: bytes saved against exact likelihood lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood import Nll, exact_nll, standard_error
from mlx_starflow.model_dir.directory import ModelDirectory, NetworkDirectory, load_flow, read_tokenizer
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.model_dir.hub import find_model
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.saving import copy_network, read_files, read_licences, save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.pipelines.pipeline import load
from mlx_starflow.training.data.image_folder import PictureFolder

# ---- quantizing


def quantize_model(
    model: str | Path,
    out: str | Path,
    quantize: int | str | None = None,
    *,
    text_encoder: int | str | None = None,
    group_size: int | None = None,
) -> Path:
    """Write a model directory again with its flow, its text encoder or both quantized.

    Weights that are quantized already are dequantized first, but for layers whose settings stay the same. Autoencoder,
    tokenizer and licences are copied. A tensor is read when it is written, so memory need not hold the dense network.

    Args:
        model: "demo", a model directory or a Hub repository of one.
        out: folder to write, made if need be.
        quantize: how to quantize the flow, a key of `QUANTIZATIONS`; None: it stays as it is.
        text_encoder: the same for the text encoder; "mixed" is for flows alone.
        group_size: weights that share a scale, in both; None: as is usual for each.

    Returns:
        `out`.

    Raises:
        StarflowError: there is no such model, nothing to quantize, it cannot be quantized so, or `out` cannot be
            written or is the model's own folder.
    """
    if quantize is None and text_encoder is None:
        raise StarflowError("nothing to quantize: say how to quantize the flow (--quantize) or --text-encoder")
    source, out = ModelDirectory.find(model), Path(out)
    if out.exists() and out.resolve() == source.path.resolve():
        raise StarflowError(f"{out} is the model's own folder; give another one to write to")
    flow_weights, config = _quantized(source.flow, quantize, group_size)
    if text_encoder is not None and not source.has("text_encoder"):
        raise StarflowError(f"{source.path} has no text encoder to quantize; leave out --text-encoder")
    if source.has("text_encoder"):
        folder = source.text_encoder.folder
        read_tokenizer(folder / "spiece.model", source.text_encoder.config)
        weights, text_config = _quantized(source.text_encoder, text_encoder, group_size)
        save_model(out / "text_encoder", weights, text_config, files=read_files(folder, "spiece.model"))
    if source.has("vae"):
        copy_network(source.vae, out / "vae")
    # The flow last: without its config.json this is not yet a model.
    return save_model(out, flow_weights, config, files=read_licences(source))


def _quantized(
    network: NetworkDirectory[nn.Module, Any], how: int | str | None, group_size: int | None
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """A network's tensors, none of them read yet, and its `config.json`, quantized."""
    module = network.lazy()
    if how is None:
        return parameters(module), network.content
    quantization = quantize_module(module, how, group_size)
    return parameters(module), {**network.content, "quantization": quantization}


# ---- what it costs


@dataclass(frozen=True)
class Pictures:
    """What models are compared on: normalized latents `[B, H, W, C]` and a caption of each."""

    latents: np.ndarray
    captions: list[str]


def read_pictures(model: str | Path, folder: str | Path, limit: int = 64) -> Pictures:
    """At most `limit` captioned pictures of a folder, spread evenly over it, as a model's latents.

    Args:
        model: "demo", a model directory or a Hub repository of one; it must read prompts.
        folder: pictures with a `metadata.jsonl`, as `PictureFolder` reads; lines whose `split` is not "train", which is
            what it is if there is none, are left out.
        limit: 2 or more.

    Raises:
        StarflowError: the model or the folder cannot be read.
    """
    if limit < 2:
        raise StarflowError(f"an error estimate needs 2 pictures or more, not {limit}")
    pipe = load(model, low_memory=True)
    side = pipe.config.img_size * pipe.vae_config.downscale
    data = PictureFolder.read(folder, size=side, splits=("train",))
    if len(data) < 2:
        raise StarflowError(f"an error estimate needs 2 pictures or more, and {folder} has {len(data)}")
    chosen = np.unique(np.linspace(0, len(data) - 1, min(limit, len(data))).round().astype(int))
    latents = []
    for start in range(0, len(chosen), 8):
        pictures = mx.array(data.pictures[chosen[start : start + 8]].astype(np.float32) / 127.5 - 1)
        latents.append(np.array(pipe.vae.scale(pipe.vae.encode(pictures).mean)))
    return Pictures(np.concatenate(latents), [data.captions[index][0] for index in chosen])


@dataclass(frozen=True)
class Measurement:
    """One model on some pictures: bytes of its networks' weights, and the exact NLL."""

    flow_bytes: int
    text_encoder_bytes: int
    nll: Nll

    @property
    def bytes(self) -> int:
        return self.flow_bytes + self.text_encoder_bytes


def measure(model: str | Path, pictures: Pictures, *, draws: int = 4, seed: int = 0) -> Measurement:
    """Sizes and exact NLL of a model. With the same pictures, draws and seed, models see the same noise.

    Raises:
        StarflowError: the model cannot be read, or its likelihood is not finite.
    """
    directory = find_model(model)
    networks = (directory, directory / "text_encoder")
    sizes = [sum(value.nbytes for value in load_weights(folder).values()) for folder in networks]
    # One network in memory at a time.
    text = _embed(directory, pictures.captions)
    mx.clear_cache()
    return Measurement(*sizes, exact_nll(load_flow(directory), pictures.latents, text, draws=draws, seed=seed))


def _embed(directory: Path, captions: list[str]) -> mx.array:
    pipe = load(directory, low_memory=True)
    parts = []
    for start in range(0, len(captions), 16):
        parts.append(pipe.encode_prompts(captions[start : start + 16]))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


@dataclass(frozen=True)
class Comparison:
    """A model before and after: what quantizing saved, and what it cost. `str` makes a table of it."""

    original: Measurement
    quantized: Measurement

    @property
    def change(self) -> Nll:
        """Of the NLL of each picture, with the same noise."""
        return self.quantized.nll - self.original.nll

    def rows(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """NLL and its parts by name: each picture's before and after, `[B]`."""
        before, after = self.original.nll, self.quantized.nll
        blocks = {f"block {i}": (before.blocks[:, i], after.blocks[:, i]) for i in range(before.blocks.shape[1])}
        return {"total": (before.total, after.total), **blocks, "prior": (before.prior, after.prior)}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: MiB, and nats per latent dimension."""
        nats = {}
        for name, (before, after) in self.rows().items():
            error = standard_error(after - before)
            nats[name] = {
                "original": float(before.mean()),
                "quantized": float(after.mean()),
                "change": float((after - before).mean()),
                "standard_error": None if math.isnan(error) else error,
            }
        sizes = {
            name: {key: getattr(part, f"{key}_bytes") / 2**20 for key in ("flow", "text_encoder")}
            for name, part in (("original", self.original), ("quantized", self.quantized))
        }
        return {"pictures": len(self.change.prior), "mib": sizes, "nll": nats}

    def __str__(self) -> str:
        lines = [f"{'':<20}{'original':>11}{'quantized':>11}   change"]
        for label, key in (("flow, MiB", "flow_bytes"), ("text encoder, MiB", "text_encoder_bytes")):
            before, after = getattr(self.original, key), getattr(self.quantized, key)
            lines.append(f"{label:<20}{before / 2**20:11.2f}{after / 2**20:11.2f}   {after / before - 1:+.1%}")
        for name, (before, after) in self.rows().items():
            label = "NLL, nats/dimension" if name == "total" else f"  {name}"
            change = after - before
            lines.append(
                f"{label:<20}{before.mean():11.5f}{after.mean():11.5f}"
                f"   {change.mean():+.5f} +- {standard_error(change):.5f}"
            )
        return "\n".join([*lines, f"{len(self.change.prior)} pictures, the same noise for both"])

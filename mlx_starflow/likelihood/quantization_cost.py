"""What quantizing a model costs: bytes saved against exact likelihood lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.nll import Nll, exact_nll, standard_error
from mlx_starflow.likelihood.protocol import ImageModel
from mlx_starflow.media.image_folder import ImageFolder
from mlx_starflow.model_dir.files import load_weights


@dataclass(frozen=True)
class CaptionedData:
    """What models are compared on: data without noise, `[B, ...]`, 2 or more, and a caption of each."""

    data: np.ndarray
    captions: list[str]

    @classmethod
    def read(cls, model: ImageModel, folder: str | Path, most: int = 64) -> CaptionedData:
        """At most so many captioned images of a folder, spread evenly over it, as a model's data.

        Args:
            folder: images with a `metadata.jsonl`, as `ImageFolder` reads; lines whose `split` is not "train", which is
                what it is if there is none, are left out.
            most: 2 or more.

        Raises:
            StarflowError: the folder cannot be read, or has too few images for an error estimate.
        """
        found = ImageFolder.read(folder, size=model.size[0], splits=("train",)).spread(most)
        if len(found) < 2:
            raise StarflowError(f"an error estimate needs 2 pictures or more, not {len(found)}")
        data = model.to_data(Image.fromarray(image) for image in found.images)
        model.release("vae")
        return cls(data, [captions[0] for captions in found.captions])


@dataclass(frozen=True)
class Measurement:
    """One model on some images: bytes of its networks' weights, and the exact NLL."""

    flow_bytes: int
    text_encoder_bytes: int
    nll: Nll

    @property
    def bytes(self) -> int:
        return self.flow_bytes + self.text_encoder_bytes


def measure(model: ImageModel, images: CaptionedData, *, draws: int = 4, seed: int = 0) -> Measurement:
    """Sizes and exact NLL of a model that reads prompts. With the same images, draws and seed, models see the same
    noise.

    Raises:
        StarflowError: the model's weights cannot be read, or its likelihood is not finite.
    """
    folders = (model.directory, model.directory / "text_encoder")
    flow, text_encoder = (sum(value.nbytes for value in load_weights(folder).values()) for folder in folders)
    text = model.conditions(images.captions)
    model.release("text_encoder")
    return Measurement(flow, text_encoder, exact_nll(model.flow, images.data, text, draws=draws, seed=seed))


@dataclass(frozen=True)
class Comparison:
    """A model before and after: what quantizing saved, and what it cost. `str` makes a table of it."""

    original: Measurement
    quantized: Measurement

    @property
    def change(self) -> Nll:
        """Of the NLL of each image, with the same noise."""
        return self.quantized.nll - self.original.nll

    def rows(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """NLL and its parts by name: each image's before and after, `[B]`."""
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

"""How well pictures fit their prompts by CLIP (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.convert.common import open_tensors
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import exists, inside, is_folder, read_json, read_lines
from mlx_starflow.model_dir.weights import load_module
from mlx_starflow.models.clip import CLIP, CLIPConfig
from mlx_starflow.models.clip_tokenizer import CLIPTokenizer

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""In order of preference: the first that is there is read."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of pixels in 0..1, as CLIP was trained with, where `preprocessor_config.json` says nothing else."""

AT_ONCE = 16

MOST_SIDE = 1024
"""Pixels of the pictures that a CLIP reads; released ones read up to 384."""


class CLIPScorer:
    """A CLIP from a Hugging Face folder.

    Attributes:
        name: of the folder.
        identity: tells this CLIP from others.
    """

    def __init__(self, folder: Path):
        """Read `config.json`, `vocab.json`, `merges.txt` and the weights.

        Raises:
            StarflowError: one of them is missing or damaged, or the model is no `CLIPModel`.
        """
        if not is_folder(folder):
            raise StarflowError(
                f"{folder} is no folder: get a CLIP with `hf download openai/clip-vit-large-patch14 --local-dir clip` "
                "and give its folder with --clip"
            )
        config = CLIPConfig.from_dict(read_json(_file(folder, "config.json")))
        if config.vision.image_size > MOST_SIDE:
            raise StarflowError(f"{folder}: an image_size of {config.vision.image_size} is more than {MOST_SIDE}")
        merges = read_lines(_file(folder, "merges.txt"))
        self._tokenizer = CLIPTokenizer(_vocabulary(folder), merges, config.text.max_position_embeddings)
        weights = next((name for name in WEIGHTS if exists(folder / name)), WEIGHTS[0])
        path = _file(folder, weights)
        network = CLIP(config)
        tensors = {name: tensor.read() for name, tensor in open_tensors(path).items()}
        self._network = load_module(network, network.sanitize(tensors), path, mx.float32)
        self._side = config.vision.image_size
        self._mean, self._std = _normalization(folder)
        self.name = folder.resolve().name
        projection = np.array(network.visual_projection.weight).astype(np.float64)
        self.identity = f"{self.name} {np.abs(projection).sum():.9g}"

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """CLIP scores, 100 max(cos, 0), of pictures, uint8 `[B, H, W, 3]`, each with its prompt: `[B]`."""
        scores = []
        for start in range(0, len(pixels), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            images = self._network.encode_images(mx.array(np.stack([self._picture(each) for each in pixels[part]])))
            texts = self._network.encode_texts(mx.array(self._tokenizer.batch(prompts[part])))
            scores.append(np.array((images * texts).sum(axis=-1)))
        return 100 * np.maximum(np.concatenate(scores), 0)

    def _picture(self, pixels: np.ndarray) -> np.ndarray:
        """The middle of a picture whose shorter side becomes CLIP's (bicubic), normalized."""
        image, side = Image.fromarray(pixels), self._side
        scale = side / min(image.size)
        # The longer side is cut to whole pixels, as CLIP's own preprocessing does.
        width, height = (side if length == min(image.size) else int(length * scale) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        cut = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
        return (cut - self._mean) / self._std


def _file(folder: Path, name: str) -> Path:
    path = inside(folder, name)
    if not exists(path):
        raise StarflowError(f"{path} is missing: download the whole CLIP into {folder}")
    return path


def _vocabulary(folder: Path) -> dict[str, int]:
    vocabulary = read_json(_file(folder, "vocab.json"))
    if not all(isinstance(each, int) and each >= 0 for each in vocabulary.values()):
        raise StarflowError(f"{folder / 'vocab.json'} is damaged: it holds a number for each token")
    return vocabulary


def _normalization(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    path = inside(folder, "preprocessor_config.json")
    config: dict[str, Any] = read_json(path) if exists(path) else {}
    try:
        mean, std = (
            np.array(config.get(key, own), np.float32) for key, own in (("image_mean", MEAN), ("image_std", STD))
        )
        if mean.shape != (3,) or std.shape != (3,) or not (np.isfinite(mean).all() and (std > 0).all()):
            raise ValueError
    except (TypeError, ValueError):
        raise StarflowError(f"{path} is damaged: image_mean and image_std are three numbers each") from None
    return mean, std

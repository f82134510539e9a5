"""The nodes. ComfyUI's images are float tensors `[batch, height, width, 3]` of 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image

from mlx_starflow import load
from mlx_starflow.likelihood import heat_map

CATEGORY = "mlx-starflow"
OWN = -1.0
"""Stands for the model's own guidance or temperature."""


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    pixels = [np.asarray(image.convert("RGB"), np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(pixels))


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    pixels = np.round(tensor[..., :3].cpu().float().numpy().clip(0, 1) * 255).astype(np.uint8)
    return [Image.fromarray(each) for each in pixels]


def watch() -> Any:
    """Shows how far a call is on the node, and ends it when ComfyUI's button to cancel is pressed."""
    bar = comfy.utils.ProgressBar(1)

    def show(progress: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if progress.total:
            bar.update_absolute(progress.done, progress.total)

    return show


class Load:
    """A flow: the embedded one, a model directory, or a Hub repository."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("STARFLOW",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("STRING", {"default": "demo", "tooltip": "demo, a model directory or a Hub repository"}),
                "dtype": (["auto", "float32", "bfloat16", "float16"],),
            }
        }

    def load(self, model: str, dtype: str) -> tuple[Any]:
        return (load(model, dtype=None if dtype == "auto" else dtype),)


class Generate:
    """Images of a prompt."""

    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        own = {"default": OWN, "min": OWN, "max": 100.0, "step": 0.05, "tooltip": "-1: the model's own"}
        side = {"default": 0, "min": 0, "max": 8192, "tooltip": "0: the model's own"}
        return {
            "required": {
                "flow": ("STARFLOW",),
                "prompt": ("STRING", {"default": "a fox to the left of a cactus at night", "multiline": True}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
                "images": ("INT", {"default": 1, "min": 1, "max": 64}),
                "guidance": ("FLOAT", own),
                "temperature": ("FLOAT", own),
                "method": (["auto", "sequential", "jacobi", "rolling"],),
                "width": ("INT", side),
                "height": ("INT", side),
            }
        }

    def generate(
        self,
        flow: Any,
        prompt: str,
        seed: int,
        images: int,
        guidance: float,
        temperature: float,
        method: str,
        width: int,
        height: int,
    ) -> tuple[torch.Tensor]:
        result = flow.generate(
            prompt,
            seed=seed,
            images=images,
            guidance=None if guidance < 0 else guidance,
            temperature=None if temperature < 0 else temperature,
            method=method,
            size=(width, height) if width and height else None,
            callback=watch(),
        )
        return (to_tensor(result.images),)


class Score:
    """The exact likelihood of images, and where the surprise is."""

    CATEGORY = CATEGORY
    FUNCTION = "score"
    RETURN_TYPES = ("FLOAT", "FLOAT", "IMAGE")
    RETURN_NAMES = ("nll", "standard error", "surprise")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "flow": ("STARFLOW",),
                "image": ("IMAGE",),
                "prompt": ("STRING", {"default": "", "multiline": True}),
                "draws": ("INT", {"default": 4, "min": 1, "max": 64, "tooltip": "of the training noise"}),
            }
        }

    def score(self, flow: Any, image: torch.Tensor, prompt: str, draws: int) -> tuple[float, float, torch.Tensor]:
        """The mean NLL of the batch in nats per dimension, its standard error, and maps, one an image."""
        images = to_images(image)
        scores = flow.score(images, prompt, draws=draws, callback=watch())
        low = min(float(each.surprise.min()) for each in scores)
        high = max(float(each.surprise.max()) for each in scores)
        seen = [flow.fit(each) for each in images]
        maps = [heat_map(own, each.surprise, low, high) for own, each in zip(seen, scores, strict=True)]
        nll = float(np.mean([each.nll for each in scores]))
        error = float(np.sqrt(np.sum([each.standard_error**2 for each in scores])) / len(scores))
        return nll, error, to_tensor(maps)


class Reprompt:
    """The exact noise of an image, regenerated under another prompt."""

    CATEGORY = CATEGORY
    FUNCTION = "reprompt"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "flow": ("STARFLOW",),
                "image": ("IMAGE",),
                "source": ("STRING", {"default": "", "tooltip": "what the image shows"}),
                "target": ("STRING", {"default": "", "tooltip": "what it shall show"}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 4.0, "step": 0.05}),
            }
        }

    def reprompt(
        self, flow: Any, image: torch.Tensor, source: str, target: str, strength: float
    ) -> tuple[torch.Tensor]:
        edits = [flow.reprompt(each, source, target, strength=strength, callback=watch()) for each in to_images(image)]
        return (to_tensor([edit.images[0] for edit in edits]),)

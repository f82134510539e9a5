"""Class labels and pixels: `ClassPipeline`, for TarFlows."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.protocol import Prompts, one_or_several
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.models.tarflow import TarFlowConfig
from mlx_starflow.pipelines.backend import MLXBackend
from mlx_starflow.pipelines.base import Pipeline

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey: Rec. 601, as in Pillow's own conversion."""


class ClassPipeline(Pipeline):
    """A TarFlow: a flow over pixels whose prompts are numbers of classes; `load_class_labels` gives one.

    Attributes:
        config: of the flow.
    """

    dimension = "pixel dimension"
    temperature = 1.0

    def __init__(self, name: str, model: ModelDirectory, backend: MLXBackend):
        super().__init__(name, model, backend)
        if not isinstance(model.flow.config, TarFlowConfig):
            raise StarflowError(f"{name} does not read class labels: it is no TarFlow")
        self.config = model.flow.config

    @property
    def size(self) -> tuple[int, int]:
        return self.config.img_size, self.config.img_size

    def check_size(self, size: tuple[int, int], images: int = 1) -> None:
        if tuple(size) != self.size:
            own = "x".join(map(str, self.size))
            raise StarflowError(f"{self.name} knows pictures of {own} pixels alone: leave out the size")

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        if self.config.channel_size == 1:
            return (images @ np.array(LUMA, np.float32))[..., None]
        return images

    def decode_images(self, data: np.ndarray) -> np.ndarray:
        return np.broadcast_to(data, (*data.shape[:-1], 3))

    def conditions(self, prompts: Prompts, shape: Sequence[int] | None = None) -> mx.array | None:
        classes = self.config.num_classes
        numbers = []
        for prompt in one_or_several(prompts):
            text = prompt.strip()
            if text and not (text.isdecimal() and int(text) < classes):
                known = f"a number from 0 to {classes - 1}" if classes else "nothing: the model knows no classes"
                raise StarflowError(f"{self.name} takes no prompt {prompt!r} but {known}")
            numbers.append(int(text) if text else -1)
        return mx.array(numbers) if classes else None

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(side // self.config.patch_size for side in shape[:-1])

"""The networks of a model directory in MLX, read when they are first used, and what a pipeline does with them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_starflow.model_dir.directory import ModelDirectory, read_text_encoder
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.pipelines.prompted_model import PromptedModel
from mlx_starflow.planning.memory import metal_limits


class MLXModel(PromptedModel[mx.array]):
    """A flow with its text encoder and its autoencoder, read from a model directory.

    Attributes (the networks are read when they are first used):
        flow, text_encoder, tokenizer, vae: the networks.
        low_memory: hold one network at a time, and read it again for the next pictures.
        group: processes that compute the flow together, or None.
    """

    def __init__(
        self,
        name: str,
        model: ModelDirectory,
        *,
        dtype: mx.Dtype | None = None,
        low_memory: bool = False,
        adapters: Sequence[tuple[str | Path, float]] = (),
        group: mx.distributed.Group | None = None,
    ):
        super().__init__(name, model)
        self.dtype, self.low_memory, self.group = dtype, low_memory, group
        self.adapters = [(str(path), float(strength)) for path, strength in adapters]

    @cached_property
    def flow(self) -> STARFlow:
        return self.model.load_flow(self.dtype, self.adapters, self.group)

    @cached_property
    def _text(self) -> tuple[T5Encoder, Tokenizer]:
        return read_text_encoder(self.model.text_encoder, self.dtype)

    @property
    def text_encoder(self) -> T5Encoder:
        return self._text[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._text[1]

    @cached_property
    def vae(self) -> AutoencoderKL:
        return self.model.vae.load(self.dtype)

    def _array(self, values: np.ndarray) -> mx.array:
        return mx.array(values)

    def _concatenate(self, arrays: list[mx.array]) -> mx.array:
        return mx.concatenate(arrays)

    def _encode(self, ids: np.ndarray, mask: np.ndarray) -> mx.array:
        text = self.text_encoder.encode(mx.array(ids), mx.array(mask))
        mx.eval(text)
        return text

    def _while_generating(self) -> AbstractContextManager[None]:
        return metal_limits()

    def _done_with(self, part: str) -> None:
        """Let go of a network that the next phases do not need, if memory is short."""
        if self.low_memory:
            self.__dict__.pop(part, None)
            mx.clear_cache()

    def _start_phase(self) -> None:
        mx.reset_peak_memory()

    def _finish_phase(self) -> int:
        return mx.get_peak_memory()

"""What computes: the networks of a model directory, and the few things that pipelines do with them.

A pipeline has a backend: usually `mlx_backend.MLXBackend`; `torch_backend.TorchBackend` runs the same models in
PyTorch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from mlx_starflow.errors import NotFinite
from mlx_starflow.likelihood.protocol import Part
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.sampling import (
    Certificate,
    JacobiSettings,
    SamplingPlan,
    SamplingTrace,
    SequentialSettings,
)
from mlx_starflow.sampling.progress import Watch

Array = TypeVar("Array")


class Backend(ABC, Generic[Array]):
    """The networks of one model, and what is computed with them; arrays are those of its framework.

    Attributes:
        certifies: whether it has `certify`.
        low_memory: hold one network at a time, and read it again when it is needed next.
        adapters, student_adapters: folders of the flow's adapters, and of its students', and their strengths.
    """

    certifies: bool = False
    low_memory: bool = False
    adapters: Sequence[tuple[str, float]] = ()
    student_adapters: Sequence[tuple[str, float]] = ()

    @property
    @abstractmethod
    def flow(self) -> Any:
        """The flow, read when it is first used, as the other networks are."""

    @property
    @abstractmethod
    def text_encoder(self) -> Any: ...

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @property
    @abstractmethod
    def vae(self) -> Any: ...

    methods: tuple[str, ...] = (SequentialSettings.name, JacobiSettings.name)
    """Ways of sampling that it has."""

    automatic_method = SequentialSettings.name
    """How to sample where neither user nor plan says so."""

    quantizes_cache: bool = False
    """Whether keys and values can be kept in fewer bits."""

    @property
    def flow_precision(self) -> str:
        """The precision of a flow that a sampling plan is to be for; "" where that does not matter."""
        return ""

    @abstractmethod
    def array(self, values: np.ndarray) -> Array:
        """Values as an array of the framework, where it computes."""

    @abstractmethod
    def numpy(self, array: Array) -> np.ndarray:
        """An array's values, float32."""

    @abstractmethod
    def concatenate(self, arrays: list[Array]) -> Array:
        """Along the first axis."""

    @abstractmethod
    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> Array:
        """Token ids and mask `[B, L]` -> text embeddings `[B, L, D]`, zero at padding."""

    @abstractmethod
    def invert(
        self,
        z: Array,
        text: Array | None,
        null_text: Array | None,
        settings: GenerationSettings,
        method: str | SamplingPlan,
        progress: Watch,
        trace: SamplingTrace,
    ) -> Array:
        """Noise -> data, `[B, h, w, C]`, by a method with the settings' guidance; see `sampling.sample`.

        `text` are embeddings of prompts, or labels of classes.
        """

    def certify(
        self,
        x: Array,
        z: Array,
        text: Array | None,
        null_text: Array | None,
        settings: GenerationSettings,
        progress: Watch = False,
        given: int = 0,
    ) -> list[Certificate]:
        """How far the guided flow, run forwards over each sample, is from its noise, but for so many given first
        frames of a video; see `certificate.certify_each`."""
        raise NotImplementedError

    @abstractmethod
    def denoise(self, x: Array, text: Array | None, progress: Watch = False) -> Array:
        """One score step on data `[B, h, w, C]`."""

    @abstractmethod
    def iterate(
        self,
        x: Array,
        labels: Array | None,
        levels: Sequence[float],
        clip: bool,
        noise: Array | None,
        progress: Watch,
        preview: Callable[[int, Array], None],
    ) -> Array:
        """Many score steps of an iTARFlow; see `sampling.iterate`."""

    @abstractmethod
    def decode(self, latents: Array) -> np.ndarray:
        """Normalized latents `[B, h, w, C]` -> images, float32 `[B, H, W, 3]`, about -1..1."""

    def release(self, part: Part) -> None:
        """With `low_memory`, let go of a network that the next phases do not need."""
        return

    def start_phase(self) -> None:
        """Begin to measure memory."""
        return

    def finish_phase(self) -> int | None:
        """Wait for what is being computed; the most bytes that were held since `start_phase`, if known."""
        return None


def check_part(values: np.ndarray, part: str) -> None:
    """Raise NotFinite, naming the network, if what it made has a NaN or an infinity."""
    if not np.isfinite(values).all():
        raise NotFinite(f"what {part} made is not finite: its weights may be damaged, or too coarse (--dtype float32)")

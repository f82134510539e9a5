"""The MLX backend: the networks of a model directory, read when they are first used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import NotFinite
from mlx_starflow.kernels.memory import available, bounded
from mlx_starflow.likelihood.protocol import Part
from mlx_starflow.model_dir.directory import ModelDirectory, load_student, read_text_encoder
from mlx_starflow.model_dir.quantization import dense_on_cpu
from mlx_starflow.model_dir.weights import dtype_name
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.autoencoder_wan import AutoencoderWan
from mlx_starflow.models.itarflow import ITarFlow
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.models.student import Student
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.models.tarflow import PixelFlow
from mlx_starflow.models.tokenizer import Tokenizer
from mlx_starflow.pipelines.backend import Backend, check_part
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.sampling import (
    Certificate,
    RollingSettings,
    SamplingPlan,
    SamplingTrace,
    denoise,
    iterate,
    sample,
)
from mlx_starflow.sampling.certificate import certify_each
from mlx_starflow.sampling.methods import DRAFT, METHODS
from mlx_starflow.sampling.progress import Watch
from mlx_starflow.sampling.student import StudentSample, sample_student

Result = TypeVar("Result")


class MLXBackend(Backend[mx.array]):
    """The networks of a model directory in MLX, read when they are first used.

    Attributes:
        model: the directory.
        dtype: precision of the networks; None: what `precision.automatic` says. A network then computes in a precision
            of larger range from the time on that it makes a NaN or an infinity.
        group: processes that compute the flow together, or None.
        quantize: how the flow's weights are quantized as they are read, or None.
        student_adapters: folders of adapters of its students, and their strengths.
    """

    certifies = True
    methods = (*METHODS, DRAFT)
    automatic_method = RollingSettings.name
    quantizes_cache = True

    def __init__(
        self,
        model: ModelDirectory,
        *,
        dtype: mx.Dtype | None = None,
        low_memory: bool = False,
        adapters: Sequence[tuple[str | Path, float]] = (),
        group: mx.distributed.Group | None = None,
        quantize: int | str | None = None,
        student_adapters: Sequence[tuple[str | Path, float]] = (),
    ):
        self.model, self.dtype, self.low_memory, self.group = model, dtype, low_memory, group
        self.quantize = quantize
        self.adapters, self.student_adapters = (
            [(str(path), float(strength)) for path, strength in each] for each in (adapters, student_adapters)
        )
        self._flow: STARFlow | PixelFlow | None = None
        self._dense: tuple[STARFlow | PixelFlow, STARFlow | PixelFlow] | None = None
        self._exact: STARFlow | PixelFlow | None = None
        self._text: tuple[T5Encoder, Tokenizer] | None = None
        self._vae: AutoencoderKL | AutoencoderWan | None = None
        self._student: tuple[str, Student] | None = None
        self._fallen: dict[Part, str] = {}

    # ---- networks

    @property
    def flow(self) -> STARFlow | PixelFlow:
        if self._flow is None:
            self._flow = self.model.load_flow(self._chosen("flow"), self.adapters, self.group, self.quantize)
        return self._flow

    def _read_text_encoder(self) -> tuple[T5Encoder, Tokenizer]:
        if self._text is None:
            self._text = read_text_encoder(self.model.text_encoder, self._chosen("text_encoder"))
        return self._text

    @property
    def text_encoder(self) -> T5Encoder:
        return self._read_text_encoder()[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._read_text_encoder()[1]

    @property
    def vae(self) -> AutoencoderKL | AutoencoderWan:
        if self._vae is None:
            self._vae = self.model.vae.load(self._chosen("vae"))
        return self._vae

    def student(self, folder: str) -> Student:
        """The student in a folder, which is kept until another one is asked for; on a CPU dense, as `dense_flow` is.

        Raises StarflowError if there is none, it has learned from another model, or an adapter does not fit it.
        """
        if self._student is None or self._student[0] != folder:
            student = load_student(folder, self.model, self.dtype, self.student_adapters)
            self._student = folder, dense_on_cpu(student, available() // 2)
        return self._student[1]

    @property
    def held(self) -> set[Part]:
        """The networks that are in memory."""
        networks: dict[Part, object] = {"text_encoder": self._text, "flow": self._flow, "vae": self._vae}
        return {part for part, network in networks.items() if network is not None}

    def release(self, part: Part) -> None:
        if not self.low_memory:
            return
        self._drop(part)
        if part == "flow":
            self._exact = None
        mx.clear_cache()

    def _drop(self, part: Part) -> None:
        if part == "flow":
            self._flow = self._dense = self._student = None
        elif part == "vae":
            self._vae = None
        else:
            self._text = None

    def dense_flow(self) -> STARFlow | PixelFlow:
        """The flow for repeated evaluation: on a CPU, if memory allows, a copy whose quantized layers are dense.

        The copy is kept as long as the flow is.
        """
        if self._dense is None or self._dense[0] is not self.flow:
            self._dense = self.flow, self.flow if self.group else dense_on_cpu(self.flow, available() // 2)
        return self._dense[1]

    def exact_flow(self) -> STARFlow | PixelFlow:
        """The flow for exact inversion: beside `flow`, if that is half precision because nobody chose, it in float32.

        Where there is no memory for both, `flow` makes room. Where there is none for float32 at all, that is warned
        about, and `flow` is what there is.
        """
        precision = self.model.flow.precision
        if self.dtype is not None or precision.dtype == "float32" or self.group is not None:
            return self.dense_flow()
        if self._exact is None:
            size = sum(4 * weight.size for weight in self.model.flow.weights().values())
            if size > available():
                warnings.warn(
                    f"there is no memory for the flow in float32: editing is computed in {precision.dtype}, and what "
                    "comes back of a picture is off by that precision's rounding",
                    stacklevel=3,
                )
                return self.flow
            if 1.5 * size > available():
                self._drop("flow")
            self._exact = self.model.load_flow(mx.float32, self.adapters, quantize=self.quantize)
        return self._exact

    # ---- precision

    def _chosen(self, part: Part) -> mx.Dtype | str | None:
        """The precision of a network: the one asked for or fallen back to, or None."""
        return self._fallen.get(part, self.dtype)

    @property
    def flow_precision(self) -> str:
        chosen = self._chosen("flow")
        if chosen is None:
            return self.model.flow.precision.dtype
        return chosen if isinstance(chosen, str) else dtype_name(chosen)

    @bounded()
    def in_range(self, part: Part, compute: Callable[[], Result]) -> Result:
        """What a function computes with a network; again, if it is not finite, with a larger range of numbers.

        Raises NotFinite if that does not help, or a precision was asked for.
        """
        try:
            return compute()
        except NotFinite as error:
            fallback = None if self.dtype is not None else getattr(self.model, part).precision.fallback
            if fallback is None or part in self._fallen:
                raise
            self._fallen[part] = fallback
            self._drop(part)
            warnings.warn(
                f"{str(error).partition(':')[0]}: numbers left float16's range; from here on it is computed in "
                f"{fallback} (--dtype {fallback} from the start)",
                stacklevel=4,
            )
            return compute()

    # ---- what is computed with them

    def array(self, values: np.ndarray) -> mx.array:
        return mx.array(values)

    def numpy(self, array: mx.array) -> np.ndarray:
        return np.array(array.astype(mx.float32))

    def concatenate(self, arrays: list[mx.array]) -> mx.array:
        return mx.concatenate(arrays)

    def encode_text(self, ids: np.ndarray, mask: np.ndarray) -> mx.array:
        def compute() -> mx.array:
            text = self.text_encoder.encode(mx.array(ids), mx.array(mask))
            check_part(np.array(text.astype(mx.float32)), "the text encoder")
            return text

        return self.in_range("text_encoder", compute)

    def invert(
        self,
        z: mx.array,
        text: mx.array | None,
        null_text: mx.array | None,
        settings: GenerationSettings,
        method: str | SamplingPlan,
        progress: Watch,
        trace: SamplingTrace,
    ) -> mx.array:
        guidance, options = settings.guidance, settings.options()
        kv_bits = settings.cache_bits or 0
        student = None if settings.student is None else self.student(settings.student)

        def compute() -> mx.array:
            trace.clear()
            x = sample(
                self.flow,
                z,
                text,
                null_text,
                guidance,
                method,
                kv_bits=kv_bits,
                student=student,
                progress=progress,
                trace=trace,
                **options,
            )
            mx.eval(x)
            return x

        return self.in_range("flow", compute)

    def sample_student(
        self, z: mx.array, text: mx.array | None, settings: GenerationSettings, progress: Watch = False
    ) -> StudentSample:
        """Noise -> clean data by the settings' student."""
        assert settings.student is not None
        return sample_student(self.student(settings.student), z, text, settings.steps, progress=progress)

    def certify(
        self,
        x: mx.array,
        z: mx.array,
        text: mx.array | None,
        null_text: mx.array | None,
        settings: GenerationSettings,
        progress: Watch = False,
        given: int = 0,
    ) -> list[Certificate]:
        guidance, options = settings.guidance, settings.options()

        def compute() -> list[Certificate]:
            return certify_each(self.flow, x, z, text, null_text, guidance, given=given, progress=progress, **options)

        return self.in_range("flow", compute)

    def denoise(self, x: mx.array, text: mx.array | None, progress: Watch = False) -> mx.array:
        return self.in_range("flow", lambda: denoise(self.flow, x, text, progress=progress))

    def iterate(
        self,
        x: mx.array,
        labels: mx.array | None,
        levels: Sequence[float],
        clip: bool,
        noise: mx.array | None,
        progress: Watch,
        preview: Callable[[int, mx.array], None],
    ) -> mx.array:
        def compute() -> mx.array:
            flow = self.flow
            assert isinstance(flow, ITarFlow)  # of a model that knows noise levels
            return iterate(flow, x, labels, levels, clip, noise=noise, progress=progress, preview=preview)

        return self.in_range("flow", compute)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images `[B, H, W, 3]` in -1..1 -> normalized latents without noise, float32 `[B, h, w, C]`."""

        def compute() -> np.ndarray:
            latents = np.array(self.vae.scale(self.vae.encode(mx.array(images)).mean).astype(mx.float32))
            check_part(latents, "the autoencoder")
            return latents

        return self.in_range("vae", compute)

    def decode(self, latents: mx.array) -> np.ndarray:
        def compute() -> np.ndarray:
            # The flow speaks float32; the decoder its own precision.
            unscaled = self.vae.unscale(latents).astype(self.vae.decoder.conv_in.weight.dtype)
            images = np.array(self.vae.decode(unscaled).astype(mx.float32))
            check_part(images, "the autoencoder")
            return images

        return self.in_range("vae", compute)

    # ---- memory

    def start_phase(self) -> None:
        mx.reset_peak_memory()

    def finish_phase(self) -> int:
        return mx.get_peak_memory()

"""Class labels to images: `ClassPipeline`, for TarFlows and iTARFlows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.protocol import Prompts, one_or_several
from mlx_starflow.media.files import MOST_YAML, exists, inside, read_text
from mlx_starflow.media.images import to_images
from mlx_starflow.media.noise import digest
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.files import CLASSES_FILE
from mlx_starflow.models.flow import Flow
from mlx_starflow.models.itarflow import ITarFlowConfig, at_noise_level
from mlx_starflow.models.tarflow import PixelFlowConfig
from mlx_starflow.pipelines.backend import Backend
from mlx_starflow.pipelines.image_maker import ImageMaker
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.pipelines.results import DENOISE_STEPS, ClassSettings, GenerationSettings, GenerationStats
from mlx_starflow.pipelines.students import sample_by_student
from mlx_starflow.planning.limits import ClassRequest, automatic_kv_bits, check_memory
from mlx_starflow.sampling import Certificate, SamplingPlan, SamplingTrace
from mlx_starflow.sampling.cache import KVBits
from mlx_starflow.sampling.iterate import noise_levels
from mlx_starflow.sampling.progress import Progress

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey: Rec. 601, as in Pillow's own conversion."""


class ClassPipeline(ImageMaker):
    """A TarFlow or an iTARFlow: a flow over pixels whose prompts are classes; `load_class_labels` gives one.

    A prompt is the name of a class, as `classes.txt` in the model's directory has it, or else its number, from 0 on.

    Attributes:
        config: of the flow.
        classes: names of the classes, or their numbers where they have no names.
        settings: how this model samples unless told otherwise.
    """

    dimension = "pixel dimension"
    settings: ClassSettings

    def __init__(self, name: str, model: ModelDirectory, backend: Backend[Any]):
        super().__init__(name, model, backend)
        if not isinstance(model.flow.config, PixelFlowConfig):
            raise StarflowError(f"{name} does not read class labels: it is no TarFlow")
        self.config = config = model.flow.config
        self.classes = read_classes(model, config.num_classes)
        self.plan = SamplingPlan.find(model.path, backend.flow_precision, model.flow.content)
        self.settings = own_settings(model)
        self.temperature = self.settings.temperature
        self._noise_level: float | None = None
        self._fit: dict[tuple[object, ...], KVBits] = {}

    # ---- the flow, at a noise level

    @property
    def noise_level(self) -> float | None:
        """What an iTARFlow scores and edits at; None: its highest one, and for a TarFlow.

        Setting it raises StarflowError for a TarFlow, which knows none.
        """
        return self._noise_level

    @noise_level.setter
    def noise_level(self, level: float | None) -> None:
        if level is not None:
            _ = self._mlx  # its error
        if level is not None and not isinstance(self.config, ITarFlowConfig):
            raise StarflowError(f"{self.name} knows no noise levels: leave the noise level out")
        if level is not None and not 0 < level < float("inf"):
            raise StarflowError(f"a noise level must be above 0, not {level:g}")
        self._noise_level = level

    @property
    def flow(self) -> Flow:
        return at_noise_level(self.backend.flow, self._noise_level)

    def dense_flow(self) -> Flow:
        return at_noise_level(super().dense_flow(), self._noise_level)

    def exact_flow(self) -> Flow:
        return at_noise_level(super().exact_flow(), self._noise_level)

    # ---- images and data

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

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(side // self.config.patch_size for side in shape[:-1])

    # ---- classes

    def label(self, prompt: str) -> int:
        """The number of the class that a prompt means, -1 for "". Raises StarflowError if it is none."""
        text = prompt.strip()
        if not text:
            return -1
        if text in self.classes:
            return self.classes.index(text)
        if text.isascii() and text.isdecimal() and len(text) < 9 and int(text) < len(self.classes):
            return int(text)
        raise StarflowError(f"{self.name} takes no prompt {prompt!r} but {self._known()}")

    def _known(self) -> str:
        if not self.classes:
            return "nothing: the model knows no classes"
        numbers = f"a number from 0 to {len(self.classes) - 1}"
        if self.classes == numbered(len(self.classes)):
            return numbers
        names = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        return f"the name of a class ({names}) or {numbers}"

    def conditions(self, prompts: Prompts, shape: Sequence[int] | None = None) -> mx.array | None:
        numbers = [self.label(prompt) for prompt in one_or_several(prompts)]
        return mx.array(numbers) if self.classes else None

    # ---- making images

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            self.label(prompt)

    def checked_images(self, settings: GenerationSettings, size: tuple[int, int], images: int) -> GenerationSettings:
        self.check_size(size)
        asked = images, settings.guidance > 0, settings.kv_bits
        if asked not in self._fit:
            here = self.backend if isinstance(self.backend, MLXBackend) else None
            request = ClassRequest(
                self.model,
                batch=images,
                guidance=settings.guidance,
                dtype=here.dtype if here else None,
                ranks=here.group.size() if here and here.group else 1,
                quantization=here.quantize if here else None,
            )
            bits = self._decided_kv_bits(settings, request.blocks, lambda: automatic_kv_bits(request))
            check_memory(request, bits)
            self._fit[asked] = bits
        return settings.updated(kv_bits=self._fit[asked])

    def noise_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        self.check_size(size or self.size)
        return self.config.num_patches, self.config.channel_size * self.config.patch_size**2

    def prompt_conditions(self, prompts: Sequence[str], size: tuple[int, int] | None) -> Any:
        return self.backend.array(np.array([self.label(prompt) for prompt in prompts], np.int32))

    def states(self, settings: GenerationSettings) -> int:
        assert isinstance(settings, ClassSettings)
        return 1 + self.config.blocks + self._steps(settings)

    def _steps(self, settings: ClassSettings) -> int:
        """How many steps of denoising are taken. Raises StarflowError if the flow cannot take as many."""
        if not settings.denoise:
            return 0
        if isinstance(self.config, ITarFlowConfig):
            return settings.denoise_steps or DENOISE_STEPS
        if (settings.denoise_steps or 1) > 1 or settings.stochastic or settings.clip:
            raise StarflowError(f"{self.name} is no iTARFlow, and denoises in one step: leave out the steps and --clip")
        return 1 if self.config.noise_type == "gaussian" else 0

    def _sample(
        self,
        noise: np.ndarray,
        text: Any,
        null_text: Any,
        settings: GenerationSettings,
        stats: GenerationStats,
        keep_steps: bool,
        verify: bool,
        progress: Progress,
    ) -> tuple[list[Any], list[Certificate]]:
        assert isinstance(settings, ClassSettings)
        backend, trace = self.backend, SamplingTrace(keep_states=keep_steps)
        steps, labels = self._steps(settings), text if self.classes else None
        z, null = settings.temperature * backend.array(noise), None if labels is None else null_text
        if settings.samples_by_student:
            return sample_by_student(self, z, labels, self.config.blocks, settings, stats, keep_steps, progress), []
        with self.phases.run(stats, "flow", progress):
            x = backend.invert(z, labels, null, settings, self.method(settings), progress, trace)
        blocks = [self.config.block(index) for index in range(self.config.blocks)]
        tokens = len(noise) * sum(block.num_patches for block in blocks)
        stats.count(trace.evaluations, tokens, trace.student_evaluations)
        certificates: list[Certificate] = []
        if verify and backend.certifies:
            with self.phases.run(stats, "verify", progress):
                for each in backend.certify(x, z, labels, null, settings, progress):
                    certificate = replace(each, noise_floor=trace.noise_floor)
                    certificates.append(certificate)
                    self.check_certificate(certificate, self.method(settings))
        stats.certificates += certificates
        previews: list[Any] = []
        if steps:
            with self.phases.run(stats, "denoise", progress):
                x = self._denoise(x, labels, noise, settings, steps, progress, previews)
        if not keep_steps:
            return [x], certificates
        flow = backend.flow
        return [flow.latents(flow.noise_tokens(z), x.shape), *trace.states, *previews[:-1], x], certificates

    def _denoise(
        self,
        x: Any,
        labels: Any,
        noise: np.ndarray,
        settings: ClassSettings,
        steps: int,
        progress: Progress,
        previews: list[Any],
    ) -> Any:
        """Samples -> clean data; `previews` is filled with what each step takes for them."""
        backend = self.backend
        if not isinstance(self.config, ITarFlowConfig):
            return backend.denoise(x, labels, progress)

        def preview(step: int, clean: Any) -> None:
            # A step that is taken again, in another precision, replaces what it gave.
            previews[step - 1 :] = [clean]

        levels = noise_levels(self.config.t1, self.config.t0, steps)
        fresh = backend.array(fresh_noise(noise, steps - 1, x.shape[1:])) if settings.stochastic else None
        return backend.iterate(x, labels, levels, settings.clip, fresh, progress, preview)

    def _decode(self, data: Any, progress: Progress) -> list[Image.Image]:
        return to_images(self.decode_images(self.backend.numpy(data)))


def own_settings(model: ModelDirectory) -> ClassSettings:
    """How a model of classes samples unless told otherwise. Raises StarflowError if its `config.json` is not usable."""
    config = model.flow.config
    assert isinstance(config, PixelFlowConfig)
    return ClassSettings.from_dict({"guidance": config.cfg if config.num_classes else 0.0, **model.pipeline})


def numbered(count: int) -> list[str]:
    """Numbers of so many classes, which have no names."""
    return [str(number) for number in range(count)]


def read_classes(model: ModelDirectory, count: int) -> list[str]:
    """Names of a model's classes, or their numbers where there is no `classes.txt`.

    Raises StarflowError if there are not as many names as classes, or a name is there twice.
    """
    path = model.path / CLASSES_FILE
    if not count or not exists(inside(model.path, CLASSES_FILE)):
        return numbered(count)
    names = [line.strip() for line in read_text(path, MOST_YAML).splitlines() if line.strip()]
    if len(names) != count or len(set(names)) < count:
        raise StarflowError(f"{path} must hold {count} different names, one a line, and holds {len(set(names))}")
    return names


def fresh_noise(noise: np.ndarray, steps: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal `[steps, B, *shape]`, for each sample from the noise `[B, ...]` that it starts from alone."""
    generators = [np.random.Generator(np.random.Philox(int(digest(one)[:32], 16))) for one in noise]
    drawn = [generator.standard_normal((steps, *shape), np.float32) for generator in generators]
    return np.stack(drawn, axis=1)

"""Records of generating: how images are sampled, what it cost, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked_class
from mlx_starflow.kernels.affine import GuidanceMode
from mlx_starflow.media.files import expanded
from mlx_starflow.media.images import save_image, save_images
from mlx_starflow.models.configs import PIPELINE, plain_fields
from mlx_starflow.pipelines.upscaling import Upscaler
from mlx_starflow.sampling.cache import KV_BITS, KV_CHOICES, KVBits, kv_name
from mlx_starflow.sampling.certificate import Certificate
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.methods import DRAFT, METHODS
from mlx_starflow.sampling.progress import Progress, Watch
from mlx_starflow.sampling.student import MOST_STEPS as MOST_STUDENT_STEPS

DENOISE_STEPS = 16
"""Of an iTARFlow, unless somebody says otherwise."""

MOST_STEPS = 10_000

Settings = TypeVar("Settings", bound="GenerationSettings")


def named_kv_bits(value: KVBits | str) -> str:
    """Bits of keys and values as settings name them: 8 is "8", and 0 "none". Raises StarflowError."""
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if value in KV_BITS:
        return kv_name(value)
    if value not in KV_CHOICES:
        raise StarflowError(
            'keys and values are kept in 8 or 4 bits, "8,4", the null branch\'s in 4, or none, or auto, not '
            f"{str(value)[:50]!r}"
        )
    return str(value)


@checked_class
@dataclass(frozen=True)
class GenerationSettings:
    """How images are sampled. A model directory's `config.json` may hold its own defaults under "pipeline".

    Attributes:
        guidance: weight of classifier-free guidance, 0 or more.
        temperature: the noise is multiplied by this; below 1 gives more typical, less varied images.
        method: "sequential", "jacobi" or "rolling" (see `sampling.sample`), or "auto": what the model's sampling plan
            says (see `mlx-starflow tune`), "rolling" if it has none.
        attn_temp: attention logits are divided by this.
        denoise: take one score step, which removes the noise that the flow was trained with, before decoding.
        size: (width, height) in pixels; None is the size that the model was trained at.
        kv_bits: keys and values are kept in so many bits, "8" or "4"; with "8,4" in 8, and in 4 those of guidance's
            null branch; or "none", as they are computed; "auto": in as many as there is memory for, by the plan of
            `mlx-starflow info`.
        student: folder of a student of the model (see `mlx-starflow distill`), which makes the images by itself or,
            with the method "draft", gives the flow its first guesses; None: the flow alone.
        steps: of the student, see `sampling.student.sample_student`; None: its kind's.
    """

    guidance: float = 0.0
    temperature: float = 1.0
    method: str = "auto"
    attn_temp: float = 1.0
    denoise: bool = True
    size: tuple[int, int] | None = None
    kv_bits: str = "auto"
    student: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))
        plain_fields(self)
        object.__setattr__(self, "kv_bits", named_kv_bits(self.kv_bits))
        SamplingOptions(self.guidance, self.attn_temp)  # its errors
        if self.method not in (known := ["auto", *METHODS, DRAFT]):
            raise StarflowError(f"unknown sampling method {self.method!r}; it must be one of {', '.join(known)}")
        if self.method == DRAFT and self.student is None:
            raise StarflowError("drafts are a student's: give a student (--student), or another method")
        if self.student is not None and self.method not in ("auto", DRAFT):
            raise StarflowError(
                f"a student makes images by itself, and {self.method} is a way of the flow: leave one of them out, or "
                "give the method draft"
            )
        if self.samples_by_student and not self.denoise:
            raise StarflowError("what a student makes is clean already: leave denoise as it is (no --no-denoise)")
        if self.steps is not None:
            if not self.samples_by_student:
                raise StarflowError("steps are those of a student that makes images by itself: leave them out")
            if not 1 <= self.steps <= MOST_STUDENT_STEPS:
                raise StarflowError(f"a student takes 1 to {MOST_STUDENT_STEPS} steps, not {self.steps}")
        if not self.temperature >= 0:
            raise StarflowError(f"the temperature must be 0 or more, not {self.temperature:g}")

    def updated(
        self: Settings,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        method: str | None = None,
        attn_temp: float | None = None,
        denoise: bool | None = None,
        size: tuple[int, int] | None = None,
        kv_bits: KVBits | str | None = None,
        student: str | None = None,
        steps: int | None = None,
    ) -> Settings:
        """The same with other values where they are not None. Raises StarflowError if one is out of range."""
        values: dict[str, Any] = {
            "guidance": guidance,
            "temperature": temperature,
            "method": method,
            "attn_temp": attn_temp,
            "denoise": denoise,
            "size": size,
            "kv_bits": None if kv_bits is None else named_kv_bits(kv_bits),
            "student": student,
            "steps": steps,
        }
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    @property
    def samples_by_student(self) -> bool:
        """Whether a student makes the images, and not the flow."""
        return self.student is not None and self.method != DRAFT

    @property
    def cache_bits(self) -> KVBits | None:
        """`kv_bits` as numbers, 0 for none; None if that is not decided yet."""
        return KV_CHOICES[self.kv_bits]

    @classmethod
    def from_dict(cls: type[Settings], values: dict[str, Any]) -> Settings:
        """Settings from what `to_dict` gives, such as a file's metadata. Raises StarflowError."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise StarflowError(f"unknown setting {', '.join(unknown)}; this image may be of a newer version")
        typed = PIPELINE.values(cls, values)
        if len(typed.get("size", (0, 0))) != 2:
            raise StarflowError(f"a size is a width and a height, not {len(typed['size'])} numbers")
        return cls(**typed)

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def options(self) -> dict[str, Any]:
        """What `sampling.sample` and `sampling.certify` take besides the guidance's weight and the method, by name."""
        return {"attn_temp": self.attn_temp}


@checked_class
@dataclass(frozen=True)
class ClassSettings(GenerationSettings):
    """How images of class labels are sampled; what is not said here is as for prompts.

    Attributes:
        annealed_guidance: guidance grows linearly over the sequence.
        guidance_mode: "starflow", "tarflow" or "itarflow", see `sampling.sample`; None: the flow's own.
        guided_blocks: so many blocks are guided, those that are sampled first; None: all.
        denoise_steps: of an iTARFlow, see `sampling.iterate`; None: `DENOISE_STEPS`. A TarFlow takes one.
        stochastic: these steps add fresh noise, which follows from the noise that the image starts from.
        clip: limit what each step takes for the clean image to the range of pixels.
    """

    annealed_guidance: bool = True
    guidance_mode: GuidanceMode | None = None
    guided_blocks: int | None = None
    denoise_steps: int | None = None
    stochastic: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        SamplingOptions(guidance_mode=self.guidance_mode, guided_blocks=self.guided_blocks)  # its errors
        if self.denoise_steps is not None and not 1 <= self.denoise_steps <= MOST_STEPS:
            raise StarflowError(
                f"the number of denoising steps must be 1 or more and at most {MOST_STEPS}, not {self.denoise_steps}"
            )

    def with_classes(
        self,
        *,
        annealed_guidance: bool | None = None,
        guidance_mode: GuidanceMode | None = None,
        guided_blocks: int | None = None,
        denoise_steps: int | None = None,
        stochastic: bool | None = None,
        clip: bool | None = None,
    ) -> ClassSettings:
        """`updated` for what images of class labels alone have."""
        values: dict[str, Any] = {
            "annealed_guidance": annealed_guidance,
            "guidance_mode": guidance_mode,
            "guided_blocks": guided_blocks,
            "denoise_steps": denoise_steps,
            "stochastic": stochastic,
            "clip": clip,
        }
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def options(self) -> dict[str, Any]:
        return {
            **super().options(),
            "annealed_guidance": self.annealed_guidance,
            "guidance_mode": self.guidance_mode,
            "guided_blocks": self.guided_blocks,
        }


@dataclass
class GenerationStats:
    """What generating cost.

    Attributes:
        seconds: wall time of each phase: text, flow, denoise, decode (loading included if it was put off).
        memory: bytes of arrays held at most in each phase; empty where nobody counts them (PyTorch on a CPU).
        tokens: tokens sampled, over all blocks and images.
        evaluations: network evaluations of each flow block, deep block first, summed over batches.
        student_evaluations: those of a student.
        certificates: of each image, if they were asked for.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    evaluations: list[int] = field(default_factory=list)
    student_evaluations: int = 0
    certificates: list[Certificate] = field(default_factory=list)

    @property
    def certificate(self) -> Certificate | None:
        """The worst of all images'; None if there are none."""
        return Certificate.worst(self.certificates) if self.certificates else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds["flow"] if self.seconds.get("flow") else 0.0

    @property
    def peak_memory(self) -> int:
        return max(self.memory.values(), default=0)

    def spend(self, phase: str, seconds: float, memory: int | None) -> None:
        """Add what one run of a phase took."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if memory is not None:
            self.memory[phase] = max(self.memory.get(phase, 0), memory)

    def count(self, evaluations: list[int], tokens: int, student_evaluations: int = 0) -> None:
        """Add what sampling one batch took."""
        self.student_evaluations += student_evaluations
        before = self.evaluations or [0] * len(evaluations)
        self.evaluations = [a + b for a, b in zip(before, evaluations, strict=True)]
        self.tokens += tokens

    def add(self, other: GenerationStats) -> None:
        """Add what something else has cost."""
        for phase, seconds in other.seconds.items():
            self.spend(phase, seconds, other.memory.get(phase))
        self.count(other.evaluations, other.tokens, other.student_evaluations)
        self.certificates += other.certificates

    def __str__(self) -> str:
        phases = ", ".join(
            f"{name} {seconds:.2f} s" + (f" {self.memory[name] / 2**20:.0f} MiB" if name in self.memory else "")
            for name, seconds in self.seconds.items()
        )
        evaluations = "+".join(map(str, self.evaluations))
        student = f", {self.student_evaluations} of the student" if self.student_evaluations else ""
        return f"{phases}; {self.tokens_per_second:.0f} tokens/s, {evaluations} network evaluations{student}"


@dataclass
class GenerationResult:
    """Images, prompt by prompt and seed by seed, and all there is to know about them.

    Attributes:
        images: PIL images.
        latents: what was decoded, `[B, h, w, C]`, an array of the framework that computed it (MLX by default).
        noise: what the images came from, before the temperature, `[B, h, w, C]`.
        prompts: prompt of each image.
        seeds: seed of each image; None where the noise was given.
        steps: for each image the states from noise to latents, decoded, if asked for.
        metadata: of each image, for `media.save_image`.
    """

    images: list[Image.Image]
    latents: mx.array
    noise: np.ndarray
    prompts: list[str]
    seeds: list[int | None]
    steps: list[list[Image.Image]]
    metadata: list[dict[str, Any]]
    settings: GenerationSettings
    stats: GenerationStats

    def upscaled(self, upscaler: Upscaler, *, progress: Watch = False) -> GenerationResult:
        """The same with enlarged images, and with metadata that say so. Raises StarflowError."""
        images = upscaler(self.images, progress=progress)
        return replace(self, images=images, metadata=[upscaler.upscaled(each) for each in self.metadata])

    def save(self, path: str | Path) -> list[Path]:
        """Write the images with their metadata, several to files with numbers, see `media.images.save_images`.

        Returns:
            The files.

        Raises:
            StarflowError: a file cannot be written; then none is.
        """
        return save_images(self.images, path, self.metadata)


@dataclass(frozen=True)
class GeneratedImage:
    """One finished image, and all there is to know about it.

    Attributes:
        image: PIL image.
        prompt, seed: what it was made of; no seed where the noise was given.
        latents: what was decoded, `[h, w, C]`, an array of the framework that computed it (MLX by default).
        noise: what the image came from, before the temperature, `[h, w, C]`.
        metadata: all that is needed to make it again.
        certificate: how far the flow, run forwards over the sample, is from its noise; None if that was not computed.
        steps: the states from noise to latents, decoded, if asked for.
        fit: log p(x | prompt) - log p(x) in nats of the best of several; None if there was one alone.
    """

    image: Image.Image
    prompt: str
    seed: int | None
    latents: mx.array
    noise: np.ndarray
    metadata: dict[str, Any]
    certificate: Certificate | None = None
    steps: list[Image.Image] = field(default_factory=list)
    fit: float | None = None

    def upscaled(self, upscaler: Upscaler, *, progress: Watch = False) -> GeneratedImage:
        """The same with an enlarged image, and with metadata that say so. Raises StarflowError."""
        (image,) = upscaler(self.image, progress=progress)
        return replace(self, image=image, metadata=upscaler.upscaled(self.metadata))

    def save(self, path: str | Path) -> None:
        """Write the image, with its metadata. Raises StarflowError."""
        save_image(self.image, expanded(path), self.metadata)


class ImageStream(Iterator[GeneratedImage]):
    """Images, prompt by prompt and seed by seed, each as soon as it is finished.

    Attributes:
        images: how many will come.
        settings: how they are sampled.
        stats: what the images so far have cost.
        progress: how far this is; it can be cancelled.
    """

    def __init__(
        self,
        images: int,
        settings: GenerationSettings,
        stats: GenerationStats,
        made: Generator[GeneratedImage, None, None],
        concatenate: Callable[[list[Any]], Any],
        progress: Progress,
    ):
        self.images, self.settings, self.stats, self.progress = images, settings, stats, progress
        self._made, self._concatenate = made, concatenate

    def __next__(self) -> GeneratedImage:
        return next(self._made)

    def __len__(self) -> int:
        return self.images

    def close(self) -> None:
        """Make no more images."""
        self._made.close()

    def collect(self, made: Sequence[GeneratedImage]) -> GenerationResult:
        """Images that this stream has given, one or more, as one result."""
        certificates = [each.certificate for each in made if each.certificate is not None]
        return GenerationResult(
            images=[each.image for each in made],
            latents=self._concatenate([each.latents[None] for each in made]),
            noise=np.stack([each.noise for each in made]),
            prompts=[each.prompt for each in made],
            seeds=[each.seed for each in made],
            steps=[each.steps for each in made if each.steps],
            metadata=[each.metadata for each in made],
            settings=self.settings,
            stats=replace(self.stats, certificates=certificates),
        )

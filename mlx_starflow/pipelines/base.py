"""What all pipelines have in common: a model's directory, a backend, images to data and back, seeds and metadata."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast, get_args

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow import __version__, editing, likelihood
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.kernels.memory import bounded
from mlx_starflow.likelihood.protocol import ImageModel, Part
from mlx_starflow.media.given import ImageOrVideo, Images, ImageSource, is_image, one_or_many, open_image
from mlx_starflow.media.images import to_images
from mlx_starflow.media.noise import check_seeds, digest, draw_seed
from mlx_starflow.media.pixels import crop_image, scale_pixels
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.models.autoencoder_kl import WHOLE_PIXELS
from mlx_starflow.models.flow import BlockConfig, Flow
from mlx_starflow.pipelines.backend import Backend
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.pipelines.phases import Phases
from mlx_starflow.pipelines.results import GenerationSettings
from mlx_starflow.planning.limits import check_count, check_side
from mlx_starflow.sampling import Certificate, SamplingPlan, SequentialSettings
from mlx_starflow.sampling.cache import KVBits, check_quantizable
from mlx_starflow.sampling.methods import DRAFT, Method

BATCH = 16
"""Most images that go through the autoencoder at once, and prompts through the text encoder."""


WORST = 1.0
"""The largest certificate that no plan makes right, in standard deviations of the noise."""


class Pipeline(ImageModel):
    """A model that makes, scores and edits images.

    Scoring and editing are methods: each is the function of its name in `likelihood` or `editing`, whose first
    argument is the model.

    Attributes:
        name: as the user gave it.
        model, directory: the model's directory, opened, and its path.
        backend: what computes.
        phases: what the backend's work is charged to.
        plan: how method "auto" samples; None is in a rolling window.
        temperature: of the noise that samples are made of, unless told otherwise.
        dimension: what the data's dimensions are.
    """

    plan: SamplingPlan | None = None

    score = likelihood.score
    prompt_fit = likelihood.prompt_fit
    classify = likelihood.classify
    encode = editing.encode
    decode = editing.decode
    inpaint = editing.inpaint
    reprompt = editing.reprompt
    vary = editing.vary
    interpolate = editing.interpolate

    def __init__(self, name: str, model: ModelDirectory, backend: Backend[Any]):
        self.name, self.model, self.directory, self.backend = name, model, model.path, backend
        self.phases = Phases(backend)

    @property
    def flow(self) -> Flow:
        """The flow, read when it is first used; with the PyTorch backend that of PyTorch."""
        return self.backend.flow

    def dense_flow(self) -> Flow:
        return self._mlx.dense_flow()

    def inversion(self, method: Method | None = None) -> Method:
        if method is not None and method != "auto":
            return method
        if self.plan is None or not self.plan.fits(self.backend.flow_precision, 0):
            return SequentialSettings.name
        return self.plan.without_drafts()

    def exact_flow(self) -> Flow:
        return self._mlx.exact_flow()

    @property
    def _mlx(self) -> MLXBackend:
        """The backend, for scoring and editing. Raises StarflowError if it is another one."""
        if not isinstance(self.backend, MLXBackend):
            raise StarflowError("scoring and editing need the mlx backend: load(name, backend='mlx')")
        return self.backend

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Memory is bounded from the first phase to the last; what fails, or is stopped, inside lets go of the networks
        that it has read, if memory is short."""
        with bounded():
            try:
                yield
            except BaseException:
                for part in get_args(Part):
                    self.release(part)
                raise

    def release(self, part: Part) -> None:
        """Let go of a network that is not needed for now, if the model is short of memory."""
        self.backend.release(part)

    def method(self, settings: GenerationSettings) -> str | SamplingPlan:
        """How settings sample: "auto" is the model's sampling plan, or the backend's own choice where there is none.

        That is also what it is where the flow has fallen back to another precision than the plan's, or keys and values
        are quantized otherwise. A plan that was tuned with a student is followed by "draft" too, and by "auto" without
        the student's guesses.
        """
        plan = self.plan
        if plan is not None and not plan.fits(self.backend.flow_precision, settings.cache_bits):
            plan = None
        if settings.method == DRAFT and plan is not None and plan.drafts:
            return plan
        if settings.method != "auto":
            return settings.method
        return self.backend.automatic_method if plan is None else plan.without_drafts()

    def _decided_kv_bits(
        self, settings: GenerationSettings, blocks: Sequence[BlockConfig], decide: Callable[[], KVBits]
    ) -> KVBits:
        """Bits of keys and values of the flow's blocks, 0 for none: the settings', or what `decide` says.

        Raises StarflowError if the backend, or the blocks' heads, cannot have them so.
        """
        bits, can = settings.cache_bits, self.backend.quantizes_cache
        if bits and not can:
            raise StarflowError("the torch backend keeps keys and values as they are: leave out kv_bits (--kv-bits)")
        check_quantizable(blocks, bits or 0)
        return bits if bits is not None else decide() if can else 0

    def check_certificate(self, certificate: Certificate, method: str | SamplingPlan) -> None:
        """Warn about a sample that is further from its noise than the plan allows that it was made by.

        Whatever a plan allows, a sample that is off by a standard deviation of the noise is another noise's.
        """
        if isinstance(method, SamplingPlan) and not certificate.max <= min(method.tolerance, WORST):
            warnings.warn(
                f"{certificate}, which is more than the {min(method.tolerance, WORST):.1e} of the sampling plan of "
                f"{self.name}: run `mlx-starflow tune` again, or use --method sequential",
                stacklevel=3,
            )

    # ---- images and data

    def check_size(self, size: tuple[int, int], images: int = 1) -> None:
        """Raise StarflowError if images of a size (width, height) in pixels, so many at once, are too large."""
        check_side(size)

    def image_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """(width, height) in pixels of the images that data, or noise, of `shape` `[B, ...]` are of."""
        return self.size

    def fit(self, image: ImageOrVideo, size: tuple[int, int] | None = None) -> Image.Image | list[Image.Image]:
        """An image cut about its middle to the shape of `size`, by default the model's, and resized to it."""
        if not is_image(image):
            raise StarflowError(f"{self.name} makes images, not videos: give it images")
        self.check_size(size := size or self.size)
        return fit_image(cast(ImageSource, image), size)

    @checked
    def to_data(self, images: Images, size: tuple[int, int] | None = None) -> np.ndarray:
        """Images of any size, one or many -> data without noise, float32 `[B, ...]`: fitted to `size`, then encoded."""
        waiting = one_or_many(images)
        self.check_size(size := size or self.size)
        count = _at_once(size[0] * size[1])
        parts = []
        while batch := list(islice(waiting, count)):
            fitted = np.stack([np.asarray(self.fit(image, size)) for image in batch])
            parts.append(self.encode_images(scale_pixels(fitted)))
        if not parts:
            raise StarflowError("there are no pictures")
        return np.concatenate(parts)

    def to_data_each(self, images: Images, size: tuple[int, int] | None = None) -> list[np.ndarray]:
        """`to_data` of each image, `[...]`; videos may differ in shape."""
        return list(self.to_data(images, size))

    @checked
    def to_images(self, data: np.ndarray | mx.array) -> list[Image.Image] | list[list[Image.Image]]:
        """Data `[B, ...]` -> images."""
        data = np.array(data, np.float32)
        width, height = self.image_size(data.shape)
        count = _at_once(width * height)
        parts = (data[start : start + count] for start in range(0, len(data), count))
        return [image for part in parts for image in to_images(self.decode_images(part))]

    # ---- seeds and metadata

    def _seeds(self, seed: int | Sequence[int] | None, images: int, noise: np.ndarray | None) -> list[int | None]:
        """A seed for each image of a prompt; None where the noise is given."""
        if images < 1:
            raise StarflowError(f"the number of images must be 1 or more, not {images}")
        check_count(images)
        if noise is not None:
            return [None] * images
        if seed is None:
            seed = draw_seed()
        # Python's own integers, which metadata in JSON can hold.
        if isinstance(seed, int | np.integer):
            check_seeds([seed])
            return [int(seed) + k for k in range(images)]
        if isinstance(seed, str | float) or not isinstance(seed, Iterable):
            raise StarflowError(f"a seed is a whole number from 0 on, or a list of them, not {seed!r}")
        seeds = list(seed)
        check_seeds(seeds)
        return [int(each) for each in seeds]

    def origin(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {"version": __version__, "model": self.name}
        return metadata | ({"adapters": self.backend.adapters} if self.backend.adapters else {})

    def _metadata(
        self,
        prompts: list[str],
        seeds: list[int | None],
        settings: GenerationSettings,
        noise: np.ndarray,
        certificate: Certificate | None,
    ) -> dict[str, Any]:
        """All that is needed to make images again: prompts times seeds, as `generate` takes them."""
        metadata = {**self.origin(), "prompts": prompts, "seeds": seeds}
        if settings.student is not None and self.backend.student_adapters:
            metadata["adapters"] = [*self.backend.adapters, *self.backend.student_adapters]
        if None in seeds:
            metadata["noise_sha256"] = digest(noise)
        if certificate is not None:
            metadata["certificate"] = certificate.to_dict()
        return {**metadata, "settings": self._recorded(settings)}

    def _recorded(self, settings: GenerationSettings) -> dict[str, Any]:
        """Settings as metadata name them: with the method that "auto" was, unless that is a plan, and with the bits of
        keys and values if they were quantized."""
        method, recorded = self.method(settings), settings.to_dict()
        if not settings.cache_bits:
            del recorded["kv_bits"]
        for key in ("student", "steps"):
            if recorded[key] is None:
                del recorded[key]
        if settings.samples_by_student:
            return recorded
        return recorded | ({"method": method} if isinstance(method, str) else {})


def fit_image(image: ImageSource, size: tuple[int, int]) -> Image.Image:
    """An image as models see it, cut about its middle to the shape of `size` (width, height) and resized to it.

    Raises:
        StarflowError: it cannot be read, or is no image.
    """
    image = open_image(image)
    return image if image.size == size else crop_image(image, *size)


def _at_once(pixels: int) -> int:
    """How many images of so many pixels the autoencoder takes at once: as many as make up a large one."""
    return max(1, min(BATCH, WHOLE_PIXELS // pixels))

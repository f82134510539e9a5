"""Pairs of a model's flow, for its students to learn from: of images, or of the model's own samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.media.sources import Skip, open_source
from mlx_starflow.model_dir.adapters import Adapter, Strengths
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.models.itarflow import ITarFlowConfig
from mlx_starflow.pipelines.class_labels import ClassPipeline
from mlx_starflow.pipelines.image import ImagePipeline
from mlx_starflow.pipelines.loading import load
from mlx_starflow.sampling.guidance import SamplingOptions
from mlx_starflow.sampling.progress import Progress
from mlx_starflow.training.data.cache.build import CacheSettings, build_cache
from mlx_starflow.training.data.cache.files import is_cache
from mlx_starflow.training.data.cache.reading import LatentCache
from mlx_starflow.training.data.pairs.compute import Pairs, pairs_of_data, pairs_of_samples
from mlx_starflow.training.data.pairs.files import SHARD, PairFolder
from mlx_starflow.training.loop.identity import digest


class Grid(NamedTuple):
    """Of the tokens of an image, and `shape` of its noise, as the flow's `sample` takes it."""

    shape: tuple[int, ...]
    rows: int
    columns: int


@dataclass
class TeacherPairs:
    """The pairs of a student's teacher, in `out/pairs`; what is computed of images on the way is in `out/training`.

    Args:
        model: the teacher: "demo", a model directory or a Hub repository, of prompts or, a TarFlow, of classes.
        out: the student's folder.
        data: captioned images, or a latent cache of them; None: the model's own samples, of `prompts`.
        least: how many, at least: there are whole files of `SHARD`.
        guidance, temperature: of the samples, see `NewStudent`.
        prompts: of the samples; a TarFlow's are its classes unless there are some.
        adapters: of the teacher's flow, with their strengths.
        seed: of the first pair.
        report: is told, in a line, what goes on.

    Attributes:
        pipe: the teacher.

    Raises:
        StarflowError: it is no such model, or these do not go together.
    """

    model: str | Path
    out: Path
    data: Path | None
    least: int
    guidance: float | None
    temperature: float | None
    prompts: Sequence[str]
    adapters: Strengths
    seed: int
    report: Callable[[str], None] = field(repr=False)

    at_once: ClassVar[int] = 32
    """Pairs that are computed together."""

    def __post_init__(self) -> None:
        if self.least < 2:
            raise StarflowError(f"a student needs 2 pairs or more, not {self.least}")
        if self.of_images and (self.temperature is not None or self.prompts):
            raise StarflowError(
                "pairs of pictures have the temperature 1 and their own captions: give --guidance for samples of them"
            )
        pipe = load(self.model, adapters=self.adapters)
        if not isinstance(pipe, ImagePipeline | ClassPipeline) or isinstance(pipe.model.flow.config, ITarFlowConfig):
            raise StarflowError(f"{self.model}: students are of models of pictures, STARFlows and TarFlows")
        self.pipe: ImagePipeline | ClassPipeline = pipe
        if self.of_images and isinstance(pipe, ClassPipeline):
            raise StarflowError("a TarFlow's students learn from its samples: leave out the pictures")
        if self.data is None and not self.prompts and isinstance(pipe, ImagePipeline):
            raise StarflowError("samples need prompts: give pictures with captions, or --prompt-file")

    @property
    def count(self) -> int:
        """How many there are."""
        return self._shards * SHARD

    @property
    def of_images(self) -> bool:
        """Whether the pairs are of images, and not of samples."""
        return self.data is not None and self.guidance is None

    @cached_property
    def settings(self) -> Any:
        """How the pairs are sampled."""
        if self.of_images:
            return self.pipe.settings.updated(guidance=0.0, temperature=1.0)
        return self.pipe.settings.updated(guidance=self.guidance, temperature=self.temperature)

    @cached_property
    def grid(self) -> Grid:
        shape, patch = self.pipe.noise_shape(), self.pipe.model.flow.config.patch_size
        if len(shape) == 2:
            side = math.isqrt(shape[0])
            return Grid(shape, side, side)
        return Grid(shape, shape[0] // patch, shape[1] // patch)

    @cached_property
    def all_prompts(self) -> list[str]:
        """Of the samples, the empty one among them."""
        if self.prompts:
            found = list(self.prompts)
        elif isinstance(self.pipe, ClassPipeline):
            found = list(self.pipe.classes)
        else:
            assert self.data is not None  # or there would be prompts
            if is_cache(self.data):
                captions = [text for texts in LatentCache(self.data).captions for text in texts]
            else:
                captions = [text for item in open_source(self.data) if not isinstance(item, Skip)
                            for text in item.captions]  # fmt: skip
            found = list(dict.fromkeys(captions))
        self.pipe.check_prompts(found)
        return [*found, ""]

    def _cache(self, progress: Progress) -> LatentCache:
        """The images' latents. Raises StarflowError if they are another model's."""
        assert self.data is not None
        folder = self.data
        if not is_cache(folder):
            folder = self.out / "training/cache"
            for line in build_cache(self.data, folder, self.model, CacheSettings(), progress=progress).remarks():
                self.report(line)
        return LatentCache(folder, self.model)

    def _image_pairs(self, progress: Progress) -> tuple[str, Callable[[range], Pairs]]:
        """A digest of the images, and what makes pairs of them."""
        cache, pipe = self._cache(progress), self.pipe
        fitting = [number for number, bucket in enumerate(cache.buckets) if cache.shapes[bucket] == self.grid.shape]
        if not fitting:
            raise StarflowError(f"{self.data} has no latents of {self.grid.shape[0]}x{self.grid.shape[1]}")
        ratio = cache.ratios[cache.buckets[fitting[0]]]

        def make(indices: range) -> Pairs:
            images = np.array([fitting[index % len(fitting)] for index in indices])
            rounds = [index // len(fitting) for index in indices]
            views = np.array([each % cache.views for each in rounds])
            captions = [
                cache.captions[image][each % len(cache.captions[image])]
                for image, each in zip(images, rounds, strict=True)
            ]
            draws = draw_noise([self.seed + index for index in indices], (2, *self.grid.shape))
            clean = cache.latents(images, views, draws[:, 0])
            text = mx.array(cache.text(captions, ratio))
            return pairs_of_data(pipe.dense_flow(), mx.array(clean), mx.array(draws[:, 1]), text)

        return digest(cache.checksums), make

    def _sample_pairs(self, progress: Progress) -> tuple[str, Callable[[range], Pairs]]:
        """A digest of the prompts, and what makes pairs of samples of them."""
        prompts, temperature = self.all_prompts, self.settings.temperature

        def make(indices: range) -> Pairs:
            mine = [prompts[index % len(prompts)] for index in indices]
            z = temperature * draw_noise([self.seed + index for index in indices], self.grid.shape)
            return self.sample_pairs(z, mine, progress)

        return digest(prompts), make

    def sample_pairs(self, z: np.ndarray, prompts: list[str], progress: Progress) -> Pairs:
        """Pairs of samples of noise z, float32, as the flow takes it, and of as many prompts."""
        pipe, settings = self.pipe, self.settings
        options = SamplingOptions(settings.guidance, **settings.options())
        null = pipe.conditions([""]) if settings.guidance else None
        return pairs_of_samples(pipe.dense_flow(), mx.array(z), pipe.conditions(prompts), null, options, progress)

    def folder(self, resume: bool, progress: Progress) -> PairFolder:
        """The pairs, all of them made. Raises StarflowError, also if there are pairs of something else."""
        source, make = (self._image_pairs if self.of_images else self._sample_pairs)(progress)
        identity = {
            "teacher": fingerprint(self.pipe.directory),
            "of": "pictures" if self.of_images else "samples",
            "guidance": self.settings.guidance,
            "temperature": self.settings.temperature,
            "options": {name: value for name, value in self.settings.options().items() if value is not None},
            "source": source,
            "seed": self.seed,
        }
        if self.adapters:
            identity["adapters"] = [[Adapter.read(path).digest(), strength] for path, strength in self.adapters]
        folder = PairFolder(self.out / "pairs", identity, (self.grid.rows, self.grid.columns), resume=resume)
        with progress.counting("pairs", self.count, "pair") as counter:
            try:
                for number in range(self._shards):
                    if not folder.has(number):
                        folder.write(number, _shard(number, make, self.at_once, progress))
                    counter.advance(SHARD)
            except KeyboardInterrupt:
                self.report(f"stopped at {counter.done} of {self.count} pairs: run it again to resume")
                raise
        return folder

    @property
    def _shards(self) -> int:
        return -(-self.least // SHARD)


def _shard(number: int, make: Callable[[range], Pairs], at_once: int, progress: Progress) -> Pairs:
    """The pairs of a file, made a few at a time."""
    start, arrays = number * SHARD, []
    for first in range(start, start + SHARD, at_once):
        arrays.append(make(range(first, first + at_once)).arrays())
        progress.check()
    joined = {name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]}
    return Pairs(joined["noise"], joined["states"], joined["clean"], joined.get("condition"))

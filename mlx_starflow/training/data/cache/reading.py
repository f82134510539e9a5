"""Training from a latent cache: latents and text embeddings come from memory-mapped files, no encoder is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.files import parse_json
from mlx_starflow.media.sources import repeats_of
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import IndexedData, Order
from mlx_starflow.training.data.cache.files import INDEX, TEXT, TEXT_INDEX, damaged_files, latents_file, read_manifest
from mlx_starflow.training.data.cache.model import check_model
from mlx_starflow.training.data.cache.numbers import DTYPES, decode_numbers
from mlx_starflow.training.data.dropout import choose_caption, context_mask, context_share

Numbers = Sequence[int] | np.ndarray


MOST_TEXT = 2**16
"""Tokens of a text, of which models read at most a few hundred."""

CAPTIONED = "{} is a cache, whose captions are encoded already: give --caption to mlx-starflow cache"
"""What to say of a caption for the images of a cache."""


class LatentCache:
    """What `build_cache` made. Images are numbered from 0 in the order of their source.

    Args:
        folder: of the cache.
        model: "demo", a model directory or a Hub repository that must be the one it was made with, as far as that
            matters (its encoders are read to compare checksums, and let go of); None: any.

    Attributes:
        keys, captions: of each image, the usual caption first.
        repeats: how often a pass of a training takes each image, `[N]`.
        ratios: aspect ratios of the buckets.
        buckets: each image's bucket, an index of `ratios`, `[N]`.
        views: how many there are of each image.
        shapes: of one image's latents in each bucket, (h, w, C).
        text_length, text_width: L and D of the text embeddings `[B, L, D]`.
        patch_size: of the flow.
        identity: of the model it was made with, see `CacheModel.identity`.
        names_ratio: whether prompts name their image's aspect ratio.

    Raises:
        StarflowError: there is no finished cache, a file is of another size or the index is damaged, or it was made
            with another model. (`check` compares all checksums.)
    """

    def __init__(self, folder: str | Path, model: str | Path | None = None):
        self.folder = Path(folder)
        try:
            self._open(model)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise StarflowError(
                f"{self.folder}: the description is damaged ({one_line(error)[:200]}); "
                "make the cache again with mlx-starflow cache --no-resume"
            ) from None

    def _open(self, model: str | Path | None) -> None:
        self._manifest = manifest = read_manifest(self.folder)
        small = (INDEX, TEXT_INDEX)
        if damaged := damaged_files(self.folder, manifest, contents=lambda name: name in small):
            raise _damage(self.folder, damaged)
        settings = manifest["settings"]
        self.identity = settings["model"]
        if model is not None:
            check_model(self.identity, model, self.folder)
        self.views, self._dtype = settings["views"], settings["dtype"]
        self.text_length, self.patch_size = settings["model"]["text_length"], settings["model"]["patch_size"]
        self.text_width = manifest["text_width"]
        self.names_ratio = settings["model"]["prompts"]["mix_aspect"]
        self._mean, self._std = (np.array(manifest["scale"][name], np.float32) for name in ("mean", "std"))
        self.ratios = list(manifest["buckets"])
        self.shapes = [tuple(bucket["latents"]) for bucket in manifest["buckets"].values()]
        self._read_index()
        longest = max((count for _, count in self._texts.values()), default=0)
        if not longest <= self.text_length <= MOST_TEXT or self.patch_size < 1 or self.views < 1:
            raise ValueError("sizes that cannot be")
        if {self._mean.shape, self._std.shape} != {shape[-1:] for shape in self.shapes} or not (self._std > 0).all():
            raise ValueError("the latents' scale is not theirs")
        self._latents = [
            self._map(latents_file(ratio), (bucket["pictures"], self.views, 2, *bucket["latents"]))
            for ratio, bucket in manifest["buckets"].items()
        ]
        self._text = self._map(TEXT, (sum(count for _, count in self._texts.values()), self.text_width))

    def _read_index(self) -> None:
        number = {ratio: index for index, ratio in enumerate(self.ratios)}
        self.keys: list[str] = []
        self.captions: list[tuple[str, ...]] = []
        buckets, repeats = [], []
        for row in self._lines(INDEX):
            self.keys.append(row["key"])
            self.captions.append(tuple(row["captions"]))
            buckets.append(number[row["bucket"]])
            repeats.append(repeats_of(row))
        self.buckets, self.repeats = np.array(buckets), np.array(repeats)
        # An image's place among those of its bucket.
        self._places = np.zeros(len(buckets), np.int64)
        for bucket in range(len(self.ratios)):
            members = np.flatnonzero(self.buckets == bucket)
            self._places[members] = np.arange(len(members))
        self._texts: dict[tuple[str, str | None], tuple[int, int]] = {}
        start = 0
        for row in self._lines(TEXT_INDEX):
            self._texts[row["text"], row["ratio"]] = start, row["tokens"]
            start += row["tokens"]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return [parse_json(line) for line in (self.folder / name).read_bytes().splitlines()]

    def _map(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            return np.memmap(self.folder / name, DTYPES[self._dtype], "r", shape=shape)
        except (OSError, ValueError):
            raise _damage(self.folder, [name]) from None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(file["bytes"] for file in self._manifest["files"].values())

    @property
    def checksums(self) -> dict[str, Any]:
        """Of all files, as they were written."""
        return {name: file["sha256"] for name, file in self._manifest["files"].items()}

    def check(self) -> None:
        """Read every file and compare its checksum. Raises StarflowError naming those that are damaged."""
        if damaged := damaged_files(self.folder, self._manifest, contents=lambda name: True):
            raise _damage(self.folder, damaged)

    def posterior(self, images: Numbers, views: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of raw latents, float32 `[B, h, w, C]` each.

        Args:
            images: numbers of images, `[B]`, all of one bucket.
            views: which view of each, `[B]`.
        """
        images, views = np.asarray(images), np.asarray(views)
        bucket = self.buckets[images[0]]
        assert (self.buckets[images] == bucket).all(), "the images of a batch are of one bucket"
        moments = decode_numbers(self._latents[bucket][self._places[images], views], self._dtype)
        return moments[:, 0], moments[:, 1]

    def latents(self, images: Numbers, views: Numbers, noise: np.ndarray) -> np.ndarray:
        """Normalized latents drawn from the posterior with standard normal `noise`, float32 `[B, h, w, C]`."""
        mean, std = self.posterior(images, views)
        return (mean + std * noise - self._mean) / self._std

    def text(self, captions: Sequence[str], ratio: str = "1:1") -> np.ndarray:
        """Text embeddings as `Pipeline.encode_prompts` gives them, float32 `[B, L, D]`, zero at padding.

        Args:
            captions: of images in this cache, or "".
            ratio: the bucket's, which some models read too.
        """
        out = np.zeros((len(captions), self.text_length, self.text_width), np.float32)
        for row, caption in zip(out, captions, strict=True):
            if (place := self._texts.get((caption, ratio if self.names_ratio else None))) is None:
                raise StarflowError(f"{self.folder} does not hold the text {caption[:100]!r}: make the cache again")
            start, count = place
            row[:count] = decode_numbers(self._text[start : start + count], self._dtype)
        return out


class CachedLatents(IndexedData):
    """Batches of a cache's images for `Trainer` and a flow.

    A batch is of one bucket, and every image comes as often as any other times its `repeats`.

    Args:
        cache: the images.
        subset: numbers, in the cache, of the images that are used, which are counted from 0 here; None: all.
        patch_size: of the flow; None: of the flow that the cache was made for.
    """

    def __init__(self, cache: LatentCache, subset: np.ndarray | None = None, patch_size: int | None = None):
        self.cache = cache
        self.subset = np.arange(len(cache)) if subset is None else np.asarray(subset)
        self.patch_size = patch_size or cache.patch_size
        self.order = Order(len(self.subset), cache.buckets[self.subset], cache.repeats[self.subset])

    def arrays(
        self, chosen: np.ndarray, rng: np.random.Generator, config: TrainingConfig, progress: float
    ) -> dict[str, np.ndarray]:
        """`latents`, `noise` and `text`, float32; and `context_mask`, where the config asks for it.

        The images with the numbers `chosen` are of one bucket.
        """
        cache, count = self.cache, len(chosen)
        images = self.subset[chosen]
        bucket = cache.buckets[images[0]]
        height, width, channels = cache.shapes[bucket]
        views = rng.integers(cache.views, size=count)
        captions = [choose_caption(cache.captions[index], rng, config.caption_dropout) for index in images]
        draw, noise = rng.standard_normal((2, count, height, width, channels), dtype=np.float32)
        batch = {
            "latents": cache.latents(images, views, draw),
            "noise": noise,
            "text": cache.text(captions, cache.ratios[bucket]),
        }
        if config.context_full or config.context_partial:
            tokens = (height // self.patch_size) * (width // self.patch_size)
            share = context_share(config.context_full, progress)
            batch["context_mask"] = context_mask(rng, count, tokens, share, config.context_partial)
        return batch


def _damage(folder: Path, names: Sequence[str]) -> StarflowError:
    return StarflowError(
        f"{folder}: {', '.join(names)} is damaged or missing; make the cache again with mlx-starflow cache --no-resume"
    )

"""The two halves of making a latent cache: images through the autoencoder, captions through the text encoder.

Both go in steps of a fixed number of samples, each committed when it is done, so that a run that was interrupted goes
on with the same batches and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.buckets import closest_ratio
from mlx_starflow.media.image_folder import read_bytes
from mlx_starflow.media.pixels import UnreadableImage, decode_image, image_views, no_remarks, scale_pixels
from mlx_starflow.media.sources import Sample, Skip, Source
from mlx_starflow.media.sources.sample import skip_line
from mlx_starflow.model_dir.directory import load_text_encoder, load_vae
from mlx_starflow.model_dir.weights import automatic_dtype
from mlx_starflow.models.autoencoder_kl import AutoencoderKL
from mlx_starflow.models.t5 import T5Encoder
from mlx_starflow.pipelines.prompts import complete_prompt
from mlx_starflow.sampling.progress import Progress
from mlx_starflow.training.data.cache.files import (
    INDEX,
    SKIPPED,
    TEXT,
    TEXT_INDEX,
    CacheWriter,
    Committed,
    latents_file,
)
from mlx_starflow.training.data.cache.model import CacheModel
from mlx_starflow.training.data.cache.numbers import encode_numbers

STEP = 4
"""Batches of images between two commits."""

TEXT_BATCH, TEXT_STEP = 32, 256
"""Captions that go through the text encoder at once, and between two commits."""

THREADS = 4
"""Images that are decoded at once, while the one before is encoded."""


Step = tuple[list["Future[_Image | Skip | None]"], int, str]
"""Images that are being decoded, and number and checksum of all items up to them."""


class Changed(Exception):
    """The data is not what it was."""


class Items:
    """The samples and skips of a source from number `done` on, with a running checksum of keys and captions.

    Raises:
        Changed: the first `done` do not have the checksum `digest`.
    """

    def __init__(self, source: Source, done: int, digest: str | None):
        self._source, self._hash = iter(source), hashlib.sha256()
        self.count = 0
        if sum(1 for _ in islice(self, done)) < done or (done and self.digest != digest):
            raise Changed

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Sample | Skip]:
        return self

    def __next__(self) -> Sample | Skip:
        item = next(self._source)
        line = [item.key, item.reason] if isinstance(item, Skip) else [item.key, item.split, *item.captions]
        self._hash.update(json.dumps(line).encode() + b"\n")
        self.count += 1
        return item


@dataclass(frozen=True)
class _Image:
    """An image made ready: `line` of the index, and uint8 views `[K, H, W, 3]` of its bucket's size."""

    line: dict[str, Any]
    ratio: str
    views: np.ndarray


class _Autoencoder:
    """That of a folder, in this machine's precision, and in float32 for images whose numbers leave that one's range."""

    def __init__(self, folder: Path):
        self._folder, self._vae = folder, _load(folder)
        self._whole = self._vae if automatic_dtype() == mx.float32 else None

    def moments(self, pixels: mx.array) -> np.ndarray:
        """Posterior means and standard deviations of images `[B, H, W, 3]`, float32 `[B, 2, h, w, C]`."""
        moments = _moments(self._vae, pixels)
        if np.isfinite(moments).all() or self._whole is self._vae:
            return moments
        if self._whole is None:
            warnings.warn("the autoencoder leaves float16's range; images where it does are in float32", stacklevel=2)
            self._whole = _load(self._folder, "float32")
        # The next images begin in half precision again, so that a run that was interrupted ends with the same bytes.
        return _moments(self._whole, pixels)


def _load(folder: Path, dtype: str | None = None) -> AutoencoderKL:
    vae = load_vae(folder, dtype)
    assert isinstance(vae, AutoencoderKL)
    return vae


def _moments(vae: AutoencoderKL, pixels: mx.array) -> np.ndarray:
    posterior = vae.encode(pixels)
    std = mx.exp(0.5 * posterior.logvar.astype(mx.float32))
    return np.array(mx.stack([posterior.mean.astype(mx.float32), std], axis=1))


class ImageStage:
    """Images -> posterior means and standard deviations `[views, 2, h, w, C]`, a file a bucket, and the index.

    Args:
        settings: the cache's, as `CacheWriter` has them.
        shapes: (width, height) in pixels of the buckets.
    """

    def __init__(self, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]):
        self.settings, self.shapes = settings, shapes

    def run(self, items: Items, total: int | None, model: CacheModel, writer: CacheWriter, progress: Progress) -> None:
        """Encode what is left of the source and commit it; the last commit says `pictures_done`.

        Raises Cancelled after a commit.
        """
        vae = _Autoencoder(model.directory / "vae")
        with (
            ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool,
            progress.counting("pictures", total, "picture", done=items.count) as counter,
            no_remarks(),
        ):
            try:
                for prepared, count, digest in self._steps(items, pool):
                    self._encode([future.result() for future in prepared], vae, writer)
                    writer.commit(Committed(count, digest))
                    counter.advance(count - counter.done)
            finally:
                pool.shutdown(cancel_futures=True)
        writer.commit(Committed(items.count, items.digest, pictures_done=True))

    def _steps(self, items: Items, pool: ThreadPoolExecutor) -> Iterator[Step]:
        """Steps, each given out when the next one is being decoded already."""
        ahead: Step | None = None
        while True:
            step = [self._submit(item, pool) for item in islice(items, STEP * self.settings["batch_size"])]
            if ahead:
                yield ahead
            if not step:
                return
            ahead = step, items.count, items.digest

    def _submit(self, item: Sample | Skip, pool: ThreadPoolExecutor) -> Future[_Image | Skip | None]:
        if isinstance(item, Skip):
            return pool.submit(lambda: item)
        if item.split != self.settings["split"]:
            return pool.submit(lambda: None)
        try:
            # Files are read here, one after the other, and decoded by the threads.
            return pool.submit(self._prepare, item, b"" if item.problem() else read_bytes(item))
        except UnreadableImage as error:
            skip = Skip(item.key, str(error))
            return pool.submit(lambda: skip)

    def _prepare(self, sample: Sample, data: bytes) -> _Image | Skip:
        if problem := sample.problem():
            return Skip(sample.key, problem)
        try:
            image = decode_image(data)
        except UnreadableImage as error:
            return Skip(sample.key, str(error))
        ratio = closest_ratio(*image.size, list(self.shapes))
        count, flip, seed = (self.settings[name] for name in ("views", "flip", "seed"))
        views = image_views(image, *self.shapes[ratio], count, flip=flip, seed=seed, key=sample.key)
        line = {
            "key": sample.key,
            "captions": sample.captions,
            "bucket": ratio,
            "size": image.size,
            "sha256": hashlib.sha256(data).hexdigest(),
            **({"repeats": sample.repeats} if sample.repeats > 1 else {}),
        }
        return _Image(line, ratio, views)

    def _encode(self, prepared: Sequence[_Image | Skip | None], vae: _Autoencoder, writer: CacheWriter) -> None:
        for ratio in self.shapes:
            if chosen := [item for item in prepared if isinstance(item, _Image) and item.ratio == ratio]:
                self._encode_bucket(ratio, chosen, vae, writer)
        for item in prepared:
            if isinstance(item, Skip):
                writer.append(SKIPPED, skip_line(item).encode())
            elif item is not None:
                writer.append(INDEX, json.dumps(item.line).encode() + b"\n")

    def _encode_bucket(self, ratio: str, images: Sequence[_Image], vae: _Autoencoder, writer: CacheWriter) -> None:
        views = np.concatenate([image.views for image in images])
        size, parts = self.settings["batch_size"], []
        for start in range(0, len(views), size):
            parts.append(vae.moments(mx.array(scale_pixels(views[start : start + size]))))
        rows = np.concatenate(parts).reshape(len(images), -1)
        for image, row in zip(images, rows, strict=True):
            try:
                writer.append(latents_file(ratio), encode_numbers(row, self.settings["dtype"]))
            except OverflowError as error:
                raise StarflowError(f"latents of {image.line['key']}: {error}; use another --dtype") from None


class TextStage:
    """Captions -> text embeddings without their padding `[tokens, D]`, and their index.

    Args:
        texts: (caption, aspect ratio that is named with it or None), each once.
    """

    def __init__(self, texts: Sequence[tuple[str, str | None]], settings: Mapping[str, Any]):
        self.texts, self.settings = texts, settings

    def run(self, model: CacheModel, writer: CacheWriter, progress: Progress) -> None:
        """Encode what is left of the texts and commit it, with the number of those that were cut.

        Raises Cancelled after a commit.
        """
        done, cut = writer.progress.texts, writer.progress.cut
        if done == len(self.texts):
            return
        encoder, tokenizer = load_text_encoder(model.directory / "text_encoder")
        with progress.counting("captions", len(self.texts), "text", done=done) as counter:
            while part := self.texts[done : done + TEXT_STEP]:
                prompts = [complete_prompt(text, model.config, ratio=ratio or "1:1") for text, ratio in part]
                ids, mask, truncated = tokenizer.batch(prompts, model.config.txt_size)
                rows = _embeddings(encoder, ids, mask)
                for (text, ratio), row in zip(part, rows, strict=True):
                    try:
                        writer.append(TEXT, encode_numbers(row, self.settings["dtype"]))
                    except OverflowError as error:
                        raise StarflowError(f"the embedding of {text!r}: {error}; use another --dtype") from None
                    line = {"text": text, "ratio": ratio, "tokens": len(row)}
                    writer.append(TEXT_INDEX, json.dumps(line).encode() + b"\n")
                done, cut = done + len(part), cut + sum(truncated)
                writer.commit(replace(writer.progress, texts=done, cut=cut))
                counter.advance(len(part))


def _embeddings(encoder: T5Encoder, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Embeddings of each row's tokens, float32 `[tokens, D]`. Rows of about the same length go together."""
    lengths = mask.sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    rows: list[np.ndarray] = [np.zeros(0)] * len(ids)
    for start in range(0, len(order), TEXT_BATCH):
        chosen = order[start : start + TEXT_BATCH]
        longest = lengths[chosen].max()
        hidden = encoder.encode(mx.array(ids[chosen, :longest]), mx.array(mask[chosen, :longest]))
        for index, row in zip(chosen, np.array(hidden.astype(mx.float32)), strict=True):
            rows[index] = row[: lengths[index]]
    return rows

"""Making a latent cache of a source of captioned images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.buckets import RATIOS, bucket_size
from mlx_starflow.media.files import parse_json
from mlx_starflow.media.sources import Skip, open_source, repeats_of, skip_report
from mlx_starflow.planning.limits import check_held, check_side
from mlx_starflow.sampling.progress import Callback, Watch, watch
from mlx_starflow.training.data.cache.encode import STEP, Changed, ImageStage, Items, TextStage
from mlx_starflow.training.data.cache.files import INDEX, SKIPPED, CacheWriter, Committed, check_cache_output
from mlx_starflow.training.data.cache.model import CacheModel
from mlx_starflow.training.data.cache.numbers import DTYPES

MOST = 1_000_000
"""Views of an image, and images at once."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How a cache is made.

    Attributes:
        size: side in pixels of the images, which are square, or of the square that has the buckets' area; None: the
            model's.
        buckets: nine aspect ratios instead of squares; None: if the model's prompts name them.
        views: how many of each image: its middle, then random parts.
        flip: mirror every second view.
        dtype: of the numbers on disk: float16, bfloat16 or float32.
        batch_size: images that go through the autoencoder at once.
        split: takes the images whose metadata has this `split`; "train" if it has none.
        caption_column: field of the metadata that holds the caption.
        caption: of images that have none.
        seed: of the random views.
    """

    size: int | None = None
    buckets: bool | None = None
    views: int = 1
    flip: bool = False
    dtype: str = "float16"
    batch_size: int = 8
    split: str = "train"
    caption_column: str | None = None
    caption: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("views", "batch_size"):
            if not 1 <= getattr(self, name) <= MOST:
                raise StarflowError(f"{name} must be 1 or more, at most {MOST:,}, not {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise StarflowError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.flip and self.views < 2:
            raise StarflowError("flip mirrors every second view: it needs 2 views or more")
        if self.seed < 0:
            raise StarflowError(f"the seed must be 0 or more, not {self.seed}")

    def shapes(self, model: CacheModel) -> dict[str, tuple[int, int]]:
        """(width, height) in pixels of the buckets, by their ratio. Raises StarflowError if the size does not fit."""
        size = model.side if self.size is None else self.size
        if size < model.step or size % model.step:
            raise StarflowError(f"a size of {size} does not fit: this model wants multiples of {model.step} pixels")
        ratios = RATIOS if self._buckets(model) else RATIOS[:1]
        check_side((size, size))
        # Images are held at most some steps ahead, their pixels and what the autoencoder makes of them.
        check_held(STEP * self.batch_size, 2 * 3 * self.views * size * size)
        return {ratio: bucket_size(ratio, size, model.step) for ratio in ratios}

    def resolve(self, model: CacheModel) -> dict[str, Any]:
        """All that a cache depends on besides its data."""
        return {
            **asdict(self),
            "size": model.side if self.size is None else self.size,
            "buckets": self._buckets(model),
            "model": model.identity(),
        }

    def _buckets(self, model: CacheModel) -> bool:
        return bool(model.config.mix_aspect) if self.buckets is None else self.buckets


@dataclass(frozen=True)
class CacheSummary:
    """What a finished cache holds.

    Attributes:
        images, texts: how many; texts are distinct captions, the empty one included.
        repeats: times that a pass takes an image, the least and the most; (1, 1) if all count once.
        enlarged: images that were smaller than they are encoded.
        cut: texts that were longer than the model reads.
        bytes: on disk.
        skipped: a line about images that could not be used, "" if all could.
        finished_before: there was nothing left to do.
    """

    folder: Path
    images: int
    texts: int
    repeats: tuple[int, int]
    enlarged: int
    cut: int
    bytes: int
    skipped: str
    finished_before: bool

    def remarks(self) -> Iterator[str]:
        """What whoever gave the pictures should know of them, a line each."""
        if self.skipped:
            yield self.skipped
        if self.repeats != (1, 1):
            low, high = self.repeats
            times = f"{low}" if low == high else f"{low} to {high}"
            yield f"the names of the folders give repeats: a pass takes each picture {times} times"
        if self.enlarged:
            yield f"{self.enlarged} pictures are smaller than they are encoded, and were enlarged"
        if self.cut:
            yield f"{self.cut} captions are longer than the model reads, and were cut"


@checked
def build_cache(
    data: str | Path,
    out: str | Path,
    model: str | Path = "demo",
    settings: CacheSettings | None = None,
    *,
    resume: bool = True,
    progress: Watch = None,
    callback: Callback | None = None,
) -> CacheSummary:
    """Encode all images of a source and their captions into a folder that `LatentCache` opens.

    One network is in memory at a time. A run that was interrupted, in whatever way, goes on where it stopped when it is
    called with the same arguments, and ends with the same bytes. A finished cache is left as it is.

    Args:
        data: see `open_source`.
        out: the folder; new, empty, or a cache with the same settings.
        model: whose autoencoder and text encoder encode: "demo", a model directory, or a Hub repository.
        settings: see there.
        resume: False: throw away what is in `out`, if it is a cache.
        progress, callback: see `Progress`; its phases are "pictures", "captions" and "checksums", and what was
            cancelled goes on as what was interrupted does.

    Raises:
        StarflowError: data or model cannot be used, no image can, `out` cannot be written or holds something else, or
            the data has changed since the cache was begun.
    """
    check_cache_output(Path(out), data)
    network, settings = CacheModel(model), settings or CacheSettings()
    shapes = settings.shapes(network)
    source = open_source(data, settings.caption_column, settings.caption)
    progress = watch(progress, callback)
    with CacheWriter(Path(out), settings.resolve(network), resume=resume) as writer:
        done = Committed(writer.finished["items"], writer.finished["source"]) if writer.finished else writer.progress
        try:
            items = Items(source, done.items, done.source)
            if (writer.finished or done.pictures_done) and next(items, None) is not None:
                raise Changed
        except Changed:
            raise StarflowError(
                f"{data} is not what it was when {out} was begun: give another folder, or --no-resume to make it again"
            ) from None
        if writer.finished:
            return _summary(writer, finished_before=True)
        progress.check()
        if not writer.progress.pictures_done:
            ImageStage(writer.settings, shapes).run(items, source.total, network, writer, progress)
            mx.clear_cache()
        rows = _rows(writer)
        if not rows:
            writer.forget()
            raise StarflowError(
                f"{data} has no usable picture: " + (_skipped(writer) or f"none is of the split {settings.split}")
            )
        texts = _texts(rows, bool(network.config.mix_aspect))
        TextStage(texts, writer.settings).run(network, writer, progress)
        with progress.counting("checksums", None, "file") as counter:
            writer.finish(_facts(rows, len(texts), shapes, network, writer), lambda name: counter.advance())
        return _summary(writer, finished_before=False)


def _rows(writer: CacheWriter) -> list[dict[str, Any]]:
    """The lines of the index. Raises StarflowError if it is damaged."""
    try:
        rows = [parse_json(line) for line in writer.read(INDEX).splitlines()]
        for row in rows:
            texts, sides = row["captions"], row["size"]
            if not all(isinstance(each, str) for each in (row["key"], row["bucket"], *texts)) or len(sides) != 2:
                raise ValueError
            if not all(isinstance(side, int) for side in sides):
                raise ValueError
    except (ValueError, TypeError, KeyError):
        raise StarflowError(f"{writer.folder / INDEX} is damaged: start again with --no-resume") from None
    return rows


def _texts(rows: Sequence[Mapping[str, Any]], name_ratio: bool) -> list[tuple[str, str | None]]:
    """Every text to be encoded, once: the empty caption, which takes the place of dropped ones, before all others."""
    texts: dict[tuple[str, str | None], None] = {}
    for empty in (True, False):
        for row in rows:
            for caption in [""] if empty else row["captions"]:
                texts[caption, row["bucket"] if name_ratio else None] = None
    return list(texts)


def _facts(
    rows: Sequence[Mapping[str, Any]],
    texts: int,
    shapes: Mapping[str, tuple[int, int]],
    model: CacheModel,
    writer: CacheWriter,
) -> dict[str, Any]:
    """What the manifest says besides settings and files."""
    downscale, channels = model.vae_config.downscale, model.vae_config.latent_channels
    counts = Counter(row["bucket"] for row in rows)
    return {
        "items": writer.progress.items,
        "source": writer.progress.source,
        "pictures": len(rows),
        "texts": texts,
        "repeats": (min(map(repeats_of, rows)), max(map(repeats_of, rows))),
        "enlarged": sum(any(a < b for a, b in zip(row["size"], shapes[row["bucket"]], strict=True)) for row in rows),
        "cut": writer.progress.cut,
        "buckets": {
            ratio: {"latents": [height // downscale, width // downscale, channels], "pictures": counts[ratio]}
            for ratio, (width, height) in shapes.items()
            if counts[ratio]
        },
        "text_width": model.config.txt_dim,
        "scale": model.scale(),
    }


def _summary(writer: CacheWriter, *, finished_before: bool) -> CacheSummary:
    manifest = writer.finished or {}
    return CacheSummary(
        writer.folder,
        images=manifest["pictures"],
        texts=manifest["texts"],
        repeats=tuple(manifest.get("repeats", (1, 1))),
        enlarged=manifest["enlarged"],
        cut=manifest["cut"],
        bytes=sum(file["bytes"] for file in manifest["files"].values()),
        skipped=_skipped(writer),
        finished_before=finished_before,
    )


def _skipped(writer: CacheWriter) -> str:
    lines = writer.read(SKIPPED).decode(errors="replace").splitlines()
    skips = [Skip(key, reason) for key, _, reason in (line.partition("\t") for line in lines)]
    return skip_report(skips, writer.folder / SKIPPED) if skips else ""

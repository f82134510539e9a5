"""Pictures and videos enlarged by a network that others have trained: `Upscaler`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_starflow.convert.upscaler_files import find_upscaler
from mlx_starflow.convert.upscalers import UpscalerFile
from mlx_starflow.errors import StarflowError
from mlx_starflow.errors.arguments import checked
from mlx_starflow.media.given import Images, ImageSource, one_or_many, open_image
from mlx_starflow.model_dir.weights import automatic_dtype, parse_dtype
from mlx_starflow.models.upscalers.tiling import Tiles, tile_count, windows
from mlx_starflow.planning.upscaling import SIDES, frames_at_once, tile_side, upscaling_bytes
from mlx_starflow.sampling.progress import Callback, Counter, Progress, Watch, watch

PHASE = "upscaling"
"""What `Progress.phase` says."""

SMALLEST_TILE = 8


class _NotFinite(Exception):
    """A pixel is no finite number."""


class Upscaler:
    """A network that enlarges pictures; `Upscaler.load` gives one.

    upscaler = Upscaler.load("RealESRGAN_x4plus.pth")
    (large,) = upscaler("small.png")

    Attributes:
        path: of its file.
        architecture: "RRDBNet", "SRVGGNet" or "SPAN".
        scale: how often it enlarges, in each direction. Where the network enlarges more, its result is made smaller.
        digest: SHA-256 of the file.
        dtype: what it computes in.
    """

    def __init__(self, file: UpscalerFile, scale: int, dtype: mx.Dtype):
        self.path, self.architecture, self.scale = file.path, file.network.architecture, scale
        self.digest = file.digest
        self._file = file
        self._read(dtype)

    @classmethod
    @checked
    def load(
        cls, path: str | Path | None = None, *, scale: int | None = None, dtype: str | mx.Dtype | None = None
    ) -> Upscaler:
        """Read a file of an upscaler's weights.

        Args:
            path: a `.pth` or `.safetensors` file; the name of one in `~/.cache/mlx-starflow/upscalers`; or one on the
                Hub, owner/name/file. None: what is in that folder.
            scale: how often to enlarge; None: as the file does.
            dtype: to compute in; None or "auto": float16 on a GPU, float32 on a CPU.

        Raises:
            StarflowError: there is none (the message says where to get one), it cannot be read, or enlarges less.
        """
        if scale is not None and scale < 1:
            raise StarflowError(f"pictures are enlarged by 1 or more, not by {scale}")
        file = find_upscaler(path, scale)
        return cls(file, scale or file.network.scale, parse_dtype(dtype) or automatic_dtype())

    def _read(self, dtype: mx.Dtype) -> None:
        self._network, self.dtype = self._file.read(dtype), dtype

    def __str__(self) -> str:
        return f"{self.path.name} ({self.scale} times)"

    @property
    def metadata(self) -> dict[str, Any]:
        """What the description of a picture says of it; `upscaled` adds it."""
        return {"file": self.path.name, "sha256": self.digest, "scale": self.scale}

    def upscaled(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """A picture's description, and that it was enlarged after all else."""
        before = metadata.get("upscaled")
        return {**metadata, "upscaled": [*(before if isinstance(before, list) else []), self.metadata]}

    def memory(self, size: tuple[int, int]) -> int:
        """Bytes that enlarging one image of a size (width, height) takes, in tiles as small as need be."""
        return upscaling_bytes(self._network, size, side=SIDES[-1], item=self.dtype.size)

    @checked
    def __call__(
        self, images: Images, *, tile: int | None = None, progress: Watch = False, callback: Callback | None = None
    ) -> list[Image.Image]:
        """Enlarge images.

        Args:
            images: one or many, as files, folders, PIL images or arrays. Transparency is enlarged too, as a picture of
                its own.
            tile: side of the tiles, in pixels of the image, or in squares of them for a network that reads those; None:
                by the memory that there is. The result is the same but for rounding.
            progress: a `Progress`, or whether to show progress bars; None shows them on a terminal only.
            callback: is called with the `Progress` before each tile, and can cancel it.

        Returns:
            PIL images, `scale` times as wide and as high: RGB, or RGBA where there is transparency.

        Raises:
            StarflowError: an image cannot be read, is too large, or the result is not finite.
            Cancelled: somebody has cancelled it.
        """
        watched = watch(progress, callback)
        each_one = [cast(ImageSource, each) for each in one_or_many(images, transparency=True)]
        with watched.counting("pictures", len(each_one), "picture", shown=len(each_one) > 1) as counter:
            made = []
            for each in each_one:
                made.append(self._one(open_image(each, transparency=True), tile, watched))
                counter.advance()
        return made

    @checked
    def frames(
        self,
        frames: Iterable[Image.Image],
        *,
        at_once: int | None = None,
        tile: int | None = None,
        progress: Watch = False,
        callback: Callback | None = None,
    ) -> Iterator[Image.Image]:
        """Enlarge the frames of a video, of one size, as they come.

        Args:
            at_once: frames that are enlarged together; None: by their size and the memory that there is.

        The other arguments and the errors are those of the call for images.
        """
        return self._frames(frames, at_once, tile, watch(progress, callback))

    def _frames(
        self, frames: Iterable[Image.Image], at_once: int | None, tile: int | None, progress: Progress
    ) -> Iterator[Image.Image]:
        waiting = iter(frames)
        first = next(waiting, None)
        if first is None:
            return
        count = at_once or frames_at_once(self._network, first.size, item=self.dtype.size)
        waiting = chain([first], waiting)
        total = len(frames) if isinstance(frames, Sized) else None
        with progress.counting("frames", total, "frame") as counter:
            while batch := list(islice(waiting, max(1, count))):
                if any(each.size != batch[0].size for each in batch):
                    raise StarflowError("frames of one video must have one size")
                for image in self._enlarged([each.convert("RGB") for each in batch], tile, progress):
                    yield image
                    counter.advance()

    def _one(self, image: Image.Image, tile: int | None, progress: Progress) -> Image.Image:
        layers = [image.convert("RGB")]
        if image.mode == "RGBA":
            layers.append(image.getchannel("A").convert("RGB"))
        colours, *alpha = self._enlarged(layers, tile, progress)
        if alpha:
            colours.putalpha(alpha[0].convert("L"))
        colours.info = dict(image.info)
        return colours

    def _enlarged(self, images: Sequence[Image.Image], tile: int | None, progress: Progress) -> list[Image.Image]:
        """RGB images of one size."""
        if tile is not None and tile < SMALLEST_TILE:
            raise StarflowError(f"tiles have sides of {SMALLEST_TILE} pixels or more, not {tile}")
        pixels = np.stack([np.asarray(image) for image in images])
        with progress.running(PHASE):
            try:
                made = self._pixels(pixels, tile, progress)
            except _NotFinite:
                if self.dtype == mx.float32:
                    raise StarflowError(
                        f"the picture that {self.path} made is not finite: its weights may be damaged"
                    ) from None
                warnings.warn(
                    f"{self.path.name} leaves the range of half precision: float32 from here on", stacklevel=3
                )
                self._read(mx.float32)
                made = self._pixels(pixels, tile, progress)
        width, height = (self.scale * side for side in images[0].size)
        results = [Image.fromarray(each) for each in made]
        if results[0].size == (width, height):
            return results
        return [each.resize((width, height), Image.Resampling.LANCZOS) for each in results]

    def _pixels(self, images: np.ndarray, tile: int | None, progress: Progress) -> np.ndarray:
        """uint8 `[B, H, W, 3]` -> `[B, k * H, k * W, 3]`, k being the network's scale. Raises _NotFinite."""
        network = self._network
        B, height, width, _ = images.shape
        side = tile or tile_side(network, (width, height), batch=B, item=self.dtype.size)
        prepared = network.prepared(mx.array(images).astype(mx.float32) / 255)
        _, rows, columns, _ = prepared.shape
        last = network.pixel_side(side)
        total = network.stages * tile_count(rows, columns, side) + tile_count(rows, columns, last)
        with progress.counting(PHASE, total, "tile", leave=False) as counter:
            maps = network.features(prepared, Tiles(side, counter.advance))
            del prepared
            made = self._last(maps, last, counter)
        return made[:, : network.scale * height, : network.scale * width]

    def _last(self, maps: Sequence[mx.array], side: int, counter: Counter) -> np.ndarray:
        """Feature maps -> pixels, tile by tile into one array of bytes."""
        network = self._network
        B, rows, columns, _ = maps[0].shape
        k = network.scale * network.unshuffle
        made = np.empty((B, k * rows, k * columns, 3), np.uint8)
        for window in chain.from_iterable(windows(rows, columns, side, network.pixel_radius)):
            y = window.own(network.pixels(*(window.read(x) for x in maps)), k)
            finite = mx.isfinite(y).all()
            y = mx.round(mx.clip(y, 0, 1) * 255).astype(mx.uint8)
            mx.eval(finite, y)
            if not finite.item():
                raise _NotFinite
            at = [slice(k * each.start, k * each.stop) for each in (window.rows, window.columns)]
            made[:, at[0], at[1]] = np.array(y)
            counter.advance()
        return made

"""Video on disk, frame by frame: MP4 by PyAV, animated WebP and GIF, and folders of numbered images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from itertools import chain, islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, ImageSequence

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.media.description import comment_of, described, describing
from mlx_starflow.media.files import exists, is_folder, is_regular, left_behind, replacing, temporary_path
from mlx_starflow.media.formats import ANIMATIONS, FORMATS, MOVIES, UNDESCRIBED
from mlx_starflow.media.images import check_output, read_image_metadata, save_image
from mlx_starflow.media.outputs import check_outputs
from mlx_starflow.media.pixels import crop_image, decode_image, no_remarks
from mlx_starflow.media.sources.inside import read_inside
from mlx_starflow.media.video_geometry import as_shown, natural_order

CRF = 18
"""Quality of H.264 unless told otherwise: 0 loses nothing, 51 is worst; at 18 losses are hard to see."""

_ENCODER = "libx264"


def check_video_output(path: Path, live: bool = False) -> None:
    """Raise StarflowError if `VideoWriter` could not write to `path`: better before the work than after it."""
    if not path.suffix:
        if not path.name:
            raise StarflowError(f"{path} cannot be written: give the folder for the frames a name")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StarflowError(f"{path} cannot be written: frames go into a folder that is new or empty")
        if not path.parent.is_dir():
            raise StarflowError(f"{path} cannot be written: the folder {path.parent} does not exist")
        check_outputs(folders=[path])
        return
    formats = (*MOVIES, *ANIMATIONS)
    if path.suffix.lower() not in formats:
        known = ", ".join(formats)
        still = "; one picture: mlx-starflow generate --model MODEL" if path.suffix.lower() in FORMATS else ""
        raise StarflowError(
            f"{path}: videos are written as {known}, or as frames into a folder (a name without suffix){still}"
        )
    check_output(path, formats)
    if path.suffix.lower() in MOVIES:
        if _ENCODER not in _pyav().codecs_available:
            raise StarflowError(
                f"this PyAV has no H.264 encoder ({_ENCODER}): pip install --force-reinstall --only-binary av av"
            )
    elif live:
        raise StarflowError(
            f"{path}: an animation cannot be watched while it grows; write an .mp4 or a folder of frames"
        )


class VideoWriter:
    """Writes a video frame by frame; a context manager.

    with VideoWriter(Path("out.mp4"), fps=16) as writer:
        for image in images:
            writer.add(image)

    By the name's suffix it becomes H.264 in MP4, whose frames go to disk as they come; an animated WebP (lossless) or
    GIF, whose frames are kept in memory until the end; or, without a suffix, a folder of PNG files. It appears under
    its name when the block ends without an error.

    Args:
        fps: frames a second.
        crf: quality of H.264, see `CRF`.
        metadata: how the video was made, plain values, for `metadata.read_metadata`; in a folder each frame has it.
        live: write under the name itself, so that what is there can be watched while the rest is being made, and stays
            if the process is killed: an MP4 in fragments of one frame, or a folder.

    Raises:
        StarflowError: it cannot be written there or so; or, at the end, there was no frame.
    """

    def __init__(
        self, path: Path, fps: float, *, crf: int = CRF, metadata: dict[str, Any] | None = None, live: bool = False
    ):
        if not fps > 0:
            raise StarflowError(f"the frame rate must be above 0, not {fps:g}")
        if not 0 <= crf <= 51:
            raise StarflowError(f"crf must be from 0 (lossless) to 51 (worst), not {crf}")
        check_video_output(path, live)
        self.path, self.fps, self.crf, self.metadata, self.live = path, fps, crf, metadata, live
        self.frames = 0
        self._size: tuple[int, int] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> VideoWriter:
        suffix = self.path.suffix.lower()
        begin = self._movie if suffix in MOVIES else self._animation if suffix else self._folder
        self._write = self._stack.enter_context(begin())
        return self

    def add(self, image: Image.Image) -> None:
        """Append a frame. Raises StarflowError if its size is not that of the others, or odd in an MP4."""
        if self._size is None:
            if self.path.suffix.lower() in MOVIES and (image.width % 2 or image.height % 2):
                raise StarflowError(
                    f"{self.path}: H.264 wants an even width and height, not {image.width}x{image.height}; "
                    "write a .webp, or frames into a folder"
                )
            self._size = image.size
        elif image.size != self._size:
            raise StarflowError(f"{self.path}: a frame is {image.width}x{image.height}, those before it are not")
        self._write(image.convert("RGB"))
        self.frames += 1

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None and self.frames:
            self._stack.close()
            return
        # Whoever holds a temporary name must let go of it; but what went wrong outside is not theirs to report.
        with suppress(_Abandoned):
            self._stack.__exit__(_Abandoned, _Abandoned(), None)
        if kind is None:
            raise StarflowError(f"{self.path}: there are no frames to write")

    @contextmanager
    def _movie(self) -> Iterator[Callable[[Image.Image], None]]:
        av = _pyav()
        rate = Fraction(self.fps).limit_denominator(1001)
        options, codec_options = {}, {"crf": str(self.crf)}
        if self.live:
            # Every frame is a fragment of its own, on disk as soon as it is encoded, which it is at once.
            options = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
            codec_options["tune"] = "zerolatency"
        with (
            self._target() as target,
            _av_errors(self.path, "written"),
            av.open(str(target), "w", options=options) as container,
        ):
            if self.metadata is not None:
                container.metadata["comment"] = comment_of(self.metadata)
            stream = container.add_stream(_ENCODER, rate=rate, options=codec_options)
            stream.pix_fmt = "yuv420p"
            codec = stream.codec_context
            # BT.709, in the range of television; a keyframe every two seconds to seek to.
            codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
            codec.gop_size = max(1, round(2 * self.fps))

            def write(image: Image.Image) -> None:
                if not self.frames:
                    stream.width, stream.height = image.size
                with _av_errors(self.path, "written"):
                    frame = av.VideoFrame.from_image(image).reformat(
                        format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                    )
                    frame.pts, frame.time_base = self.frames, 1 / rate
                    container.mux(stream.encode(frame))

            try:
                yield write
            finally:
                if self.frames:
                    container.mux(stream.encode(None))

    @contextmanager
    def _target(self) -> Iterator[Path]:
        if self.live:
            yield self.path
            return
        with replacing(self.path) as temporary:
            yield temporary

    @contextmanager
    def _animation(self) -> Iterator[Callable[[Image.Image], None]]:
        images: list[Image.Image] = []
        yield images.append
        # Whole milliseconds, or in GIF hundredths, that add up to the video's length.
        unit = 1 if self.path.suffix.lower() == ".webp" else 10
        ends = [round(1000 / unit * number / self.fps) * unit for number in range(len(images) + 1)]
        durations = [end - start for start, end in pairwise(ends)]
        options: dict[str, Any] = {"lossless": True} if unit == 1 else {"disposal": 2}
        options |= describing(self.metadata, self.path)
        with replacing(self.path) as temporary:
            images[0].save(temporary, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)

    @contextmanager
    def _folder(self) -> Iterator[Callable[[Image.Image], None]]:
        folder = self.path if self.live else temporary_path(self.path)

        def write(image: Image.Image) -> None:
            save_image(image, folder / f"{self.frames + 1:05}.png", self.metadata)

        try:
            for left in left_behind(self.path):
                shutil.rmtree(left, ignore_errors=True)
            folder.mkdir(exist_ok=self.live)
            yield write
            if not self.live:
                os.replace(folder, self.path)
        except OSError as error:
            raise StarflowError(f"{self.path} cannot be written: {one_line(error)}") from None
        finally:
            if not self.live:
                shutil.rmtree(folder, ignore_errors=True)


class VideoFrames(Iterator[Image.Image]):
    """Frames of a video one after another, see `read_video`.

    Attributes:
        path: of the video.
        fps: frames a second as they come here.
        read: how many have been read.
    """

    def __init__(self, path: Path, fps: float, images: Iterator[Image.Image], wanted: int | None):
        self.path, self.fps, self.read = path, fps, 0
        self._images, self._wanted = images, wanted

    def __next__(self) -> Image.Image:
        if self.read == self._wanted:
            raise StopIteration
        image = next(self._images, None)
        if image is None:
            if self._wanted is not None:
                raise StarflowError(
                    f"{self.path} has {self.read} frames at {self.fps:g} frames a second; needed are {self._wanted}"
                )
            raise StopIteration
        self.read += 1
        return image


def read_video(
    path: str | Path, *, fps: float | None = None, frames: int | None = None, size: tuple[int, int] | None = None
) -> VideoFrames:
    """The frames of a video, read when they are asked for: RGB, upright, with square pixels.

    Args:
        path: a video file that PyAV reads, a GIF or WebP, or a folder of images, which are taken in the order of
            their names, see `natural_order`.
        fps: show the video at this rate: frames are left out or repeated, and its speed stays the same. None: as it is.
        frames: so many, from the start; the video must not have fewer.
        size: (width, height) that frames are cropped and resized to, see `pixels.crop_image`.

    Raises:
        StarflowError: the file is missing or no video, here or when it is read, or it is too short.
    """
    path = Path(path)
    if not exists(path):
        raise StarflowError(f"{path} does not exist: give a video file, or a folder of frames")
    if is_folder(path):
        own, timed = _folder_frames(path, fps)
    elif not is_regular(path):
        raise StarflowError(f"{path} cannot be read as a video: it is not a regular file")
    elif path.suffix.lower() in ANIMATIONS:
        own, timed = _animation_frames(path)
    else:
        own, timed = _movie_frames(path)
    images = (image for image, _, _ in timed) if fps is None else _resample(timed, fps)
    if size is not None:
        images = (image if image.size == size else crop_image(image, *size) for image in images)
    return VideoFrames(path, fps or own, images, frames)


Timed = Iterator[tuple[Image.Image, float, float]]
"""Frames, the seconds at which they are shown, and until which they are."""


def _resample(timed: Timed, fps: float) -> Iterator[Image.Image]:
    """What is shown at the times 0, 1 / fps, 2 / fps and so on."""
    count = 0
    for image, _, end in timed:
        # A time just before a frame is taken for that frame's: sums of durations are not exact.
        while count / fps < end - 0.01 / fps:
            yield image
            count += 1


def _movie_frames(path: Path) -> tuple[float, Timed]:
    av = _pyav()
    stack = ExitStack()
    with _av_errors(path, "read as a video"), stack:
        container = stack.enter_context(av.open(str(path)))
        if not container.streams.video:
            raise StarflowError(f"{path} holds no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        opened = stack.pop_all()

    def frames() -> Timed:
        with _av_errors(path, "read as a video"), opened:
            first, before = None, None
            for number, frame in enumerate(container.decode(stream)):
                time = number / rate if frame.time is None else frame.time
                first = time if first is None else first
                if before is not None:
                    yield before[0], before[1], time - first
                matrix = frame.side_data.get("DISPLAYMATRIX")
                image = as_shown(
                    frame.to_image(), stream.sample_aspect_ratio, None if matrix is None else bytes(matrix)
                )
                before = image, time - first
            if before is not None:
                yield before[0], before[1], before[1] + 1 / rate

    return rate, _not_empty(frames(), path)


def _animation_frames(path: Path) -> tuple[float, Timed]:
    def frames() -> Timed:
        with _image_errors(path), no_remarks(), Image.open(path) as opened:
            time = 0.0
            for image in ImageSequence.Iterator(opened):
                image.load()  # which also tells its duration
                # Players show a frame of no duration for a tenth of a second.
                end = time + (image.info.get("duration") or 100) / 1000
                yield image.convert("RGB"), time, end
                time = end

    # Durations are whole milliseconds: the mean of several is closer to the rate.
    end, count = [(end, number) for number, (_, _, end) in enumerate(islice(frames(), 32), 1)][-1]
    return round(count / end, 2), frames()


def _folder_frames(path: Path, fps: float | None) -> tuple[float, Timed]:
    found = (each for each in path.iterdir() if each.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    names = sorted(found, key=natural_order)
    if not names:
        raise StarflowError(f"{path} holds no frames: PNG, JPEG or WebP files")
    try:
        rate = float(read_image_metadata(names[0])["settings"]["fps"])
    except (StarflowError, KeyError, TypeError, ValueError):
        rate = fps or 25.0

    def frames() -> Timed:
        for number, name in enumerate(names):
            with _image_errors(name), no_remarks():
                image = decode_image(read_inside(name, None))
            yield image, number / rate, (number + 1) / rate

    return rate, frames()


def _not_empty(timed: Timed, path: Path) -> Timed:
    first = next(timed, None)
    if first is None:
        raise StarflowError(f"{path} holds no frames")
    return chain([first], timed)


def read_video_metadata(path: Path) -> dict[str, Any]:
    """How a video that `VideoWriter` wrote was made. Raises StarflowError if it does not say."""
    if is_folder(path):
        names = sorted(path.glob("*.png"), key=natural_order)
        if not names:
            raise StarflowError(UNDESCRIBED.format(path))
        return read_image_metadata(names[0])
    if path.suffix.lower() not in MOVIES:
        return read_image_metadata(path)
    if exists(path) and not is_regular(path):
        raise StarflowError(f"{path} cannot be read as a video: it is not a regular file")
    av = _pyav()
    with _av_errors(path, "read as a video"), av.open(str(path)) as container:
        comment = container.metadata.get("comment")
    try:
        metadata = described(comment)
    except ValueError:
        raise StarflowError(f"{path}: its description is damaged") from None
    if metadata is None:
        raise StarflowError(UNDESCRIBED.format(path))
    return metadata


# ---- errors


class _Abandoned(Exception):
    """Ends the work on a file that is not wanted."""


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError:
        raise StarflowError("video files need PyAV: pip install av") from None
    av.logging.set_level(None)
    return av


@contextmanager
def _av_errors(path: Path, what: str) -> Iterator[None]:
    from av.error import FFmpegError

    try:
        yield
    except (FFmpegError, OSError, ValueError) as error:
        raise StarflowError(f"{path} cannot be {what}: {one_line(error)}") from None


@contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except StarflowError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they like
        raise StarflowError(f"{path} cannot be read as a picture: {one_line(error)}") from None

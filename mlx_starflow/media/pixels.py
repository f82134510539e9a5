"""Images that come from anywhere, made usable: upright, RGB, transparency on white, cropped to a size."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .heic .heif".split()
)
"""How the names of files end that are taken for images, in lower case; not all of them can be read everywhere."""

ZOOM = 1.1
"""Random views show at least 1 / ZOOM of the width and height that the whole crop shows."""

MANY_PIXELS = 2**24
"""Images of more pixels than this are decoded one at a time: they take up to 15 bytes a pixel."""

_large = threading.Lock()

# Formats that need nothing but a decoder: some of Pillow's others start programs.
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

HEIF_PACKAGE = "pillow-heif"
"""What teaches Pillow to read HEIC, the format of an iPhone's photos; the extra `heic`."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_ORIENTATION = 0x0112
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """The message is a few words that say why."""


def decode_image(data: bytes) -> Image.Image:
    """The image in a file's bytes: RGB, turned as its EXIF says, transparency on white, the first frame of several.

    16-bit greys keep their upper 8 bits. Colour profiles are not applied.

    Raises:
        UnreadableImage: it is empty, damaged, of an unknown format, of floating-point numbers, or so large that
            Pillow takes it for a decompression bomb (179 million pixels); or it is HEIC, and pillow-heif is missing.
    """
    with _opened(data) as opened, _room_for(opened.width * opened.height):
        opened.load()
        return model_picture(opened)


def decode_with_transparency(data: bytes) -> Image.Image:
    """The image in a file's bytes as it is: `visible_picture`. Raises UnreadableImage, as `decode_image`."""
    with _opened(data) as opened, _room_for(opened.width * opened.height):
        opened.load()
        return visible_picture(opened)


def visible_picture(image: Image.Image) -> Image.Image:
    """An image with its transparency: RGBA if it has some, else RGB, turned as its EXIF says; with its colour profile.

    Raises:
        UnreadableImage: it is of floating-point numbers.
    """
    orientation, profile = _orientation(image), image.info.get("icc_profile")
    transparent = image.has_transparency_data and not image.mode.startswith("I")
    made = _upright(image.convert("RGBA") if transparent else _rgb(image), orientation)
    # Profiles of greys and of inks mean nothing to RGB.
    made.info = {"icc_profile": profile} if profile and image.mode in ("RGB", "RGBA", "P") else {}
    return made


def stored_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the image in a file's bytes as its header says, before anything is decoded.

    Raises UnreadableImage, as `decode_image`.
    """
    with _opened(data) as opened:
        return opened.size


def decode_transparency(data: bytes) -> Image.Image | None:
    """How opaque the image in a file's bytes is, mode "L", 255 where it is, turned as its EXIF says; None if it all is.

    Raises UnreadableImage, as `decode_image`.
    """
    with _opened(data) as opened, _room_for(opened.width * opened.height):
        opened.load()
        if not opened.has_transparency_data:
            return None
        return _upright(opened.convert("RGBA").getchannel("A"), _orientation(opened))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image in a file's bytes, of which the header has been read; whatever is wrong inside is UnreadableImage."""
    if not data:
        raise UnreadableImage("the file is empty")
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and not reads_heif():
        raise UnreadableImage(f"a HEIC picture, which {HEIF_PACKAGE} reads: pip install {HEIF_PACKAGE}")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as opened:
            yield opened
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not a picture, or of a format that cannot be read here") from None
    except Exception as error:  # decoders of damaged files raise whatever they like
        text = " ".join(re.sub(r"<[^<>]* at 0x[^<>]*>", "", str(error)).split())
        raise UnreadableImage(text or type(error).__name__) from None


@lru_cache(maxsize=1)
def reads_heif() -> bool:
    """Whether HEIC pictures can be read here; Pillow is told how to."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


def model_picture(image: Image.Image) -> Image.Image:
    """An image as models see it, wherever it comes from: RGB, turned as its EXIF says, transparency on white.

    The result says nothing of orientation or transparency any more, so that doing it twice changes nothing.

    Raises:
        UnreadableImage: it is of floating-point numbers.
    """
    orientation = _orientation(image)
    made = _upright(_rgb(image), orientation)  # a new image, whatever the old one was
    made.info = {}
    return made


@contextmanager
def _room_for(pixels: int) -> Iterator[None]:
    """Large images are decoded one at a time: a few kilobytes can make gigabytes of one, and threads decode several."""
    if pixels <= MANY_PIXELS:
        yield
        return
    with _large:
        yield


@contextmanager
def no_remarks() -> Iterator[None]:
    """Pillow's warnings about odd files are not shown: an image can be read, or it is reported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def crop_image(
    image: Image.Image, width: int, height: int, zoom: float = 1.0, position: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """The largest part of an image that has the shape of `width` x `height`, resized to it (Lanczos).

    Args:
        zoom: 1 or more; the part is smaller by this factor.
        position: where the part lies, (across, down), 0 to 1; the middle by default.
    """
    scale = min(image.width / width, image.height / height) / zoom
    part = scale * width, scale * height
    left, top = position[0] * (image.width - part[0]), position[1] * (image.height - part[1])
    # Rounding must not lead out of the image.
    box = (left, top, min(left + part[0], image.width), min(top + part[1], image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def image_views(
    image: Image.Image, width: int, height: int, views: int = 1, *, flip: bool = False, seed: int = 0, key: str = ""
) -> np.ndarray:
    """Views of an image at one size, uint8 `[views, height, width, 3]`.

    The first is the middle. The others are random parts, up to `ZOOM` times enlarged; with `flip` the second, fourth
    and so on are mirrored. They depend on `seed`, `key` (what the image is called) and their number alone.
    """
    out = np.empty((views, height, width, 3), np.uint8)
    for view in range(views):
        zoom, position = 1.0, (0.5, 0.5)
        if view:
            name = f"{seed}/{view}/{key}".encode("utf-8", "surrogatepass")
            rng = np.random.Generator(np.random.Philox(int.from_bytes(sha256(name).digest()[:16], "little")))
            zoom, position = rng.uniform(1, ZOOM), tuple(rng.random(2))
        pixels = np.asarray(crop_image(image, width, height, zoom, position))
        out[view] = pixels[:, ::-1] if flip and view % 2 else pixels
    return out


def scale_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in -1..1."""
    return images.astype(np.float32) / 127.5 - 1


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    reads_heif()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableImage("pictures of floating-point numbers cannot be read")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF does not spoil an image
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image

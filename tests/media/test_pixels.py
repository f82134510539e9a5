from __future__ import annotations

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mlx_starflow.media import pixels
from mlx_starflow.media.pixels import (
    ZOOM,
    UnreadableImage,
    crop_image,
    decode_image,
    image_views,
    no_remarks,
    scale_pixels,
)


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def arrow() -> Image.Image:
    """Red in one corner, green in the next, the rest blue: no turn or mirroring of it is another."""
    picture = Image.new("RGB", (16, 8), "blue")
    picture.paste("red", (0, 0, 8, 4))
    picture.paste("lime", (8, 0, 16, 4))
    return picture


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_formats(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = decode_image(encoded(arrow(), kind, **options))
    assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), np.asarray(arrow()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """A camera stores the picture turned, and says how it is to be turned back."""
    stored = {
        1: lambda p: p,
        2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
        4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
        6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
        7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
        8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
    }[orientation](arrow())
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode_image(encoded(stored, exif=exif))), np.asarray(arrow()))


def test_damaged_exif_does_not_matter():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        with no_remarks():
            assert decode_image(encoded(arrow(), "JPEG", exif=exif)).size == (16, 8)


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(half)).getpixel((0, 0)) == (255, 127, 127)
    assert decode_image(encoded(clear.convert("LA"))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert decode_image(encoded(palette)).getpixel((0, 0)) == (9, 8, 7)
    assert decode_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("RGB", (4, 4), "red"), transparency=(255, 0, 0))).getpixel((0, 0)) == (
        255,
        255,
        255,
    )


def test_modes():
    assert decode_image(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG")).getpixel((0, 0))[0] > 240
    assert decode_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77, 77, 77)
    deep = Image.fromarray(np.full((4, 4), 0x8123, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert decode_image(encoded(deep, kind)).getpixel((0, 0)) == (0x81,) * 3
    with pytest.raises(UnreadableImage, match="floating-point"):
        decode_image(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no picture at all", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encoded(arrow())[:60], "truncated|broken"),
        (encoded(arrow(), "JPEG")[:-9], "truncated"),
        (encoded(arrow(), "WEBP")[:40], "."),
        (bomb(60000, 60000), "decompression bomb"),
        (bomb(4, 4), "."),
    ],
)
def test_unreadable(data, reason):
    for _ in range(2):
        with pytest.raises(UnreadableImage, match=reason) as raised:
            decode_image(data)
    # The reason goes into files that are compared: it is one line and says nothing of addresses.
    assert "\n" not in str(raised.value) and " at 0x" not in str(raised.value)


@pytest.fixture
def forget_heif():
    """What is known about pillow-heif is asked for again."""
    for function in (pixels.reads_heif, pixels._formats):
        function.cache_clear()
    yield
    for function in (pixels.reads_heif, pixels._formats):
        function.cache_clear()


def test_heic_is_read(forget_heif):
    """As it stands on a telephone: turned by the file, which is not to be turned again as its EXIF says."""
    pytest.importorskip("pillow_heif")
    assert pixels.reads_heif()
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (0, 0, 16, 32))
    jpeg = encoded(wide, "JPEG", exif=exif)
    heic = encoded(Image.open(io.BytesIO(jpeg)), "HEIF")
    assert heic[4:12] == b"ftypheic"
    image = decode_image(heic)
    assert image.size == decode_image(jpeg).size == (32, 64)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(decode_image(jpeg))).mean() < 8


def test_heic_without_its_reader(forget_heif, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnreadableImage, match=r"^a HEIC picture, which pillow-heif reads: pip install pillow-heif$"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = encoded(arrow(), kind, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(len(data), size=4):
                data[place] = rng.integers(256)
            try:
                with no_remarks():
                    assert decode_image(bytes(data)).mode == "RGB"
            except UnreadableImage as error:
                assert str(error)


def test_crops():
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (10, 0, 30, 20))
    middle = np.asarray(crop_image(picture, 10, 10))
    # Its edges know what lies beyond them, as when the whole is resized and then cut.
    assert middle.shape == (10, 10, 3) and (middle[:, 3:-3] == (255, 0, 0)).all()
    assert (middle[:, 0] != (255, 0, 0)).any()
    left = np.asarray(crop_image(picture, 10, 10, position=(0, 0)))
    assert (left[:, :2] == (0, 0, 255)).all() and (left[:, 8:] == (255, 0, 0)).all()
    right = np.asarray(crop_image(picture, 10, 10, position=(1, 1)))
    assert (right[:, 8:] == (0, 0, 255)).all()
    assert crop_image(picture, 7, 3).size == (7, 3)
    zoomed = np.asarray(crop_image(picture, 20, 10, zoom=4.0))
    assert (zoomed == (255, 0, 0)).all()
    # Of the right shape already: what a plain resize gives.
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert np.array_equal(crop_image(noise, 24, 24), noise.resize((24, 24), Image.Resampling.LANCZOS))
    for side in (1, 3, 7, 1001):
        assert crop_image(Image.new("RGB", (side, 13)), 5, 9, zoom=1.07, position=(1, 1)).size == (5, 9)


def test_views():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    views = image_views(noise, 30, 20, 4, key="a")
    assert views.shape == (4, 20, 30, 3) and views.dtype == np.uint8
    assert np.array_equal(views[0], crop_image(noise, 30, 20))
    assert len({view.tobytes() for view in views}) == 4
    assert np.array_equal(views, image_views(noise, 30, 20, 4, key="a"))
    assert np.array_equal(views[:2], image_views(noise, 30, 20, 2, key="a"))
    assert not np.array_equal(views[1], image_views(noise, 30, 20, 2, key="b")[1])
    assert not np.array_equal(views[1], image_views(noise, 30, 20, 2, key="a", seed=1)[1])
    mirrored = image_views(noise, 30, 20, 4, key="a", flip=True)
    for index in range(4):
        assert np.array_equal(mirrored[index], views[index][:, ::-1] if index % 2 else views[index])
    # A ramp shows how much of the width a view has: at least 1 / ZOOM of it.
    ramp = Image.fromarray(np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (250, 250, 3)).copy())
    for view in image_views(ramp, 50, 50, 8)[1:]:
        assert 250 / ZOOM - 12 < int(view[0, -1, 0]) - int(view[0, 0, 0]) < 250


def test_pixels():
    assert scale_pixels(np.array([0, 255], np.uint8)).tolist() == [-1, 1]
    assert scale_pixels(np.array([0], np.uint8)).dtype == np.float32

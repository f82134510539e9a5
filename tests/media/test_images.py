import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.images import grid, numbered, save_animation, save_image, to_images
from mlx_starflow.media.metadata import read_metadata


def test_to_images_maps_the_range_and_clips():
    picture = np.array([[[[-1.0, 0.0, 1.0], [-3.0, 0.5, 3.0]]]], np.float32)
    assert np.asarray(to_images(picture)[0]).tolist() == [[[0, 128, 255], [0, 191, 255]]]


def test_grid_places_pictures_row_by_row():
    images = [Image.new("RGB", (4, 3), color) for color in ("red", "green", "blue")]
    sheet = grid(images, columns=2, gap=1)
    assert sheet.size == (9, 7)
    assert sheet.getpixel((0, 0)) == (255, 0, 0)
    assert sheet.getpixel((5, 0)) == (0, 128, 0)
    assert sheet.getpixel((0, 4)) == (0, 0, 255)
    assert sheet.getpixel((4, 0)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "A.JPEG", "a.webp"])
def test_metadata_comes_back(tmp_path, name):
    path = tmp_path / name
    save_image(Image.new("RGB", (2, 2)), path, {"seeds": [1], "prompts": ["ein Apfel, größer"]})
    assert read_metadata(path) == {"seeds": [1], "prompts": ["ein Apfel, größer"]}
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_metadata_of_an_animation(tmp_path, name):
    images = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    save_animation(images, tmp_path / name, metadata={"strength": 0.5})
    assert read_metadata(tmp_path / name) == {"strength": 0.5}
    save_animation(images, tmp_path / name)
    with pytest.raises(StarflowError, match="does not say how it was made"):
        read_metadata(tmp_path / name)


def test_a_jpeg_without_room_for_its_metadata(tmp_path):
    metadata = {"prompts": ["cat " * 20_000]}
    with pytest.warns(UserWarning, match="long.jpg has no room for how it was made"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "long.jpg", metadata)
    assert Image.open(tmp_path / "long.jpg").size == (2, 2)
    save_image(Image.new("RGB", (2, 2)), tmp_path / "long.webp", metadata)
    assert read_metadata(tmp_path / "long.webp") == metadata


@pytest.mark.parametrize(
    "text", ['{"mlx-starflow": 3}', '{"mlx-starflow": {"a": 1}', '{"mlx-starflow": ' + "[" * 99999]
)
def test_damaged_metadata(tmp_path, text):
    exif = Image.Exif()
    exif[0x010E] = text
    Image.new("RGB", (2, 2)).save(tmp_path / "a.webp", exif=exif)
    with pytest.raises(StarflowError, match="its description is damaged"):
        read_metadata(tmp_path / "a.webp")


def test_somebody_elses_description(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "my cat"
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(StarflowError, match="does not say how it was made"):
        read_metadata(tmp_path / "a.jpg")


def test_metadata_errors(tmp_path):
    plain = tmp_path / "plain.png"
    save_image(Image.new("RGB", (2, 2)), plain)
    with pytest.raises(StarflowError, match="does not say how it was made"):
        read_metadata(plain)
    (tmp_path / "text.png").write_text(json.dumps({}))
    with pytest.raises(StarflowError, match="cannot be read as a picture"):
        read_metadata(tmp_path / "text.png")
    with pytest.raises(StarflowError, match="cannot be read as a picture"):
        read_metadata(tmp_path / "missing.png")


@pytest.mark.parametrize("name, message", [("no/such/a.png", "does not exist"), ("a.xyz", "are written as")])
def test_output_errors(tmp_path, name, message):
    with pytest.raises(StarflowError, match=message):
        save_image(Image.new("RGB", (2, 2)), tmp_path / name)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(Image.new("RGB", (2, 2), "red"), path)

    def full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StarflowError, match="No space left"):
        save_image(Image.new("RGB", (2, 2), "blue"), path)
    monkeypatch.undo()
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations(tmp_path, suffix):
    images = [Image.new("RGB", (6, 4), (shade, 90, 200)) for shade in (0, 100, 250)]
    path = tmp_path / f"path{suffix}"
    save_animation(images, path, seconds=0.05)
    with Image.open(path) as opened:
        assert opened.n_frames == 3 and opened.size == (6, 4) and opened.info["loop"] == 0
        opened.seek(2)
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - np.asarray(images[2])).max() < 8
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    with pytest.raises(StarflowError, match=r"written as \.gif, \.webp"):
        save_animation(images, tmp_path / "path.png")


def test_numbered_files():
    assert numbered(Path("a/out.png"), 1) == [Path("a/out.png")]
    assert numbered(Path("a/out.png"), 2) == [Path("a/out-1.png"), Path("a/out-2.png")]

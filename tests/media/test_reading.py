"""Bytes, text, JSON and YAML from anywhere: limits, and one line that says what is wrong."""

from __future__ import annotations

import io
import os
import threading
import time
from pathlib import Path

import pytest
from helpers.commands import message
from PIL import Image

from mlx_starflow.media import pixels
from mlx_starflow.media.files import (
    decode_text,
    inside,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
)
from mlx_starflow.media.images import read_image_metadata
from mlx_starflow.media.noise import read_noise

DEEP = 100_000


@pytest.mark.parametrize("text", ["[" * DEEP + "]" * DEEP, '{"a":' * 200 + "1" + "}" * 200])
def test_deep_json(text, tmp_path):
    with pytest.raises(ValueError, match="inside each other"):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    assert "inside each other" in message(read_json, tmp_path / "a.json")


def test_numbers_without_end(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' + "1" * 10_000 + "}")
    assert "is not valid JSON" in message(read_json, tmp_path / "a.json")


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))


@pytest.mark.parametrize("text", [BOMB, "&a [*a]", "[" * 5000, "{a: " * 500 + "1" + "}" * 500])
def test_yaml_that_multiplies_or_nests(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    begin = time.monotonic()
    found = message(read_yaml, tmp_path / "a.yaml")
    assert len(found) < 600 and time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "text", ["a: [", "? {a: 1}\n: 2", "!!python/object:os.system {}", "a: *b", "\x00", "a: !!int x"]
)
def test_what_is_no_yaml(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    assert "is not valid YAML" in message(read_yaml, tmp_path / "a.yaml")


def test_numbers_of_yaml():
    """Those of YAML 1.2: in YAML 1.1, 1e-4 is text, 81:16 is 4876 and 010 is 8."""
    text = "[1e-4, 64.0, 81:16, 10, 010, -3, .5, 2024-01-01, yes, null, 1.5e3, x]"
    assert parse_yaml(text) == [1e-4, 64.0, "81:16", 10, "010", -3, 0.5, "2024-01-01", True, None, 1500.0, "x"]


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\nun caf\xc3\xa9")
    assert read_text(path) == "a cat\nun café"
    path.write_bytes(b"a cat\nun caf\xe9")
    assert message(read_text, path).endswith("line 2 is not UTF-8; save it as UTF-8")
    assert "line 1 is not UTF-8" in message(decode_text, b"\xff\xfea\0", "stdin")


def test_only_regular_files_of_some_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "link"):
        if path.name == "link":
            path.symlink_to("/dev/zero")
        assert message(read_bytes, path).endswith("it is not a regular file")
        assert "not a regular file" in message(read_noise, path)
        assert "not a regular file" in message(read_image_metadata, path)
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    assert "more than 4 bytes" in message(read_bytes, tmp_path / "a", 4)
    assert "cannot read" in message(read_bytes, tmp_path / ("a" * 300))
    assert "cannot read" in message(read_bytes, Path("a\0b"))
    assert "cannot read" in message(read_bytes, tmp_path)


def test_inside_a_folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/a", "../outside"):
        (folder / name).touch()
    assert inside(folder, "sub/a") == folder / "sub/a"
    assert inside(folder, "nowhere") == folder / "nowhere"
    (folder / "link").symlink_to("a")
    (folder / "out").symlink_to("../outside")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    assert inside(folder, "link") == folder / "link"
    for name in ("../outside", "sub/../../outside", str(tmp_path / "outside"), "/etc/passwd", "out", "zero"):
        assert "leads out of" in message(inside, folder, name)
    assert "is not a regular file" in message(inside, folder, "pipe")
    message(inside, folder, "loop")
    message(inside, folder, "a\0b")


def test_the_hubs_cache_keeps_working(tmp_path):
    repository = tmp_path / "models--someone--flow"
    snapshot = repository / "snapshots/0123"
    (snapshot / "vae").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "vae/config.json").symlink_to("../../../blobs/abc")
    assert read_json(inside(snapshot, "config.json")) == read_json(inside(snapshot / "vae", "config.json")) == {}
    other = tmp_path / "models--else--flow/blobs"
    other.mkdir(parents=True)
    (other / "abc").touch()
    (snapshot / "other.json").symlink_to(other / "abc")
    assert "leads out of" in message(inside, snapshot, "other.json")


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    """Fifty kilobytes of PNG can be 170 million pixels; threads that decode several would need as many gigabytes."""
    monkeypatch.setattr(pixels, "MANY_PIXELS", 100)
    at_once, most = 0, 0
    rgb = pixels._rgb

    def slow(image: Image.Image) -> Image.Image:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.02)
        at_once -= 1
        return rgb(image)

    monkeypatch.setattr(pixels, "_rgb", slow)
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    threads = [threading.Thread(target=pixels.decode_image, args=(file.getvalue(),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1

"""Latent caches: what is in them, going on after whatever happened, damage, and training without encoders."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.images import write_images
from helpers.model_directories import write_image_model
from helpers.paths import TESTS
from helpers.precision import bound, roundings
from PIL import Image

from mlx_starflow import load
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.buckets import RATIOS, bucket_size
from mlx_starflow.media.pixels import decode_image, image_views, scale_pixels
from mlx_starflow.model_dir.directory import load_flow
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import automatic_dtype
from mlx_starflow.models import autoencoder_kl, t5
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.cache import encode, files
from mlx_starflow.training.data.cache.build import CacheSettings, build_cache
from mlx_starflow.training.data.cache.model import CacheModel
from mlx_starflow.training.data.cache.reading import CachedLatents, LatentCache
from mlx_starflow.training.loop.checkpoint import checkpoint_files, load_checkpoint
from mlx_starflow.training.loop.trainer import Trainer

SCRIPT = [sys.executable, __file__]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS)}
SMALL = CacheSettings(size=8, buckets=True, views=2, batch_size=2, dtype="float32")
SIZES = [(9, 9), (20, 10), (10, 20), (6, 6), (30, 9), (12, 9), (40, 40), (9, 30)]


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = write_image_model(tmp_path_factory.mktemp("model") / "tiny")
    change_config(directory / "vae", latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.0, 0.5, 2.0, 0.7])
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """22 pictures in several shapes; some share a caption, one has none, one cannot be read."""
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 22)


def write_data(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
        captions = ["a thing"] if index % 5 == 0 else [f"number {index % 9}", "some other name of it"]
        lines.append({"file_name": f"{index:02}.png", "captions": captions})
    lines[3]["captions"] = []
    (folder / "10.png").write_bytes(b"no picture")
    lines.append({"file_name": "00.png", "text": "held out", "split": "held_out"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def cache(model, data, tmp_path_factory) -> Path:
    """Made at once. Do not change it."""
    out = tmp_path_factory.mktemp("cache") / "straight"
    build_cache(data, out, model, SMALL)
    return out


@pytest.fixture
def whole_cache(model, data, tmp_path, chosen_here) -> Path:
    """The same in the precision that a process of its own chooses here."""
    build_cache(data, tmp_path / "whole", model, SMALL)
    return tmp_path / "whole"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def message(function, *arguments, **options) -> str:
    with pytest.raises(StarflowError) as raised:
        function(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- what is in it


def test_summary(cache, model, data, tmp_path):
    summary = build_cache(data, tmp_path / "again", model, SMALL)
    assert (summary.images, summary.texts, summary.enlarged) == (20, 12, 2) and not summary.finished_before
    tokenizer = load(model).tokenizer
    captions = {caption for captions in LatentCache(cache).captions for caption in captions}
    assert summary.cut == sum(len(tokenizer.encode(caption)) > 6 for caption in captions) > 0
    assert summary.skipped == (
        "skipped 2: 03.png (no caption), 10.png (not a picture, or of a format that cannot be read here); "
        f"all of them are in {tmp_path / 'again/skipped.txt'}"
    )
    assert summary.bytes == sum(len(c) for name, c in contents(tmp_path / "again").items() if name != "cache.json")
    assert contents(tmp_path / "again") == contents(cache)


def test_latents_are_the_autoencoders(cache, model, data):
    found = LatentCache(cache, model)
    assert len(found) == 20 and found.keys[:4] == ["00.png", "01.png", "02.png", "04.png"]
    assert [RATIOS.index(ratio) for ratio in found.ratios] == sorted(RATIOS.index(ratio) for ratio in found.ratios)
    pipe = load(model)
    rng = np.random.default_rng(0)
    for index, key in enumerate(found.keys):
        picture = decode_image((data / key).read_bytes())
        ratio = found.ratios[found.buckets[index]]
        width, height = bucket_size(ratio, 8, 2)
        views = image_views(picture, width, height, 2, key=key)
        posterior = pipe.vae.encode(mx.array(scale_pixels(views)))
        mean = np.array(posterior.mean.astype(mx.float32))
        std = np.exp(0.5 * np.array(posterior.logvar.astype(mx.float32)))
        for view in range(2):
            means, stds = found.posterior([index], [view])
            np.testing.assert_allclose(means[0], mean[view], atol=1e-6)
            np.testing.assert_allclose(stds[0], std[view], rtol=1e-5)
        noise = rng.standard_normal((2, *means.shape[1:]), dtype=np.float32)
        expected = np.array(pipe.vae.scale(posterior.sample(mx.array(noise))))
        # Drawn and scaled, by up to 2, of moments that are rounded in half precision.
        drawn = found.latents([index, index], [0, 1], noise)
        np.testing.assert_allclose(drawn, expected, atol=bound(1e-5, roundings(10)))


def test_texts_are_the_pipelines(cache, model):
    found = LatentCache(cache)
    pipe = load(model)
    captions = ["", *dict.fromkeys(caption for captions in found.captions for caption in captions)]
    with pytest.warns(UserWarning, match="is longer than the 6 tokens"):
        expected = np.array(pipe.encode_prompts(captions))
    np.testing.assert_allclose(found.text(captions), expected, atol=1e-5)
    assert found.text([""]).shape == (1, 6, 32)
    # Padding is not on disk.
    tokens = pipe.tokenizer.batch(captions, 6)[1].sum()
    assert (cache / "text.bin").stat().st_size == tokens * 32 * 4


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_precision(cache, model, data, tmp_path, dtype, error):
    build_cache(data, tmp_path / "half", model, replace(SMALL, dtype=dtype))
    half, full = LatentCache(tmp_path / "half"), LatentCache(cache)
    for index in range(len(full)):
        for a, b in zip(half.posterior([index], [1]), full.posterior([index], [1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=error, atol=1e-4)
    np.testing.assert_allclose(half.text(["a thing"]), full.text(["a thing"]), rtol=error, atol=1e-3)
    assert 2 * (tmp_path / "half/text.bin").stat().st_size == (cache / "text.bin").stat().st_size


def test_squares_and_other_settings(model, data, tmp_path):
    summary = build_cache(data, tmp_path / "a", model, CacheSettings(split="held_out"))
    found = LatentCache(summary.folder)
    assert (found.ratios, found.shapes, found.views, found.keys) == (["1:1"], [(4, 4, 4)], 1, ["00.png"])
    assert found.captions == [("held out",)] and not summary.skipped
    folders = [tmp_path / name for name in ("b", "c")]
    for folder, flip in zip(folders, (False, True), strict=True):
        build_cache(data, folder, model, CacheSettings(size=4, views=2, flip=flip, split="held_out"))
    plain, mirrored = map(LatentCache, folders)
    assert plain.shapes == [(2, 2, 4)]
    assert np.array_equal(plain.posterior([0], [0]), mirrored.posterior([0], [0]))
    assert not np.array_equal(plain.posterior([0], [1]), mirrored.posterior([0], [1]))


def test_models_that_read_aspect_ratios(model, data, tmp_path):
    """Buckets are the default there, and each caption is encoded with the ratio of its picture."""
    other = write_image_model(tmp_path / "mix")
    change_config(other, mix_aspect=True, txt_size=24)
    build_cache(data, tmp_path / "cache", other, replace(SMALL, buckets=None))
    found = LatentCache(tmp_path / "cache", other)
    assert len(found.ratios) > 3
    pipe = load(other)
    for index in range(len(found)):
        ratio = found.ratios[found.buckets[index]]
        captions = ["", *found.captions[index]]
        width, height = map(int, ratio.split(":"))
        expected = np.array(pipe.encode_prompts(captions, size=(width, height)))
        np.testing.assert_allclose(found.text(captions, ratio), expected, atol=1e-5)


# ---- going on


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 6])
def test_resumed_equals_uninterrupted(model, data, tmp_path, monkeypatch, stop):
    """Whenever it stops, in the middle of whatever file."""
    monkeypatch.setattr(encode, "TEXT_STEP", 4)
    build_cache(data, tmp_path / "straight", model, SMALL)
    out = tmp_path / "cache"
    whole = files.CacheWriter.commit
    commits = []

    def breaks(self, progress):
        if len(commits) == stop:
            self.append("index.jsonl", b"half a line")
            raise Killed
        commits.append(progress)
        whole(self, progress)

    monkeypatch.setattr(files.CacheWriter, "commit", breaks)
    with pytest.raises(Killed):
        build_cache(data, out, model, SMALL)
    assert "is not finished: run the command that makes it again" in message(LatentCache, out)
    monkeypatch.setattr(files.CacheWriter, "commit", whole)
    assert not build_cache(data, out, model, SMALL).finished_before
    assert contents(out) == contents(tmp_path / "straight")


def test_progress_of_older_versions(model, data, tmp_path, monkeypatch):
    """It has only the keys that were known when it was written."""
    out = tmp_path / "cache"
    monkeypatch.setattr(encode.TextStage, "run", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_cache(data, out, model, SMALL)
    monkeypatch.undo()
    state = json.loads((out / "unfinished.json").read_text())
    kept = {name: state["progress"][name] for name in ("items", "source", "pictures_done")}
    (out / "unfinished.json").write_text(json.dumps({**state, "progress": kept}))
    build_cache(data, out, model, SMALL)
    build_cache(data, tmp_path / "straight", model, SMALL)
    assert contents(out) == contents(tmp_path / "straight")


def test_kill_9(whole_cache, model, data, tmp_path):
    """A process that is killed again and again, at whatever moment, ends with the same bytes."""
    cache, out = whole_cache, tmp_path / "cache"
    killed = 0
    for attempt in range(12):
        process = subprocess.Popen([*SCRIPT, data, out, model, "slowly"], env=ENVIRONMENT)
        try:
            seen = progress_of(out)
            deadline = time.monotonic() + 60
            while process.poll() is None and progress_of(out) == seen and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(0.03 * attempt)
        finally:
            process.kill()
            process.wait()
        killed += process.returncode == -signal.SIGKILL
        if (out / "cache.json").exists():
            break
    assert killed >= 3
    assert build_cache(data, out, model, SMALL)
    assert contents(out) == contents(cache)
    LatentCache(out, model).check()


def progress_of(folder: Path) -> str:
    try:
        return (folder / "unfinished.json").read_text()
    except FileNotFoundError:
        return ""


def test_a_full_disk(whole_cache, model, data, tmp_path):
    """Nothing larger than 4 kB can be written: one line, and it goes on when there is room."""
    cache, out = whole_cache, tmp_path / "cache"
    result = subprocess.run([*SCRIPT, data, out, model, "4096"], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().startswith(f"cannot write {out}/") and result.stderr.count("\n") == 1
    assert "run the same command again: it goes on" in result.stderr
    assert "is not finished" in message(LatentCache, out)
    assert max(len(content) for content in contents(out).values()) == 4096
    build_cache(data, out, model, SMALL)
    assert contents(out) == contents(cache)


def test_a_finished_cache_is_left_alone(model, data, tmp_path):
    out = tmp_path / "cache"
    build_cache(data, out, model, SMALL)
    before = contents(out)
    (out / "unfinished.json").write_text("what a crash at the very end leaves")
    assert build_cache(data, out, model, SMALL).finished_before
    assert contents(out) == before
    error = message(build_cache, data, out, model, replace(SMALL, views=3, dtype="float16"))
    assert "other settings (views 2 -> 3, dtype float32 -> float16): give another folder, or --no-resume" in error
    assert contents(out) == before
    assert not build_cache(data, out, model, replace(SMALL, views=1), resume=False).finished_before
    assert LatentCache(out).views == 1


def test_data_that_changed(model, tmp_path, monkeypatch):
    data = write_data(tmp_path / "pictures", 22)
    out = tmp_path / "cache"
    build_cache(data, out, model, SMALL)
    index = data / "metadata.jsonl"
    text = index.read_text()
    shorter = text.rpartition("\n")[0]
    for changed in (text.replace("number 1", "number one"), f'{text}\n{{"file_name": "new.png"}}', shorter):
        index.write_text(changed)
        assert "is not what it was when" in message(build_cache, data, out, model, SMALL)
    index.write_text(text)
    assert build_cache(data, out, model, SMALL).finished_before


def test_data_that_changed_in_between(model, tmp_path, monkeypatch):
    data = write_data(tmp_path / "pictures", 22)
    out = tmp_path / "cache"
    monkeypatch.setattr(encode.TextStage, "run", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_cache(data, out, model, SMALL)
    with (data / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "01.png", "text": "one more"}')
    assert "is not what it was when" in message(build_cache, data, out, model, SMALL)
    assert "is not what it was when" in message(build_cache, data, out, model, SMALL)


def test_nothing_usable(model, tmp_path):
    data = tmp_path / "pictures"
    data.mkdir()
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png"}')
    out = tmp_path / "cache"
    error = message(build_cache, data, out, model, SMALL)
    assert error.startswith(
        f"{data} has no usable picture: skipped 2: a.png (No such file or directory), b.png (no cap"
    )
    assert (out / "skipped.txt").read_text() == "a.png\tNo such file or directory\nb.png\tno caption\n"
    assert message(build_cache, data, out, model, SMALL) == error
    Image.new("RGB", (9, 9)).save(data / "a.png")
    assert build_cache(data, out, model, SMALL).images == 1
    assert (out / "skipped.txt").read_text() == "b.png\tno caption\n"
    other = replace(SMALL, split="test")
    # A folder in which nothing came of it may be used with other settings.
    assert message(build_cache, data, tmp_path / "b", model, other).endswith("picture: none is of the split test")
    assert build_cache(data, tmp_path / "b", model, SMALL).images == 1


def test_other_folders_are_left_alone(model, data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for resume in (True, False):
        error = message(build_cache, data, tmp_path, model, SMALL, resume=resume)
        assert error == f"{tmp_path} holds other files (mine.txt); give a new or an empty folder"
    assert contents(tmp_path) == {"mine.txt": b"mine"}
    (tmp_path / "mine.txt").rename(tmp_path / "cache.json")
    assert "cannot read" in message(build_cache, data, tmp_path, model, SMALL, resume=False)
    (tmp_path / "cache.json").write_text('{"mine": 1}')
    assert "holds other files (cache.json)" in message(build_cache, data, tmp_path, model, SMALL, resume=False)
    assert contents(tmp_path) == {"cache.json": b'{"mine": 1}'}
    (tmp_path / "cache.json").rename(tmp_path / "mine.txt")
    assert message(build_cache, data, tmp_path / "mine.txt", model, SMALL).endswith("mine.txt is a file; give a folder")
    assert "is not a latent cache: make one with" in message(LatentCache, tmp_path)
    assert "is not a latent cache: make one with" in message(LatentCache, tmp_path / "nowhere")


def test_one_writer_at_a_time(cache, model, data):
    with files.CacheWriter(cache, read_manifest(cache)["settings"]) as writer, ThreadPoolExecutor(1) as other:
        assert writer.finished
        line = other.submit(message, build_cache, data, cache, model, SMALL).result()
        assert line == f"another mlx-starflow (pid {os.getpid()}) is writing {cache}"
    assert build_cache(data, cache, model, SMALL).finished_before


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "cache.json").read_text())


def test_numbers_that_do_not_fit(model, data, tmp_path):
    other = tmp_path / "model"
    write_image_model(other)
    weights = load_weights(other / "vae")
    weights["encoder.conv_out.bias"] = weights["encoder.conv_out.bias"] + 1e5
    save_model(other / "vae", weights, read_config(other / "vae"))
    error = message(build_cache, data, tmp_path / "cache", other, replace(SMALL, dtype="float16"))
    assert error == "latents of 00.png: a number is not finite, or too large for float16; use another --dtype"
    # Half precision, which a GPU computes in, is too narrow for such an autoencoder too: it is float32 then.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert build_cache(data, tmp_path / "b", other, SMALL).images == 20
    lines = [str(each.message) for each in said if "float16's range" in str(each.message)]
    assert len(lines) == (automatic_dtype() == mx.float16)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"views": 0}, "views must be 1 or more, at most 1,000,000, not 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of float16, bfloat16, float32"),
        ({"flip": True}, "flip mirrors every second view: it needs 2 views or more"),
        ({"seed": -1}, "the seed must be 0 or more"),
        ({"size": 7}, "a size of 7 does not fit: this model wants multiples of 2 pixels"),
        ({"size": 0}, "a size of 0 does not fit"),
    ],
)
def test_settings(model, data, tmp_path, changes, expected):
    def build():
        build_cache(data, tmp_path / "cache", model, CacheSettings(**changes))

    assert expected in message(build)
    assert not (tmp_path / "cache").exists()


# ---- damage, and other models


def copy(cache: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, content in contents(cache).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["latents-1x1.bin", "latents-16x9.bin", "text.bin", "text.jsonl", "index.jsonl"])
def test_damage(cache, tmp_path, name):
    folder = copy(cache, tmp_path / "cache")
    LatentCache(folder).check()
    path = folder / name
    whole = path.read_bytes()
    half = len(whole) // 2
    for bad in (whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :], whole[:-1], whole + b"x", b"", None):
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)

        def check():
            LatentCache(folder).check()

        assert message(check).startswith(f"{folder}: {name} is damaged or missing; make the cache again")
        if bad is None or len(bad) != len(whole) or name.endswith(".jsonl"):
            message(LatentCache, folder)  # noticed already when it is opened
        path.write_bytes(whole)


def test_damage_while_it_is_made(model, data, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    monkeypatch.setattr(encode.TextStage, "run", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_cache(data, out, model, SMALL)
    os.truncate(out / "latents-1x1.bin", 100)
    assert "latents-1x1.bin is shorter than it was: start again with --no-resume" in message(
        build_cache, data, out, model, SMALL
    )
    (out / "latents-1x1.bin").unlink()
    assert "lacks latents-1x1.bin; start again with --no-resume" in message(build_cache, data, out, model, SMALL)


@pytest.mark.parametrize(
    "damage",
    [{"progress": [1]}, {"progress": {"items": "x"}}, {"progress": {"other": 1}}, {"bytes": 3}, {"bytes": {"a": "b"}},
     {"bytes": {"index.jsonl": -1}}, {"settings": 1}, {"progress": {"texts": None}}],
)  # fmt: skip
def test_a_damaged_progress_is_one_line(model, data, tmp_path, monkeypatch, damage):
    out = begun(model, data, tmp_path, monkeypatch)
    state = json.loads((out / "unfinished.json").read_text())
    (out / "unfinished.json").write_text(json.dumps({**state, **damage}))
    assert "damaged: " in (said := message(build_cache, data, out, model, SMALL)) and "--no-resume" in said


@pytest.mark.parametrize("line", [b"\xff", b"[" * 100_000, b"[1]", b"{}", b'{"captions": 3}', b'{"key": 1}'])
def test_a_damaged_index_is_one_line(model, data, tmp_path, monkeypatch, line):
    out = begun(model, data, tmp_path, monkeypatch)
    rows = (out / "index.jsonl").read_bytes()
    (out / "index.jsonl").write_bytes(line.ljust(len(rows) - 1)[: len(rows) - 1] + b"\n")
    assert "index.jsonl is damaged: start again with --no-resume" in message(build_cache, data, out, model, SMALL)


def begun(model, data, tmp_path, monkeypatch) -> Path:
    """A cache whose images are done and whose texts are not."""
    out = tmp_path / "cache"
    with monkeypatch.context() as stopped, pytest.raises(ZeroDivisionError):
        stopped.setattr(encode.TextStage, "run", lambda *arguments: 1 / 0)
        build_cache(data, out, model, SMALL)
    return out


def test_a_manifest_that_is_none(cache, tmp_path):
    folder = copy(cache, tmp_path / "cache")
    manifest = read_manifest(folder)
    (folder / "cache.json").write_text(json.dumps({**manifest, "format": 0}))
    assert "is a cache of another version" in message(LatentCache, folder)
    (folder / "cache.json").write_text(json.dumps({**manifest, "format": 1, "scale": 0}).replace("scale", "s"))
    assert "or damaged: make it again" in message(LatentCache, folder)
    (folder / "cache.json").write_text("{")
    assert "cache.json is not valid JSON" in message(LatentCache, folder)


def changed_models(model: Path, folder: Path) -> Iterator[tuple[str | None, Path]]:
    """Models that differ from `model`, and in what as far as a cache is concerned."""
    for number, (part, expected) in enumerate(
        [
            ("encoder.conv_in.weight", "another autoencoder"),
            ("decoder.conv_in.weight", None),
            ("shared.weight", "another text encoder"),
            ("flow", None),
        ]
    ):
        other = folder / str(number)
        for path in model.rglob("*"):
            if path.is_file():
                (other / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
                (other / path.relative_to(model)).write_bytes(path.read_bytes())
        where = other if part == "flow" else other / ("text_encoder" if part == "shared.weight" else "vae")
        weights = load_weights(where)
        name = part if part in weights else "blocks.0.proj_in.weight"
        weights[name] = weights[name].at[(0,) * weights[name].ndim].add(1e-3)
        save_model(where, weights, read_config(where))
        yield expected, other
    for part, changes, expected in [
        ("vae", {"scaling_factor": 0.5}, "another autoencoder"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, None),
        ("text_encoder", {"layer_norm_epsilon": 1e-5}, "another text encoder"),
        (".", {"txt_size": 7}, "another length of captions"),
        (".", {"mix_aspect": True}, "another way to complete prompts"),
        (".", {"patch_size": 2}, "another patch size"),
    ]:
        before = (model / part / "config.json").read_bytes()
        change_config(model / part, **changes)
        yield expected, model
        (model / part / "config.json").write_bytes(before)


def test_another_model_is_refused(cache, model, data, tmp_path):
    for expected, other in changed_models(model, tmp_path):
        if expected is None:
            assert len(LatentCache(cache, other)) == 20
            assert build_cache(data, cache, other, SMALL).finished_before
            continue
        error = message(LatentCache, cache, other)
        assert error == (
            f"{cache} was made with {expected} than {other} has: make one for it with "
            f"mlx-starflow cache DATA -o CACHE --model {other}"
        )
        assert "other settings (another model" in message(build_cache, data, cache, other, SMALL)


def test_the_models_weights_are_read_one_by_one():
    model = CacheModel("demo")
    tensors = [array for part in ("vae", "text_encoder") for array in load_weights(model.directory / part).values()]
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert model.identity() == CacheModel("demo").identity()
    assert mx.get_peak_memory() - before < 3 * max(array.nbytes for array in tensors)
    assert 3 * max(array.nbytes for array in tensors) < sum(array.nbytes for array in tensors) / 2


def test_models_that_need_no_cache(model, data, tmp_path):
    assert "unknown model" in message(build_cache, data, tmp_path / "a", "nothing")
    flow = tmp_path / "flow"
    flow.mkdir()
    for name in ("config.json", "model.safetensors"):
        (flow / name).write_bytes((model / name).read_bytes())
    assert "a cache needs its text_encoder/ folder too" in message(build_cache, data, tmp_path / "a", flow)
    change_config(flow, txt_size=0)
    assert "does not read captions" in message(build_cache, data, tmp_path / "a", flow)


# ---- training

TRAINING = TrainingConfig(steps=8, batch_size=3, lr=1e-3, log_every=4, caption_dropout=0.3)


@pytest.fixture
def no_encoders(monkeypatch):
    """Whoever makes an encoder fails."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("an encoder was made")

    monkeypatch.setattr(autoencoder_kl.AutoencoderKL, "__init__", refuse)
    monkeypatch.setattr(autoencoder_kl.Encoder, "__init__", refuse)
    monkeypatch.setattr(t5.T5Encoder, "__init__", refuse)


class Seen(CachedLatents):
    """Notes the shapes of its batches."""

    def batch(self, *arguments):
        arrays = super().batch(*arguments)
        self.seen = [*getattr(self, "seen", []), arrays["latents"].shape]
        return arrays


def make_trainer(cache: Path, model: Path, folder: Path, config: TrainingConfig = TRAINING) -> Trainer:
    return Trainer(load_flow(model, dtype="float32"), Seen(LatentCache(cache, model)), config, folder)


def test_training_needs_no_encoder_and_resumes_bit_for_bit(cache, model, tmp_path, no_encoders, uncompiled):
    straight = make_trainer(cache, model, tmp_path / "straight").run()
    half = make_trainer(cache, model, tmp_path / "halves", replace(TRAINING, save_steps=3))
    whole = CachedLatents.batch
    calls = []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return whole(half.data, *arguments)

    half.data.batch = breaks
    with pytest.raises(Killed):
        half.run()
    assert checkpoint_files(tmp_path / "halves")[0].name == "checkpoint-00000003.safetensors"
    resumed = make_trainer(cache, model, tmp_path / "halves").run()
    assert all(np.array_equal(np.array(straight[name]), np.array(resumed[name])) for name in straight)
    orders = [load_checkpoint(checkpoint_files(tmp_path / name)[0]).order for name in ("straight", "halves")]
    assert np.array_equal(*orders)


def test_a_compiled_step_takes_every_bucket(cache, model, tmp_path):
    config = replace(TRAINING, context_full=0.0, context_partial=0.0)
    trainer = make_trainer(cache, model, tmp_path / "compiled", config)
    compiled = trainer.run()
    assert len({shape[1:] for shape in trainer.data.seen}) > 2
    mx.disable_compile()
    try:
        plain = make_trainer(cache, model, tmp_path / "plain", config).run()
    finally:
        mx.enable_compile()
    for name, array in plain.items():
        np.testing.assert_allclose(np.array(compiled[name]), np.array(array), atol=1e-4)


def test_the_loss_falls(cache, model, tmp_path, no_encoders, uncompiled):
    config = replace(TRAINING, steps=40, lr=3e-3, log_every=20, context_full=0.0, context_partial=0.0)
    make_trainer(cache, model, tmp_path, config).run()
    first, last = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"]
    assert "nll-text-only" not in last


def test_batches(cache):
    found = LatentCache(cache)
    samples = CachedLatents(found)
    rng = np.random.default_rng(0)
    config = replace(TRAINING, caption_dropout=0.25, batch_size=4)
    null, dropped, shapes = found.text([""])[0], 0, set()
    known = {found.text([caption]).tobytes() for captions in found.captions for caption in captions} | {null.tobytes()}
    for _ in range(200):
        batch = samples.batch(rng, config, 0.0)
        shapes.add(batch["latents"].shape)
        assert batch["noise"].shape == batch["latents"].shape == (4, *batch["latents"].shape[1:])
        assert batch["context_mask"].shape == (4, np.prod(batch["latents"].shape[1:3]))
        assert {array.dtype for array in batch.values()} == {np.dtype(np.float32)}
        assert all(text[None].tobytes() in known for text in batch["text"])
        dropped += sum(np.array_equal(text, null) for text in batch["text"])
    assert {shape[1:] for shape in shapes} == set(found.shapes)
    assert dropped / 800 == pytest.approx(0.25, abs=0.05)
    some = found.buckets == found.buckets[5]
    arrays = samples.arrays(np.flatnonzero(some), rng, config, 1.0)
    assert len(arrays["text"]) == some.sum() and arrays["latents"].shape[1:] == found.shapes[found.buckets[5]]
    plain = samples.batch(rng, replace(config, context_full=0.0, context_partial=0.0), 0.0)
    assert set(plain) == {"latents", "noise", "text"}


def test_repeats_and_a_caption_for_all(model, tmp_path):
    for name in ("2_rex", "5_dog"):
        write_images(tmp_path / "repeated" / name, 3)
    summary = build_cache(tmp_path / "repeated", tmp_path / "a", model, SMALL)
    found = LatentCache(tmp_path / "a")
    assert summary.repeats == (2, 5) and found.repeats.tolist() == [2, 2, 2, 5, 5, 5]
    assert found.captions == [("rex",)] * 3 + [("dog",)] * 3
    assert CachedLatents(found, np.array([1, 4])).order.length == 7
    write_images(tmp_path / "flat", 3)
    settings = replace(SMALL, caption="a photo of rex")
    assert build_cache(tmp_path / "flat", tmp_path / "b", model, settings).repeats == (1, 1)
    assert LatentCache(tmp_path / "b").captions == [("a photo of rex",)] * 3
    said = message(build_cache, tmp_path / "flat", tmp_path / "b", model, replace(SMALL, caption="a cat"))
    assert "caption a photo of rex -> a cat" in said


def test_latents_are_drawn_anew(cache, model):
    """mean + std * noise: over many draws, the posterior's own mean and standard deviation."""
    found = LatentCache(cache)
    mean, std = found.posterior([0], [1])
    noise = np.random.default_rng(0).standard_normal((4000, *mean.shape[1:]), dtype=np.float32)
    drawn = found.latents([0] * 4000, [1] * 4000, noise)
    drawn = np.array(load(model).vae.unscale(mx.array(drawn)))
    np.testing.assert_allclose(drawn.mean(axis=0), mean[0], atol=5 * std.max() / 4000**0.5)
    np.testing.assert_allclose(drawn.std(axis=0), std[0], rtol=0.06)


def main(data: str, out: str, model: str, how: str) -> None:
    """Make the cache in a process of its own: slowly, or with a limit on the size of files, as on a full disk."""
    if how == "slowly":
        whole = files.CacheWriter.append

        def append(self: files.CacheWriter, name: str, content: bytes) -> None:
            whole(self, name, content)
            time.sleep(0.02)

        files.CacheWriter.append = append
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(how), int(how)))
    try:
        build_cache(data, out, model, SMALL)
    except StarflowError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])

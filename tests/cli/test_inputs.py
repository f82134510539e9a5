"""What commands are given to read, and cannot: every one ends in a line and exit code 2, foreseen by its reader."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from helpers.commands import Command
from helpers.images import smooth_images, write_images
from helpers.model_directories import write_class_model, write_image_model, write_video_model

from mlx_starflow.cli import main

LONG = "x" * 300


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_image_model(folder / "image")
    write_video_model(folder / "video")
    write_class_model(folder / "class")
    return folder


@contextmanager
def limit(seconds=20):
    """A reader that waits for a pipe, or for the end of /dev/zero, fails."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bad_names(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    paths = [tmp_path / name for name in ("none.png", "pipe.png", "loop.png", "empty.png", "folder", "empty.png/x")]
    return [*paths, "/dev/zero", LONG, "~nobodyhere/x", "new\nline.png", "\x1b[31mred.png"]


COMMANDS = {
    "score": "score {bad} -m {image}",
    "classify": "classify {bad} -l a,b -m {image}",
    "encode": "encode {bad} -m {image} -o z.safetensors",
    "decode": "decode {bad} -m {image} -o z.png",
    "inpaint": "edit inpaint {bad} --mask 0,0,4,8 -m {image} -o z.png",
    "mask": "edit inpaint {good} --mask {bad} -m {image} -o z.png",
    "interpolate": "edit interpolate {good} {bad} -m {image} -o z.webp",
    "from": "generate --from {bad} -o z.png",
    "load-noise": "generate a -m {image} --load-noise {bad} -o z.png",
    "lora": "generate a -m {image} --lora {bad} 1 -o z.png",
    "image": "video a -m {video} --image {bad} -o z.webp",
    "video": "video a -m {video} --video {bad} -o z.webp",
    "cache": "cache {bad} -m {image} -o cache",
    "train": "train {bad} -o trained --dry-run --preset tarflow",
    "config": "train {good} -o trained --config {bad}",
    "model-config": "train {good} -o trained --model-config {bad}",
    "convert flow": "convert flow {bad} -o c",
    "convert text-encoder": "convert text-encoder {bad} -o c",
    "convert vae": "convert vae {bad} -o c",
    "info": "info {bad}",
    "model": "generate a -m {bad} -o z.png",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_names_of_what_cannot_be_read(name, models, tmp_path, monkeypatch):
    write_images(tmp_path / "good", 1)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for bad in bad_names(tmp_path):
        values = {"bad": bad, "good": tmp_path / "good/0.png", **{each: models / each for each in ("image", "video")}}
        arguments = [word.format(**values) for word in COMMANDS[name].split()]
        with limit():
            result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert "should not have happened" not in result.stderr, (arguments, result.stderr)
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, (arguments, result.stderr)
        assert "\x1b" not in result.stderr


def test_names_that_are_no_text(models, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        smooth_images(1)[0].save(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes names of UTF-8 alone")
    tables = ["--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json"]
    result = Command("score")(tmp_path / name, "-m", models / "image", "--draws", 1, *tables)
    assert result.exit_code == 0 and r"caf\udce9.png" in result.stdout
    assert next(iter(csv.DictReader((tmp_path / "t.csv").open())))["picture"].endswith(r"caf\udce9.png")
    assert json.loads((tmp_path / "t.json").read_text())["pictures"][0]["picture"] == str(tmp_path / name)


@pytest.mark.parametrize("kind", ["image", "video", "class"])
def test_info_of_every_family(models, kind):
    result = Command("info")(models / kind)
    assert result.exit_code == 0, result.output
    assert "tokens" in result.stdout


def refuses(path, function):
    """`function` as it is, but that it is not allowed to look at `path`, as those who are not root are not."""

    def guarded(given, *arguments, **options):
        if not isinstance(given, int) and os.fspath(given) in (str(path), os.fsencode(path)):
            raise PermissionError(13, "Permission denied", os.fspath(given))
        return function(given, *arguments, **options)

    return guarded


@pytest.mark.parametrize("what", ["folder", "inner", "file", "metadata", "caption"])
def test_what_may_not_be_read(models, tmp_path, monkeypatch, what):
    folder = tmp_path / "data"
    write_images(folder / "inner", 2, [{"text": "a"}] * 2 if what == "metadata" else None)
    if what == "caption":
        for number in (0, 1):
            (folder / f"inner/{number}.txt").write_text("a")
    target = {"folder": folder, "inner": folder / "inner", "file": folder / "inner/0.png"}.get(what)
    target = target or folder / "inner" / {"metadata": "metadata.jsonl", "caption": "0.txt"}[what]
    for name in ("scandir", "listdir", "open"):
        monkeypatch.setattr(os, name, refuses(target, getattr(os, name)))
    monkeypatch.setattr("io.open", refuses(target, open))
    monkeypatch.setattr("builtins.open", refuses(target, open))
    result = Command("score")(folder, "-m", models / "image", "--draws", 1)
    if what in ("file", "caption"):
        assert result.exit_code == 0 and "skipped 1" in result.stderr and "Permission denied" in result.stderr
    else:
        assert result.exit_code == 2, result.output
        assert "Permission denied" in result.stderr and "should not" not in result.stderr


def test_nobody_home(models, monkeypatch, tmp_path):
    """No HOME and no line in /etc/passwd, as in a container that runs under a number."""
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(*_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    write_images(tmp_path, 1)
    assert Command("score")(tmp_path / "0.png", "-m", models / "image", "--draws", 1).exit_code == 0
    assert Command("info")(models / "image").exit_code == 0
    for command, arguments in {
        "cache": ["-m", models / "image", "-o", tmp_path / "cache"],
        "train": ["-o", tmp_path / "trained", "--preset", "tarflow", "--dry-run"],
        "finetune": ["~/pictures", "-o", tmp_path / "run"],
    }.items():
        data = models / "image" if command == "finetune" else "~/pictures"
        assert "home" in Command(command).mistake(data, *arguments)
    shutil.rmtree(tmp_path / "trained", ignore_errors=True)


@pytest.mark.parametrize("size", [0, -8, "x", [1], "8.5", 1.5, 10**400, 2**20, {}, True])
def test_sizes_of_a_flow_that_are_none(tmp_path, size):
    """Before pictures are read at that size."""
    write_images(tmp_path / "pictures/cat", 2)
    (tmp_path / "flow.yaml").write_text(json.dumps({"model_type": "tarflow", "patch_size": 2, "img_size": size}))
    for more in (["--dry-run"], ["--steps", 1]):
        out = tmp_path / "model"
        arguments = [tmp_path / "pictures", "-o", out, "--model-config", tmp_path / "flow.yaml", *more]
        said = Command("train").mistake(*arguments)
        assert "should not have happened" not in said and ("img_size" in said or "a size has sides" in said)


CROSSED = {
    "text without room for its positions": {"head_dim": 8},
    "an odd head": {"head_dim": 17},
    "heads that do not share keys": {"num_heads": 3, "num_kv_heads": 2},
    "a wider deep block whose heads do not fit": {"top_block_channels": 20},
    "a head of its own": {"top_block": {"head_dim": 8}},
    "text that is not projected": {"top_block": {"use_proj_txt": False}},
    "no layers": {"layers_per_block": []},
    "layers without end": {"layers_per_block": [10**9]},
    "a patch larger than the picture": {"patch_size": 64},
    "a patch that does not divide": {"patch_size": 3},
    "text of no width": {"txt_dim": 0},
    "text of another width": {"txt_dim": 7},
    "other latents": {"channel_size": 5},
    "a video without its order": {"vid_size": "17:16"},
    "a norm of no name": {"norm_type": "x"},
    "a window of nothing": {"learnable_self_denoiser": True, "denoiser_window": 0},
}


@pytest.mark.parametrize("what", CROSSED)
def test_fields_that_do_not_go_together(what, models, tmp_path):
    """In a model's config, and in one of a training: success, as far as they do, or a line."""
    shutil.copytree(models / "image", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, **CROSSED[what]}))
    write_images(tmp_path / "pictures", 2, [{"text": "a"}] * 2)
    flow = {"patch_size": 2, "channels": 16, "head_dim": 16, "layers_per_block": [1, 1], **CROSSED[what]}
    (tmp_path / "flow.yaml").write_text(json.dumps(flow))
    out = tmp_path / "out"
    calls = [
        ("info", tmp_path / "model"),
        ("generate", "a", "-m", tmp_path / "model", "-o", tmp_path / "z.png"),
        ("score", tmp_path / "pictures/0.png", "-m", tmp_path / "model", "--draws", 1),
        ("train", tmp_path / "pictures", "-o", out, "--encoders", models / "image", "--model-config",
         tmp_path / "flow.yaml", "--steps", 1, "--batch-size", 1),
    ]  # fmt: skip
    for name, *arguments in calls:
        result = Command(name)(*arguments)
        assert result.exit_code in (0, 2), (name, result.output)
        assert "should not have happened" not in result.stderr, (name, result.stderr)
        if result.exit_code:
            assert result.stderr.splitlines()[-1].startswith("Error: "), result.stderr

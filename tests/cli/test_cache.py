"""`mlx-starflow cache`, as a user types it."""

from __future__ import annotations

import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model
from PIL import Image

from mlx_starflow.training.data.cache.reading import LatentCache

run = Command("cache")
mistake = run.mistake


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size in enumerate([(8, 8), (30, 20), (20, 30), (6, 6)]):
        Image.new("RGB", size, (50 * index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"the picture that has number {index}")
    return folder


def test_cache(model, pictures, tmp_path):
    (pictures / "bad.jpg").write_bytes(b"")
    (pictures / "bad.txt").write_text("empty")
    out = tmp_path / "cache"
    words = [pictures, "-o", out, "--model", model, "--buckets", "--views", 2, "--flip", "--dtype", "bfloat16"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out} finished: 4 pictures, 5 texts, 0.0 MiB\n"
    skipped, enlarged, cut = result.stderr.splitlines()
    assert skipped == f"skipped 1: bad.jpg (the file is empty); all of them are in {out / 'skipped.txt'}"
    assert enlarged == "1 pictures are smaller than they are encoded, and were enlarged"
    assert cut == "4 captions are longer than the model reads, and were cut"
    cache = LatentCache(out, model)
    assert cache.ratios == ["1:1", "2:3", "3:2"] and cache.views == 2
    again = run(*words)
    assert again.exit_code == 0 and again.stdout.startswith(f"{out} was finished already: 4 pictures")
    assert run(out, "--check").stdout == f"{out} is intact: 4 pictures, 0.0 MiB\n"
    assert run(*words[:-5], "--no-resume").exit_code == 0


def test_mistakes(model, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ["-o", "out", "-m", model]
    assert "nowhere does not exist; give a folder of pictures" in mistake("nowhere", *out)
    assert "Missing option '-o' / '--output'. (see: " in mistake(pictures)
    assert "unknown model 'nothing'" in mistake(pictures, "-o", "out", "-m", "nothing")
    assert "a size of 9 does not fit: this model wants multiples of 2 pixels" in mistake(pictures, *out, "--size", 9)
    assert "it needs 2 views or more" in mistake(pictures, *out, "--flip")
    assert "has no usable picture: none is of the split test" in mistake(pictures, *out, "--split", "test")
    assert "'int8' is not one of" in mistake(pictures, *out, "--dtype", "int8")
    assert "is not a latent cache: make one with mlx-starflow cache DATA -o nowhere" in mistake("nowhere", "--check")
    assert run(pictures, *out).exit_code == 0
    assert "other settings (views 1 -> 3): give another folder, or --no-resume" in mistake(pictures, *out, "--views", 3)
    (tmp_path / "out/text.bin").write_bytes(b"")
    assert "out: text.bin is damaged or missing; make the cache again" in mistake("out", "--check")


def test_ctrl_c(model, pictures, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlx_starflow.training.data.cache.build.TextStage.run", interrupted)
        result = run(pictures, "-o", tmp_path / "out", "-m", model)
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr == "stopped: the same command goes on where this one was\n"
    assert run(pictures, "-o", tmp_path / "out", "-m", model).exit_code == 0


def test_help():
    result = run("--help")
    assert result.exit_code == 0
    for kind in (".txt", "metadata.jsonl", "metadata.csv", "folder for each class", ".tar", "hf:NAME"):
        assert kind in " ".join(result.stdout.split())

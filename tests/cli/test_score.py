"""`mlx-starflow score`, `classify` and `calibrate`, as a user types them."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from helpers.commands import Command
from helpers.images import write_images
from helpers.model_directories import write_class_model, write_image_model
from PIL import Image

score, classify, calibrate = Command("score"), Command("classify"), Command("calibrate")


@pytest.fixture
def model(tmp_path):
    return write_image_model(tmp_path / "model")


@pytest.fixture
def folder(tmp_path):
    """Three pictures with captions."""
    write_images(tmp_path / "pictures", 3, [{"text": text} for text in ("a cat", "a dog", "a cat")])
    return tmp_path / "pictures"


def test_one_picture(model, folder):
    result = score(folder / "0.png", "-m", model, "--prompt", "a cat", "--draws", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["picture", "NLL", "+-"]
    assert lines[1].startswith(str(folder / "0.png"))
    assert lines[2] == "NLL in nats per latent dimension, 2 draws of the training noise"
    other = score(folder / "0.png", "-m", model, "--draws", 2).stdout.splitlines()[1]
    assert other.split()[1:] != lines[1].split()[1:]


def test_tables_and_maps(model, folder, tmp_path):
    tables = ["--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json"]
    result = score(folder, folder / "1.png", "-m", model, "--captions", "--map", tmp_path / "maps/all", *tables)
    assert result.exit_code == 0, result.output
    assert "mean of 4" in result.stdout
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["unit"] == "nats per latent dimension"
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["prompt"] for row in rows] == ["a cat", "a dog", "a cat", ""]
    for row, each in zip(rows, content["pictures"], strict=True):
        assert float(row["nll"]) == pytest.approx(each["nll"])
        assert np.sum(each["surprise"]) / each["dimensions"] == pytest.approx(each["nll"], abs=1e-4)
    maps = sorted(path.name for path in (tmp_path / "maps/all").iterdir())
    assert maps == ["0.surprise.png", "1-2.surprise.png", "1.surprise.png", "2.surprise.png"]
    assert Image.open(tmp_path / "maps/all/0.surprise.png").size[0] == 2 * 256 + 4


def test_tables_on_standard_output(model, folder):
    result = score(folder, "-m", model, "--json", "-", "--draws", 1)
    rows = json.loads(result.stdout)["pictures"]
    assert [row["standard_error"] for row in rows] == [None] * 3
    assert score(folder, "-m", model, "--csv", "-").stdout.startswith("picture,prompt,nll,")


def test_typicality(model, folder, tmp_path):
    result = calibrate(folder, "-m", model, "--draws", 2)
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines()[:2]] == ["unprompted", "prompted"]
    assert (model / "likelihood.json").is_file()
    result = score(folder, "-m", model, "--captions", "--map", tmp_path / "maps", "--map-of", "typicality")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].split() == ["picture", "NLL", "+-", "deviation"]
    assert (tmp_path / "maps/2.typicality.png").is_file()
    row = json.loads(score(folder / "0.png", "-m", model, "--json", "-").stdout)["pictures"][0]
    assert np.shape(row["deviation_map"]) == (4, 4)


def test_calibrating_without_captions(model, folder):
    (folder / "metadata.jsonl").unlink()
    result = calibrate(folder, "-m", model, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert "prompted" not in json.loads((model / "likelihood.json").read_text())["nll"]
    # A prompted score has nothing to be compared with.
    assert "deviation" not in score(folder / "0.png", "-m", model, "--prompt", "a").stdout
    assert "deviation" in score(folder / "0.png", "-m", model).stdout


def test_bits_of_dequantized_pixels(folder, tmp_path):
    pixels = write_class_model(tmp_path / "tarflow", noise_type="uniform")
    result = score(folder / "0.png", "-m", pixels, "--prompt", 2)
    assert "bits/pixel dim" in result.stdout and "nats per pixel dimension" in result.stdout
    assert "bits/pixel dim" not in score(folder / "0.png", "-m", write_class_model(tmp_path / "other")).stdout


def test_classify(model, folder, tmp_path):
    tables = ["--csv", tmp_path / "t.csv", "--json", tmp_path / "t.json"]
    result = classify(folder, "-m", model, "--labels", "a cat, a dog", "--draws", 1, *tables)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 3 and "nats ahead" in result.stdout
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["labels"] == ["a cat", "a dog"]
    assert all(sum(row["posterior"].values()) == pytest.approx(1) for row in content["pictures"])
    assert next(csv.DictReader((tmp_path / "t.csv").open())).keys() == {
        "picture",
        "label",
        "probability",
        "margin_nats",
    }


def test_labels_from_a_file_and_all_classes(model, folder, tmp_path):
    (tmp_path / "labels.txt").write_text("a cat\n\na dog\n")
    result = classify(folder / "0.png", "-m", model, "--label-file", tmp_path / "labels.txt", "--json", "-")
    assert json.loads(result.stdout)["labels"] == ["a cat", "a dog"]
    pixels = write_class_model(tmp_path / "tarflow")
    result = classify(folder / "0.png", "-m", pixels, "--json", "-")
    assert json.loads(result.stdout)["labels"] == ["0", "1", "2"]


def test_mistakes(model, folder, tmp_path):
    one = folder / "0.png"
    assert "does not exist" in score.mistake(tmp_path / "none.png", "-m", model)
    assert "leave out --prompt" in score.mistake(one, "-m", model, "--prompt", "a", "--captions")
    assert "cannot be written" in score.mistake(one, "-m", model, "--csv", tmp_path / "none/t.csv")
    assert "mlx-starflow calibrate" in score.mistake(one, "-m", model, "--map", tmp_path, "--map-of", "typicality")
    assert "multiples of 2" in score.mistake(one, "-m", model, "--size", "7x8")
    assert "there are no labels" in classify.mistake(one, "-m", model)
    assert "must differ" in classify.mistake(one, "-m", model, "--labels", "a,a")
    assert "2 pictures and 2 draws" in calibrate.mistake(one, "-m", model)
    assert "Missing option" in calibrate.mistake(one)
    (tmp_path / "file").write_text("")
    assert "file is a file; give a folder" in score.mistake(one, "-m", model, "--map", tmp_path / "file/maps")


def test_pictures_without_a_caption_are_compared_with_unprompted_ones(model, folder, tmp_path):
    assert calibrate(folder, "-m", model, "--draws", 2).exit_code == 0
    bare = tmp_path / "bare.png"
    bare.write_bytes((folder / "1.png").read_bytes())
    table = ["--draws", 2, "--json", "-"]
    rows = json.loads(score(folder, bare, "-m", model, "--captions", *table).stdout)["pictures"]
    assert [row["prompt"] for row in rows] == ["a cat", "a dog", "a cat", ""]
    known = json.loads((model / "likelihood.json").read_text())["nll"]
    for row in rows:
        kind = known["prompted" if row["prompt"] else "unprompted"]
        spread = np.sqrt(kind["between"] + kind["within"] / 2)
        assert row["deviation"] == pytest.approx((row["nll"] - kind["mean"]) / spread, abs=1e-6)


def test_deviations_of_some_pictures_alone(model, folder, tmp_path):
    captions = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").unlink()
    assert calibrate(folder, "-m", model, "--draws", 2).exit_code == 0
    (folder / "metadata.jsonl").write_text(captions)
    bare = tmp_path / "bare.png"
    bare.write_bytes((folder / "1.png").read_bytes())
    result = score(folder, bare, "-m", model, "--captions", "--csv", tmp_path / "t.csv")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert score(folder, bare, "-m", model, "--captions").stdout.splitlines()[0].endswith("deviation")
    assert [bool(row["deviation"]) for row in rows] == [False, False, False, True]

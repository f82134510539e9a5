"""The scripts that fetch emoji, train on them and say what has been learned."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from helpers.examples import run_example, run_example_here
from helpers.model_directories import edit_config, write_image_model
from PIL import Image

from mlx_starflow import load


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_data(emoji):
    found = rows(emoji)
    assert Counter(row["split"] for row in found) == {"held_out": 20, "train": 20, "autoencoder": 1}
    pizza = next(row for row in found if row["text"] == "pizza")
    # The README shows it, so it is never held out.
    assert pizza["split"] == "train" and pizza["captions"] == ["slice of pizza", "pizza slice"]
    assert Image.open(emoji / pizza["file_name"]).size == (128, 128)


def test_other_styles(npm, tmp_path):
    run_example_here("style_data.py", tmp_path, "--style", "twemoji")
    found = rows(tmp_path)
    assert len(found) == 40 and {"text", "file_name"} == found[0].keys()
    assert Image.open(tmp_path / found[0]["file_name"]).size == (64, 64)


def test_report(emoji, tmp_path):
    model = write_image_model(tmp_path / "model")
    edit_config(model / "vae", sample_size=8)
    printed = run_example_here("reports/demo.py", emoji, tmp_path / "grid.png", "--model", model)
    assert printed.count("nats per dimension") == 3 and "one picture, start of Python included" in printed
    assert Image.open(tmp_path / "grid.png").size == (8 * 8 + 7 * 2, 3 * 8 + 2 * 2)


@pytest.mark.torch
@pytest.mark.slow
def test_training(emoji, tmp_path):
    steps = ["--autoencoder-steps", 1, "--flow-steps", 1, "--batch-size", 2]
    run_example("train_demo.py", emoji, tmp_path, *steps)
    assert load(tmp_path / "model").generate("pizza", seed=1).images[0].size == (64, 64)


@pytest.mark.torch
@pytest.mark.slow
def test_training_of_a_latent_flow(emoji, tmp_path):
    run_example("train_latent_flow.py", emoji, tmp_path, "--steps", 1)
    flow = load(tmp_path / "model").flow
    assert flow.config.patch_size == 1 and flow.config.img_size == 16

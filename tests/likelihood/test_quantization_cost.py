"""What quantizing costs in exact likelihood."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import message
from helpers.examples import run_example_here
from helpers.images import write_images
from helpers.model_directories import size

from mlx_starflow import load
from mlx_starflow.likelihood.quantization_cost import CaptionedData, Comparison, measure
from mlx_starflow.model_dir.requantize import quantize_model


def test_pictures(trained_model, captioned_gradients):
    """Spread over the folder, as the autoencoder's latents; other splits are left out."""
    every = CaptionedData.read(load(trained_model), captioned_gradients)
    assert every.data.shape == (23, 4, 4, 4)
    assert "another" not in every.captions
    few = CaptionedData.read(load(trained_model), captioned_gradients, 3)
    np.testing.assert_allclose(few.data, every.data[[0, 11, 22]], atol=1e-5)
    assert few.captions == [every.captions[index] for index in (0, 11, 22)]
    assert "2 pictures or more, not 1" in message(CaptionedData.read, load(trained_model), captioned_gradients, 1)
    assert "holds no training data" in message(CaptionedData.read, load(trained_model), trained_model)


def test_what_it_costs(trained_model, captioned_gradients, tmp_path):
    data = CaptionedData.read(load(trained_model), captioned_gradients)
    original = measure(load(trained_model), data, draws=2)
    assert (original.flow_bytes, original.text_encoder_bytes) == (
        size(trained_model),
        size(trained_model / "text_encoder"),
    )
    costs = {}
    for how in ("8", "4", "mixed"):
        out = quantize_model(trained_model, tmp_path / how, how, text_encoder="mxfp8")
        costs[how] = Comparison(original, measure(load(out), data, draws=2))
        assert costs[how].quantized.flow_bytes == size(out)
    lost = {how: cost.change for how, cost in costs.items()}
    # This flow has hardly learned, so that a change may also be for the better; but not as large.
    size_of = {how: np.abs(change.blocks).mean() for how, change in lost.items()}
    assert 0 < size_of["8"] < 0.5 * size_of["4"]
    assert size_of["mixed"] < size_of["4"]
    # Paired: the pictures differ much more than the models.
    assert lost["8"].standard_error < 0.2 * original.nll.standard_error

    report = json.loads(json.dumps(costs["4"].to_dict()))
    assert report["pictures"] == 23
    assert report["mib"]["original"]["flow"] == size(trained_model) / 2**20
    nats = report["nll"]
    assert list(nats) == ["total", "block 0", "block 1", "block 2", "prior"]
    assert nats["total"]["change"] == pytest.approx(lost["4"].mean)
    assert nats["total"]["standard_error"] == pytest.approx(lost["4"].standard_error)
    parts = [values["change"] for name, values in nats.items() if name != "total"]
    assert sum(parts) == pytest.approx(nats["total"]["change"], abs=1e-9)
    table = str(costs["4"]).splitlines()
    assert len({line.find("+-") for line in table if "+-" in line}) == 1
    assert f"{lost['4'].mean:+.5f} +- {lost['4'].standard_error:.5f}" in table[3]


def test_nothing_changes_nothing(trained_model, captioned_gradients):
    data = CaptionedData.read(load(trained_model), captioned_gradients, 4)
    change = Comparison(*(measure(load(trained_model), data, draws=1) for _ in range(2))).change
    assert change.mean == change.standard_error == 0
    assert not math.isnan(measure(load(trained_model), data, draws=1, seed=1).nll.mean)


def test_the_example(trained_model, captioned_gradients):
    words = [trained_model, captioned_gradients, "--limit", 3, "--draws", 1, "--only", 4, "mixed"]
    lines = run_example_here("reports/quantization.py", *words).splitlines()
    assert lines[0].startswith("machine: ")
    assert [line.split()[0] for line in lines[-2:]] == ["4", "mixed"]
    assert all(line.count("+-") == 1 for line in lines[-2:])


def write_samples(pipe, folder: Path) -> Path:
    """Pictures that the model finds likely: its own."""
    prompts = ["a fox on grass", "two fish under water", "a red apple on a blue background", "a cat and a dog"]
    images = pipe.generate(prompts, seed=1, verify=False).images
    write_images(folder, images, [{"text": prompt} for prompt in prompts])
    return folder


def test_the_embedded_model(tmp_path):
    """4 bits lose hundredths of a nat, `mixed` less than a third of that, and it is at most a tenth larger."""
    pipe = load("demo")
    data = CaptionedData.read(pipe, write_samples(pipe, tmp_path / "samples"))
    original = measure(pipe, data, draws=1)
    found = {}
    for how in ("4", "mixed"):
        found[how] = measure(load(quantize_model("demo", tmp_path / how, how)), data, draws=1)
    lost = {how: each.nll - original.nll for how, each in found.items()}
    assert 3 * lost["4"].standard_error < lost["4"].mean < 0.03
    assert abs(lost["mixed"].mean) < lost["4"].mean / 3
    assert found["4"].flow_bytes < found["mixed"].flow_bytes < 1.1 * found["4"].flow_bytes < 0.7 * original.flow_bytes

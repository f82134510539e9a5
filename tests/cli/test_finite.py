"""What leaves the program is finite, or an error that names the part which is not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command, message
from helpers.images import write_images
from helpers.model_directories import edit_weights, write_image_model
from safetensors.numpy import save_file

from mlx_starflow import load
from mlx_starflow.model_dir.files import load_weights

generate, encode, score = Command("generate"), Command("encode"), Command("score")


@pytest.fixture
def model(tmp_path):
    return write_image_model(tmp_path / "model")


def damage(folder, part):
    """One NaN in the first weight whose name holds `part`."""
    name, weight = next((n, w) for n, w in load_weights(folder).items() if part in n and w.ndim > 1)
    values = np.array(weight)
    values.flat[0] = np.nan
    edit_weights(folder, **{name.replace(".", "__"): mx.array(values)})


@pytest.mark.usefixtures("chosen_here")  # float16 would first be tried again in bfloat16
def test_a_nan_in_the_decoder(model, tmp_path):
    damage(model / "vae", "decoder")
    out = tmp_path / "out.png"
    assert "the autoencoder made is not finite" in generate.mistake("a cat", "-m", model, "-o", out)
    assert not out.exists()


@pytest.mark.usefixtures("chosen_here")  # float16 would first be tried again in bfloat16
def test_a_nan_in_the_encoder(model, tmp_path):
    damage(model / "vae", "encoder")
    write_images(tmp_path / "pictures", 1, [{"text": "a"}])
    picture = tmp_path / "pictures/0.png"
    out = tmp_path / "n.safetensors"
    assert "the autoencoder made is not finite" in encode.mistake(picture, "-m", model, "-o", out, "--no-check")
    assert not out.exists()
    assert "the autoencoder made is not finite" in score.mistake(picture, "-m", model)


def test_a_nan_in_the_text_encoder(model):
    folder = model / "text_encoder"
    name = next(name for name in load_weights(folder) if "shared" in name or "embed" in name)
    values = np.full(load_weights(folder)[name].shape, np.nan, np.float32)
    edit_weights(folder, **{name.replace(".", "__"): mx.array(values)})
    assert "the text encoder made is not finite" in message(load(model).encode_prompts, ["a cat"])


def test_noise_files(model, tmp_path):
    noise = np.zeros((1, 4, 4, 4), np.float32)
    noise[0, 0, 0, 0] = np.nan
    save_file({"noise": noise}, tmp_path / "n.safetensors")
    assert "not finite" in generate.mistake("a cat", "-m", model, "--load-noise", tmp_path / "n.safetensors")


def test_guidance_that_overflows(model, tmp_path):
    write_images(tmp_path / "pictures", 1, [{"text": "a"}])
    picture = tmp_path / "pictures/0.png"
    out = tmp_path / "n.safetensors"
    for guidance in ("1e30", "inf"):
        words = picture, "-m", model, "--prompt", "a cat", "--guidance", guidance, "-o", out, "--no-check"
        error = encode.mistake(*words)
        assert "not finite" in error or "guidance must be" in error
        assert not out.exists()

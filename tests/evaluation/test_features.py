"""What pictures are compared by: how they are resized, and the features that every model has."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.precision import bound

from mlx_starflow.evaluation.features import (
    INCEPTION_FILE,
    INCEPTION_URL,
    InceptionFeatures,
    OwnFeatures,
    averaged_pixels,
    find_inception,
    inception_input,
    resize_matrix,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("resize", ["tensorflow", "pytorch"])
@pytest.mark.parametrize("side", [1, 7, 64, 299, 512])
def test_rows_are_interpolated(resize: str, side: int) -> None:
    matrix = resize_matrix(side, 299, resize)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    assert (matrix >= 0).all() and ((matrix > 0).sum(axis=1) <= 2).all()
    if side == 299:
        np.testing.assert_array_equal(matrix, np.eye(299))


def test_both_ways_of_resizing_worked_out() -> None:
    """Two pixels become four: TensorFlow samples at 0, 0.5, 1, 1.5, PyTorch at -0.25, 0.25, 0.75, 1.25."""
    np.testing.assert_allclose(resize_matrix(2, 4, "tensorflow"), [[1, 0], [0.5, 0.5], [0, 1], [0, 1]])
    np.testing.assert_allclose(resize_matrix(2, 4, "pytorch"), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])


def test_the_range_of_each() -> None:
    ends = np.zeros((1, 2, 2, 3), np.uint8)
    ends[:, 1] = 255
    assert inception_input(ends, "tensorflow").min() == -1.0
    assert inception_input(ends, "tensorflow").max() == pytest.approx(127 / 128)
    assert inception_input(ends, "pytorch").max() == pytest.approx(1.0)


def test_means_of_parts() -> None:
    made = averaged_pixels(np.repeat(np.repeat(PIXELS, 5, axis=1), 3, axis=2))
    np.testing.assert_allclose(made, averaged_pixels(PIXELS), atol=1e-6)
    np.testing.assert_allclose(made.reshape(3, 8, 8, 3), PIXELS / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(averaged_pixels(np.full((1, 13, 9, 3), 255, np.uint8)), 1, atol=1e-6)


def test_own_features(model) -> None:
    features = OwnFeatures(model, "weights")
    size = (16, 16) if features.name == "autoencoder" else model.size
    pixels = np.random.default_rng(1).integers(0, 256, (9, size[1], size[0], 3), np.uint8)
    found = features(pixels)
    assert found.shape == (9, features.dimensions) and found.dtype == np.float32
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[8:], features(pixels[8:]), rtol=bound(1e-4, 0.02), atol=bound(1e-5, 0.02))


def test_stages_are_what_the_encoder_goes_through(latent_flow) -> None:
    encoder = latent_flow.vae.encoder
    images = mx.array(np.random.default_rng(2).standard_normal((2, 8, 8, 3)).astype(np.float32))
    stages = encoder.stages(images)
    assert [each.shape for each in stages] == [(2, 4, 4, 8), (2, 4, 4, 8), (2, 4, 4, 8)]
    last = encoder.conv_out(encoder.conv_norm_out(stages[-1], silu=True))
    assert mx.array_equal(last, encoder(images))


def test_weights_that_are_missing(tmp_path) -> None:
    said = message(InceptionFeatures, tmp_path / INCEPTION_FILE)
    assert INCEPTION_FILE in said and INCEPTION_URL in said and "--features own" in said
    assert "tensorflow or pytorch" in message(InceptionFeatures, tmp_path, "bicubic")


def test_weights_of_something_else(tmp_path) -> None:
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.zeros(2)})
    assert "lacks the tensor" in message(InceptionFeatures, tmp_path / "x.safetensors")
    (tmp_path / "x.pth").write_bytes(b"no checkpoint")
    assert "x.pth" in message(InceptionFeatures, tmp_path / "x.pth")


def test_weights_where_pytorch_keeps_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_inception() is None
    path = tmp_path / "hub/checkpoints" / INCEPTION_FILE
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_inception() == path

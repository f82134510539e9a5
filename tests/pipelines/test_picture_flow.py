"""What connects flows to pictures and prompts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images, write_gradients
from helpers.model_directories import write_class_model, write_image_model, write_trained_model

from mlx_starflow import load
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.pipelines.picture_flow import LatentFlow, PixelFlow, open_picture_flow, picture_flow


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


def test_kinds_of_models(directory, tmp_path):
    latents = open_picture_flow(directory)
    assert isinstance(latents, LatentFlow) and latents.dimension == "latent dimension"
    assert latents.size == (8, 8) and latents.temperature == 0.8
    pixels = open_picture_flow(write_class_model(tmp_path / "model"))
    assert isinstance(pixels, PixelFlow) and pixels.dimension == "pixel dimension"
    assert pixels.size == (8, 8) and pixels.temperature == 1.0
    assert picture_flow(pixels) is pixels
    assert picture_flow(load(directory)).directory == latents.directory
    assert "mlx backend" in message(picture_flow, 3)


def test_pictures_and_latents(directory):
    model = open_picture_flow(directory)
    images = smooth_images(20)
    data = model.data(images)
    assert data.shape == (20, 4, 4, 4) and data.dtype == np.float32
    np.testing.assert_allclose(model.data(images[17:18]), data[17:18], atol=1e-5)
    assert [image.size for image in model.images(data)] == [(8, 8)] * 20
    assert model.data(smooth_images(1, (20, 10)), (16, 8)).shape == (1, 4, 8, 4)
    assert model.grid((4, 8, 4)) == (4, 8) and model.pixels((1, 4, 8, 4)) == (16, 8)


def test_prompts(directory):
    model = open_picture_flow(directory)
    text = np.array(model.conditions(["a", "", "a"]))
    np.testing.assert_array_equal(text[0], text[2])
    np.testing.assert_allclose(text[:2], np.array(model.pipe.encode_prompts(["a", ""])), atol=1e-6)


def test_pixels(tmp_path):
    model = open_picture_flow(write_class_model(tmp_path / "model"))
    images = smooth_images(2)
    data = model.data(images)
    np.testing.assert_allclose(data, np.stack([np.asarray(image) for image in images]) / 127.5 - 1, atol=1e-6)
    assert np.array_equal(np.asarray(model.images(data)[1]), np.asarray(images[1]))
    assert model.conditions(["1", "", " 2 "]).tolist() == [1, -1, 2]
    assert model.grid(data.shape[1:]) == (4, 4) and model.pixels(data.shape) == (8, 8)


def test_grey_pixels(tmp_path):
    model = open_picture_flow(write_class_model(tmp_path / "model", channel_size=1, num_classes=0))
    (image,) = smooth_images(1)
    data = model.data([image])
    np.testing.assert_allclose((data[0, ..., 0] + 1) * 127.5, np.asarray(image.convert("L")), atol=1)
    (back,) = model.images(data)
    assert back.mode == "RGB" and np.ptp(np.asarray(back), axis=-1).max() == 0
    assert model.conditions(["", ""]) is None


def test_low_memory_holds_one_network_at_a_time(directory):
    from mlx_starflow.likelihood import score

    model = open_picture_flow(directory, low_memory=True)
    (first,) = score(model, smooth_images(1), "a cat")
    assert set(vars(model.pipe)) & {"flow", "_text", "vae"} == {"flow"}
    (second,) = score(open_picture_flow(directory), smooth_images(1), "a cat")
    assert first.nll == second.nll


def test_quantized_flows_are_dense_on_the_cpu(tmp_path):
    from mlx_starflow.likelihood.requantize import quantize_model

    folder = write_gradients(tmp_path / "pictures")
    dense = write_trained_model(tmp_path / "model", folder, steps=1)
    model = open_picture_flow(quantize_model(dense, tmp_path / "small", 8))
    before = dict(quantized_layers(model.pipe.flow))
    assert before
    x = mx.array(model.data(smooth_images(1)))
    text = model.conditions([""])
    expected = np.array(model.pipe.flow(x, text).z)
    if mx.default_device().type == mx.cpu:
        assert not quantized_layers(model.flow)
    np.testing.assert_allclose(np.array(model.flow(x, text).z), expected, atol=1e-3)


def test_methods_of_a_pipeline(directory):
    pipe = load(directory)
    first, second = smooth_images(2)
    assert pipe.score([first], "a cat", draws=1)[0].dimensions == 64
    assert pipe.prompt_fit([first], ["a cat"], draws=1).shape == (1, 1, 1)
    assert pipe.classify([first], ["a cat", "a dog"], draws=1).best[0] in ("a cat", "a dog")
    assert pipe.best_of("a cat", 2, seed=1, draws=1).fits.shape == (1, 2)
    encoded, trip = pipe.encode([first], "a cat")
    assert trip.flow_max < 1e-3
    assert len(pipe.decode(encoded)[0]) == 1
    assert len(pipe.reprompt(first, "a cat", "a dog", [0.5]).images) == 1
    assert len(pipe.vary(first, "a cat", [0.5], images=2).images) == 2
    assert len(pipe.interpolate(first, second).images) == 5
    from mlx_starflow.editing import read_mask

    assert len(pipe.inpaint(first, read_mask("0,0,4,8", (8, 8)), steps=1, rounds=1).images) == 1


def test_models_that_are_no_models(tmp_path):
    assert "unknown model" in message(open_picture_flow, str(tmp_path / "none"))
    assert "config.json" in message(open_picture_flow, tmp_path)

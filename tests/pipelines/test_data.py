"""What connects flows to images and prompts: images to data and back, conditions, the networks that are held."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images, write_gradients
from helpers.model_directories import write_class_model, write_image_model, write_trained_model

from mlx_starflow import editing, likelihood, load
from mlx_starflow.model_dir.quantization import quantized_layers
from mlx_starflow.pipelines import ClassPipeline, ImagePipeline, Pipeline, load_class_labels, load_video, open_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


def test_kinds_of_models(directory, tmp_path):
    latents = load(directory)
    assert isinstance(latents, ImagePipeline) and latents.dimension == "latent dimension"
    assert latents.size == (8, 8) and latents.temperature == 0.8
    tarflow = write_class_model(tmp_path / "model")
    pixels = load_class_labels(tarflow)
    assert pixels.dimension == "pixel dimension"
    assert pixels.size == (8, 8) and pixels.temperature == 1.0
    assert isinstance(load(tarflow), ClassPipeline)
    assert "not class labels" in message(load_class_labels, directory)
    assert "makes pictures, not videos" in message(load_video, directory)
    assert "makes images, not videos" in message(latents.score, [smooth_images(5)])


def test_pictures_and_latents(directory):
    model = open_model(directory)
    images = smooth_images(20)
    data = model.to_data(images)
    assert data.shape == (20, 4, 4, 4) and data.dtype == np.float32
    np.testing.assert_allclose(model.to_data(images[17:18]), data[17:18], atol=1e-5)
    assert [image.size for image in model.to_images(data)] == [(8, 8)] * 20
    assert model.to_data(smooth_images(1, (20, 10)), (16, 8)).shape == (1, 4, 8, 4)
    assert model.grid((4, 8, 4)) == (4, 8) and model.image_size((1, 4, 8, 4)) == (16, 8)


def test_prompts(directory):
    model = open_model(directory)
    text = np.array(model.conditions(["a", "", "a"]))
    np.testing.assert_array_equal(text[0], text[2])
    np.testing.assert_allclose(text[:2], np.array(model.encode_prompts(["a", ""])), atol=1e-6)


def test_pixels(tmp_path):
    model = open_model(write_class_model(tmp_path / "model"))
    images = smooth_images(2)
    data = model.to_data(images)
    np.testing.assert_allclose(data, np.stack([np.asarray(image) for image in images]) / 127.5 - 1, atol=1e-6)
    assert np.array_equal(np.asarray(model.to_images(data)[1]), np.asarray(images[1]))
    assert model.conditions(["1", "", " 2 "]).tolist() == [1, -1, 2]
    assert model.grid(data.shape[1:]) == (4, 4) and model.image_size(data.shape) == (8, 8)


def test_grey_pixels(tmp_path):
    model = open_model(write_class_model(tmp_path / "model", channel_size=1, num_classes=0))
    (image,) = smooth_images(1)
    data = model.to_data([image])
    np.testing.assert_allclose((data[0, ..., 0] + 1) * 127.5, np.asarray(image.convert("L")), atol=1)
    (back,) = model.to_images(data)
    assert back.mode == "RGB" and np.ptp(np.asarray(back), axis=-1).max() == 0
    assert model.conditions(["", ""]) is None


def test_low_memory_holds_one_network_at_a_time(directory):
    from mlx_starflow.likelihood import score

    model = load(directory, low_memory=True)
    (first,) = score(model, smooth_images(1), "a cat")
    assert model.backend.held == set()
    (second,) = score(open_model(directory), smooth_images(1), "a cat")
    assert first.nll == second.nll


def test_quantized_flows_are_dense_on_the_cpu(tmp_path):
    from mlx_starflow.model_dir.requantize import quantize_model

    folder = write_gradients(tmp_path / "pictures")
    dense = write_trained_model(tmp_path / "model", folder, steps=1)
    model = open_model(quantize_model(dense, tmp_path / "small", 8))
    before = dict(quantized_layers(model.flow))
    assert before
    x = mx.array(model.to_data(smooth_images(1)))
    text = model.conditions([""])
    expected = np.array(model.flow(x, text).z)
    if mx.default_device().type == mx.cpu:
        assert not quantized_layers(model.dense_flow())
    np.testing.assert_allclose(np.array(model.dense_flow()(x, text).z), expected, atol=1e-3)
    assert model.dense_flow() is model.dense_flow()
    # The flow itself is what it was.
    model.vary(smooth_images(1)[0])
    assert dict(quantized_layers(model.flow)).keys() == before.keys()
    assert mx.array_equal(model.flow(x, text).z, expected)


def test_models_that_are_no_models(tmp_path):
    assert "unknown model" in message(open_model, str(tmp_path / "none"))
    assert "config.json" in message(open_model, tmp_path)


@pytest.mark.parametrize(
    "function",
    [
        *(likelihood.score, likelihood.prompt_fit, likelihood.classify, editing.encode, editing.decode),
        *(editing.inpaint, editing.reprompt, editing.vary, editing.interpolate),
    ],
    ids=lambda function: function.__name__,
)
def test_methods_are_the_functions(function):
    assert getattr(Pipeline, function.__name__) is function


def test_a_method_is_about_its_pipeline(directory):
    pipe, options = load(directory), {"draws": 2, "seed": 3, "size": (16, 8)}
    (ours,), (theirs,) = (
        each(smooth_images(1), "a cat", **options) for each in (pipe.score, partial(likelihood.score, pipe))
    )
    assert np.array_equal(ours.nats, theirs.nats) and ours.nats.shape == (2, 3, 4, 8)

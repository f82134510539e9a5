"""Pictures to noise and back, in memory and as files."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_class_model, write_video_model
from helpers.precision import bound, roundings
from safetensors.numpy import save_file

from mlx_starflow.editing import Encoded, decode, encode, inversion
from mlx_starflow.media.noise import load_noise, save_noise
from mlx_starflow.pipelines import open_model
from mlx_starflow.sampling import sample


def test_there_and_back(model):
    images = smooth_images(3)
    encoded, trip = encode(model, images, ["1", "", "2"], batch_size=2)
    data = model.to_data(images)
    assert trip.flow_max < 1e-3 and 0 < trip.flow_rms <= trip.flow_max
    again, back = decode(model, encoded, batch_size=2)
    np.testing.assert_allclose(back, data, atol=1e-3)
    for image, expected in zip(again, model.to_images(data), strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
    # It is the noise that the sampler takes.
    x = sample(model.flow, mx.array(encoded.noise), model.conditions(encoded.prompts))
    np.testing.assert_allclose(np.array(x), data, atol=bound(1e-3, roundings(10)))


def test_what_the_autoencoder_loses_is_told_apart(latent_flow, pixel_flow):
    images = smooth_images(2)
    back = latent_flow.to_images(latent_flow.to_data(images))
    lost = [np.asarray(a, float) - b for a, b in zip(back, images, strict=True)]
    trip = encode(latent_flow, images)[1]
    assert trip.autoencoder_rms == pytest.approx(np.sqrt(np.square(lost).mean()), rel=1e-4)
    assert encode(pixel_flow, images)[1].autoencoder_rms == 0
    assert encode(pixel_flow, images, check=False)[1] is None
    assert "autoencoder: RMS" in str(trip)


def test_guided_maps(model):
    images = smooth_images(2)
    plain = encode(model, images, "1", check=False)[0]
    guided, trip = encode(model, images, "1", guidance=1.5)
    assert guided.guidance == 1.5 and trip.flow_max < 1e-3
    assert np.abs(guided.noise - plain.noise).max() > 1e-3
    np.testing.assert_allclose(decode(model, guided)[1], model.to_data(images), atol=1e-3)


def test_training_noise_and_denoising(model):
    images = smooth_images(2)
    noisy = encode(model, images, "1", noise_seed=3, check=False)[0]
    assert np.abs(noisy.noise - encode(model, images, "1", check=False)[0].noise).max() > 1e-3
    rough, clean = (decode(model, noisy, denoise=denoise)[1] for denoise in (False, True))
    assert np.abs(rough - clean).max() > 1e-3


def test_another_prompt_on_the_way_back(model):
    encoded, _ = encode(model, smooth_images(1), "1", check=False)
    _, other = decode(model, replace(encoded, prompts=[""]))
    assert np.abs(other - model.to_data(smooth_images(1))).max() > 1e-3


def test_files(latent_flow, tmp_path):
    encoded, _ = encode(latent_flow, smooth_images(2), ["a", "b"], guidance=0.5, check=False)
    path = tmp_path / "noise.safetensors"
    encoded.save(path)
    found = Encoded.load(path)
    assert np.array_equal(found.noise, encoded.noise)
    assert (found.prompts, found.guidance, found.model) == (["a", "b"], 0.5, latent_flow.name)
    # `generate --load-noise` reads it, and files of `generate --save-noise` can be decoded.
    assert np.array_equal(load_noise(path, encoded.noise.shape), encoded.noise)
    save_noise(encoded.noise, path)
    assert Encoded.load(path).prompts == ["", ""]


def test_damaged_files(tmp_path):
    path = tmp_path / "noise.safetensors"
    assert "cannot be read" in message(Encoded.load, path)
    path.write_bytes(b"nonsense")
    assert "cannot be read" in message(Encoded.load, path)
    save_file({"other": np.zeros(1, np.float32)}, path)
    assert 'no tensor "noise"' in message(Encoded.load, path)
    noise = np.zeros((2, 4, 4, 4), np.float32)
    save_file({"noise": noise}, path, {"mlx-starflow": "{"})
    assert "description is damaged" in message(Encoded.load, path)
    save_file({"noise": noise}, path, {"mlx-starflow": '{"prompts": ["a"]}'})
    assert "has 1 prompts for 2 pictures" in message(Encoded.load, path)
    assert "cannot be written" in message(Encoded(noise, ["", ""]).save, tmp_path / "none" / "noise.safetensors")


def test_mistakes(model):
    assert "there are 2 prompts for 3 pictures" in message(encode, model, smooth_images(3), ["1", "2"])
    assert "there are no pictures" in message(encode, model, [])


def test_a_way_back_that_misses_the_picture(latent_flow, monkeypatch, recwarn):
    """By a known share of 0.1, which is more than this flow's latents are: rounding times a guidance would hang on the
    processor."""

    def encoded(share):
        monkeypatch.setattr(inversion, "from_noise", lambda *given: from_noise(*given) + 0.1 * share)
        recwarn.clear()
        encode(latent_flow, smooth_images(1))
        return [str(each.message) for each in recwarn if "way back" in str(each.message)]

    from_noise = inversion.from_noise
    assert not encoded(0.08)
    assert encoded(0.5) == [
        "on the way back from the noise the error is 0.5 of what the flow models (RMS): "
        "try a lower guidance, or weights in float32"
    ]
    assert "this noise is not the picture's; try a lower guidance" in message(encoded, 1.1)


def test_learned_variances(tmp_path):
    flow = open_model(write_class_model(tmp_path / "model", nvp=False, num_classes=0))
    encoded, trip = encode(flow, smooth_images(1))
    assert trip.flow_max < 1e-3 and encoded.noise.shape == (1, 16, 12)
    assert "shape" in message(decode, flow, replace(encoded, noise=encoded.noise[:, :8]))


@pytest.fixture(scope="module")
def video_flow(tmp_path_factory):
    return open_model(write_video_model(tmp_path_factory.mktemp("video")))


def test_videos_there_and_back(video_flow):
    videos = [smooth_images(9, (48, 32)), smooth_images(9, (48, 32))[::-1]]
    encoded, trip = encode(video_flow, videos, ["a cat", ""])
    assert encoded.noise.shape == (2, 3, 2, 3, 4)
    assert trip.flow_max < 1e-3 and trip.autoencoder_rms > 1
    again, data = decode(video_flow, encoded)
    np.testing.assert_allclose(data, video_flow.to_data(videos), atol=1e-3)
    # The autoencoder's part is what it loses by itself.
    given = np.concatenate([np.stack(frames) for frames in videos]).astype(np.float32)
    made = np.concatenate([np.stack(frames) for frames in again]).astype(np.float32)
    assert trip.autoencoder_rms == pytest.approx(np.sqrt(np.square(made - given).mean()), rel=1e-2)
    guided, trip = encode(video_flow, videos[:1], "a cat", guidance=1.5)
    assert trip.flow_max < 1e-3
    assert np.abs(guided.noise - encoded.noise[:1]).max() > 1e-3


def test_the_video_sampler_takes_encoded_noise(video_flow):
    frames = smooth_images(9, (48, 32))
    encoded, _ = encode(video_flow, [frames], "a cat", check=False)
    options = {"frames": 9, "size": (48, 32), "temperature": 1.0, "guidance": 0.0, "denoise": False}
    result = video_flow.generate("a cat", noise=encoded.noise, method="sequential", **options)
    np.testing.assert_allclose(np.array(result.latents), video_flow.to_data([frames]), atol=bound(1e-3, roundings(10)))


def test_noise_of_too_long_a_video(video_flow):
    long = Encoded(np.zeros((1, 6, 2, 2, 4), np.float32), [""])
    assert "more than the 5" in message(decode, video_flow, long)

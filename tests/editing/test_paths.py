"""Re-prompting, variations and interpolation."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_class_model

from mlx_starflow.editing import decode, encode, interpolate, reprompt, vary
from mlx_starflow.editing.paths import slerp
from mlx_starflow.pipelines import open_model
from mlx_starflow.sampling import denoise, sample


def test_reprompt(model):
    (image,) = smooth_images(1)
    data = model.to_data([image])[0]
    edit = reprompt(model, image, "0", "2", [0.0, 0.5, 1.0, 1.5], batch_size=3)
    assert edit.places == [0.0, 0.5, 1.0, 1.5] and len(edit.images) == 4
    np.testing.assert_allclose(edit.data[0], data, atol=1e-3)
    assert all(np.abs(edit.data[i] - edit.data[i + 1]).max() > 1e-4 for i in range(3))
    alone = reprompt(model, image, "0", "2", [0.5])
    np.testing.assert_allclose(alone.data[0], edit.data[1], atol=1e-3)


def test_the_same_prompt_gives_the_picture_back(model):
    (image,) = smooth_images(1)
    edit = reprompt(model, image, "1", "1", [0.0, 0.7, 1.0])
    for each in edit.data:
        np.testing.assert_allclose(each, model.to_data([image])[0], atol=1e-3)


def test_vary(model):
    (image,) = smooth_images(1)
    data = model.to_data([image])[0]
    edit = vary(model, image, "1", [0.0, 0.5, 1.0], images=2, seed=3, batch_size=4)
    assert edit.places == [0.0, 0.5, 1.0] * 2
    for start in (0, 3):
        np.testing.assert_allclose(edit.data[start], data, atol=1e-3)
    assert np.abs(edit.data[1] - edit.data[4]).max() > 1e-3
    alone = vary(model, image, "1", [0.5], seed=4)
    np.testing.assert_allclose(alone.data[0], edit.data[4], atol=1e-3)


def test_previews(model):
    (image,) = smooth_images(1)
    encoded, _ = encode(model, image, "1")
    calls = {
        "vary": lambda **options: vary(model, image, "1", [0.3, 0.9], seed=3, **options).images,
        "reprompt": lambda **options: reprompt(model, image, "0", "2", [0.5, 1.0], **options).images,
        "interpolate": lambda **options: interpolate(model, image, image, ("0", "2"), 0.5, **options).images,
        "decode": lambda **options: decode(model, encoded, **options)[0],
    }
    for name, call in calls.items():
        seen = []

        def look(progress, seen=seen):
            if progress.phase == "flow":
                seen.append(progress.preview())
            else:
                assert progress.preview() == []

        plain = call()
        assert [each.tobytes() for each in call(callback=look)] == [each.tobytes() for each in plain], name
        assert all(len(images) == len(plain) and images[0].size == plain[0].size for images in seen), name
        assert len({images[0].tobytes() for images in seen}) > 3, name


def test_full_strength_is_a_sample(latent_flow):
    from mlx_starflow.media.noise import draw_noise

    (image,) = smooth_images(1)
    edit = vary(latent_flow, image, "a cat", [1.0], temperature=0.5, seed=9)
    text = latent_flow.conditions(["a cat"])
    noise = 0.5 * draw_noise([9], edit.data.shape[1:])
    import mlx.core as mx

    expected = denoise(latent_flow.flow, sample(latent_flow.flow, mx.array(noise), text), text)
    np.testing.assert_allclose(edit.data, np.array(expected), atol=1e-3)


def test_the_models_own_temperature(latent_flow):
    (image,) = smooth_images(1)
    assert latent_flow.temperature == 0.8
    own, given = (vary(latent_flow, image, "a", [0.6], temperature=each).data for each in (None, 0.8))
    assert np.array_equal(own, given)


@pytest.mark.parametrize("prompts", [("0", "1"), ("2", "2"), ("", "")])
def test_interpolation_has_the_pictures_at_its_ends(model, prompts):
    first, second = smooth_images(2)
    edit = interpolate(model, first, second, prompts, [0.0, 0.4, 1.0])
    ends = model.to_data([first, second])
    np.testing.assert_allclose(edit.data[[0, 2]], ends, atol=1e-3)
    assert np.abs(edit.data[1] - ends).reshape(2, -1).max(axis=1).min() > 1e-2


def test_no_condition_at_all(tmp_path):
    flow = open_model(write_class_model(tmp_path / "model", num_classes=0))
    first, second = smooth_images(2)
    edit = interpolate(flow, first, second, shares=[0.0, 1.0])
    np.testing.assert_allclose(edit.data, flow.to_data([first, second]), atol=1e-3)
    np.testing.assert_allclose(vary(flow, first, strengths=[0.0]).data, flow.to_data([first]), atol=1e-3)
    assert "reads no prompts" in message(reprompt, flow, first, "", "")


def test_slerp():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 1, 4, 50)).astype(np.float32)
    path = slerp(first, second, np.linspace(0, 1, 5))
    np.testing.assert_allclose(path[0], first[0], atol=1e-6)
    np.testing.assert_allclose(path[4], second[0], atol=1e-6)
    lengths = np.linalg.norm(path.reshape(5, -1), axis=1)
    assert lengths.min() > 0.95 * min(lengths[0], lengths[4])
    # Nothing to turn: a straight line.
    np.testing.assert_allclose(slerp(first, 3 * first, np.array([0.5])), 2 * first, rtol=1e-5)
    np.testing.assert_allclose(slerp(0 * first, second, np.array([0.5])), second / 2, rtol=1e-5)


def test_mistakes(model):
    first, second = smooth_images(2)
    assert "must be numbers, 0 or more" in message(reprompt, model, first, "0", "1", [-0.1])
    assert "must be numbers, 0 to 1" in message(vary, model, first, "0", [1.1])
    assert "must be numbers, 0 to 1" in message(interpolate, model, first, second, shares=[float("nan")])
    assert "must be numbers" in message(reprompt, model, first, "0", "1", [])
    assert "images must be 1 or more" in message(vary, model, first, images=0)
    assert "temperature 0 or more" in message(vary, model, first, temperature=-1)

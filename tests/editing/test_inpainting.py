"""Inpainting: what stays, what follows the model, and steps that are Langevin dynamics."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images
from helpers.model_directories import write_class_model
from helpers.precision import bound, roundings
from helpers.tiny_flows import tiny_flow
from PIL import Image

from mlx_starflow.editing import inpaint, read_mask
from mlx_starflow.editing.inpainting import Langevin
from mlx_starflow.likelihood import with_noise
from mlx_starflow.models.starflow import STARFlow
from mlx_starflow.pipelines import load, open_model

RIGHT = "4,0,4,8"


# ---- pictures


def test_what_is_kept_stays(model):
    (image,) = smooth_images(1)
    mask = read_mask(RIGHT, (8, 8))
    result = inpaint(model, image, mask, "1", steps=3, rounds=2, feather=2, images=2, seed=4)
    before = np.asarray(image)
    for painted in result.images:
        after = np.asarray(painted)
        assert np.array_equal(after[:, :2], before[:, :2])
        assert (after[:, 4:] != before[:, 4:]).any()
    assert (np.asarray(result.images[0]) != np.asarray(result.images[1])).any()
    assert result.data.shape == model.to_data([image, image]).shape
    assert result.nll.shape == (3, 2) and np.isfinite(result.nll).all()
    hard = inpaint(model, image, mask, "1", steps=3, rounds=2, feather=0, seed=4).images[0]
    assert np.array_equal(np.asarray(hard)[:, :4], before[:, :4])


def test_previews(model):
    (image,) = smooth_images(1)
    mask, seen = read_mask(RIGHT, (8, 8)), {"flow": [], "inpainting": []}

    def look(progress):
        if shown := progress.preview():
            seen[progress.phase].append(shown)

    asked = {"steps": 3, "rounds": 1, "images": 2, "seed": 4}
    plain = inpaint(model, image, mask, "1", **asked).images
    watched = inpaint(model, image, mask, "1", callback=look, **asked).images
    assert [each.tobytes() for each in watched] == [each.tobytes() for each in plain]
    assert len(seen["inpainting"]) == 3 and len(seen["flow"]) > 3
    for images in [*seen["inpainting"], *seen["flow"]]:
        assert [each.size for each in images] == [(8, 8)] * 2


def test_a_seed_is_one_picture_in_any_company(model):
    (image,) = smooth_images(1)
    mask = read_mask("0,0,8,3", (8, 8))
    together = inpaint(model, image, mask, steps=3, rounds=1, images=3, seed=7)
    alone = inpaint(model, image, mask, steps=3, rounds=1, seed=8)
    difference = np.asarray(together.images[1]).astype(int) - np.asarray(alone.images[0])
    assert np.abs(difference).max() <= 1
    np.testing.assert_allclose(together.nll[:, 1], alone.nll[:, 0], rtol=bound(1e-4, roundings(2)))


def test_what_lies_under_the_mask_does_not_matter(model):
    first, second = smooth_images(2)
    mask = read_mask(RIGHT, (8, 8))
    mixed = Image.composite(second, first, mask)
    results = [inpaint(model, each, mask, steps=2, rounds=1, feather=0).images[0] for each in (first, mixed)]
    assert np.array_equal(*map(np.asarray, results))


def test_other_sizes(latent_flow):
    (image,) = smooth_images(1, (32, 16))
    mask = read_mask("0,0,10,16", image.size)
    result = inpaint(latent_flow, image, mask, steps=1, rounds=1, size=(16, 8), feather=0)
    assert result.images[0].size == (16, 8)
    kept = np.asarray(latent_flow.fit(image, (16, 8)))[:, 6:]
    assert np.array_equal(np.asarray(result.images[0])[:, 6:], kept)


def test_dequantized_pixels(tmp_path):
    flow = open_model(write_class_model(tmp_path / "model", noise_type="uniform", num_classes=0))
    (image,) = smooth_images(1)
    result = inpaint(flow, image, read_mask(RIGHT, (8, 8)), steps=2, rounds=1, feather=0)
    assert np.array_equal(np.asarray(result.images[0])[:, :4], np.asarray(image)[:, :4])


def test_low_memory_holds_one_network_at_a_time(latent_flow):
    (image,) = smooth_images(1)
    mask = read_mask(RIGHT, (8, 8))
    frugal = load(latent_flow.directory, low_memory=True)
    images = [inpaint(model, image, mask, "a", steps=2, rounds=2).images[0] for model in (frugal, latent_flow)]
    assert np.array_equal(*map(np.asarray, images))
    assert frugal.backend.held == {"vae"}


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"steps": 0}, "number of steps must be 1 or more"),
        ({"rounds": 0}, "number of rounds must be 1 or more"),
        ({"images": 0}, "number of images must be 1 or more"),
        ({"seed": -1}, "seed is a whole number"),
        ({"strength": 0.0}, "above 0 and at most 1"),
        ({"strength": 1.5}, "above 0 and at most 1"),
        ({"feather": -1}, "feather must be 0 pixels or more"),
    ],
)
def test_settings_out_of_range(model, options, reason):
    assert reason in message(inpaint, model, smooth_images(1)[0], read_mask(RIGHT, (8, 8)), **options)


def test_masks_that_do_not_fit(latent_flow):
    (image,) = smooth_images(1)
    assert "must have the same size" in message(inpaint, latent_flow, image, Image.new("L", (4, 4), 255))
    everywhere = Image.fromarray(np.tile(np.uint8([[255, 0]]), (8, 4)))
    assert "touches every latent" in message(inpaint, latent_flow, image, everywhere)
    (wide,) = smooth_images(1, (24, 8))
    outside = read_mask("0,0,4,8", wide.size)
    assert "nothing free" in message(inpaint, latent_flow, wide, outside)


# ---- steps


def gaussian(noise_std: float, **options) -> STARFlow:
    """A flow whose samples are standard normal: its density's score is -x."""
    flow = tiny_flow(layers_per_block=[1], noise_std=noise_std, txt_size=0, txt_dim=0, **options)
    for block in flow.blocks:
        block.proj_out.update({name: 0 * value for name, value in block.proj_out.items()})
    return flow


def langevin(flow: STARFlow, chains: int, free: float = 1.0, strength: float = 0.2) -> Langevin:
    """Chains over 4x4 cells of which a share of the columns is free."""
    held = np.ones((4, 4), np.float32) * (np.arange(4) >= 4 * free)
    return Langevin(flow, None, held, range(chains), strength)


def test_steps_sample_where_the_temperature_is_1():
    """Chains that start from samples stay samples: mean 0, and the variance that steps of this size lead to."""
    dynamics = langevin(gaussian(1.0), 64)
    x = mx.array(np.random.default_rng(0).standard_normal((64, 4, 4, 4), np.float32))
    for step in range(24):
        x = dynamics.step(x, step, 1.0)
    values = np.array(x)
    # x' = (1 - s) x + sqrt(2 s) e keeps a variance of 1 / (1 - s / 2).
    assert abs(values.mean()) < 4 / 64
    assert values.var() == pytest.approx(1 / 0.9, rel=4 * math.sqrt(2 / values.size))


def test_steps_go_uphill_where_it_is_0():
    dynamics = langevin(gaussian(0.5), 2)
    x = mx.ones((2, 4, 4, 4))
    moved = np.array(dynamics.step(x, 0, 0.0))
    np.testing.assert_allclose(moved, 1 - 0.2 * 0.25, rtol=bound(1e-5, 1e-2))
    assert (dynamics.nll(mx.array(moved)) < dynamics.nll(x)).all()


def test_a_state_holds_what_is_kept(model):
    kept = model.to_data(smooth_images(2))
    held = np.zeros(kept.shape[-3:-1], np.float32)
    held[:, 0], held[:, 1] = 1, 0.25
    dynamics = Langevin(model.flow, model.conditions(["1", ""]), held, [3, 4], 0.5)
    x = mx.zeros(kept.shape)
    state = np.array(dynamics.hold(kept, x, 5))
    noisy = with_noise(model.flow, kept, 10, numbers=[3, 4])
    np.testing.assert_allclose(state[..., 0, :], noisy[..., 0, :], rtol=1e-6)
    np.testing.assert_allclose(state[..., 1, :], 0.25 * noisy[..., 1, :], rtol=1e-5)
    assert not state[..., 2:, :].any()
    assert (np.array(dynamics.hold(kept, x, 6)) != state).any()
    assert np.array_equal(dynamics.clean(kept, x, False)[..., 0, :], kept[..., 0, :])


def test_states_under_a_condition(model):
    x = mx.zeros(model.to_data(smooth_images(1)).shape)
    held = np.zeros(x.shape[-3:-1], np.float32)
    one, none = (Langevin(model.flow, model.conditions([prompt]), held, [0], 0.5) for prompt in ("2", ""))
    assert np.abs(one.nll(x) - none.nll(x)).max() > 1e-3
    assert (np.array(one.step(x, 0, 0.0)) != np.array(none.step(x, 0, 0.0))).any()


@pytest.mark.slow
def test_the_embedded_model_restores_half_an_apple():
    model = load("demo")
    prompt = "a red apple on a blue background"
    image = model.generate(prompt, seed=1).images[0]
    result = model.inpaint(image, "64,0,64,128", prompt, seed=1)
    assert result.nll[-1, 0] < result.nll[0, 0]
    before, after = (np.asarray(each).astype(float) for each in (image, result.images[0]))
    assert np.sqrt(np.square(after - before)[:, 64:].mean()) < 25
    steps = [np.abs(np.diff(each, axis=1)).mean(axis=(0, 2))[59:68].max() for each in (before, after)]
    assert steps[1] < 1.25 * steps[0]

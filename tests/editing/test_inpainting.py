"""Inpainting: what stays, what follows the model, and the ratio that decides."""

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

from mlx_starflow.editing import Trace, inpaint, read_mask
from mlx_starflow.editing.inpainting import Chain
from mlx_starflow.editing.maps import noise_to_tokens
from mlx_starflow.pipelines import load, open_model
from mlx_starflow.sampling import GuidedFlow

RIGHT = "4,0,4,8"


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.Generator(np.random.Philox(number)) for number in range(count)]


# ---- pictures


def test_what_is_kept_stays(model):
    (image,) = smooth_images(1)
    result = inpaint(model, image, read_mask(RIGHT, (8, 8)), "1", steps=3, rounds=2, images=2, seed=4)
    before = np.asarray(image)
    for painted in result.images:
        after = np.asarray(painted)
        assert np.array_equal(after[:, :4], before[:, :4])
        assert (after[:, 4:] != before[:, 4:]).any()
    assert (np.asarray(result.images[0]) != np.asarray(result.images[1])).any()
    assert result.data.shape == model.to_data([image, image]).shape
    assert result.trace.accepted.shape == (6, 2) and result.trace.nll.shape == (7, 2)
    assert 0 <= result.trace.rate <= 1


def test_a_seed_is_one_picture_in_any_company(model):
    (image,) = smooth_images(1)
    mask = read_mask("0,0,8,3", (8, 8))
    together = inpaint(model, image, mask, steps=3, rounds=1, images=3, seed=7)
    alone = inpaint(model, image, mask, steps=3, rounds=1, seed=8)
    difference = np.asarray(together.images[1]).astype(int) - np.asarray(alone.images[0])
    assert np.abs(difference).max() <= 1
    np.testing.assert_allclose(together.trace.nll[:, 1], alone.trace.nll[:, 0], rtol=bound(1e-4, roundings(2)))


def test_what_lies_under_the_mask_does_not_matter(model):
    first, second = smooth_images(2)
    mask = read_mask(RIGHT, (8, 8))
    mixed = Image.composite(second, first, mask)
    results = [inpaint(model, each, mask, steps=2, rounds=1).images[0] for each in (first, mixed)]
    assert np.array_equal(*map(np.asarray, results))


def test_other_sizes(latent_flow):
    (image,) = smooth_images(1, (32, 16))
    mask = read_mask("0,0,10,16", image.size)
    result = inpaint(latent_flow, image, mask, steps=1, rounds=1, size=(16, 8))
    assert result.images[0].size == (16, 8)
    kept = np.asarray(latent_flow.fit(image, (16, 8)))[:, 6:]
    assert np.array_equal(np.asarray(result.images[0])[:, 6:], kept)


def test_dequantized_pixels(tmp_path):
    flow = open_model(write_class_model(tmp_path / "model", noise_type="uniform", num_classes=0))
    (image,) = smooth_images(1)
    result = inpaint(flow, image, read_mask(RIGHT, (8, 8)), steps=2, rounds=1)
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
        ({"accept": "all"}, "unknown rule 'all'"),
    ],
)
def test_settings_out_of_range(model, options, reason):
    assert reason in message(inpaint, model, smooth_images(1)[0], read_mask(RIGHT, (8, 8)), **options)


def test_masks_that_do_not_fit(latent_flow):
    (image,) = smooth_images(1)
    assert "must have the same size" in message(inpaint, latent_flow, image, Image.new("L", (4, 4), 255))
    everywhere = Image.fromarray(np.tile(np.uint8([[255, 0]]), (8, 4)))
    assert "touches every token" in message(inpaint, latent_flow, image, everywhere)
    (wide,) = smooth_images(1, (24, 8))
    outside = read_mask("0,0,4,8", wide.size)
    assert "nothing free" in message(inpaint, latent_flow, wide, outside)


# ---- chains


def one_block(flip: bool) -> Chain:
    """256 chains over a flow of one block whose first four tokens, in data order, are free."""
    flow = tiny_flow(layers_per_block=[1], seq_order="L2R" if flip else "R2L", txt_size=0, txt_dim=0)
    flow.blocks[0].proj_out.weight = 5 * flow.blocks[0].proj_out.weight
    free = np.arange(16) < 4
    return Chain(flow, (256, 4, 4, 4), None, free)


def log_normal(x: np.ndarray, mean: np.ndarray, std: float) -> np.ndarray:
    return (-0.5 * np.square((x - mean) / std) - math.log(std) - 0.5 * math.log(2 * math.pi)).sum(axis=(1, 2))


@pytest.mark.parametrize("flip", [False, True])
def test_the_ratio_is_that_of_metropolis_hastings(flip):
    """With one block and a proposal's density written out, the ratio is the likelihood ratio of the kept tokens."""
    chain, s = one_block(flip), 0.4
    rngs = generators(256)
    state = noise_to_tokens(chain.guided, chain._normal(rngs, (256, 16, 4)))
    z, nats = chain._forward(state)
    moved = mx.where(chain.mask, math.sqrt(1 - s**2) * z + s * chain._normal(rngs, z.shape), z)
    proposal = chain.with_kept(state, noise_to_tokens(chain.guided, moved))
    new_z, new_nats = chain._forward(proposal)
    old, new = (np.array(each, np.float64)[:, chain.free] for each in (z, new_z))
    # q(x' | x) over the free tokens: the density of their new noise times |det dz/dx|.
    forwards = log_normal(new, math.sqrt(1 - s**2) * old, s) + log_det_of_free(chain, proposal)
    backwards = log_normal(old, math.sqrt(1 - s**2) * new, s) + log_det_of_free(chain, state)
    exact = nats.sum(axis=1) - new_nats.sum(axis=1) + backwards - forwards
    np.testing.assert_allclose((nats - new_nats)[:, ~chain.free].sum(axis=1), exact, atol=1e-3)


def log_det_of_free(chain: Chain, tokens: mx.array) -> np.ndarray:
    out = chain.flow(chain.flow.latents(tokens, chain.shape))
    return np.array(chain.flow.tokens(out.log_det), np.float64)[:, chain.free].sum(axis=(1, 2))


@pytest.mark.parametrize("accept", ["kept", "whole"])
def test_samples_stay_samples(accept):
    """Chains that start from samples of the model leave the mean NLL as it is; by the whole ratio they do not."""
    chain = one_block(flip=True)
    rngs = generators(256)
    state = noise_to_tokens(chain.guided, chain._normal(rngs, (256, 16, 4)))
    end, trace = chain.run(state, rngs, 12, 0.5, accept)
    change = (trace.nll[-1] - trace.nll[0]) * 64
    error = change.std(ddof=1) / math.sqrt(len(change))
    assert trace.rate > 0.1
    assert (abs(change.mean()) < 4 * error) == (accept == "kept")
    kept = np.array(end - state)[:, ~chain.free]
    assert (kept == 0).all()
    np.testing.assert_allclose(trace.nll[-1], chain._forward(end)[1].sum(axis=1) / 64, rtol=1e-4, atol=1e-4)


def test_a_first_state_keeps_what_is_kept(model):
    data = model.to_data(smooth_images(2))
    free = np.arange(16) % 4 > 1
    chain = Chain(model.flow, data.shape, model.conditions(["1", ""]), free)
    kept = model.flow.tokens(mx.array(data))
    state = chain.start(kept, generators(2))
    assert np.array_equal(np.array(state)[:, ~free], np.array(kept)[:, ~free])
    assert np.abs(np.array(state - kept))[:, free].min(axis=-1).max() > 0.01


def test_states_under_a_condition(model):
    shape = model.to_data(smooth_images(1)).shape
    chain = Chain(model.flow, shape, model.conditions(["2"]), np.arange(16) < 8)
    assert isinstance(chain.guided, GuidedFlow)
    zeros = mx.zeros(model.flow.tokens(mx.zeros(shape)).shape)
    other = Chain(model.flow, shape, model.conditions([""]), np.arange(16) < 8)
    assert np.abs(chain._forward(zeros)[1] - other._forward(zeros)[1]).max() > 1e-3


def test_traces_join_where_they_meet():
    first = Trace(np.array([[True], [False]]), np.array([[3.0], [2.0], [2.0]]))
    second = Trace(np.array([[True]]), np.array([[9.0], [1.0]]))
    joined = Trace.joined([first, second])
    assert joined.nll[:, 0].tolist() == [3, 2, 2, 1] and joined.rate == pytest.approx(2 / 3)


@pytest.mark.slow
def test_the_embedded_model_restores_half_an_apple():
    model = load("demo")
    image = model.generate("red apple", seed=1).images[0]
    result = inpaint(model, image, read_mask("32,0,32,64", (64, 64)), "red apple", steps=10, rounds=2)
    assert result.trace.nll[-1, 0] < result.trace.nll[0, 0]
    difference = np.asarray(result.images[0]).astype(float) - np.asarray(image)
    assert np.sqrt(np.square(difference[:, 32:]).mean()) < 50

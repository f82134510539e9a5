from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_flows import tiny_case
from mlx.utils import tree_flatten, tree_map

from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.training.data.dropout import context_mask, context_share
from mlx_starflow.training.loop.objective import flow_loss
from mlx_starflow.training.recipes.autoencoder import autoencoder_loss, autoencoder_noise

CASES = ("t2i", "t2i_patch2", "t2i_all_text", "t2i_shifted", "t2i_identity_block", "t2i_modern", "pretrained_lm")


@pytest.mark.parametrize("case", CASES)
def test_loss_is_the_official_one(golden, case):
    loaded = golden(case)
    shapes = [name[:-1] for name in loaded.arrays if name == "x" or name.endswith(".x")]
    for shape in shapes:
        loss, metrics = flow_loss(loaded.flow, loaded[shape + "x"], loaded[shape + "y"], noise_std=0.0)
        assert float(loss) == pytest.approx(float(loaded.arrays[shape + "loss"]), rel=1e-5)
        assert float(metrics["nll"]) == pytest.approx(float(loss))


def test_labels_are_a_condition_too(golden):
    loaded = golden("tarflow")
    loss, _ = flow_loss(loaded.flow, loaded["x"], mx.array(loaded.arrays["y"].astype(np.int32)), noise_std=0.0)
    assert float(loss) == pytest.approx(float(loaded.arrays["loss"]), rel=1e-5)


def test_noise_is_added_in_units_of_its_std():
    tiny = tiny_case("softplus")
    noise = mx.array(np.random.default_rng(0).standard_normal(tiny.x.shape, dtype=np.float32))
    loss, _ = flow_loss(tiny.flow, tiny.x, tiny.text, noise_std=0.3, noise=noise)
    expected, _ = flow_loss(tiny.flow, tiny.x + 0.3 * noise, tiny.text, noise_std=0.0)
    assert float(loss) == float(expected)
    drawn = {float(flow_loss(tiny.flow, tiny.x, tiny.text, noise_std=0.3)[0]) for _ in range(2)}
    assert len(drawn) == 2 and float(expected) not in drawn


def test_latent_norm_penalty():
    tiny = tiny_case("softplus")
    plain, _ = flow_loss(tiny.flow, tiny.x, tiny.text, noise_std=0.0)
    hidden = tiny.flow(tiny.x, tiny.text).hidden
    tiny.flow.config.latent_norm_regularization = 0.01
    loss, metrics = flow_loss(tiny.flow, tiny.x, tiny.text, noise_std=0.0)
    expected = float(plain) + 0.01 * sum(np.square(np.array(h)).mean() for h in hidden[:-1])
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["nll"]) == pytest.approx(float(plain))


@pytest.mark.parametrize("family", ["softplus", "exp_all_text", "shifted", "modern", "language_model", "no_text"])
def test_gradient_is_the_slope(family):
    """d loss(weights + t * direction) / dt against central differences, along the gradient and at random."""
    tiny = tiny_case(family)
    weights = tiny.flow.trainable_parameters()
    keep = None
    if tiny.text is not None:
        keep = mx.array(context_mask(np.random.default_rng(1), 2, tiny.x.size // 2 // tiny.x.shape[-1], 0.3, 0.5))

    def loss(weights):
        tiny.flow.update(weights)
        return flow_loss(tiny.flow, tiny.x, tiny.text, noise_std=0.0, context_mask=keep)[0]

    gradient = mx.grad(loss)(weights)
    rng = np.random.default_rng(2)
    noise = tree_map(lambda w: mx.array(rng.standard_normal(w.shape, dtype=np.float32)), weights)
    for direction in (gradient, noise):
        length = np.sqrt(sum(float(mx.square(d).sum()) for _, d in tree_flatten(direction)))
        unit = tree_map(lambda d, length=length: d / length, direction)
        slope = sum(
            float((g * u).sum()) for (_, g), (_, u) in zip(tree_flatten(gradient), tree_flatten(unit), strict=True)
        )
        ahead, behind = (float(loss(tree_map(lambda w, u, t=t: w + t * u, weights, unit))) for t in (4e-3, -4e-3))
        assert slope == pytest.approx((ahead - behind) / 8e-3, rel=5e-3, abs=2e-4)


def test_metrics_tell_what_was_read():
    tiny = tiny_case("softplus", 3)
    keep = np.ones((3, 6), np.float32)
    keep[1, 1:] = 0
    keep[2, 3] = 0
    nll = np.array(tiny.flow(tiny.x, tiny.text, mx.array(keep)).nll())
    loss, metrics = flow_loss(tiny.flow, tiny.x, tiny.text, noise_std=0.0, context_mask=mx.array(keep))
    assert float(loss) == pytest.approx(nll.mean())
    assert float(metrics["nll"]) == pytest.approx(nll[0])
    assert float(metrics["nll-text-only"]) == pytest.approx(nll[1])
    _, metrics = flow_loss(tiny.flow, tiny.x, tiny.text, noise_std=0.0, context_mask=mx.ones((3, 6)))
    assert np.isnan(float(metrics["nll-text-only"]))


def test_text_only_samples_ignore_their_tokens():
    tiny = tiny_case("softplus")
    block = tiny.flow.blocks[-1]
    tokens = tiny.flow.tokens(tiny.x)
    keep = mx.array(context_mask(np.random.default_rng(0), 2, tokens.shape[1], 1.0, 0.0))
    rope_frequencies = tiny.flow.rope_frequencies(tiny.x.shape, 3)
    condition = block.condition(tiny.text, 2)
    _, log_det = block(tokens, condition, rope_frequencies, keep)
    _, other = block(tokens + 1, condition, rope_frequencies, keep)
    assert np.array_equal(np.array(log_det), np.array(other))


def test_context_keep_shares():
    keep = context_mask(np.random.default_rng(0), 20000, 16, 0.4, 0.3)
    assert keep.dtype == np.float32 and set(np.unique(keep)) == {0.0, 1.0}
    assert (keep[:, 0] == 1).all()
    kept = keep[:, 1:].sum(axis=1)
    # A partial sample keeps each number of its 15 tokens equally often.
    assert (kept == 0).mean() == pytest.approx(0.4 + 0.18 / 16, abs=0.01)
    assert (kept == 15).mean() == pytest.approx(0.42 + 0.18 / 16, abs=0.01)
    assert (kept == 7).mean() == pytest.approx(0.18 / 16, abs=0.005)
    assert (context_mask(np.random.default_rng(0), 50, 9, 0.0, 0.0) == 1).all()
    assert (context_mask(np.random.default_rng(0), 50, 9, 1.0, 0.5)[:, 1:] == 0).all()
    again = context_mask(np.random.default_rng(0), 20000, 16, 0.4, 0.3)
    assert np.array_equal(keep, again)


def test_context_share_falls_late():
    assert [context_share(0.5, p) for p in (0.0, 0.5, 0.7)] == [0.5] * 3
    assert context_share(0.5, 0.775) == pytest.approx(0.3)
    assert context_share(0.5, 0.85) == pytest.approx(0.1) == pytest.approx(context_share(0.5, 1.0))


def test_autoencoder_loss_by_hand():
    model = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (6, 8, 8, 3)).astype(np.float32)
    noise = autoencoder_noise(rng, 6, (4, 4, 4), 0.3)
    assert (noise["level"][2:] == np.float32(0.3)).all() and (noise["level"][:2] < 0.3).all()
    loss, metrics = autoencoder_loss(
        model, mx.array(pictures), **{k: mx.array(v) for k, v in noise.items()}, kl_weight=0.01
    )
    posterior = model.encode(mx.array(pictures))
    mean, logvar = np.array(posterior.mean), np.array(posterior.logvar)
    latents = mean + np.exp(logvar / 2) * noise["posterior"]
    latents += noise["level"][:, None, None, None] * mean.std(axis=(0, 1, 2), ddof=1) * noise["latent"]
    error = np.array(model.decode(mx.array(latents))) - pictures
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean()
    expected = np.abs(error).mean() + 0.5 * (error**2).mean() + 0.01 * kl
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(metrics["dB"]) == pytest.approx(10 * np.log10(4 / (error**2).mean()), rel=1e-5)

"""The video autoencoder against the official one (arrays in tests/data/wan_vae): whole, in tiles, piece by piece."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from helpers.golden_files import golden_case
from mlx.utils import tree_flatten

from mlx_starflow.convert.pth import read_checkpoint
from mlx_starflow.errors import StarflowError
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig
from mlx_starflow.models.autoencoder_wan import layers as layers
from mlx_starflow.models.autoencoder_wan.names import present_name
from mlx_starflow.models.autoencoder_wan.tiling import StreamState, joined, resplit, whole

DATA = golden_case("wan_vae")
# Channels first in the file.
GOLDEN = {
    name: array.transpose(0, 2, 3, 4, 1) if array.ndim == 5 else array
    for name, array in mx.load(str(DATA / "golden.safetensors")).items()
}
OFFICIAL = json.loads((DATA / "config.json").read_text())
CONFIG = {
    "_class_name": "AutoencoderKLWan",
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "base_dim": OFFICIAL["dim"],
    "decoder_base_dim": OFFICIAL["dec_dim"],
    "z_dim": OFFICIAL["z_dim"],
    "dim_mult": OFFICIAL["dim_mult"],
    "num_res_blocks": OFFICIAL["num_res_blocks"],
    "temperal_downsample": OFFICIAL["temperal_downsample"],
    "latents_mean": GOLDEN["latents_mean"].tolist(),
    "latents_std": GOLDEN["latents_std"].tolist(),
    "later_scale": 1.0,
}
TINY = AutoencoderWanConfig((0.1, -0.2), (0.5, 2.0), base_dim=4, decoder_base_dim=8, z_dim=2, num_res_blocks=1)


def checkpoint() -> dict[str, mx.array]:
    stored = read_checkpoint(DATA / "model.pth")
    return {name: stored.mx(name) for name in stored}


@pytest.fixture(scope="module")
def vae() -> AutoencoderWan:
    vae = AutoencoderWan(AutoencoderWanConfig.from_dict(CONFIG))
    vae.load_weights(list(vae.sanitize(checkpoint()).items()), strict=True)
    return vae


def tiny_vae(config: AutoencoderWanConfig = TINY) -> AutoencoderWan:
    mx.random.seed(0)
    return AutoencoderWan(config)


def error(actual: mx.array, expected: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    return (mx.abs(actual.astype(mx.float32) - expected).max() / mx.abs(expected).max()).item()


# ---- agreement with the official code


@pytest.mark.parametrize("rows", [None, 0, 1, 3])
def test_golden(vae, rows):
    posterior = vae.encode(GOLDEN["video"], rows)
    assert posterior.mean.dtype == posterior.logvar.dtype == mx.float32
    assert error(vae.scale(posterior.mean), GOLDEN["video_mean_normalized"]) < 1e-5
    assert error(posterior.logvar, GOLDEN["video_logvar"]) < 1e-5
    assert error(vae.decode(vae.unscale(GOLDEN["latents"]), rows), GOLDEN["decoded"]) < 1e-5


def test_golden_picture(vae):
    mean = vae.scale(vae.encode(GOLDEN["image"][:, 0]).mean)
    assert error(mean, GOLDEN["image_mean_normalized"][:, 0]) < 1e-5
    decoded = vae.decode(vae.unscale(GOLDEN["image_latents"][:, 0]))
    assert error(decoded, GOLDEN["image_decoded"][:, 0]) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(mx.bfloat16, 0.1), (mx.float16, 0.02)])
def test_half_precision(dtype, bound):
    vae = AutoencoderWan(AutoencoderWanConfig.from_dict(CONFIG))
    vae.load_weights(list(vae.sanitize(checkpoint()).items()), strict=True)
    vae.set_dtype(dtype)
    posterior = vae.encode(GOLDEN["image"])
    assert posterior.mean.dtype == mx.float32
    assert error(vae.scale(posterior.mean), GOLDEN["image_mean_normalized"]) < bound
    decoded = vae.decode(vae.unscale(GOLDEN["image_latents"]))
    assert decoded.dtype == dtype
    assert error(decoded, GOLDEN["image_decoded"]) < bound


# ---- piece by piece, in tiles, in batches


def test_decoding_piece_by_piece_is_decoding_at_once(vae):
    z = mx.concatenate([vae.unscale(GOLDEN["latents"])] * 2, axis=1)
    stream = vae.decoder_stream()
    pieces = [stream.push(z[:, a:b]) for a, b in ((0, 1), (1, 2), (2, 5), (5, 6))]
    assert [piece.shape[1] for piece in pieces] == [1, 4, 12, 4]
    at_once = vae.decode(z)
    assert error(mx.concatenate(pieces, axis=1), at_once) < 1e-6
    # What comes later does not change what was there before.
    assert error(at_once[:, :9], GOLDEN["decoded"]) < 1e-5
    stream = vae.decoder_stream()
    assert error(stream.push(z[:, :3]), at_once[:, :9]) < 1e-6


def test_encoding_piece_by_piece_is_encoding_at_once(vae):
    x = mx.concatenate([GOLDEN["video"], GOLDEN["video"][:, :4]], axis=1)
    stream = vae.encoder_stream()
    pieces = [stream.push(x[:, a:b]) for a, b in ((0, 5), (5, 9), (9, 13))]
    assert [piece.mean.shape[1] for piece in pieces] == [2, 1, 1]
    at_once = vae.encode(x)
    assert error(mx.concatenate([piece.mean for piece in pieces], axis=1), at_once.mean) < 1e-6
    assert error(mx.concatenate([piece.logvar for piece in pieces], axis=1), at_once.logvar) < 1e-6


@pytest.mark.parametrize(("height", "width", "rows"), [(5, 3, 1), (5, 3, 2), (6, 2, 7), (1, 1, 1), (9, 2, 40)])
def test_tiles_are_the_whole(height, width, rows):
    vae = tiny_vae()
    z = mx.random.normal((2, 2, height, width, 2))
    assert error(vae.decode(z, rows), vae.decode(z, 0)) < 1e-5
    x = mx.random.uniform(-1, 1, (2, 5, 16 * height, 16 * width, 3))
    tiled, at_once = vae.encode(x, rows), vae.encode(x, 0)
    assert error(tiled.mean, at_once.mean) < 1e-5
    assert error(tiled.logvar, at_once.logvar) < 1e-5


def test_large_frames_go_in_tiles():
    config = AutoencoderWanConfig.from_dict(CONFIG)
    assert config.tile_rows(53) == 19  # 848 pixels: 240 rows of patches, in 13 tiles
    assert config.tile_rows(4) == 256
    assert config.tile_rows(10_000) == 8


def test_attention_a_few_queries_at_a_time(vae, monkeypatch):
    monkeypatch.setattr(layers, "LOGITS", 8)
    assert error(vae.decode(vae.unscale(GOLDEN["latents"])), GOLDEN["decoded"]) < 1e-5


def test_videos_of_a_batch_do_not_mix():
    vae = tiny_vae()
    z = mx.random.normal((3, 2, 2, 3, 2))
    alone = mx.concatenate([vae.decode(z[i : i + 1]) for i in range(3)])
    assert error(alone, vae.decode(z)) < 1e-5


@pytest.mark.slow
def test_memory_grows_neither_with_the_length_nor_with_the_height():
    vae = tiny_vae()
    mx.eval(vae.parameters())

    def peak(frames: int, height: int, rows: int | None) -> int:
        z = mx.zeros((1, 1, height, 4, 2))
        stream = vae.decoder_stream(rows)
        mx.eval(stream.push(z), stream.push(z))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(frames):
            mx.eval(stream.push(z))
        return mx.get_peak_memory() - before

    def peaks(*how: int | None) -> list[int]:
        """A main thread that is faster than MLX's begins tiles before those ahead are freed: 0.29 to 0.38 of the
        whole, by the threads of the BLAS."""
        return [peak(*how) for _ in range(4)]

    assert min(peaks(8, 8, None)) < 1.05 * max(peaks(2, 8, None))
    assert min(peaks(1, 64, 16)) < 0.4 * max(peaks(1, 64, 0))


# ---- shapes and scales


def test_norms_of_many_sizes_are_traced_once(monkeypatch):
    traced, rsqrt = [], mx.rsqrt
    monkeypatch.setattr(mx, "rsqrt", lambda x: traced.append(x.shape) or rsqrt(x))
    norm = layers.RMSNorm(4)
    for height in range(1, 13):
        x = mx.random.normal((1, 1 + height % 3, height, 2 * height, 4))
        expected = x / mx.sqrt(mx.square(x).mean(axis=-1, keepdims=True))
        assert mx.abs(norm(x) - expected).max().item() < 1e-5
    assert len(traced) <= 1


def test_numbers_of_frames():
    config = AutoencoderWanConfig.from_dict(CONFIG)
    assert (config.downscale, config.temporal_downscale, config.latent_channels) == (16, 4, 48)
    assert [config.latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    assert [config.pixel_frames(n) for n in (1, 2, 21)] == [1, 5, 81]
    for frames, fix in ((0, 1), (2, 5), (80, 81)):
        with pytest.raises(StarflowError, match=f"multiples of 4, not {frames}; give it {fix}"):
            config.latent_frames(frames)


def test_scale():
    vae = tiny_vae()
    x = mx.random.normal((2, 3, 1, 2, 2))
    plain = (np.array(x) - np.float32([0.1, -0.2])) / np.float32([0.5, 2.0])
    factors = np.float32([1, 0.6, 0.6]).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(np.array(vae.scale(x)), plain * factors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(vae.scale(x, start=3)), plain * np.float32(0.6), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(vae.scale(x[:, 1])), plain[:, 1], rtol=1e-5, atol=1e-6)
    for start in (0, 1):
        np.testing.assert_allclose(np.array(vae.unscale(vae.scale(x, start), start)), np.array(x), atol=1e-6)
    np.testing.assert_allclose(np.array(vae.unscale(vae.scale(x[:, 1]))), np.array(x[:, 1]), atol=1e-6)


def test_sample(vae):
    posterior = vae.encode(GOLDEN["image"][:, 0])
    noise = mx.ones_like(posterior.mean)
    assert mx.allclose(posterior.sample(noise), posterior.mean + mx.exp(0.5 * posterior.logvar))


@pytest.mark.parametrize("shape", [(16, 16, 3), (1, 16, 16, 4), (1, 24, 16, 3), (1, 5, 16, 8, 3)])
def test_encode_names_the_shape_it_wants(shape):
    with pytest.raises(StarflowError, match="multiples of 16, not"):
        tiny_vae().encode(mx.zeros(shape))


def test_mistakes():
    vae = tiny_vae()
    with pytest.raises(StarflowError, match="takes 1 frame and then multiples of 4, not 4; give it 5"):
        vae.encode(mx.zeros((1, 4, 16, 16, 3)))
    stream = vae.encoder_stream()
    stream.push(mx.zeros((1, 1, 16, 16, 3)))
    with pytest.raises(StarflowError, match="multiples of 4"):
        stream.push(mx.zeros((1, 1, 16, 16, 3)))
    for shape in ((1, 1, 1, 3), (1, 0, 1, 1, 2), (1, 1, 2)):
        with pytest.raises(StarflowError, match="decodes latents"):
            vae.decode(mx.zeros(shape))
    for call, x in ((vae.encode, mx.zeros((1, 16, 16, 3))), (vae.decode, mx.zeros((1, 1, 1, 2)))):
        with pytest.raises(StarflowError, match="tile_rows must be 0 or more, not -1"):
            call(x, -1)


# ---- layers


def test_correlation_is_the_convolution():
    mx.random.seed(0)
    x, bias = mx.random.normal((2, 4, 7, 5, 6)), mx.random.normal((3,))
    for t in (1, 3):
        weight = mx.random.normal((3, t, 3, 3, 6))
        expected = mx.conv3d(x, weight) + bias
        assert error(layers.correlate(x, weight, bias), expected) < 1e-5


def test_other_backends_convolve_likewise(vae, monkeypatch):
    """What a GPU runs instead of the CPU's sums of products."""
    monkeypatch.setattr(layers, "on_cpu", lambda: False)
    assert error(vae.decode(vae.unscale(GOLDEN["latents"])), GOLDEN["decoded"]) < 1e-5
    assert error(vae.scale(vae.encode(GOLDEN["video"]).mean), GOLDEN["video_mean_normalized"]) < 1e-5


@pytest.mark.skipif(not layers.on_cpu(), reason="a GPU has convolutions of its own")
@pytest.mark.parametrize("rows", [None, 3])
def test_large_frames_take_fewer_products(vae, monkeypatch, rows):
    monkeypatch.setattr(layers, "_is_large", lambda x, weight: weight.shape[2:4] == (3, 3))
    assert error(vae.decode(vae.unscale(GOLDEN["latents"]), rows), GOLDEN["decoded"]) < 1e-5
    assert error(vae.scale(vae.encode(GOLDEN["video"], rows).mean), GOLDEN["video_mean_normalized"]) < 1e-5


def test_which_frames_are_large():
    kernels = mx.zeros((32, 3, 3, 3, 32))
    assert layers._is_large(mx.zeros((1, 6, 18, 10, 32)), kernels)
    assert not layers._is_large(mx.zeros((1, 6, 17, 10, 32)), kernels)
    assert not layers._is_large(mx.zeros((1, 6, 18, 10, 12)), kernels[..., :12])
    assert not layers._is_large(mx.zeros((1, 6, 18, 10, 32)), kernels[:, :, :1, :1])


def test_tiles_of_every_height():
    x = mx.random.normal((1, 1, 11, 2, 1))
    for rows in range(1, 13):
        tiles = list(resplit(whole(x), rows))
        assert [last for _, last in tiles] == [False] * (len(tiles) - 1) + [True]
        assert all(tile.shape[2] <= rows for tile, _ in tiles)
        assert mx.array_equal(joined(iter(tiles)), x)


def test_what_a_stream_remembers():
    state, layer = StreamState(4), layers.CausalConv(1, 1)
    frames = [mx.full((1, 1, 1, 1, 1), float(i)) for i in range(1, 5)]
    assert state.continued(layer, 0, frames[0], 2).flatten().tolist() == [1]
    state.first = False
    assert state.continued(layer, 0, frames[1], 2).flatten().tolist() == [0, 1, 2]
    assert state.continued(layer, 0, frames[2], 2).flatten().tolist() == [1, 2, 3]
    assert state.continued(layer, 1, frames[3], 2).flatten().tolist() == [0, 0, 4]
    assert state.nbytes == 16


# ---- config


def test_config():
    config = AutoencoderWanConfig.from_dict(CONFIG)
    assert AutoencoderWanConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert AutoencoderWanConfig.from_dict({**CONFIG, "later_scale": None}).later_scale == 0.6
    assert AutoencoderWanConfig.from_dict({**CONFIG, "decoder_base_dim": None}).decoder_base_dim == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'"),
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"is_residual": False}, "not Wan 2.2's"),
        ({"patch_size": None}, "not Wan 2.2's"),
        ({"attn_scales": [1.0]}, "attn_scales is not supported"),
        ({"in_channels": 4}, "in_channels is 4; it must be 12"),
        ({"base_dim": 0}, "base_dim must be a positive integer, not 0"),
        ({"dim_mult": [1, 0, 2, 2]}, r"dim_mult\[1\] must be a positive integer"),
        ({"dim_mult": 4}, "dim_mult must be a list, not 4"),
        ({"dim_mult": [1, 2]}, "temperal_downsample has 3 values, dim_mult 2"),
        ({"dim_mult": [1, 3, 2, 2]}, "do not make"),
        ({"z_dim": 16}, "latents_mean has 48 values, z_dim is 16"),
        ({"latents_mean": None}, "missing key latents_mean"),
        ({"later_scale": 0}, "later_scale must be above 0"),
        ({"act_fn": "silu"}, "unknown key act_fn"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(StarflowError, match=message) as caught:
        AutoencoderWanConfig.from_dict(CONFIG | changes)
    assert "\n" not in str(caught.value)


# ---- names


def test_sanitize_is_strict():
    vae = AutoencoderWan(AutoencoderWanConfig.from_dict(CONFIG))
    weights = checkpoint()
    for damage, message in (
        (lambda w: w.pop("decoder.head.2.bias"), "tensor decoder.conv_out.bias is missing"),
        (lambda w: w.update({"discriminator.weight": mx.zeros(1)}), "no place for the tensor discriminator.weight"),
        (lambda w: w.update({"quant_conv.bias": mx.zeros(96)}), "quant_conv.bias is there twice"),
        (
            lambda w: w.update({"conv2.weight": mx.zeros((48, 1, 1, 1, 48))}),
            r"conv2.weight is \[48, 1, 1, 1, 48\], its config says \[48, 48, 1, 1\]",
        ),
        (lambda w: w.update({"encoder.head.0.gamma": mx.zeros(16)}), r"head.0.gamma is \[16\]"),
    ):
        damaged = dict(weights)
        damage(damaged)
        with pytest.raises(StarflowError, match=message) as caught:
            vae.sanitize(damaged)
        assert "\n" not in str(caught.value)
    with pytest.raises(StarflowError, match="its config says"):
        vae.sanitize(vae.sanitize(weights))


def test_the_released_autoencoder():
    config = AutoencoderWanConfig((0.0,) * 48, (1.0,) * 48)
    parameters = tree_flatten(AutoencoderWan(config).parameters())
    # What Wan2.2_VAE.pth holds.
    assert len(parameters) == 196
    assert sum(value.size for _, value in parameters) == 704_688_668
    assert {present_name(name, 2) for name, _ in parameters} == {name for name, _ in parameters}

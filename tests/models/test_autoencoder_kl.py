"""The SD-VAE against diffusers' AutoencoderKL (arrays in tests/data/sd_vae), and its converter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.golden_files import golden_case
from mlx.utils import tree_flatten, tree_unflatten

from mlx_starflow.convert.vae import convert_vae
from mlx_starflow.errors import StarflowError
from mlx_starflow.models import autoencoder_kl
from mlx_starflow.models import autoencoder_kl_tiling as tiling
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.autoencoder_layers import Conv3x3, GroupNorm, PointwiseConv

DATA = golden_case("sd_vae")
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = json.loads((DATA / "config.json").read_text())
# Channels first in the file.
GOLDEN = {name: array.transpose(0, 2, 3, 1) for name, array in mx.load(str(DATA / "golden.safetensors")).items()}
TINY = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def checkpoint() -> dict[str, mx.array]:
    return mx.load(str(DATA / WEIGHTS))


def load_vae(dtype: mx.Dtype = mx.float32) -> AutoencoderKL:
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(CONFIG))
    vae.load_weights(list(vae.sanitize(checkpoint()).items()), strict=True)
    vae.set_dtype(dtype)
    return vae


def load_converted(directory: Path) -> AutoencoderKL:
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(json.loads((directory / "config.json").read_text())))
    vae.load_weights(str(directory / "model.safetensors"), strict=True)
    return vae


def tiny_vae(**changes) -> AutoencoderKL:
    mx.random.seed(0)
    return AutoencoderKL(AutoencoderKLConfig.from_dict(TINY | changes))


def largest_error(actual: mx.array, expected: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    difference = mx.abs(actual.astype(mx.float32) - expected).max()
    return (difference / mx.abs(expected).max()).item()


def old_names(weights: dict[str, mx.array], *, convolutions: bool) -> dict[str, mx.array]:
    renamed = {}
    for name, weight in weights.items():
        if "attentions" in name and "group_norm" not in name:
            for new, old in OLD_NAMES.items():
                name = name.replace(f".{new}.", f".{old}.")
            if convolutions and weight.ndim == 2:
                weight = weight[:, :, None, None]
        renamed[name] = weight
    return renamed


def write_source(directory: Path, weights: dict[str, mx.array], config: dict = CONFIG) -> Path:
    directory.mkdir()
    mx.save_safetensors(str(directory / WEIGHTS), weights)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# ---- agreement with diffusers


def test_encode_is_diffusers():
    posterior = load_vae().encode(GOLDEN["x"])
    assert posterior.mean.dtype == posterior.logvar.dtype == mx.float32
    assert largest_error(posterior.mean, GOLDEN["mean"]) < 1e-5
    assert largest_error(posterior.logvar, GOLDEN["logvar"]) < 1e-5


def test_decode_is_diffusers():
    vae = load_vae()
    assert largest_error(vae.decode(GOLDEN["latents"]), GOLDEN["decoded_raw"]) < 1e-4
    # What pipelines do with a flow's or a diffusion model's latents.
    assert largest_error(vae.decode(vae.unscale(GOLDEN["latents"])), GOLDEN["decoded_scaled"]) < 1e-4


# PyTorch, in the same dtype, is off by up to 0.030 and 0.0039.
@pytest.mark.parametrize(("dtype", "bound"), [(mx.bfloat16, 0.05), (mx.float16, 0.01)])
def test_half_precision(dtype, bound):
    vae = load_vae(dtype)
    posterior, decoded = vae.encode(GOLDEN["x"]), vae.decode(GOLDEN["latents"])
    assert posterior.mean.dtype == posterior.logvar.dtype == decoded.dtype == dtype
    assert largest_error(posterior.mean, GOLDEN["mean"]) < bound
    assert largest_error(posterior.logvar, GOLDEN["logvar"]) < bound
    assert largest_error(decoded, GOLDEN["decoded_raw"]) < bound


# ---- shapes and the posterior


@pytest.mark.parametrize(("height", "width"), [(8, 24), (40, 16), (64, 72)])
def test_shapes_of_any_aspect_ratio(height, width):
    vae = load_vae()
    assert vae.config.downscale == 8
    posterior = vae.encode(mx.zeros((1, height, width, 3)))
    assert posterior.mean.shape == posterior.logvar.shape == (1, height // 8, width // 8, 4)
    assert vae.decode(posterior.mean).shape == (1, height, width, 3)


def test_pictures_of_a_batch_do_not_mix():
    vae = load_vae()
    alone = mx.concatenate([vae.encode(GOLDEN["x"][i : i + 1]).mean for i in range(2)])
    assert largest_error(alone, vae.encode(GOLDEN["x"]).mean) < 1e-5


def test_sample():
    posterior = load_vae().encode(GOLDEN["x"])
    noise = mx.array(np.random.default_rng(0).standard_normal(posterior.mean.shape).astype(np.float32))
    expected = np.array(posterior.mean) + np.sqrt(np.exp(np.array(posterior.logvar))) * np.array(noise)
    np.testing.assert_allclose(np.array(posterior.sample(noise)), expected, rtol=1e-5, atol=1e-5)
    assert mx.array_equal(posterior.sample(mx.zeros_like(noise)), posterior.mean)


def test_logvar_is_limited():
    vae = tiny_vae(use_quant_conv=False)
    vae.encoder.conv_out.bias = mx.array([0.0] * 4 + [1000.0, 1000.0, -1000.0, -1000.0])
    logvar = vae.encode(mx.zeros((1, 4, 4, 3))).logvar
    assert logvar.max().item() == 20
    assert logvar.min().item() == -30


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 8, 8, 4), (1, 12, 8, 3), (1, 8, 12, 3)])
def test_encode_names_the_shape_it_wants(shape):
    with pytest.raises(StarflowError, match=r"\[B, H, W, 3\] with H and W multiples of 8"):
        load_vae().encode(mx.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 2, 4), (1, 4, 2, 2)])
def test_decode_names_the_shape_it_wants(shape):
    with pytest.raises(StarflowError, match=r"\[B, h, w, 4\]"):
        load_vae().decode(mx.zeros(shape))


# ---- normalization of the latents


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scaling_factor": 0.5}, [0.5, 1.0]),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, [0.375, 0.875]),
        ({"scaling_factor": 0.5, "latents_mean": [1.0, 0.0], "latents_std": [2.0, 4.0]}, [0.0, 0.25]),
        # Statistics take the place of the shift.
        (
            {"scaling_factor": 0.5, "shift_factor": 9.0, "latents_mean": [1.0, 0.0], "latents_std": [2.0, 4.0]},
            [0.0, 0.25],
        ),
    ],
)
def test_scale(settings, expected):
    vae = tiny_vae(latent_channels=2, **settings)
    raw = mx.broadcast_to(mx.array([1.0, 2.0]), (1, 3, 2, 2))
    scaled = vae.scale(raw)
    assert mx.allclose(scaled, mx.broadcast_to(mx.array(expected), raw.shape))
    assert mx.allclose(vae.unscale(scaled), raw)
    assert vae.scale(raw.astype(mx.bfloat16)).dtype == vae.unscale(raw.astype(mx.bfloat16)).dtype == mx.float32


def test_statistics_are_no_weights():
    vae = tiny_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    names = {name for name, _ in tree_flatten(vae.parameters())}
    assert names == {name for name, _ in tree_flatten(tiny_vae().parameters())}


# ---- decoding in tiles


@pytest.mark.parametrize("rows", [1, 3, 8, 64])
def test_tiles_are_the_whole_picture(rows):
    vae = load_vae()
    assert largest_error(vae.decode(GOLDEN["latents"], rows), vae.decode(GOLDEN["latents"], 0)) < 1e-5
    assert largest_error(vae.decode(GOLDEN["latents"], rows), GOLDEN["decoded_raw"]) < 1e-4


@pytest.mark.parametrize("shape", [(2, 7, 5, 4), (1, 1, 1, 4), (1, 13, 1, 4), (1, 40, 24, 4)])
@pytest.mark.parametrize("changes", [{}, {"mid_block_add_attention": False, "block_out_channels": [8, 16, 16]}])
def test_tiles_of_any_shape(shape, changes):
    vae = tiny_vae(**changes)
    z = mx.random.normal(shape)
    for rows in (3, 6):
        assert largest_error(vae.decode(z, rows), vae.decode(z, 0)) < 1e-5


def test_tiles_of_queries(monkeypatch):
    monkeypatch.setattr(tiling, "LOGITS", 100)
    vae = tiny_vae()
    z = mx.random.normal((1, 6, 9, 4))
    assert largest_error(vae.decode(z, 4), vae.decode(z, 0)) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(mx.bfloat16, 0.05), (mx.float16, 0.01)])
def test_tiles_in_half_precision(dtype, bound):
    decoded = load_vae(dtype).decode(GOLDEN["latents"], 8)
    assert decoded.dtype == dtype
    assert largest_error(decoded, GOLDEN["decoded_raw"]) < bound


def test_large_pictures_are_decoded_in_tiles(monkeypatch):
    used = []
    original = autoencoder_kl.Decoder.in_tiles
    monkeypatch.setattr(autoencoder_kl.Decoder, "in_tiles", lambda *a: used.append(a[2]) or original(*a))
    vae = tiny_vae()
    vae.decode(mx.zeros((2, 16, 16, 4)))
    assert not used
    monkeypatch.setattr(autoencoder_kl, "WHOLE_PIXELS", 32 * 32 - 1)
    vae.decode(mx.zeros((2, 16, 16, 4)))
    assert used == [autoencoder_kl.TILE_PIXELS // 32] * 2
    with pytest.raises(StarflowError, match="tile_rows must be 0 or more, not -1"):
        vae.decode(mx.zeros((1, 4, 4, 4)), -1)


@pytest.mark.parametrize(
    ("side", "width", "attention", "share"), [(512, 8, True, 0.25), (1024, 4, False, 0.25)], ids=["512", "1024"]
)
def test_tiles_take_less_memory(side, width, attention, share):
    config = {"block_out_channels": [width] * 4, "norm_num_groups": 2, "mid_block_add_attention": attention}
    vae = tiny_vae(**config)
    z = mx.random.normal((1, side // 8, side // 8, 4))
    mx.eval(vae.parameters(), z)

    def measured(rows: int | None) -> tuple[mx.array, int]:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        decoded = vae.decode(z, rows)
        mx.eval(decoded)
        return decoded, mx.get_peak_memory() - before

    (tiles, less), (whole, more) = measured(None), measured(0)
    assert largest_error(tiles, whole) < 1e-5
    assert less < share * more


# ---- layers


@pytest.mark.parametrize("shape", [(1, 5, 7, 32), (3, 6, 4, 40)])
def test_sum_of_products_is_the_convolution(shape):
    mx.random.seed(0)
    fast, plain = Conv3x3(shape[-1], 24), nn.Conv2d(shape[-1], 24, 3, padding=1)
    plain.update(fast.parameters())
    x = mx.random.normal(shape)
    assert largest_error(fast._sum_of_products(x), plain(x)) < 1e-5

    def gradients(layer, call):
        def loss(parameters, x):
            layer.update(parameters)
            return (call(x) ** 2).mean()

        return tree_flatten(mx.grad(loss, argnums=(0, 1))(layer.parameters(), x))

    for (name, a), (_, b) in zip(gradients(fast, fast._sum_of_products), gradients(plain, plain), strict=True):
        assert largest_error(a, b) < 1e-5, name


def test_convolutions_of_large_pictures():
    mx.random.seed(0)
    x = mx.random.normal((1, 64, 72, 32))
    for layer, padding in ((Conv3x3(32, 8), 1), (PointwiseConv(32, 8), 0)):
        assert largest_error(layer(x), mx.conv2d(x, layer.weight, padding=padding) + layer.bias) < 1e-5


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm(silu):
    rng = np.random.default_rng(0)
    # A mean far from zero and a large picture are what single-pass and naively summed moments fail at.
    x = rng.standard_normal((2, 96, 64, 12)).astype(np.float32) * 2 + 20
    norm = GroupNorm(4, 12)
    norm.weight, norm.bias = (mx.array(rng.standard_normal(12).astype(np.float32)) for _ in range(2))
    groups = x.astype(np.float64).reshape(2, -1, 4, 3)
    groups -= groups.mean(axis=(1, 3), keepdims=True)
    groups /= np.sqrt((groups**2).mean(axis=(1, 3), keepdims=True) + 1e-6)
    expected = groups.reshape(x.shape) * np.array(norm.weight) + np.array(norm.bias)
    if silu:
        expected = expected / (1 + np.exp(-expected))
    assert largest_error(norm(mx.array(x), silu=silu), mx.array(expected.astype(np.float32))) < 1e-5


def test_norms_of_many_sizes_are_traced_once(monkeypatch):
    traced, sigmoid = [], mx.sigmoid
    monkeypatch.setattr(mx, "sigmoid", lambda x: traced.append(x.shape) or sigmoid(x))
    norm = GroupNorm(2, 4)
    for height in range(1, 13):
        x = mx.random.normal((1 + height % 3, height, 2 * height, 4))
        y = norm(x)
        assert largest_error(norm(x, silu=True), y / (1 + mx.exp(-y))) < 1e-5
    assert len(traced) <= 1


# ---- gradients


def check_gradient(function, x: mx.array, parameters: dict) -> None:
    """The gradient's product with a direction is the function's slope in it, for the input and for the weights."""
    gradients = mx.grad(function, argnums=(0, 1))(x, parameters)
    for argument, gradient in zip((x, parameters), gradients, strict=True):
        flat = tree_flatten(gradient)
        for name, g in flat:
            assert mx.isfinite(g).all().item(), name
            # A constant added to all keys does not change the attention.
            assert mx.abs(g).max().item() > 0 or name.endswith("to_k.bias"), name
        # Along the gradient itself the slope is its squared norm.
        norm = mx.sqrt(sum((g**2).sum() for _, g in flat))
        step = 1e-2 / norm

        def moved(sign, argument=argument, gradient=gradient, step=step):
            if isinstance(argument, dict):
                pairs = zip(tree_flatten(argument), tree_flatten(gradient), strict=True)
                return function(x, tree_unflatten([(name, a + sign * step * g) for (name, a), (_, g) in pairs]))
            return function(argument + sign * step * gradient, parameters)

        slope = (moved(1) - moved(-1)) / (2 * step)
        assert slope.item() == pytest.approx((norm**2).item(), rel=2e-2)


def test_gradient_through_encode():
    vae = tiny_vae()

    def loss(x, parameters):
        vae.update(parameters)
        posterior = vae.encode(x)
        return (posterior.sample(mx.ones_like(posterior.mean)) ** 2).mean()

    parameters = {name: vae.parameters()[name] for name in ("encoder", "quant_conv")}
    check_gradient(loss, mx.random.normal((2, 8, 6, 3)), parameters)


def test_gradient_through_decode():
    vae = tiny_vae()

    def loss(x, parameters):
        vae.update(parameters)
        return (vae.decode(x) ** 2).mean()

    parameters = {name: vae.parameters()[name] for name in ("decoder", "post_quant_conv")}
    check_gradient(loss, mx.random.normal((2, 4, 3, 4)), parameters)


# ---- config


def test_config_reads_diffusers():
    config = AutoencoderKLConfig.from_dict(CONFIG)
    assert config.block_out_channels == (32, 32, 64, 64)
    assert (config.layers_per_block, config.norm_num_groups, config.sample_size) == (2, 16, 64)
    assert config.scaling_factor == 0.18215
    assert config.downscale == 8
    assert AutoencoderKLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_of_old_files_takes_the_defaults():
    config = AutoencoderKLConfig.from_dict({"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": None})
    assert (config.scaling_factor, config.use_quant_conv, config.norm_num_groups) == (0.18215, True, 32)
    assert config.downscale == 2
    assert AutoencoderKLConfig.from_dict(TINY | {"sample_size": [32, 64]}).sample_size == 64


def test_optional_parts():
    vae = tiny_vae(mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)
    assert not any("attentions" in name or "quant" in name for name, _ in tree_flatten(vae.parameters()))
    images = vae.decode(vae.encode(mx.zeros((1, 4, 6, 3))).mean)
    assert images.shape == (1, 4, 6, 3)
    assert mx.isfinite(images).all().item()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'"),
        ({"model_type": "t5"}, "model_type is 't5'"),
        ({"act_fn": "relu"}, "act_fn 'relu'"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "AttnUpDecoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types has 1 blocks, block_out_channels has 2"),
        ({"block_out_channels": None}, "missing key block_out_channels"),
        ({"layers_per_block": None}, "missing key layers_per_block"),
        ({"layers_per_block": 0}, "layers_per_block must be a positive integer, not 0"),
        ({"latent_channels": "4"}, "latent_channels must be a positive integer, not '4'"),
        ({"block_out_channels": 8}, "block_out_channels must be a list, not 8"),
        ({"block_out_channels": []}, "block_out_channels is empty"),
        ({"block_out_channels": [8, -4]}, r"block_out_channels\[1\] must be a positive integer"),
        ({"block_out_channels": [8, 18]}, "18 is not a multiple of norm_num_groups 4"),
        ({"scaling_factor": 0}, "scaling_factor must not be 0"),
        ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std go together"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 3}, "latents_std has 3 values, latent_channels is 4"),
        ({"resnet_act": "silu"}, "unknown key resnet_act"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(StarflowError, match=message) as caught:
        AutoencoderKLConfig.from_dict(TINY | changes)
    assert "\n" not in str(caught.value)


# ---- checkpoints


def test_saved_weights_are_what_sanitize_made(tmp_path):
    out = convert_vae(DATA, tmp_path / "vae")
    assert out == tmp_path / "vae"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "autoencoder_kl"
    assert not any(key.startswith("_") for key in config)
    saved, expected = mx.load(str(out / "model.safetensors")), load_vae().sanitize(checkpoint())
    assert saved.keys() == expected.keys()
    assert all(mx.array_equal(saved[name], expected[name]) for name in saved)
    assert largest_error(load_converted(out).decode(GOLDEN["latents"]), GOLDEN["decoded_raw"]) < 1e-4


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_attention_names(tmp_path, convolutions):
    weights = old_names(checkpoint(), convolutions=convolutions)
    assert weights.keys() != checkpoint().keys()
    old = mx.load(str(convert_vae(write_source(tmp_path / "old", weights), tmp_path / "a") / "model.safetensors"))
    new = mx.load(str(convert_vae(DATA, tmp_path / "b") / "model.safetensors"))
    assert old.keys() == new.keys()
    assert all(mx.array_equal(old[name], new[name]) for name in new)


@pytest.mark.parametrize("dtype", ["bfloat16", mx.float16])
def test_convert_to_another_dtype(tmp_path, dtype):
    out = convert_vae(DATA, tmp_path / "vae", dtype=dtype)
    expected = dtype if isinstance(dtype, mx.Dtype) else mx.bfloat16
    assert {weight.dtype for weight in mx.load(str(out / "model.safetensors")).values()} == {expected}


def test_convert_keeps_the_checkpoints_dtype(tmp_path):
    source = write_source(tmp_path / "half", {name: w.astype(mx.bfloat16) for name, w in checkpoint().items()})
    weights = mx.load(str(convert_vae(source, tmp_path / "vae") / "model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {mx.bfloat16}


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert_from_a_pickle(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(DATA / "config.json", source)
    tensors = {name: torch.from_numpy(np.array(w)).to(getattr(torch, dtype)) for name, w in checkpoint().items()}
    torch.save(tensors, source / "diffusion_pytorch_model.bin")
    weights = mx.load(str(convert_vae(source, tmp_path / "vae") / "model.safetensors"))
    expected = load_vae().sanitize(checkpoint())
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert mx.array_equal(weight, expected[name].astype(getattr(mx, dtype))), name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("decoder.conv_in.bias"), "tensor decoder.conv_in.bias is missing"),
        (lambda w: w.update({"loss.logvar": mx.zeros(1)}), "no place for the tensor loss.logvar"),
        (
            lambda w: w.update({"quant_conv.weight": mx.zeros((8, 4, 1, 1))}),
            r"tensor quant_conv.weight is \[8, 4, 1, 1\], its config says \[8, 8, 1, 1\]",
        ),
        # A tensor in MLX's layout already.
        (
            lambda w: w.update({"decoder.conv_in.weight": mx.zeros((64, 3, 3, 4))}),
            r"decoder.conv_in.weight is \[64, 3, 3, 4\], its config says \[64, 4, 3, 3\]",
        ),
        (
            lambda w: w.update({"decoder.mid_block.attentions.0.key.bias": mx.zeros(64)}),
            "decoder.mid_block.attentions.0.to_k.bias is there twice",
        ),
    ],
)
def test_sanitize_is_strict(tmp_path, damage, message):
    weights = checkpoint()
    damage(weights)
    with pytest.raises(StarflowError, match=message):
        load_vae().sanitize(weights)
    source = write_source(tmp_path / "source", weights)
    with pytest.raises(StarflowError, match=f"{WEIGHTS}: .*{message}") as caught:
        convert_vae(source, tmp_path / "vae")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "vae").exists()


def test_sanitize_does_not_take_its_own_output():
    vae = load_vae()
    with pytest.raises(StarflowError, match="its config says"):
        vae.sanitize(vae.sanitize(checkpoint()))


def test_convert_errors(tmp_path):
    out = tmp_path / "vae"
    with pytest.raises(StarflowError, match="nowhere is not a folder"):
        convert_vae(tmp_path / "nowhere", out)
    with pytest.raises(StarflowError, match="dtype 'int8' is not one of float32, bfloat16, float16"):
        convert_vae(DATA, out, dtype="int8")
    with pytest.raises(StarflowError, match="the checkpoint's own folder"):
        convert_vae(DATA, DATA)

    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(StarflowError, match=r"config\.json: No such file"):
        convert_vae(source, out)
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ('{"_class_name": "VQModel"}', "_class_name is 'VQModel'"),
    ):
        (source / "config.json").write_text(text)
        with pytest.raises(StarflowError, match=rf"config\.json: .*{message}") as caught:
            convert_vae(source, out)
        assert "\n" not in str(caught.value)

    shutil.copy(DATA / "config.json", source)
    with pytest.raises(StarflowError, match=r"neither diffusion_pytorch_model\.safetensors nor .*\.bin"):
        convert_vae(source, out)
    (source / WEIGHTS).write_bytes((DATA / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(StarflowError, match=rf"cannot read .*{WEIGHTS}, download it again") as caught:
        convert_vae(source, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()

    out.write_text("in the way")
    with pytest.raises(StarflowError, match=f"{out} cannot be written"):
        convert_vae(DATA, out)

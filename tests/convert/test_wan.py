"""Wan 2.2's video autoencoder from its official file and from diffusers' folder of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import Command
from helpers.golden_files import golden_case

from mlx_starflow.convert import convert_vae, export_model
from mlx_starflow.convert.archive import write_archive
from mlx_starflow.convert.pth import read_checkpoint
from mlx_starflow.convert.wan import WAN_VAE
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_vae
from mlx_starflow.model_dir.files import Spec, load_weights, read_config
from mlx_starflow.models.autoencoder_wan import AutoencoderWan, AutoencoderWanConfig

DATA = golden_case("wan_vae")
GOLDEN = mx.load(str(DATA / "golden.safetensors"))
OFFICIAL = json.loads((DATA / "config.json").read_text())
CONFIG = {
    **WAN_VAE,
    "base_dim": OFFICIAL["dim"],
    "decoder_base_dim": OFFICIAL["dec_dim"],
    "dim_mult": OFFICIAL["dim_mult"],
    "num_res_blocks": OFFICIAL["num_res_blocks"],
    # What else diffusers writes there.
    "_diffusers_version": "0.35.0",
    "attn_scales": [],
    "clip_output": False,
    "dropout": 0.0,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}
PARTS = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}


def diffusers_name(name: str) -> str:
    """What diffusers calls an official tensor of this size, in which a resolution has one residual block, or two up."""
    whole = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    first, *rest = name.split(".")
    if first in whole:
        return ".".join([whole[first], *rest])
    name = f"{first}." + ".".join(rest)
    for official, present in {
        r"^(encoder|decoder)\.conv1\.": r"\1.conv_in.",
        r"\.head\.0\.": ".norm_out.",
        r"\.head\.2\.": ".conv_out.",
        r"\.middle\.1\.": ".mid_block.attentions.0.",
        r"\.middle\.0\.": ".mid_block.resnets.0.",
        r"\.middle\.2\.": ".mid_block.resnets.1.",
        r"\.downsamples\.(\d)\.downsamples\.0\.": r".down_blocks.\1.resnets.0.",
        r"\.downsamples\.(\d)\.downsamples\.1\.": r".down_blocks.\1.downsampler.",
        r"\.upsamples\.(\d)\.upsamples\.([01])\.": r".up_blocks.\1.resnets.\2.",
        r"\.upsamples\.(\d)\.upsamples\.2\.": r".up_blocks.\1.upsampler.",
        r"\.shortcut\.": ".conv_shortcut.",
        **{re.escape(f".{a}."): f".{b}." for a, b in PARTS.items()},
    }.items():
        name = re.sub(official, present, name)
    return name


def official() -> dict[str, mx.array]:
    stored = read_checkpoint(DATA / "model.pth")
    return {name: stored.mx(name) for name in stored}


def write(path: Path, tensors: dict[str, mx.array]) -> Path:
    return write_archive(path, {n: Spec(a.shape, a.dtype) for n, a in tensors.items()}, tensors.items())


def write_diffusers(folder: Path, config: dict | None = None) -> Path:
    tensors = {diffusers_name(name): array for name, array in official().items()}
    write(folder / "diffusion_pytorch_model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return convert_vae(DATA / "model.pth", folder / "vae", config=folder / "config.json")


def check_golden(directory: Path, later_scale: float = 0.6) -> None:
    vae = load_vae(directory, dtype="float32")
    assert isinstance(vae, AutoencoderWan)
    assert vae.config.later_scale == later_scale
    video, latents = (GOLDEN[name].transpose(0, 2, 3, 4, 1) for name in ("video", "latents"))
    factors = mx.array([1.0, later_scale, later_scale]).reshape(-1, 1, 1, 1)
    expected = GOLDEN["video_mean_normalized"].transpose(0, 2, 3, 4, 1)
    assert mx.abs(vae.scale(vae.encode(video).mean) - expected * factors).max().item() < 1e-5
    decoded = vae.decode(vae.unscale(latents * factors))
    assert mx.abs(decoded - GOLDEN["decoded"].transpose(0, 2, 3, 4, 1)).max().item() < 1e-4


# ---- both layouts


def test_the_official_file(converted):
    assert sorted(path.name for path in converted.iterdir()) == ["config.json", "model.safetensors"]
    config = read_config(converted)
    assert config["model_type"] == "autoencoder_wan"
    assert config["later_scale"] == 0.6
    check_golden(converted)


def test_a_diffusers_folder(converted, tmp_path):
    source = write_diffusers(tmp_path / "source")
    out = convert_vae(source, tmp_path / "vae")
    found, expected = load_weights(out), load_weights(converted)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)
    assert read_config(out) == read_config(converted)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_the_way_back(converted, suffix, tmp_path):
    path = export_model(converted, tmp_path / f"vae.{suffix}")
    if suffix == "pth":
        stored = read_checkpoint(path)
        found = {name: stored.mx(name) for name in stored}
    else:
        found = mx.load(str(path))
    expected = {diffusers_name(name): array for name, array in official().items()}
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]).item() for name in expected)


def test_the_statistics_are_the_golden_ones():
    assert mx.allclose(mx.array(WAN_VAE["latents_mean"]), GOLDEN["latents_mean"])
    assert mx.allclose(mx.array(WAN_VAE["latents_std"]), GOLDEN["latents_std"])
    config = AutoencoderWanConfig.from_dict(WAN_VAE)
    assert config == AutoencoderWanConfig(config.latents_mean, config.latents_std)


def test_the_official_file_needs_no_config(tmp_path):
    """Its folder holds another network's config.json. These weights are too small to be the released ones."""
    source = tmp_path / "Wan2.2-TI2V-5B"
    source.mkdir()
    shutil.copy(DATA / "model.pth", source / "Wan2.2_VAE.pth")
    (source / "config.json").write_text('{"_class_name": "WanModel"}')
    for path in (source, source / "Wan2.2_VAE.pth"):
        with pytest.raises(StarflowError, match=r"Wan2.2_VAE.pth: .* its config says \["):
            convert_vae(path, tmp_path / "vae")
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_dtypes(dtype, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    half = {name: array.astype(mx.float16) for name, array in official().items()}
    out = convert_vae(write(tmp_path / "half.pth", half), tmp_path / "vae", config=config, dtype=dtype)
    assert {array.dtype for array in load_weights(out).values()} == {mx.bfloat16 if dtype else mx.float16}
    assert load_vae(out, dtype="float32").decoder.conv_in.weight.dtype == mx.float32


def test_the_command(tmp_path):
    source = write_diffusers(tmp_path / "source")
    result = Command("convert")("vae", source, "-o", tmp_path / "vae", "--later-scale", "0.8")
    assert result.exit_code == 0, result.output
    assert "MB of weights" in result.stdout
    check_golden(tmp_path / "vae", 0.8)


# ---- what goes wrong


def test_mistakes(converted, tmp_path):
    def mistake(change: dict, **options: object) -> str:
        source = write_diffusers(tmp_path / "source", {**CONFIG, **change})
        with pytest.raises(StarflowError) as error:
            convert_vae(source, tmp_path / "vae", **options)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "vae").exists()
        shutil.rmtree(source)
        return str(error.value)

    assert "config.json: autoencoder config: this is not Wan 2.2's autoencoder" in mistake({"is_residual": False})
    assert re.search(r"tensor decoder\..* is \[.*\], its config says \[", mistake({"decoder_base_dim": 32}))
    assert "later_scale must be above 0" in mistake({}, later_scale=-1.0)
    with pytest.raises(StarflowError, match="holds another model"):
        convert_vae(golden_case("sd_vae"), converted)
    with pytest.raises(StarflowError, match="later_scale is a video autoencoder's"):
        convert_vae(golden_case("sd_vae"), tmp_path / "vae", later_scale=0.6)


def test_a_damaged_model_is_refused(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "vae")
    weights = dict(load_weights(converted))
    del weights["decoder.conv_out.bias"]
    mx.save_safetensors(str(tmp_path / "vae/model.safetensors"), weights)
    with pytest.raises(StarflowError, match=r"lacks the tensor decoder\.conv_out\.bias"):
        load_vae(tmp_path / "vae")
    config = read_config(converted)
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "z_dim": 4}))
    with pytest.raises(StarflowError, match=r"config\.json: autoencoder config: latents_mean has 48 values"):
        load_vae(tmp_path / "vae")

"""Autoencoders under the names of the official release's fine-tuned decoders, and as lone files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.golden_files import golden_case

from mlx_starflow.convert import convert_vae
from mlx_starflow.convert.archive import write_archive
from mlx_starflow.convert.vae import SD_VAE
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_vae
from mlx_starflow.model_dir.files import Spec, load_weights, read_config
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

DATA = golden_case("sd_vae")
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def halves(name: str) -> str:
    """The name in a pair of sequences: (encoder, quant_conv) and (post_quant_conv, decoder)."""
    for new, old in (
        ("encoder.1.", "quant_conv."),
        ("decoder.0.", "post_quant_conv."),
        ("encoder.0.", "encoder."),
        ("decoder.1.", "decoder."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(name)


def old_attention(name: str) -> str:
    for new, old in OLD.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def weights(rename: Callable[[str], str]) -> dict[str, mx.array]:
    tensors = mx.load(str(DATA / "diffusion_pytorch_model.safetensors"))
    return {rename(name): array for name, array in tensors.items()}


def write(path: Path, tensors: dict[str, mx.array]) -> Path:
    return write_archive(path, {n: Spec(a.shape, a.dtype) for n, a in tensors.items()}, tensors.items())


def assert_same_model(found: Path, expected: Path) -> None:
    a, b = load_weights(found), load_weights(expected)
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[name], b[name]).item() for name in b)
    assert read_config(found) == read_config(expected)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return convert_vae(DATA, tmp_path_factory.mktemp("vae") / "plain")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "fine_tuned.pth", "fine_tuned.safetensors"])
@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(str, id="diffusers"),
        pytest.param(old_attention, id="old attention"),
        pytest.param(halves, id="halves"),
        pytest.param(lambda name: halves(old_attention(name)), id="halves, old attention"),
        pytest.param(lambda name: f"vae.{name}", id="wrapped"),
    ],
)
def test_layouts(rename, file, plain, tmp_path):
    source = write(tmp_path / "source" / file, weights(rename))
    shutil.copy(DATA / "config.json", source.parent)
    if file == "pytorch_model.bin":
        source = source.parent  # a folder with the name that the release keeps it under
    assert_same_model(convert_vae(source, tmp_path / "model"), plain)


def test_old_attention_as_convolutions(plain, tmp_path):
    tensors = weights(lambda name: halves(old_attention(name)))
    projections = [n for n, a in tensors.items() if n.split(".")[-2] in OLD.values() and a.ndim == 2]
    assert len(projections) == 8  # encoder and decoder, four each
    tensors |= {name: tensors[name][..., None, None] for name in projections}
    write(tmp_path / "source/vae.pth", tensors)
    out = convert_vae(tmp_path / "source/vae.pth", tmp_path / "model", config=DATA / "config.json")
    assert_same_model(out, plain)


def test_a_fine_tuned_decoder_decodes(plain, tmp_path):
    golden = mx.load(str(DATA / "golden.safetensors"))
    source = write(tmp_path / "source/vae.pth", weights(halves))
    vae = load_vae(convert_vae(source, tmp_path / "model", config=DATA / "config.json"), dtype="float32")
    z = golden["z"].transpose(0, 2, 3, 1) if "z" in golden else mx.random.normal((1, 4, 4, 4))
    expected = load_vae(plain, dtype="float32").decode(z)
    assert np.array_equal(np.array(vae.decode(z)), np.array(expected))


def test_a_lone_file_is_taken_for_sd_vae(tmp_path):
    # The facts of stabilityai/sd-vae-ft-ema: 83.65 million weights, 8 times smaller latents.
    config = AutoencoderKLConfig.from_dict(SD_VAE)
    assert config.downscale == 8
    assert config.scaling_factor == 0.18215
    assert sum(p.size for p in parameters(AutoencoderKL(config)).values()) == 83_653_863
    source = write(tmp_path / "source/vae.pth", weights(halves))
    with pytest.raises(StarflowError, match=r"vae\.pth: the autoencoder's tensor .* is \[.*its config says \["):
        convert_vae(source, tmp_path / "model")


def mistake(source: Path, out: Path, **options: object) -> str:
    with pytest.raises(StarflowError) as error:
        convert_vae(source, out, **options)
    assert "\n" not in str(error.value)
    assert not out.exists()
    return str(error.value)


def test_mistakes(tmp_path):
    out = tmp_path / "model"
    config = {"config": DATA / "config.json"}
    assert "is not a folder" in mistake(tmp_path / "nowhere.pth", out)
    tensors = weights(halves)
    del tensors["decoder.1.conv_out.bias"]
    source = write(tmp_path / "source/less.pth", tensors)
    assert "decoder.conv_out.bias is missing" in mistake(source, out, **config)
    tensors["encoder.conv_in.weight"] = tensors["encoder.0.conv_in.weight"]
    source = write(tmp_path / "source/both.pth", tensors)
    assert "tensor encoder.conv_in.weight is there twice" in mistake(source, out, **config)
    source = write(tmp_path / "source/other.pth", weights(lambda name: f"discriminator.{name}"))
    assert "no place for the tensor discriminator." in mistake(source, out, **config)
    (tmp_path / "source/config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    assert "_class_name is 'VQModel'" in mistake(source, out)
    assert "config.json: No such file" in mistake(source, out, config=tmp_path / "config.json")
    with pytest.raises(StarflowError, match="is the checkpoint's own folder"):
        convert_vae(source, source.parent, **config)


def test_memory(tmp_path):
    """An autoencoder of many layers is converted in the memory of a few tensors."""
    config = AutoencoderKLConfig(block_out_channels=(32,) * 7, layers_per_block=3, norm_num_groups=8)
    network = parameters(AutoencoderKL(config))
    tensors = {name: mx.contiguous(w.transpose(0, 3, 1, 2)) if w.ndim == 4 else w for name, w in network.items()}
    source = write(tmp_path / "deep.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "_class_name": "AutoencoderKL"}))
    del network, tensors
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert_vae(source, tmp_path / "vae")
    assert mx.get_peak_memory() - before < source.stat().st_size / 20

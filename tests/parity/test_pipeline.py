"""Prompts to pictures: MLX and PyTorch make the same ones of a seed."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command, message
from helpers.images import smooth_images
from helpers.model_directories import edit_weights, write_class_model, write_image_model
from helpers.tiny_flows import tiny_flow
from helpers.torch_reference import DEVICES, difference
from PIL import Image

from mlx_starflow import load
from mlx_starflow.editing import Encoded
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.pipelines import ClassPipeline

pytestmark = [pytest.mark.torch, pytest.mark.parametrize("device", DEVICES)]

CASES = [
    ("tiny", {"method": "sequential"}),
    ("tiny", {"method": "jacobi"}),
    ("tiny", {"method": "sequential", "guidance": 0.0, "attn_temp": 0.8}),
    ("tiny", {"method": "sequential", "size": (16, 8), "denoise": False}),
    ("demo", {"method": "sequential"}),
    ("demo", {"method": "jacobi", "size": (96, 64)}),
]

generate = Command("generate")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_text_that_is_not_finite(tmp_path, device):
    model = write_image_model(tmp_path / "model")
    name = next(name for name in load_weights(model / "text_encoder") if name.endswith("final_layer_norm.weight"))
    damaged = mx.full(load_weights(model / "text_encoder")[name].shape, mx.nan)
    edit_weights(model / "text_encoder", **{name.replace(".", "__"): damaged})
    pipe = load(model, backend="torch", device=device)
    assert "the text encoder made is not finite" in message(pipe.encode_prompts, ["a cat"])


@pytest.mark.parametrize(("model", "settings"), CASES, ids=str)
def test_the_same_pictures(tiny, model, settings, device):
    prompts = ["a cat", "", "a dog"]
    ours, theirs = (
        load(tiny if model == "tiny" else "demo", dtype="float32", backend=backend, device=where).generate(
            prompts, seed=7, batch_size=2, keep_steps=True, verify=False, **settings
        )
        for backend, where in (("mlx", None), ("torch", device))
    )
    assert (ours.noise == theirs.noise).all()
    assert difference(ours.latents, theirs.latents) < 2e-4
    # 1e-4 of a picture's range is less than one of its 255 steps: rounding may go either way.
    assert np.abs(pixels(ours.images) - pixels(theirs.images)).max() <= 1
    for mine, other in zip(ours.steps, theirs.steps, strict=True):
        assert np.abs(pixels(mine) - pixels(other)).max() <= 1
    assert ours.metadata == theirs.metadata and ours.prompts == theirs.prompts and ours.seeds == theirs.seeds
    assert ours.stats.evaluations == theirs.stats.evaluations and ours.stats.tokens == theirs.stats.tokens
    assert ours.stats.seconds.keys() == theirs.stats.seconds.keys() and "network evaluations" in str(theirs.stats)
    assert bool(theirs.stats.memory) == (device == "cuda")


@pytest.mark.parametrize("method", ["sequential", "jacobi"])
@pytest.mark.parametrize("family", ["tarflow", "levels"])
def test_the_same_pictures_of_classes(family, method, tmp_path, device):
    if family == "levels":
        flow = tiny_flow("levels")
        model = save_model(tmp_path / "m", parameters(flow), {"model_type": "itarflow", **flow.config.to_dict()})
    else:
        model = write_class_model(tmp_path / "m")
    pipes = [load(model, dtype="float32"), load(model, dtype="float32", backend="torch", device=device)]
    assert all(isinstance(pipe, ClassPipeline) for pipe in pipes)
    changes = [{}, {"annealed_guidance": False, "guidance_mode": "starflow", "guided_blocks": 1}]
    if family == "levels":
        changes += [{"denoise_steps": 3, "clip": True}, {"denoise_steps": 3, "stochastic": True}]
    for classes in changes:
        ours, theirs = (
            pipe.generate(
                ["2", "", "0"],
                seed=7,
                settings=pipe.settings.with_classes(**classes),
                batch_size=2,
                keep_steps=True,
                verify=False,
                guidance=0.7,
                method=method,
            )
            for pipe in pipes
        )
        assert difference(ours.latents, theirs.latents) < 1e-3
        assert np.abs(pixels(ours.images) - pixels(theirs.images)).max() <= 1
        for mine, other in zip(ours.steps, theirs.steps, strict=True):
            assert np.abs(pixels(mine) - pixels(other)).max() <= 1
        assert ours.metadata == theirs.metadata and ours.stats.evaluations == theirs.stats.evaluations
        assert ours.stats.seconds.keys() == theirs.stats.seconds.keys()
    torch = pipes[1]
    assert "need the mlx backend" in message(torch.score, smooth_images(1), "1")
    assert "need the mlx backend" in message(setattr, torch, "noise_level", 0.1)
    assert "takes no prompt 'cow'" in message(torch.generate, "cow")
    words = ["--label", 1, "-m", model, "--seed", 3, "--dtype", "float32", "--method", method]
    for name, more in (("mlx", []), ("torch", ["--backend", "torch", "--device", device])):
        assert generate(*words, *more, "-o", tmp_path / f"{name}.png").exit_code == 0
    made, other = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("mlx", "torch"))
    assert np.abs(made - other).max() <= 1


def test_prompts_and_decoder(tiny, device):
    ours, theirs = load(tiny, dtype="float32"), load(tiny, dtype="float32", backend="torch", device=device)
    prompts = ["a cat", "a dog"]
    assert difference(ours.encode_prompts(prompts), theirs.encode_prompts(prompts)) < 1e-5
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 4)).astype(np.float32)
    decoded = [pipe.backend.decode(pipe.backend.array(latents)) for pipe in (ours, theirs)]
    assert np.abs(decoded[0] - decoded[1]).max() < 1e-4


def test_scoring_and_editing_need_mlx(tiny, device):
    pipe = load(tiny, backend="torch", device=device)
    (image,) = smooth_images(1)
    encoded = Encoded(np.zeros((1, 4, 4, 4), np.float32), ["a cat"])
    for call in (lambda: pipe.score([image]), lambda: pipe.vary(image), lambda: pipe.decode(encoded)):
        assert "need the mlx backend" in message(call)
    assert "need the mlx backend" in message(pipe.best_of, "a cat", 2)


def test_bfloat16(device):
    exact, rounded = (
        load("demo", backend="torch", device=device, dtype=dtype).generate("a red apple", seed=1)
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < difference(exact.latents, rounded.latents) < 0.5


def test_from_the_command_line(tiny, tmp_path, device):
    words = ["a cat", "-m", tiny, "--seed", 3, "--dtype", "float32", "--method", "sequential"]
    for name, more in (("mlx", ["--no-verify"]), ("torch", ["--backend", "torch", "--device", device, "-v"])):
        result = generate(*words, *more, "-o", tmp_path / f"{name}.png")
        assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output
    ours, theirs = (tmp_path / f"{name}.png" for name in ("mlx", "torch"))
    assert read_metadata(ours) == read_metadata(theirs)
    # The picture of one backend can be made again with the other, which has no windows.
    assert generate(*words[:-1], "rolling", "-o", tmp_path / "rolling.png").exit_code == 0
    for name in ("mlx", "rolling"):
        words = ["--from", tmp_path / f"{name}.png", "--backend", "torch", "--device", device, "--dtype", "float32"]
        assert generate(*words, "-o", tmp_path / "again.png").exit_code == 0
        first, again = (np.asarray(Image.open(tmp_path / f"{each}.png")).astype(int) for each in (name, "again"))
        assert np.abs(first - again).max() <= 1 + 3 * (name == "rolling")


def test_options_that_torch_does_not_have(tiny, tmp_path, device):
    words = ["a cat", "-m", tiny, "-o", tmp_path / "a.png"]
    torch = [*words, "--backend", "torch", "--device", device]
    assert "no low-memory mode" in generate.mistake(*torch, "--low-memory")
    assert "float32 or bfloat16, not in float16" in generate.mistake(*torch, "--dtype", "float16")
    assert "keeps keys and values as they are" in generate.mistake(*torch, "--kv-bits", "8")
    assert "add --backend torch" in generate.mistake(*words, "--device", device)
    if "cuda" not in DEVICES:
        assert "no device cuda" in generate.mistake(*words, "--backend", "torch", "--device", "cuda")
    assert "unknown backend 'jax'" in message(load, tiny, backend="jax")
    assert "neither cpu nor cuda" in message(load, tiny, backend="torch", device="tpu")
    pipe = load(tiny, backend="torch", device=device)
    assert "sequential or jacobi, not by 'rolling'" in message(pipe.generate, "a cat", method="rolling")


def test_a_damaged_model_is_named(tmp_path, device):
    directory = write_image_model(tmp_path)
    edit_weights(directory / "vae", decoder__conv_in__bias=None)
    assert "decoder.conv_in.bias" in generate.mistake("a cat", "-m", directory, "--backend", "torch")


def test_without_pytorch(tiny, tmp_path, monkeypatch, device):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("mlx_starflow.reference")]:
        monkeypatch.delitem(sys.modules, name)
    error = generate.mistake("a cat", "-m", tiny, "--backend", "torch", "-o", tmp_path / "a.png")
    assert "pip install 'mlx-starflow[torch]'" in error

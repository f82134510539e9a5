"""`mlx-starflow edit`, `encode` and `decode`, as a user types them."""

from __future__ import annotations

import json

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.images import write_images
from helpers.model_directories import write_class_model, write_image_model
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from mlx_starflow import load_flow
from mlx_starflow.editing import Encoded
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.pipelines import Pipeline
from mlx_starflow.training.finetuning.adapters import AdapterConfig, adapter_layers, attach, save_adapter

edit, encode, decode, generate = Command("edit"), Command("encode"), Command("decode"), Command("generate")


def write_adapter(path, model):
    """An adapter of a model that changes all that it makes."""
    flow, config = load_flow(model), AdapterConfig(rank=2)
    attach(flow, config)
    for layer in adapter_layers(flow).values():
        layer.lora_b = 0.05 * mx.ones(layer.lora_b.shape)
    return save_adapter(path, flow, config)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pictures(tmp_path):
    return write_images(tmp_path / "pictures", 2)


def size(path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# ---- edit


def test_inpaint(model, pictures, tmp_path):
    words = ["--mask", "4,0,4,8", "-m", model, "--steps", 2, "--rounds", 2, "-o", tmp_path / "out.png"]
    result = edit("inpaint", pictures[0], *words, "--images", 2, "--json", tmp_path / "told.json", "--seed", 3)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{tmp_path / 'out.png'}: seed {seed}" for seed in (3, 4)]
    assert size(tmp_path / "out.png") == (18, 8)
    assert np.shape(json.loads((tmp_path / "told.json").read_text())["nll"]) == (3, 2)


def test_a_mask_from_a_file(model, pictures, tmp_path):
    mask = tmp_path / "mask.png"
    Image.fromarray(np.tile(np.uint8([0] * 4 + [255] * 4), (8, 1))).save(mask)
    words = ["-m", model, "--steps", 1, "--rounds", 1, "--feather", 0, "-o", tmp_path / "out.png"]
    assert edit("inpaint", pictures[0], "--mask", mask, *words).exit_code == 0
    kept = [np.asarray(Image.open(path))[:, :4] for path in (tmp_path / "out.png", pictures[0])]
    assert np.array_equal(*kept)


def test_reprompt(model, pictures, tmp_path):
    words = [pictures[0], "--from", "a cat", "--to", "a dog", "-m", model]
    result = edit("reprompt", *words, "--strength", 0.5, "-o", tmp_path / "out.png")
    assert result.stdout == f"{tmp_path / 'out.png'}: strength 0.5\n"
    assert size(tmp_path / "out.png") == (8, 8)
    result = edit("reprompt", *words, "--frames", 3, "-o", tmp_path / "out.gif")
    assert result.stdout.endswith("path 0, 0.5, 1\n")
    assert Image.open(tmp_path / "out.gif").n_frames == 3
    assert edit("reprompt", *words, "--frames", 3, "-o", tmp_path / "row.png").exit_code == 0
    assert size(tmp_path / "row.png") == (28, 8)


def test_vary(model, pictures, tmp_path):
    result = edit("vary", pictures[0], "-m", model, "--images", 3, "--seed", 5, "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert size(tmp_path / "out.png") == (18, 18)
    result = edit("vary", pictures[0], "-m", model, "--frames", 4, "-o", tmp_path / "out.webp")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out.webp").n_frames == 4


def test_interpolate(model, pictures, tmp_path):
    words = ["--from", "a cat", "--to", "a dog", "--frames", 5, "-m", model]
    result = edit("interpolate", *pictures, *words, "-o", tmp_path / "out.webp")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out.webp").n_frames == 5


def test_edits_say_how_they_were_made(model, pictures, tmp_path):
    one, two = pictures
    asked = {
        "inpaint": ([one, "--mask", "0,0,4,4", "--steps", 1, "--rounds", 1, "-n", 2, "--seed", 3], {"feather": 0}),
        "reprompt": ([one, "--to", "a dog", "--strength", 0.5], {"prompts": ["", "a dog"], "strength": 0.5}),
        "vary": ([one, "-p", "a cat", "--seed", 3, "-n", 2], {"prompts": ["a cat"], "temperature": 0.8}),
        "interpolate": ([one, two, "--frames", 3], {"share": [0.0, 0.5, 1.0]}),
    }
    for number, (name, (words, expected)) in enumerate(asked.items()):
        out = tmp_path / f"{name}{['.png', '.jpg', '.webp', '.gif'][number]}"
        result = edit(name, *words, "-m", model, "-o", out)
        assert result.exit_code == 0, result.output
        found = read_metadata(out)
        assert found["made_by"] == f"edit {name}" and found["model"] == str(model) and found["size"] == [8, 8]
        assert str(one) in found["source"].values()
        assert found | expected == found
        assert found.get("seeds") == ([3, 4] if "-n" in words else None)
        assert f"was made by mlx-starflow edit {name}" in generate.mistake("--like", out)
        told = Command("info")(out).stdout
        assert f"made_by        edit {name}" in told and str(one) in told and "--like" not in told
        assert edit(name, *words, "-m", model, "-o", out, "--no-metadata", "--overwrite").exit_code == 0
        assert "does not say how it was made" in generate.mistake("--like", out)


def test_edits_and_scores_take_adapters_methods_and_little_memory(model, pictures, tmp_path, monkeypatch):
    one, two = pictures
    methods, inversion = [], Pipeline.inversion
    monkeypatch.setattr(Pipeline, "inversion", lambda pipe, method: methods.append(method) or inversion(pipe, method))
    adapter = write_adapter(tmp_path / "adapter", model)
    asked = {
        "inpaint": [one, "--mask", "0,0,4,4", "--steps", 1, "--rounds", 1, "--seed", 3],
        "reprompt": [one, "--to", "a dog", "--strength", 0.5],
        "vary": [one, "--seed", 3],
        "interpolate": [one, two, "--frames", 3],
    }

    def made(name, *words):
        out = tmp_path / "out.png"
        result = edit(name, *asked[name], "-m", model, "-o", out, "--overwrite", *words)
        assert result.exit_code == 0, result.output
        with Image.open(out) as image:
            return np.asarray(image).astype(int), read_metadata(out)

    for name in asked:
        plain, _ = made(name)
        frugal, _ = made(name, "--low-memory", "--method", "sequential")
        assert np.abs(frugal - plain).max() <= 1, name
        made(name, "--method", "jacobi")
        assert methods[-3:] == [None, "sequential", "jacobi"], name
        tuned, about = made(name, "--lora", adapter, 1)
        assert (tuned != plain).any() and about["adapters"] == [[str(adapter), 1.0]], name
    score = [
        Command("score")(one, "-m", model, "--low-memory", *words).stdout for words in ([], ["--lora", adapter, 1])
    ]
    assert score[0] != score[1]
    noise = tmp_path / "n.safetensors"
    for command, words in ((encode, [one, "-o", noise]), (decode, [noise, "-o", tmp_path / "back.png"])):
        result = command(*words, "-m", model, "--lora", adapter, 1, "--low-memory")
        assert result.exit_code == 0, result.output
    assert decode(noise, "-m", model, "-o", tmp_path / "other.png", "--method", "rolling").exit_code == 0
    assert methods[-2:] == ["sequential", "rolling"]
    with Image.open(tmp_path / "other.png") as other, Image.open(tmp_path / "back.png") as back:
        assert (np.asarray(other) != np.asarray(back)).any()


def test_seconds_without_an_animation(model, pictures, tmp_path):
    one, out = pictures[0], ["-m", model, "-o", tmp_path / "out.png"]
    line = edit.mistake("vary", one, "--seconds", 2, *out)
    assert "--seconds does nothing alone: give --frames too" in line
    assert "--seconds" in edit.mistake("vary", one, "--seconds", 2, "--frames", 3, *out)
    assert "--seconds" in edit.mistake("interpolate", one, one, "--seconds", 2, *out)
    assert not (tmp_path / "out.png").exists()


def test_mistakes(model, pictures, tmp_path):
    one, out = pictures[0], ["-m", model, "-o", tmp_path / "out.png"]
    assert "leaves nothing free" in edit.mistake("inpaint", one, "--mask", "0,0,0,0", *out)
    assert "touches every latent" in edit.mistake("inpaint", one, "--mask", "0,0,7,7", *out)
    assert "cannot read the picture" in edit.mistake("inpaint", tmp_path / "none.png", "--mask", "0,0,4,4", *out)
    assert "cannot be written" in edit.mistake("vary", one, "-m", model, "-o", tmp_path / "none/out.png")
    assert "pictures are written as" in edit.mistake("vary", one, "-m", model, "-o", tmp_path / "out.gif")
    assert "leave out --images" in edit.mistake("vary", one, "--frames", 3, "--images", 2, *out)
    assert "Missing option" in edit.mistake("reprompt", one, *out)
    assert "multiples of 2" in edit.mistake("vary", one, "--size", "9x9", *out)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("command", ["inpaint", "reprompt", "vary", "interpolate"])
def test_help(command):
    result = edit(command, "--help")
    assert result.exit_code == 0 and "mlx-starflow edit" in result.stdout


# ---- encode and decode


def test_there_and_back(model, pictures, tmp_path):
    noise = tmp_path / "noise.safetensors"
    result = encode(*pictures, "-m", model, "--prompt", "a cat", "-o", noise)
    assert result.exit_code == 0, result.output
    assert "noise [2, 4, 4, 4]" in result.stdout and "and back: flow: largest error" in result.stdout
    result = decode(noise, "-o", tmp_path / "grid.png")
    assert result.exit_code == 0, result.output
    assert size(tmp_path / "grid.png") == (18, 8)
    result = decode(noise, "-o", tmp_path / "each.png", "--separate", "--denoise", "--prompt", "a dog", "--guidance", 1)
    assert result.exit_code == 0, result.output
    assert size(tmp_path / "each-2.png") == (8, 8)


def test_generate_reads_the_noise(model, pictures, tmp_path):
    noise = tmp_path / "noise.safetensors"
    encode(pictures[0], "-m", model, "--prompt", "a cat", "-o", noise)
    # Both in float32, on a GPU too: a random autoencoder makes much of a rounding.
    decode(noise, "-o", tmp_path / "decoded.png", "--dtype", "float32")
    settings = ["--guidance", 0, "--temperature", 1, "--no-denoise", "--method", "sequential", "--dtype", "float32"]
    result = generate("a cat", "-m", model, "--load-noise", noise, *settings, "-o", tmp_path / "generated.png")
    assert result.exit_code == 0, result.output
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("decoded", "generated"))
    assert np.abs(first - second).max() <= 1


def test_encode_options(model, pictures, tmp_path):
    noise = tmp_path / "noise.safetensors"
    folder = pictures[0].parent
    lines = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(["a cat", "a dog"])]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--captions", "--guidance", 1, "--noise-seed", 3, "--no-check", "--size", "16x8"]
    result = encode(folder, "-m", model, "-o", noise, *words)
    assert result.exit_code == 0, result.output
    assert "and back" not in result.stdout
    encoded = Encoded.load(noise)
    assert encoded.prompts == ["a cat", "a dog"] and encoded.guidance == 1 and encoded.noise.shape == (2, 4, 8, 4)


def test_noise_that_cannot_be_used(model, pictures, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    assert "cannot be read" in decode.mistake(tmp_path / "bad.safetensors", "-o", tmp_path / "out.png")
    assert "cannot be read" in decode.mistake(tmp_path / "none.safetensors", "-o", tmp_path / "out.png")
    assert "cannot be written" in encode.mistake(pictures[0], "-m", model, "-o", tmp_path / "none/noise.safetensors")
    assert "leave out --prompt" in encode.mistake(
        pictures[0], "-m", model, "--captions", "--prompt", "a", "-o", tmp_path / "noise.safetensors"
    )


def test_decoded_images_say_how_they_were_made(model, pictures, tmp_path):
    noise = tmp_path / "noise.safetensors"
    assert encode(*pictures, "-m", model, "--prompt", "a cat", "--no-check", "-o", noise).exit_code == 0
    assert decode(noise, "-o", tmp_path / "grid.png").exit_code == 0
    assert decode(noise, "-o", tmp_path / "each.jpg", "--separate", "--guidance", 2).exit_code == 0
    both, one = (read_metadata(tmp_path / name) for name in ("grid.png", "each-2.jpg"))
    assert both["made_by"] == one["made_by"] == "decode"
    assert both["prompts"] == one["prompts"] == ["a cat"] and (both["guidance"], one["guidance"]) == (0, 2)
    assert len(both["noise_sha256"]) == 2 and both["noise_sha256"][1:] == one["noise_sha256"]
    assert both["source"] == {"noise": str(noise)}


def test_decoded_images_of_classes(tmp_path):
    model = write_class_model(tmp_path / "model")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    noise = tmp_path / "noise.safetensors"
    assert encode(tmp_path / "red.png", "-m", model, "--prompt", "2", "-o", noise).exit_code == 0
    assert decode(noise, "-o", tmp_path / "again.webp").exit_code == 0
    assert read_metadata(tmp_path / "again.webp")["prompts"] == ["2"]


def test_a_noise_file_that_names_a_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path))
    asked = []

    def snapshot_download(repository, **options):
        asked.append(options)
        raise LocalEntryNotFoundError(repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    Encoded(np.zeros((1, 4, 4, 4), np.float32), [""], model="some/body").save(tmp_path / "noise.safetensors")
    line = decode.mistake(tmp_path / "noise.safetensors", "-o", tmp_path / "out.png")
    assert "some/body is not on this machine" in line and "--model some/body" in line
    assert all(options["local_files_only"] for options in asked) and asked


# ---- generate --best-of


def test_best_of(model, tmp_path):
    words = ["-m", model, "--best-of", 3, "--seed", 10, "--method", "sequential", "--dtype", "float32"]
    words += ["-o", tmp_path / "out.png"]
    result = generate("a cat", *words)
    assert result.exit_code == 0, result.output
    assert "the best of 3" in result.stdout
    # The picture says which seed it has, and that makes it again.
    result = generate("--from", tmp_path / "out.png", "--dtype", "float32", "-o", tmp_path / "again.png")
    assert result.exit_code == 0, result.output
    first, again = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("out", "again"))
    assert np.abs(first - again).max() == 0
    result = generate("a cat", "a dog", *words, "--images", 2, "--verify")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("the best of 3") == 4
    assert "leave out --best-of" in generate.mistake("--like", tmp_path / "again.png", "--best-of", 2)

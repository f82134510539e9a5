"""`mlx-starflow distill --lora --from`: the style of a model's adapter becomes an adapter of a student."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.model_directories import same, write_image_model
from helpers.students import write_student

from mlx_starflow import StarflowError, load
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.adapters import Adapter
from mlx_starflow.model_dir.directory import load_flow, load_student
from mlx_starflow.model_dir.files import load_weights, read_safetensors
from mlx_starflow.sampling.student import sample_student
from mlx_starflow.training.finetuning.adapters import AdapterConfig, adapter_layers, attach, save_adapter

distill, generate, score, fuse, upload = map(Command, ("distill", "generate", "score", "fuse", "upload"))

SMALL = ("--pairs", 128, "--batch-size", 8, "--seed", 1)
TAUGHT = ("--steps", 60, "--rank", 8, "--lr", 1e-2, "--save-steps", 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\n")
    return path


@pytest.fixture(scope="module")
def student(model, prompts, tmp_path_factory):
    """One that has learned what it could in 60 steps."""
    out = tmp_path_factory.mktemp("student") / "out"
    words = ("--channels", 64, "--layers", 2, "--steps", 60, "--lr", 3e-3)
    done = distill(model, "--prompt-file", prompts, "-o", out, *words, *SMALL)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory):
    """A large change of the model's flow."""
    flow, config = load_flow(model, "float32"), AdapterConfig(rank=4, scale=4.0)
    attach(flow, config)
    for number, layer in enumerate(adapter_layers(flow).values()):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number))
    return save_adapter(tmp_path_factory.mktemp("lora") / "adapter", flow, config, {"model": str(model)})


def taught(model, student, lora, prompts, out, *options: object):
    return distill(model, "--lora", lora, 1, "--from", student, "--prompt-file", prompts, "-o", out, *SMALL, *options)


@pytest.fixture(scope="module")
def style(model, student, lora, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("style") / "out"
    done = taught(model, student, lora, prompts, out, *TAUGHT)
    assert done.exit_code == 0, done.output
    assert "weights of an adapter of" in done.output and f"wrote {out / 'adapter'}" in done.output
    return out


def test_the_student_comes_nearer_to_the_adapted_teacher(model, student, lora, style):
    pipe = load(model, adapters=[(lora, 1.0)])
    noise = np.random.default_rng(5).standard_normal((16, *pipe.noise_shape()), np.float32)
    prompts = ["a cat", "a dog"] * 8
    exact = pipe.generate(prompts, noise=noise, method="sequential").latents
    z, text = mx.array(pipe.settings.temperature * noise), pipe.encode_prompts(prompts)
    errors = {}
    for strength in (0.0, 1.0):
        own = load_student(student, pipe.model, adapters=[(style / "adapter", strength)])
        errors[strength] = float(mx.square(sample_student(own, z, text).data - exact).mean())
    assert errors[1.0] < 0.8 * errors[0.0]


def test_what_is_written(student, style):
    config = json.loads((style / "adapter/adapter_config.json").read_text())
    assert config["of"] == "student" and config["model"] == str(student) and config["rank"] == 8
    assert Adapter.read(style / "adapter").of_student
    assert (style / "samples.png").exists() and not (style / "config.json").exists()
    identity = json.loads((style / "pairs/pairs.json").read_text())["identity"]
    assert identity["of"] == "samples" and identity["guidance"] == 1.0 and len(identity["adapters"]) == 1


def test_it_is_used_and_recorded(model, student, style, tmp_path):
    words = ("a cat", "-m", model, "--student", student, "--seed", 3)
    with_it = (*words, "--lora", style / "adapter", 1, "-o", tmp_path / "style.png")
    for command in (with_it, (*words, "-o", tmp_path / "plain.png")):
        done = generate(*command)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "style.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    found = read_metadata(tmp_path / "style.png")
    assert found["adapters"] == [[str(style / "adapter"), 1.0]] and found["settings"]["student"] == str(student)
    assert "adapters" not in read_metadata(tmp_path / "plain.png")
    again = generate("--like", tmp_path / "style.png", "-o", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "style.png").read_bytes()


def test_drafts_of_both_are_exact(model, student, lora, style):
    pipe = load(model, adapters=[(lora, 1.0)], student_adapters=[(style / "adapter", 1.0)])
    exact = pipe.generate("a cat", seed=3, method="sequential")
    drafted = pipe.generate("a cat", seed=3, method="draft", student=student)
    assert np.allclose(drafted.latents, exact.latents, atol=2e-2)
    assert len(exact.metadata[0]["adapters"]) == 1 and len(drafted.metadata[0]["adapters"]) == 2


def test_resumed_is_uninterrupted(model, student, lora, prompts, style, tmp_path):
    part = shutil.copytree(style, tmp_path / "part")
    shutil.rmtree(part / "adapter")
    (part / "training/student/checkpoint-00000060.safetensors").unlink()
    again = taught(model, student, lora, prompts, part, *TAUGHT)
    assert again.exit_code == 0 and "resuming at step 30" in again.output
    first, second = (read_safetensors(each / "adapter/adapters.safetensors") for each in (style, part))
    assert same(first, second)
    other = taught(model, student, lora, prompts, part, *TAUGHT, "--rank", 4)
    assert other.exit_code == 2 and "adapter" in other.output


def test_the_student_itself_stays(model, student, lora, prompts, tmp_path):
    before = {name: np.array(array) for name, array in load_weights(student).items()}
    assert taught(model, student, lora, prompts, tmp_path / "out", "--steps", 1).exit_code == 0
    assert all(np.array_equal(array, before[name]) for name, array in load_weights(student).items())
    said = taught(model, student, lora, prompts, student, "--steps", 1)
    assert said.exit_code == 2 and str(student) in said.output


def test_adapters_of_the_other_kind_are_refused(model, student, lora, style, tmp_path):
    own = style / "adapter"
    of_student = "is an adapter of a student, and changes no model"
    picture = ("a cat", "-m", model, "-o", tmp_path / "out.png")
    assert "is an adapter of a student: give that with --student DIR" in generate.mistake(*picture, "--lora", own, 1)
    said = generate.mistake(*picture, "--student", student, "--lora", lora, 1)
    assert "has learned from" in said and "without adapters" in said
    assert generate("a cat", "-m", model, "-o", tmp_path / "a.png").exit_code == 0
    assert of_student in fuse.mistake(model, "--lora", own, 1, "-o", tmp_path / "fused")
    assert of_student in score.mistake(tmp_path / "a.png", "-m", model, "--lora", own, 1)
    pipe = load(model, student_adapters=[(lora, 1.0)])
    with pytest.raises(StarflowError, match="is an adapter of a model, and changes no student"):
        pipe.generate("a cat", student=student)
    assert "what is published are models" in upload.mistake(own, "somebody/style", "--dry-run")
    other = write_student(tmp_path / "other", model, guidance=1.0, temperature=0.8)
    assert "does not fit this student" in generate.mistake(*picture, "--student", other, "--lora", own, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guidance", 2), "has learned the guidance 1: leave --guidance out"),
        (("--temperature", 0.5), "has learned the temperature 0.8: leave --temperature out"),
        (("--kind", "matching"), "--kind"),
        (("--channels", 32), "--channels"),
    ],
)
def test_what_a_student_has_learned_stays(model, student, lora, prompts, tmp_path, options, message):
    done = taught(model, student, lora, prompts, tmp_path / "out", *options)
    assert done.exit_code == 2 and message in done.output


def test_both_are_needed(model, student, lora, prompts, tmp_path):
    words = (model, "--prompt-file", prompts, "-o", tmp_path / "out")
    assert "--lora" in distill.mistake(*words, "--from", student)
    assert "--from" in distill.mistake(*words, "--lora", lora, 1)
    said = distill.mistake(*words, "--from", tmp_path / "no", "--lora", lora, 1)
    assert "no is not a folder; give a student, such as `mlx-starflow distill` writes" in said
    dry = distill(*words, "--from", student, "--lora", lora, 1, "--dry-run", *SMALL)
    assert dry.exit_code == 0 and "weights of an adapter of" in dry.output and not (tmp_path / "out").exists()

"""Images by students and by drafts: which settings they take, what is recorded, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.model_directories import write_class_model, write_image_model
from helpers.students import write_student

from mlx_starflow import load
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.directory import load_student
from mlx_starflow.model_dir.quantization import quantize_module, quantized_layers
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.pipelines import GenerationSettings
from mlx_starflow.pipelines.recipes import Recipe
from mlx_starflow.sampling.student import sample_student


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def student(model, tmp_path_factory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"), model, guidance=1.0, temperature=0.5)


@pytest.fixture(scope="module")
def pipe(model):
    return load(model)


def test_a_model_may_have_a_student_of_its_own(tmp_path):
    model = write_image_model(tmp_path / "model")
    with pytest.raises(StarflowError, match="is no student"):
        load(model).generate("a cat", student=model)
    own = write_student(model / "student", model)
    pipe = load(model)
    result = pipe.generate("a cat", seed=3, student=model)
    assert np.array_equal(result.latents, pipe.generate("a cat", seed=3, student=own).latents)
    result.save(tmp_path / "out.png")
    Recipe.read(tmp_path / "out.png").check_local()


def test_a_quantized_student_is_dense_on_a_cpu(model, tmp_path):
    folder = write_student(tmp_path, model, guidance=1.0, channels=64, num_heads=4, num_kv_heads=4)
    network = load_student(folder)
    config = {"model_type": "student", **network.config.to_dict(), "quantization": quantize_module(network, "8")}
    save_model(folder, parameters(network), config)
    quantized = load_student(folder)
    assert quantized_layers(quantized)
    pipe = load(model)
    used = pipe.backend.student(str(folder))
    assert bool(quantized_layers(used)) == (mx.default_device().type != mx.cpu)
    z, text = mx.random.normal((1, *pipe.noise_shape()), key=mx.random.key(1)), pipe.encode_prompts(["a cat"])
    made, expected = (sample_student(each, z, text, 1).data for each in (used, quantized))
    assert np.allclose(made, expected, atol=1e-3 * float(mx.abs(expected).max()))


def test_a_student_makes_the_images(pipe, student, tmp_path):
    result = pipe.generate(["a cat", "a dog"], seed=3, student=student, steps=2, keep_steps=True)
    assert result.settings.guidance == 1.0 and result.settings.temperature == 0.5
    own = load_student(student, pipe.model)
    z = 0.5 * result.noise
    expected = sample_student(own, pipe.backend.array(z), pipe.encode_prompts(["a cat", "a dog"]), 2)
    assert np.allclose(result.latents, expected.data, atol=1e-4)
    assert result.stats.student_evaluations == 2 and result.stats.evaluations == [0, 0]
    assert "2 of the student" in str(result.stats)
    assert result.stats.certificates == []
    assert [len(steps) for steps in result.steps] == [4, 4]
    result.save(tmp_path / "out.png")
    made = read_metadata(tmp_path / "out-1.png")
    assert made["settings"]["student"] == str(student) and made["settings"]["steps"] == 2
    assert "certificate" not in made
    again = Recipe.read(tmp_path / "out-1.png")
    again.check_local(model=False)
    with pytest.raises(StarflowError, match="which is not on this machine: give one with --student"):
        replace(again, settings={**again.settings, "student": "nowhere"}).check_local(model=False)
    replace(again, settings={**again.settings, "student": "nowhere"}).check_local(model=False, student=False)
    settings = GenerationSettings.from_dict(again.settings_with(None, pipe.backend.methods))
    assert np.allclose(pipe.generate("a cat", seed=3, settings=settings).latents, result.latents[:1], atol=1e-4)


def test_images_without_a_student_do_not_speak_of_one(pipe):
    metadata = pipe.generate("a cat", seed=3).metadata[0]
    assert "student" not in metadata["settings"] and "steps" not in metadata["settings"]


def test_drafts_are_exact(pipe, student):
    exact = pipe.generate("a cat", seed=3, method="sequential")
    drafted = pipe.generate("a cat", seed=3, method="draft", student=student, guidance=1.0)
    assert drafted.settings.temperature == exact.settings.temperature == 0.8
    assert np.allclose(drafted.latents, exact.latents, atol=2e-2)
    assert drafted.stats.student_evaluations == 1 and drafted.stats.certificate.max < 1e-2
    assert drafted.metadata[0]["settings"]["student"] == str(student)


def test_a_student_of_classes(tmp_path):
    model = write_class_model(tmp_path / "model")
    student = write_student(tmp_path / "student", model, "matching", guidance=0.5, positions=16)
    pipe = load(model)
    result = pipe.generate(["0", ""], seed=1, student=student)
    assert result.settings.guidance == 0.5 and result.stats.student_evaluations == 4
    assert [image.size for image in result.images] == [(8, 8)] * 2
    exact = pipe.generate("0", seed=1, method="sequential")
    inverse = write_student(tmp_path / "inverse", model)
    stepped = pipe.generate("0", seed=1, student=inverse, keep_steps=True)
    states = 2 + sum(not block.is_identity for block in pipe.flow.blocks)  # the noise, and the data
    assert [image.size for image in stepped.steps[0]] == [(8, 8)] * states
    drafted = pipe.generate("0", seed=1, method="draft", student=inverse)
    assert np.allclose(drafted.latents, exact.latents, atol=2e-2)


def test_a_student_of_another_model_is_refused(pipe, model, tmp_path):
    other = write_student(tmp_path / "other", model, teacher="another")
    with pytest.raises(StarflowError, match="learned from other weights"):
        pipe.generate("a cat", student=other)
    with pytest.raises(StarflowError, match="is no student: its model_type is 'starflow'"):
        pipe.generate("a cat", student=model)
    with pytest.raises(StarflowError, match="give that as the model"):
        load(other)
    with pytest.raises(StarflowError, match="nowhere is not a folder; give a student, such as `mlx-starflow distill`"):
        pipe.generate("a cat", student=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "learned the guidance 1 and knows no other"),
        ({"method": "rolling"}, "makes images by itself"),
        ({"steps": 0}, "1 to 1000 steps"),
        ({"denoise": False}, "is clean already"),
        ({"method": "draft", "steps": 2}, "steps are those of a student that makes images"),
    ],
)
def test_settings_that_do_not_go_with_a_student(pipe, student, options, message):
    with pytest.raises(StarflowError, match=message):
        pipe.generate("a cat", student=student, **options)


def test_settings_that_need_a_student(pipe, model, tmp_path):
    with pytest.raises(StarflowError, match="drafts are a student's"):
        pipe.generate("a cat", method="draft")
    with pytest.raises(StarflowError, match="leave them out"):
        pipe.generate("a cat", steps=4)
    matching = write_student(tmp_path / "matching", model, "matching", guidance=1.0)
    with pytest.raises(StarflowError, match="drafts need an inverse one"):
        pipe.generate("a cat", method="draft", student=matching)


def test_a_student_knows_no_adapters(model, student, tmp_path):
    adapted = load(model)
    adapted.backend.adapters = [("adapter", 1.0)]
    with pytest.raises(StarflowError, match=r"has learned from .* without adapters"):
        adapted.generate("a cat", student=student)

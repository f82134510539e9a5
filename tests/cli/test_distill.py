"""`mlx-starflow distill`: from a model to a student, and `generate --student`."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.commands import Command
from helpers.images import shapes, write_images
from helpers.model_directories import same, write_class_model, write_image_model

from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.files import load_weights

distill = Command("distill")
generate = Command("generate")

SMALL = ("--pairs", 128, "--channels", 64, "--layers", 2, "--batch-size", 4, "--seed", 1)


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
    """A student of three steps."""
    out = tmp_path_factory.mktemp("student") / "out"
    result = distill(model, "--prompt-file", prompts, "-o", out, "--steps", 3, *SMALL)
    assert result.exit_code == 0, result.output
    return out


def test_a_student_is_written_and_used(model, student, tmp_path):
    config = json.loads((student / "config.json").read_text())
    assert config["model_type"] == "student" and config["guidance"] == 1.0 and config["temperature"] == 0.8
    assert len(config["scales"]) == 3 and (student / "samples.png").exists()
    result = generate("a cat", "-m", model, "--student", student, "-o", tmp_path / "out.png", "--seed", 1, "-v")
    assert result.exit_code == 0, result.output
    assert "1 of the student" in result.output
    assert read_metadata(tmp_path / "out.png")["settings"]["student"] == str(student)
    again = generate("--like", tmp_path / "out.png", "-o", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.png").read_bytes()[-2000:] == (tmp_path / "out.png").read_bytes()[-2000:]
    draft = generate("a cat", "-m", model, "--student", student, "--method", "draft", "-o", tmp_path / "draft.png",
                     "--seed", 1, "--verify")  # fmt: skip
    assert draft.exit_code == 0 and "|f(x) - z| at most" in draft.output


def test_resumed_is_uninterrupted(model, prompts, student, tmp_path):
    part = shutil.copytree(student, tmp_path / "part", ignore=shutil.ignore_patterns("checkpoint-*", "best*"))
    (part / "pairs/pairs-000000.safetensors").unlink()
    for name in ("config.json", "model.safetensors", "samples.png"):
        (part / name).unlink()
    first = distill(model, "--prompt-file", prompts, "-o", part, "--steps", 3, "--save-steps", 1, *SMALL)
    assert first.exit_code == 0, first.output
    assert same(load_weights(part), load_weights(student))
    # What was killed after the second step goes on from there.
    (part / "training/student/checkpoint-00000003.safetensors").unlink()
    again = distill(model, "--prompt-file", prompts, "-o", part, "--steps", 3, *SMALL)
    assert again.exit_code == 0 and "resuming at step 2" in again.output
    assert same(load_weights(part), load_weights(student))


def test_interrupted_among_its_pairs(model, prompts, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    words = (model, "--prompt-file", prompts, "-o", tmp_path / "out", "--steps", 1, *SMALL)
    monkeypatch.setattr("mlx_starflow.training.recipes.teacher_pairs.pairs_of_samples", interrupted)
    stopped = distill(*words)
    assert stopped.exit_code == 130
    assert stopped.output.splitlines()[-1] == "stopped at 0 of 128 pairs: run it again to resume"
    monkeypatch.undo()
    assert distill(*words).exit_code == 0


def test_pairs_of_pictures(model, tmp_path):
    pictures = shapes()
    write_images(tmp_path / "pictures", list(pictures.values()), [{"text": f"a {name}"} for name in pictures])
    out = tmp_path / "out"
    result = distill(model, tmp_path / "pictures", "-o", out, "--kind", "matching", "--steps", 2, *SMALL)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert config["kind"] == "matching" and config.get("guidance", 0) == 0 and config.get("temperature", 1) == 1
    assert json.loads((out / "pairs/pairs.json").read_text())["identity"]["of"] == "pictures"
    other = distill(model, tmp_path / "pictures", "-o", out, "--guidance", 1, "--steps", 2, *SMALL)
    assert other.exit_code == 2 and "pairs of another kind (of pictures -> samples" in other.output


def test_a_student_of_classes(tmp_path):
    model = write_class_model(tmp_path / "model")
    out = tmp_path / "out"
    result = distill(model, "-o", out, "--steps", 2, "--pairs", 128, "--batch-size", 4, "--validation", 0)
    assert result.exit_code == 0, result.output
    made = generate("0", "-m", model, "--student", out, "-o", tmp_path / "out.png")
    assert made.exit_code == 0, made.output


def test_a_dry_run_writes_nothing(model, prompts, tmp_path):
    result = distill(model, "--prompt-file", prompts, "-o", tmp_path / "out", "--dry-run", *SMALL)
    assert result.exit_code == 0 and "128 pairs" in result.output and "a step here" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--noise-std", 0.1), "--noise-std is for flows"),
        (("--independent",), "--independent does nothing alone"),
        (("--channels", 65), "must be a multiple of 64"),
    ],
)
def test_what_is_refused(model, prompts, tmp_path, options, message):
    result = distill(model, "--prompt-file", prompts, "-o", tmp_path / "out", "--steps", 2, "--pairs", 128, *options)
    assert result.exit_code == 2 and message in result.output


def test_the_model_may_be_named_with_m(model, prompts, tmp_path):
    named = distill("-m", model, "--prompt-file", prompts, "-o", tmp_path / "out", "--dry-run", *SMALL)
    assert named.exit_code == 0, named.output
    data = distill("-m", model, tmp_path / "nothing", "-o", tmp_path / "out", "--steps", 1, *SMALL)
    assert data.exit_code == 2 and "nothing" in data.output
    assert "there is no model" in distill("-o", tmp_path / "out").output


def test_samples_need_prompts(model, tmp_path):
    result = distill(model, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "samples need prompts" in result.output

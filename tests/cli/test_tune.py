"""`mlx-starflow tune`, the plan it writes, `--method auto` and `--verify`."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from helpers.commands import Command
from helpers.model_directories import write_image_model, write_video_model
from helpers.students import write_student
from helpers.tiny_flows import tiny_flow

from mlx_starflow import load
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.sampling import JacobiSettings, RollingSettings, SamplingPlan, SequentialSettings

tune = Command("tune")
generate = Command("generate")


@pytest.fixture(scope="module")
def untuned(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("untuned"))


@pytest.fixture
def model(untuned, tmp_path):
    return shutil.copytree(untuned, tmp_path / "model")


def test_a_plan_is_written(model):
    result = tune(model, "--tolerance", 0.02)
    assert result.exit_code == 0, result.output
    assert "rolling window of 8" in result.output
    assert "sampling_plan.json is written" in result.output
    plan = SamplingPlan.find(model)
    assert plan.tolerance == 0.02
    assert plan.measured["guidance"] == 1.0
    assert plan.measured["samples"] == 4
    assert plan.measured["certificate"] <= 0.02
    assert load(model).plan == plan


@pytest.mark.parametrize(("name", "bits"), [("8", 8), ("8,4", (8, 4))])
def test_a_plan_for_keys_and_values_in_fewer_bits(model, name, bits):
    result = tune(model, "--tolerance", 0.02, "--kv-bits", name)
    assert result.exit_code == 0, result.output
    assert SamplingPlan.find(model).kv_bits == bits


def test_a_plan_for_videos(tmp_path):
    model = write_video_model(tmp_path / "model")
    result = tune(model, "--tolerance", 0.02, "--frames", 9, "--size", "32x32", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert "s a latent frame" in result.output
    found = SamplingPlan.find(model)
    assert found.frame == 4 and found.measured["frames"] == 3 and found.measured["certificate"] <= 0.02
    total = sum(found.measured["evaluations"])
    assert found.measured["evaluations_per_frame"] == pytest.approx(total / 3, abs=0.01)
    assert found.measured["seconds_per_frame"] > 0 and found.precision
    assert json.loads((tmp_path / "plan.json").read_text())["frame"] == 4
    # It is what videos are made by, of this and of other sizes, and pictures of the model too.
    pipe = load(model)
    assert pipe.plan == found
    for options in ({"size": (32, 32), "frames": 9}, {}, {"frames": 33, "context": 1}):
        made = pipe.generate("a cat", seed=1, verify=True, **options)
        assert made.settings.method == "auto" and made.stats.certificate.max <= 0.1
    assert pipe.generate("a cat", seed=1, frames=1, verify=True).stats.certificate.max <= 0.1
    assert "at most 17, as it was trained on" in tune.mistake(model, "--frames", 21)


def test_a_dry_run_writes_nothing(model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    result = tune(model, "--dry-run", "--prompt-file", prompts, "--guidance", 0)
    assert result.exit_code == 0, result.output
    assert "for 2 samples" in result.output
    assert SamplingPlan.find(model) is None


def test_a_flow_without_prompts(tmp_path):
    flow = tiny_flow(txt_size=0, txt_dim=0)
    save_model(tmp_path, parameters(flow), {"model_type": "starflow", **flow.config.to_dict()})
    result = tune(tmp_path, "--tolerance", 0.02)
    assert result.exit_code == 0, result.output
    assert SamplingPlan.find(tmp_path).measured["guidance"] == 0.0


def test_mistakes(model, tmp_path):
    assert "nowhere" in tune.mistake(tmp_path / "nowhere")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "holds no text" in tune.mistake(model, "--prompt-file", empty)
    assert tune(model, "--tolerance", 0).exit_code == 2


def test_auto_follows_the_plan(model, tmp_path):
    # Without a plan it is the rolling window.
    made, rolling = (load(model).generate("a cat", seed=1, method=method) for method in (None, "rolling"))
    assert made.settings.method == "auto" and mx.array_equal(made.latents, rolling.latents)
    assert made.stats.evaluations == rolling.stats.evaluations != [16, 16]
    SamplingPlan((SequentialSettings(), JacobiSettings(16, max_iterations=3)), 0.1, {}).save(model)
    result = load(model).generate("a cat", seed=1)
    assert result.settings.method == "auto"
    assert result.stats.evaluations[0] <= 3 and result.stats.evaluations[1] == 16
    assert load(model).generate("a cat", seed=1, method="sequential").stats.evaluations == [16, 16]
    (model / "sampling_plan.json").write_text("{}")
    assert "sampling_plan.json is damaged" in generate.mistake("a cat", "-m", model, "-o", tmp_path / "a.png")


def test_certificates(model, tmp_path):
    picture = tmp_path / "cat.png"
    result = generate("a cat", "a dog", "-m", model, "--seed", 1, "--method", "sequential", "--verify", "-o", picture)
    assert result.exit_code == 0, result.output
    assert result.output.count("|f(x) - z| at most") == 2
    certificate = read_metadata(picture)["certificate"]
    assert 0 < certificate["rms"] < certificate["max"] < 1e-3
    # Without --verify it is there, but not printed, where sampling is not sequential; with --no-verify it is not.
    words = ["a cat", "-m", model, "--seed", 1, "-o", picture, "--overwrite"]
    for more, kept in {
        "--method jacobi": True,
        "--method sequential": False,
        "--method jacobi --no-verify": False,
    }.items():
        result = generate(*words, *more.split())
        assert result.exit_code == 0 and "|f(x) - z|" not in result.output
        assert ("certificate" in read_metadata(picture)) == kept
    assert json.dumps(certificate)  # plain numbers


def test_each_picture_has_its_own(model):
    result = load(model).generate(["a cat", "a dog"], seed=1, images=2, batch_size=3, method="sequential")
    assert len(result.stats.certificates) == 4
    assert result.stats.certificate.max == max(each.max for each in result.stats.certificates) < 1e-3
    assert [how["certificate"]["max"] for how in result.metadata] == [each.max for each in result.stats.certificates]
    assert load(model).generate("a cat", verify=False).stats.certificate is None


def test_a_student_is_tried(model, tmp_path):
    result = tune(model, "--student", write_student(tmp_path / "student", model), "--least", "evaluations")
    assert result.exit_code == 0, result.output
    assert "first guess draft" in result.output
    other = write_student(tmp_path / "other", model, teacher="another")
    assert "learned from other weights" in tune(model, "--student", other).output


def test_a_plan_with_drafts(model, tmp_path):
    drafted, window = RollingSettings(window=16, guess="draft"), RollingSettings(window=16)
    SamplingPlan((window, drafted), 1e-2, {}, fingerprint(model)).save(model)
    pipe = load(model)
    assert pipe.method(pipe.settings).blocks == (window, window)
    made = pipe.generate("a cat", seed=1, method="draft", student=write_student(tmp_path / "student", model))
    assert pipe.method(made.settings) == pipe.plan and made.stats.student_evaluations == 1
    assert made.stats.certificate.max < 1e-2
    assert pipe.inversion() == pipe.plan.without_drafts()

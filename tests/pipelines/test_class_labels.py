"""Class labels to images: TarFlows and iTARFlows through `ClassPipeline` and `mlx-starflow generate`."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command
from helpers.model_directories import write_class_model
from helpers.precision import bound, roundings
from helpers.tiny_flows import tiny_flow
from PIL import Image

from mlx_starflow import load
from mlx_starflow.errors import StarflowError
from mlx_starflow.media.metadata import read_metadata
from mlx_starflow.media.noise import draw_noise
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.pipelines import ClassPipeline
from mlx_starflow.sampling import denoise, iterate, noise_levels, sample

generate = Command("generate")


def write_levels_model(directory: Path, names: str | None = "cat\ndog\nowl\n", **changes: object) -> Path:
    """An iTARFlow over 8x8 images, with three classes and their names."""
    flow = tiny_flow("levels", **changes)
    files = {} if names is None else {"classes.txt": names.encode()}
    return save_model(directory, parameters(flow), {"model_type": "itarflow", **flow.config.to_dict()}, files=files)


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_levels_model(tmp_path_factory.mktemp("levels") / "model")


@pytest.fixture(scope="module")
def tarflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_model(tmp_path_factory.mktemp("tarflow") / "model")


def test_an_itarflow_is_sampled_and_denoised_in_steps(levels):
    pipe = load(levels)
    assert isinstance(pipe, ClassPipeline) and pipe.classes == ["cat", "dog", "owl"]
    settings = pipe.settings.with_classes(denoise_steps=3).updated(method="sequential")
    result = pipe.generate(["dog", "0"], seed=5, settings=settings, guidance=0.8)
    z = mx.array(draw_noise([5, 5], (16, 12)))
    labels, flow = mx.array([1, 0]), pipe.flow
    x = sample(flow, z, labels, guidance=0.8, annealed_guidance=True, noise_level=0.4)
    clean = iterate(flow, x, labels, noise_levels(0.4, 0.05, 3))
    assert np.abs(np.array(result.latents - clean)).max() < 1e-4
    assert [each.max < 1e-3 for each in result.stats.certificates] == [True, True]
    assert result.images[0].size == (8, 8) and result.prompts == ["dog", "0"]
    # A seed means one image, whatever it is generated together with.
    alone = pipe.generate("dog", seed=5, settings=settings, guidance=0.8)
    assert np.abs(np.array(alone.latents[0] - result.latents[0])).max() < bound(1e-4, roundings(10))


def test_a_tarflow_takes_one_step(tarflow):
    pipe = load(tarflow)
    assert pipe.classes == ["0", "1", "2"]
    result = pipe.generate("2", seed=1, method="sequential")
    x = sample(pipe.flow, mx.array(draw_noise([1], (16, 12))), mx.array([2]))
    assert np.abs(np.array(result.latents - denoise(pipe.flow, x, mx.array([2])))).max() < 1e-4
    noisy = pipe.generate("2", seed=1, denoise=False, method="sequential")
    assert np.abs(np.array(noisy.latents - x)).max() < 1e-5
    for changes in ({"denoise_steps": 2}, {"stochastic": True}, {"clip": True}):
        with pytest.raises(StarflowError, match="is no iTARFlow, and denoises in one step"):
            pipe.generate("2", settings=pipe.settings.with_classes(**changes))


def test_fresh_noise_follows_from_the_seed(levels):
    pipe = load(levels)
    settings = pipe.settings.with_classes(denoise_steps=3, stochastic=True).updated(method="sequential")
    both = pipe.generate(["cat", "cat"], seed=[3], images=1, settings=settings)
    again = pipe.generate("cat", seed=3, settings=settings)
    plain = pipe.generate("cat", seed=3, settings=pipe.settings.with_classes(denoise_steps=3))
    assert np.abs(np.array(both.latents[1] - again.latents[0])).max() < bound(1e-5, roundings(10))
    assert np.abs(np.array(plain.latents - again.latents)).max() > 0.01


def test_states_on_the_way(levels):
    pipe = load(levels)
    made = pipe.generate("cat", seed=1, settings=pipe.settings.with_classes(denoise_steps=3), keep_steps=True)
    # Noise, two blocks, two of three steps and the image.
    assert [len(steps) for steps in made.steps] == [6]
    assert made.steps[0][-1].tobytes() == made.images[0].tobytes()


def test_unknown_classes_are_named(levels, tarflow):
    with pytest.raises(StarflowError, match=r"no prompt 'cow' but the name of a class \(cat, dog, owl\) or a number"):
        load(levels).generate("cow")
    for wrong in ("3", "-1", "1.0", "\u0663"):
        with pytest.raises(StarflowError, match="but a number from 0 to 2"):
            load(tarflow).generate(wrong)


@pytest.mark.parametrize("names", ["cat\ndog\n", "cat\ndog\ndog\n", "cat\ndog\nowl\ncow\n"])
def test_names_must_be_as_many_as_classes(names, tmp_path):
    with pytest.raises(StarflowError, match=r"classes\.txt must hold 3 different names"):
        load(write_levels_model(tmp_path / "model", names))


def test_names_stay_with_quantized_weights(levels, tmp_path):
    quantize_model(levels, tmp_path / "small", "8")
    assert load(tmp_path / "small").classes == ["cat", "dog", "owl"]


def test_likelihood_at_a_level(levels, tarflow, tmp_path):
    pipe = load(levels)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    default = pipe.score([image], "cat", draws=1)[0].nll
    pipe.noise_level = 0.05
    assert pipe.flow.noise_std == pipe.dense_flow().noise_std == pipe.exact_flow().noise_std == 0.05
    low = pipe.score([image], "cat", draws=1)[0].nll
    pipe.noise_level = 0.4
    assert pipe.score([image], "cat", draws=1)[0].nll == pytest.approx(default) and low != pytest.approx(default)
    with pytest.raises(StarflowError, match="a noise level must be above 0"):
        pipe.noise_level = 0.0
    with pytest.raises(StarflowError, match="knows no noise levels"):
        load(tarflow).noise_level = 0.1
    image.save(tmp_path / "a.png")
    score = Command("score")
    words = [tmp_path / "a.png", "-m", levels, "--prompt", "cat", "--draws", "1", "--csv", "-"]
    nll = [float(score(*words, *more).stdout.splitlines()[1].split(",")[2]) for more in ([], ["--noise-level", "0.05"])]
    assert nll == pytest.approx([default, low], rel=1e-4)
    assert "for an iTARFlow" in score.mistake(tmp_path / "a.png", "--noise-level", "0.1")
    assert "knows no noise levels" in score.mistake(tmp_path / "a.png", "-m", tarflow, "--noise-level", "0.1")
    assert "is not in the range x>0" in score.mistake(tmp_path / "a.png", "-m", levels, "--noise-level", "0")


def test_classify_gives_names(levels, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    done = Command("classify")(tmp_path / "a.png", "-m", levels, "--draws", "1")
    assert done.exit_code == 0 and any(name in done.stdout for name in ("cat", "dog", "owl"))


def test_generate_from_the_command_line(levels, tmp_path):
    out = tmp_path / "a.png"
    words = ["-m", levels, "--seed", "4", "-n", "2", "--denoise-steps", "2", "--guidance", "0.7", "--stochastic"]
    done = generate("--label", "cat", "--labels", "2,dog", *words, "--guided-blocks", "1", "--verify", "-o", out)
    assert done.exit_code == 0, done.output
    assert Image.open(out).size == (2 * 8 + 2, 3 * 8 + 2 * 2) and "|f(x) - z| at most" in done.stdout
    found = read_metadata(out)
    assert found["prompts"] == ["cat", "2", "dog"] and found["seeds"] == [4, 5]
    assert found["settings"]["denoise_steps"] == 2 and found["settings"]["stochastic"] is True
    again = generate("--from", out, "-o", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(out).tobytes()


def test_options_of_classes_are_refused_elsewhere(levels, tarflow, tmp_path):
    out = ["-o", tmp_path / "a.png"]
    assert "--label is for models of classes" in generate.mistake("--label", "3", *out)
    assert "--denoise-steps is for models of classes" in generate.mistake("a cat", "--denoise-steps", "3", *out)
    assert "denoises in one step" in generate.mistake("-m", tarflow, "--label", "1", "--denoise-steps", "3", *out)
    assert "do not go together" in generate.mistake("-m", levels, "0", "--denoise-steps", "3", "--no-denoise", *out)
    assert "knows pictures of 8x8 pixels alone" in generate.mistake("-m", levels, "0", "--size", "16x16", *out)
    assert "takes no prompt 'cow'" in generate.mistake("-m", levels, "--labels", "cat,cow", *out)
    assert not (tmp_path / "a.png").exists()


def test_best_of_and_noise_files(levels, tmp_path):
    out, noise = tmp_path / "a.png", tmp_path / "z.safetensors"
    quick = ["-m", levels, "--denoise-steps", "1", "--method", "sequential"]
    done = generate("owl", *quick, "--best-of", "3", "--seed", "1", "--save-noise", noise, "-o", out)
    assert done.exit_code == 0 and "the best of 3" in done.stdout, done.output
    done = generate("owl", *quick, "--load-noise", noise, "-o", tmp_path / "b.png")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "b.png").tobytes() == Image.open(out).tobytes()

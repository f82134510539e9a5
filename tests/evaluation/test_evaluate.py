"""Whole evaluations of tiny models: what they say, stopped and gone on with, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import message
from helpers.images import smooth_images, write_images
from helpers.precision import bound, roundings

from mlx_starflow.errors import Cancelled
from mlx_starflow.evaluation import (
    CLIPScorer,
    EvaluationSettings,
    Gaussian,
    ListedPrompt,
    OwnFeatures,
    evaluate,
    frechet_distance,
)
from mlx_starflow.media.image_files import ImageFile, find_images
from mlx_starflow.pipelines import ClassPipeline

SETTINGS = EvaluationSettings(count=24, seed=5, batch_size=4, likelihood=6, draws=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Captioned pictures, and others that nobody was trained on."""
    root = tmp_path_factory.mktemp("pictures")
    images = smooth_images(50)
    rows = [{"text": str(number % 3)} for number in range(50)]  # classes of the tiny TarFlow too
    write_images(root / "data", images[:26], rows[:26])
    write_images(root / "held-out", images[26:], rows[26:])
    return root / "data", root / "held-out"


@pytest.fixture(scope="module")
def files(folders) -> tuple[list[ImageFile], list[ImageFile]]:
    return find_images([folders[0]]), find_images([folders[1]])


def numbers(model, files, settings=SETTINGS, **options) -> dict:
    found, _ = evaluate(model, files[0], held_out=files[1], settings=settings, **options)
    return found.to_dict()


def test_all_measures(model, files) -> None:
    found, statistics = evaluate(model, files[0], held_out=files[1], settings=SETTINGS)
    assert statistics is not None and statistics.count == 26
    assert found.counts == {"samples": 24, "data": 26, "held-out": 24}
    samples, flow, memorization = found.samples, found.flow, found.memorization
    assert samples is not None and samples.frechet > 0
    assert samples.kernel is not None and samples.kernel.error > 0
    assert samples.precision is not None and 0 <= samples.precision <= 1
    assert flow is not None and flow.of == "held-out" and flow.pictures == 6
    assert flow.prompt_fit is not None and flow.samples_prompt_fit is not None and flow.typicality is not None
    assert flow.gap is not None and 0 < flow.gap.p <= 1
    assert (flow.bits is None) == (samples.features == "autoencoder" or model.flow.noise_type != "uniform")
    assert memorization is not None and memorization.p is not None and len(memorization.pairs) == 10
    text = "\n".join(found.lines())
    assert text.startswith(f"{model.name}: 24 samples, 26 data, 24 held-out")
    for word in ("Fréchet", "kernel", "precision", "recall", "NLL", "prompt fit", "typicality", "held-out", "closest"):
        assert f"\n{word}" in text
    assert "24 pictures is too high" in text and "not Inception-V3's" in text
    json.dumps(found.to_dict(), allow_nan=False)


def test_samples_are_those_of_generate(model, files) -> None:
    found = numbers(model, files)
    prompts = [each.caption for each in files[0]]
    images = [model.generate(prompts[index], seed=5 + index).images[0] for index in range(24)]
    features = OwnFeatures(model, "")
    real = features(np.stack([np.asarray(model.fit(each.open())) for each in files[0]]))
    made = features(np.stack([np.asarray(image) for image in images]))
    expected = frechet_distance(Gaussian.of(real), Gaussian.of(made))
    # Pictures of a batch and pictures alone: in half precision latents are up to 10 roundings apart (see `roundings`),
    # and covariances, which are quadratic in features, by twice as much.
    assert found["samples"]["frechet"] == pytest.approx(expected, rel=bound(1e-3, roundings(20)))


def test_stopped_anywhere_and_gone_on_with(model, files, tmp_path) -> None:
    """Whatever was being computed, the end is the same to the last digit, and what was finished is not done again."""
    settings = EvaluationSettings(count=150, seed=5, batch_size=8, likelihood=20, draws=2)
    whole = numbers(model, files, settings, folder=tmp_path / "whole")
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()}
    assert {"samples-00002.safetensors", "likelihood-data-00001.safetensors"} <= parts.keys()
    left, times = 3, 0

    def stop(progress) -> None:
        nonlocal left
        if progress.phase in ("evaluation", "likelihood", "features"):
            left -= 1
            if left == 0:
                progress.cancel()

    while True:
        left = 2 + 2 * times  # what was kept is counted too
        try:
            resumed = numbers(model, files, settings, folder=tmp_path / "stopped", callback=stop)
            break
        except Cancelled:
            times += 1
            assert times < 20
    assert times > 3
    assert resumed == whole
    again = numbers(model, files, settings, folder=tmp_path / "whole")
    assert again == whole
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "whole").iterdir()} == parts


def test_more_samples_later(model, files, tmp_path) -> None:
    """Whole parts of fewer samples are kept."""
    more = EvaluationSettings(count=96, seed=5, batch_size=8, likelihood=0)
    expected = numbers(model, files, more)
    numbers(model, files, EvaluationSettings(count=70, seed=5, batch_size=8, likelihood=0), folder=tmp_path)
    first = (tmp_path / "samples-00000.safetensors").stat().st_mtime_ns
    assert numbers(model, files, more, folder=tmp_path) == expected
    assert (tmp_path / "samples-00000.safetensors").stat().st_mtime_ns == first


def test_another_evaluation_in_the_folder(model, files, tmp_path) -> None:
    numbers(model, files, folder=tmp_path)
    other = EvaluationSettings(count=24, seed=6, batch_size=4, likelihood=6, draws=2)
    assert "another seed: 5 there, 6 here" in message(numbers, model, files, other, folder=tmp_path)
    sampling = model.settings.updated(temperature=0.5)
    assert "another sampling" in message(numbers, model, files, sampling=sampling, folder=tmp_path)


def test_data_that_changed_is_read_again(latent_flow, tmp_path) -> None:
    write_images(tmp_path / "data", 24)
    first = numbers(latent_flow, (find_images([tmp_path / "data"]), []), folder=tmp_path / "out")
    smooth_images(60)[59].save(tmp_path / "data/0.png")
    second = numbers(latent_flow, (find_images([tmp_path / "data"]), []), folder=tmp_path / "out")
    assert first["samples"]["frechet"] != second["samples"]["frechet"]


def test_pictures_that_cannot_be_read(latent_flow, tmp_path) -> None:
    write_images(tmp_path / "data", 24)
    (tmp_path / "data/7.png").write_bytes(b"nothing")
    for _ in range(2):  # the second time from the folder
        found = numbers(latent_flow, (find_images([tmp_path / "data"]), []), folder=tmp_path / "out")
        assert found["pictures"]["data"] == 23
        assert [Path(each["picture"]).name for each in found["skipped"]] == ["7.png"]
        assert found["memorization"]["p"] is None and found["likelihood"]["of"] == "data"
        assert found["likelihood"]["prompt_fit"] is None and found["likelihood"]["gap"] is None


def test_statistics_instead_of_data(model) -> None:
    features = OwnFeatures(model, "")
    size = model.size
    pixels = np.random.default_rng(0).integers(0, 256, (30, size[1], size[0], 3), np.uint8)
    usual = Gaussian.of(features(pixels))
    found, statistics = evaluate(model, statistics=usual, settings=SETTINGS)
    assert statistics is None and found.samples is not None
    assert found.samples.kernel is None and found.flow is None and found.memorization is None
    assert found.samples.frechet > 0
    other = Gaussian(np.zeros(2048), np.eye(2048))
    assert "of 2048 features and " in message(evaluate, model, statistics=other, settings=SETTINGS)


class Fixed(CLIPScorer):
    """A CLIP that takes a prompt for a tenth of its score."""

    def __init__(self) -> None:
        self.name = self.identity = "fixed"

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        assert len(pixels) == len(prompts)
        return np.array([10.0 * int(prompt) for prompt in prompts])


def test_prompts_of_kinds(model, files, tmp_path) -> None:
    prompts = [ListedPrompt("1", "one"), ListedPrompt("2", "two")]
    for _ in range(2):
        found = numbers(model, files, prompts=prompts, clip=Fixed(), folder=tmp_path)
        assert found["clip"]["model"] == "fixed" and found["clip"]["mean"] == 15.0
        assert {kind: each["mean"] for kind, each in found["clip"]["by_kind"].items()} == {"one": 10.0, "two": 20.0}
        assert found["pictures"]["samples"] == 24
    assert "another clip" in message(numbers, model, files, folder=tmp_path)


def test_the_worst_certificate(latent_flow, files) -> None:
    found = numbers(latent_flow, files, EvaluationSettings(count=20, likelihood=0, verify=True))
    assert 0 < found["certificate"] < 1e-2


def test_too_few_pictures(model, files, tmp_path) -> None:
    assert "need 20 of each kind or more" in message(evaluate, model, files[0][:5], settings=SETTINGS)
    assert "give real pictures" in message(evaluate, model, settings=SETTINGS)
    assert "20 to 1,000,000 samples, not 3" in message(EvaluationSettings, count=3)


def test_classes_in_turn_where_there_are_no_captions(pixel_flow, tmp_path) -> None:
    write_images(tmp_path / "data", 24)
    assert isinstance(pixel_flow, ClassPipeline)
    out = tmp_path / "out"
    numbers(pixel_flow, (find_images([tmp_path / "data"]), []), folder=out)
    found = numbers(pixel_flow, (find_images([tmp_path / "data"]), []), folder=out)
    assert [pair["prompt"] for pair in found["memorization"]["pairs"]] == [
        str((pair["seed"] - 5) % 3) for pair in found["memorization"]["pairs"]
    ]

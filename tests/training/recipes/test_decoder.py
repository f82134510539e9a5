"""A decoder trained alone: better pictures from noisy latents, everything else as it was, resumed exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import Command, message
from helpers.images import gradients, write_images
from helpers.model_directories import same, write_class_model, write_video_model
from mlx.utils import tree_flatten

from mlx_starflow import load
from mlx_starflow.errors import Cancelled
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.training.config import TrainingConfig, TrainingOptions
from mlx_starflow.training.recipes.decoder import (
    DecoderTraining,
    NoisyPictures,
    decoder_loss,
    measure_decoder,
    train_decoder,
)

train = Command("train")

OPTIONS = TrainingOptions(steps=40, batch_size=4, lr=1e-2, ema=0.0, noise_std=0.3, save_steps=8)

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    write_images(folder, gradients(40))
    return folder


@pytest.fixture(scope="module")
def directory(latent_flow):
    return latent_flow.directory


@pytest.fixture(scope="module")
def trained(directory, data, tmp_path_factory):
    """The directory of a model whose decoder was trained, and what was reported."""
    out = tmp_path_factory.mktemp("trained") / "model"
    mx.disable_compile()
    try:
        return out, train_decoder(data, directory, out, OPTIONS, progress=False)
    finally:
        mx.enable_compile()


def test_pictures_of_noisy_latents_are_nearer(trained) -> None:
    """In decibels and in features: of held-out pictures, without noise and with it. The decoder was random."""
    _, report = trained
    assert [each.noise for each in report.after] == [0.0, 0.3]
    for before, after in zip(report.before, report.after, strict=True):
        assert after.decibels > before.decibels + 0.5
        assert after.distance < 0.95 * before.distance


def test_all_else_stays_as_it_is(trained, directory) -> None:
    out, _ = trained
    for part in (".", "text_encoder"):
        assert same(load_weights(out / part), load_weights(directory / part))
        assert (out / part / "config.json").read_text() == (directory / part / "config.json").read_text()
    before, after = load_weights(directory / "vae"), load_weights(out / "vae")
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    image = gradients(1)[0]
    first, second = load(directory), load(out)
    assert np.array_equal(first.to_data(image), second.to_data(image))
    assert first.score(image)[0].nll == second.score(image)[0].nll
    made = [pipe.generate("a", seed=1) for pipe in (first, second)]
    assert np.array_equal(*(np.array(each.latents) for each in made))
    assert not np.array_equal(*(np.asarray(each.images[0]) for each in made))


def test_resumed_exactly(trained, directory, data, tmp_path) -> None:
    """Stopped before and after the discriminator takes part."""
    out, report = trained
    stops = [5, 28]

    def stop(progress) -> None:
        if progress.phase == "decoder" and stops and progress.done >= stops[0]:
            stops.pop(0)
            progress.cancel()

    for _ in range(2):
        with pytest.raises(Cancelled):
            train_decoder(data, directory, tmp_path / "model", OPTIONS, callback=stop)
    resumed = train_decoder(data, directory, tmp_path / "model", OPTIONS, progress=False)
    assert resumed == report
    assert same(load_weights(tmp_path / "model/vae"), load_weights(out / "vae"))


def test_other_runs_are_refused(trained, directory, data, tmp_path) -> None:
    out, _ = trained
    said = message(train_decoder, data, directory, out, OPTIONS, adversarial_from=3)
    assert "adversarial_from 20 -> 3" in said
    write_images(tmp_path / "others", gradients(41)[1:])
    assert "other pictures" in message(train_decoder, tmp_path / "others", directory, out, OPTIONS)
    assert "own folder" in message(train_decoder, data, directory, directory, OPTIONS)
    assert "holds another model" in message(
        train_decoder, data, directory, write_class_model(tmp_path / "classes"), OPTIONS
    )


def test_models_without_such_a_decoder(data, tmp_path) -> None:
    options = tmp_path / "out", OPTIONS
    assert "vae" in message(train_decoder, data, write_class_model(tmp_path / "classes"), *options)
    assert "of images" in message(train_decoder, data, write_video_model(tmp_path / "video"), *options)


# ---- the loss


@pytest.fixture
def whole(directory) -> DecoderTraining:
    mx.random.seed(0)
    return DecoderTraining(load(directory, dtype="float32").vae)


def batch(adversarial: bool) -> dict[str, mx.array]:
    images = np.stack([np.asarray(image) for image in gradients(4)])
    data = NoisyPictures(images, (4, 4, 4), 0 if adversarial else 99)
    config = TrainingConfig(steps=10, batch_size=4, noise_std=0.3)
    return {name: mx.array(each) for name, each in data.batch(np.random.default_rng(0), config, 0.5).items()}


def gradients_of(model: DecoderTraining, adversarial: bool) -> dict[str, mx.array]:
    found = mx.grad(lambda weights: (model.update(weights), decoder_loss(model, batch(adversarial))[0])[1])(
        model.trainable_parameters()
    )
    return dict(tree_flatten(found))


def largest(gradients: dict[str, mx.array], part: str) -> float:
    return max(float(mx.abs(each).max()) for name, each in gradients.items() if name.startswith(part))


def test_who_learns_what(whole) -> None:
    """The encoder nothing; the discriminator nothing before its time, and then only to tell pictures apart."""
    without, with_it = gradients_of(whole, False), gradients_of(whole, True)
    assert not [name for name in with_it if name.startswith("vae.encoder")]
    assert largest(without, "discriminator") == 0.0 and largest(without, "vae.decoder") > 0
    assert largest(with_it, "discriminator") > 0
    # Its gradient is that of the hinge loss alone: the decoder's term does not reach it, and the other way round.
    images, noise = batch(True)["images"], batch(True)["noise"]
    made = whole.decode(images, noise)

    def game(weights):
        whole.discriminator.update(weights)
        real, false = whole.discriminator(images), whole.discriminator(made)
        return 0.5 * (mx.maximum(1 - real, 0).mean() + mx.maximum(1 + false, 0).mean())

    alone = dict(tree_flatten(mx.grad(game)(whole.discriminator.trainable_parameters())))
    for name, expected in alone.items():
        np.testing.assert_allclose(np.array(with_it[f"discriminator.{name}"]), np.array(expected), atol=1e-5)
    some = "vae.decoder.conv_out.weight"
    assert not np.allclose(np.array(without[some]), np.array(with_it[some]), atol=1e-6)


def test_the_judge_keeps_its_weights(whole) -> None:
    before = dict(tree_flatten(whole.discriminator.parameters()))
    images = batch(True)["images"]
    assert mx.array_equal(whole.judged(images), whole.discriminator(images))
    assert same(before, dict(tree_flatten(whole.discriminator.parameters())))


def test_noise_and_mirrors() -> None:
    images = np.stack([np.asarray(image) for image in gradients(4)])
    data = NoisyPictures(images, (4, 4, 4), 5)
    config, rng = TrainingConfig(steps=10, batch_size=400, noise_std=0.3), np.random.default_rng(0)
    early, late = data.batch(rng, config, 0.4), data.batch(rng, config, 0.5)
    assert (early["adversarial"] == 0).all() and (late["adversarial"] == 1).all()
    spread = early["noise"].std(axis=(1, 2, 3))
    assert spread.max() < 0.3 * 1.4 and np.abs(np.mean(spread) - 0.15) < 0.02
    known = {np.round((view + 1) * 127.5).astype(np.uint8).tobytes() for view in early["images"]}
    assert known == {each.tobytes() for image in images for each in (image, image[:, ::-1])}


def test_the_measure_of_a_perfect_decoder(whole, monkeypatch) -> None:
    images = np.stack([np.asarray(image) for image in gradients(3)])
    monkeypatch.setattr(DecoderTraining, "decode", lambda self, images, noise: images + 0.02)
    found = measure_decoder(whole, images, 0.0)
    assert found.decibels == pytest.approx(40.0, abs=0.3)  # 20 log10(2 / 0.02); clipping at white takes a little
    assert replace(found, noise=0.25).noise == 0.25


# ---- the command


def test_the_command(directory, data, tmp_path) -> None:
    out = tmp_path / "model"
    words = [data, "-o", out, "--init", directory, "--only", "decoder", "--steps", 4, "--batch-size", 4]
    result = train(*words, "--adversarial-from", 2)
    assert result.exit_code == 0, result.stderr
    assert "before, 4 held-out pictures: noise 0.00: " in result.stdout and f"wrote {out}" in result.stdout
    assert json.loads((out / "vae/config.json").read_text()) == json.loads((directory / "vae/config.json").read_text())
    lines = [json.loads(line) for line in (out / "training/decoder/log.jsonl").read_text().splitlines()]
    assert {"L1", "perceptual", "discriminator"} <= lines[-1].keys()
    again = train(*words, "--adversarial-from", 2)
    assert again.exit_code == 0 and "wrote" in again.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "decoder"], "give --init too"),
        (["--perceptual", "vgg.pth"], "give --only too"),
        (["--only", "decoder", "--init", "demo", "--patience", 3], "--patience is not about a decoder"),
        (["--only", "decoder", "--init", "demo", "--perceptual", "none.pth"], "none.pth"),
    ],
)
def test_mistakes(data, tmp_path, options, said) -> None:
    assert said in train.mistake(data, "-o", tmp_path / "out", *options)

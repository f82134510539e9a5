"""Images as they are finished."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import message
from helpers.model_directories import write_image_model

from mlx_starflow import load
from mlx_starflow.media.metadata import read_metadata


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(directory):
    return load(directory)


def test_the_images_of_generate(pipe, tmp_path):
    asked = {"seed": 5, "images": 3, "batch_size": 4, "keep_steps": True}
    result = pipe.generate(["a cat", "a dog"], **asked)
    stream = pipe.stream(["a cat", "a dog"], **asked)
    assert len(stream) == stream.images == 6
    made = list(stream)
    assert [each.prompt for each in made] == result.prompts and [each.seed for each in made] == result.seeds
    assert [each.metadata for each in made] == result.metadata
    assert [each.certificate for each in made] == result.stats.certificates
    assert [each.image for each in made] == result.images
    assert [each.steps for each in made] == result.steps
    assert all((each.noise == noise).all() for each, noise in zip(made, result.noise, strict=True))
    assert all(np.array_equal(each.latents, x) for each, x in zip(made, result.latents, strict=True))
    assert stream.stats.evaluations == result.stats.evaluations and stream.settings == result.settings
    made[4].save(tmp_path / "dog.png")
    assert read_metadata(tmp_path / "dog.png") == made[4].metadata


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_noise_is_the_seed_s_whatever_the_batch(pipe, batch_size):
    whole = pipe.generate(["a cat", "a dog"], seed=7, images=2)
    made = list(pipe.stream(["a cat", "a dog"], seed=7, images=2, batch_size=batch_size))
    assert all((each.noise == noise).all() for each, noise in zip(made, whole.noise, strict=True))
    differences = [
        np.abs(np.asarray(a.image).astype(int) - np.asarray(b)) for a, b in zip(made, whole.images, strict=True)
    ]
    assert np.max(differences) <= 1


def test_each_comes_before_the_next_is_begun(pipe, monkeypatch):
    begun, invert = [], type(pipe.backend).invert
    monkeypatch.setattr(type(pipe.backend), "invert", lambda *arguments: begun.append(None) or invert(*arguments))
    stream = pipe.stream("a cat", images=5, seed=1, batch_size=2)
    assert not begun
    assert [len(begun) for _ in stream] == [1, 1, 2, 2, 3]
    begun.clear()
    assert [len(begun) for _ in pipe.stream("a cat", images=5, seed=1, batch_size=2, live=False)] == [3] * 5
    stopped = pipe.stream("a cat", images=5, batch_size=1)
    next(stopped)
    stopped.close()
    assert list(stopped) == []
    assert len(pipe.generate("a cat").images) == 1  # it goes on working


def test_low_memory_holds_one_network_at_a_time(directory, pipe):
    frugal = load(directory, low_memory=True)
    held = []
    made = []
    for each in frugal.stream("a cat", images=3, seed=1, batch_size=1):
        held.append(set(frugal.backend.held))
        made.append(each)
    assert held == [set()] * 3
    assert [each.image for each in made] == pipe.generate("a cat", images=3, seed=1, batch_size=1).images


def test_the_best_of_several(pipe):
    best = pipe.best_of(["a cat", "a dog"], 3, images=2, seed=10)
    made = list(pipe.stream(["a cat", "a dog"], best_of=3, images=2, seed=10, batch_size=4))
    assert [each.seed for each in made] == best.result.seeds
    assert [each.prompt for each in made] == best.result.prompts
    kept = best.fits[range(4), best.chosen]
    np.testing.assert_allclose([each.fit for each in made], kept, rtol=1e-3, atol=1e-2)


def test_given_noise(pipe):
    first = pipe.generate("a cat", seed=1, images=4)
    made = list(pipe.stream("a cat", images=2, best_of=2, noise=first.noise))
    assert len(made) == 2 and all(each.seed is None for each in made)
    assert all(any((each.noise == noise).all() for noise in first.noise) for each in made)


def test_mistakes_are_said_at_once(pipe):
    assert "there is no prompt" in message(pipe.stream, [])
    assert "images must be 1 or more" in message(pipe.stream, "a", images=0)
    assert "multiples of 2 pixels" in message(pipe.stream, "a", size=(7, 8))
    assert "noise has shape" in message(pipe.stream, "a", noise=np.zeros((2, 4, 4, 4), np.float32))
    assert "chosen from 1 or more" in message(pipe.stream, "a", best_of=0)
    assert "empty prompt" in message(pipe.stream, " ", best_of=2)
    assert "3 seeds a prompt cannot be shared out" in message(pipe.stream, "a", best_of=2, seed=[1, 2, 3])

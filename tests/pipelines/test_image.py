import numpy as np
import pytest
from helpers.model_directories import write_image_model
from helpers.precision import bound, roundings

from mlx_starflow import load
from mlx_starflow.errors import StarflowError
from mlx_starflow.pipelines import GenerationSettings
from mlx_starflow.sampling import cache


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipe(directory):
    return load(directory)


def pixels(result):
    return [np.asarray(image).astype(int) for image in result.images]


def test_generate(pipe):
    result = pipe.generate(["a cat", ""], seed=5, images=2)
    assert [image.size for image in result.images] == [(8, 8)] * 4
    assert result.prompts == ["a cat", "a cat", "", ""]
    assert result.seeds == [5, 6, 5, 6]
    assert result.latents.shape == result.noise.shape == (4, 4, 4, 4)
    assert result.settings.guidance == 1.0 and result.settings.temperature == 0.8


def test_a_seed_is_one_picture_in_any_company(pipe):
    together = pipe.generate(["a cat", "a dog"], seed=5, images=2, batch_size=3)
    alone = pipe.generate("a dog", seed=6)
    assert np.abs(pixels(together)[3] - pixels(alone)[0]).max() <= 1
    assert (together.noise[3] == alone.noise[0]).all()


def test_drawn_seeds_are_reported_and_reproduce(pipe):
    first = pipe.generate("a cat")
    again = pipe.generate("a cat", seed=first.seeds)
    assert (pixels(first)[0] == pixels(again)[0]).all()


def test_given_noise(pipe):
    first = pipe.generate("a cat", seed=3, images=2)
    again = pipe.generate("a cat", images=2, noise=first.noise)
    assert again.seeds == [None, None]
    assert all((a == b).all() for a, b in zip(pixels(first), pixels(again), strict=True))
    with pytest.raises(StarflowError, match="noise has shape"):
        pipe.generate("a cat", images=3, noise=first.noise)


def test_settings_matter(pipe):
    base = pipe.generate("a cat", seed=1).latents
    for change in ({"guidance": 0.0}, {"temperature": 1.0}, {"denoise": False}, {"attn_temp": 0.5}):
        assert np.abs(np.array(pipe.generate("a cat", seed=1, **change).latents) - np.array(base)).max() > 1e-4
    jacobi = pipe.generate("a cat", seed=1, method="jacobi").latents
    assert np.abs(np.array(jacobi) - np.array(base)).max() < 0.1


def test_the_empty_prompt_is_unconditional(pipe):
    weak, strong = (pipe.generate("", seed=1, guidance=g).latents for g in (0.0, 4.0))
    assert np.abs(np.array(weak) - np.array(strong)).max() < bound(1e-4, roundings(10))


def test_other_sizes(pipe):
    result = pipe.generate("a cat", seed=1, size=(16, 6))
    assert result.images[0].size == (16, 6)
    with pytest.raises(StarflowError, match="multiples of 2 pixels"):
        pipe.generate("a cat", size=(7, 8))


def test_steps(pipe):
    result = pipe.generate("a cat", seed=1, images=3, keep_steps=True, batch_size=2)
    # Noise, after each of two blocks, denoised.
    assert [len(steps) for steps in result.steps] == [4, 4, 4]
    assert all(steps[-1] is image for steps, image in zip(result.steps, result.images, strict=True))


def test_stats(pipe):
    stats = pipe.generate("a cat", seed=1, images=2, batch_size=1, method="sequential").stats
    assert list(stats.seconds) == ["text", "flow", "verify", "denoise", "decode"]
    assert all(seconds > 0 for seconds in stats.seconds.values())
    assert stats.tokens == 2 * 2 * 16
    assert stats.evaluations == [32, 32]
    assert stats.tokens_per_second > 0
    assert stats.memory.keys() == stats.seconds.keys() and stats.peak_memory == max(stats.memory.values()) > 0
    assert "tokens/s" in str(stats)


def test_low_memory_holds_one_network_at_a_time(directory, pipe):
    frugal = load(directory, low_memory=True)
    result = frugal.generate("a cat", seed=1)
    assert not frugal.backend.held
    assert (pixels(result)[0] == pixels(pipe.generate("a cat", seed=1))[0]).all()
    assert pipe.backend.held == {"flow", "text_encoder", "vae"}


def test_a_long_prompt_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="longer than the 6 tokens"):
        pipe.generate("word " * 50, seed=1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance": -1.0}, "guidance must be 0 or more"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"method": "magic"}, "unknown sampling method"),
        ({"images": 0}, "images must be 1 or more"),
        ({"kv_bits": 5}, "kept in 8 or 4 bits, \"8,4\", the null branch's in 4, or none, or auto, not '5'"),
        ({"seed": -4}, "seed is a whole number"),
    ],
)
def test_errors(pipe, settings, message):
    with pytest.raises(StarflowError, match=message):
        pipe.generate("a cat", **settings)


def test_settings_of_a_file():
    settings = GenerationSettings.from_dict({"guidance": 2.0, "size": [16, 8]})
    assert settings.size == (16, 8) and settings.to_dict() == GenerationSettings(2.0, size=(16, 8)).to_dict()
    with pytest.raises(StarflowError, match="unknown setting colour"):
        GenerationSettings.from_dict({"colour": 3})


def test_settings_and_overrides(pipe):
    """What is given by name comes before the settings, and None leaves them as they are."""
    chosen = GenerationSettings(guidance=0.5, temperature=0.6, denoise=False)
    result = pipe.generate("a cat", seed=1, settings=chosen, temperature=0.9, guidance=None)
    assert result.settings == GenerationSettings(guidance=0.5, temperature=0.9, denoise=False, kv_bits="none")
    assert pipe.generate("a cat", seed=1, guidance=0.0).settings.guidance == 0.0
    with pytest.raises(StarflowError, match="no argument 'colour'"):
        pipe.generate("a cat", colour=3)


def test_bits_of_keys_and_values(pipe, monkeypatch):
    """Decided before anything is made, and told: to the result, its files and what makes them again."""
    monkeypatch.setattr(cache, "RECENT", 2)
    exact, again = (pipe.generate("a cat", seed=1, method="sequential", kv_bits=each) for each in (None, "none"))
    assert exact.settings.kv_bits == "none" and exact.images == again.images
    both = [pipe.generate("a cat", seed=1, method="sequential", kv_bits=each) for each in ("8,4", (8, 4))]
    assert both[0].settings.kv_bits == "8,4" and both[0].settings == both[1].settings
    found = pipe.generate("a cat", seed=1, method="sequential", kv_bits=8)
    assert found.settings.kv_bits == "8" and found.metadata[0]["settings"]["kv_bits"] == "8"
    assert 0 < np.abs(np.array(found.latents) - np.array(exact.latents)).max() < 0.3
    assert exact.stats.certificate.max < found.stats.certificate.max < 0.3
    monkeypatch.setattr("mlx_starflow.pipelines.latents.automatic_kv_bits", lambda request: 4)
    short = type(pipe)(pipe.name, pipe.model, pipe.backend)
    assert short.generate("a cat", seed=1, images=2).settings.kv_bits == "4"


def test_a_flow_alone_does_not_generate(directory, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(StarflowError, match="text_encoder/ folder"):
        load(tmp_path)


def test_a_model_of_several_shapes_is_told_the_ratio(pipe, monkeypatch):
    seen = []
    batch = type(pipe.tokenizer).batch
    monkeypatch.setattr(
        type(pipe.tokenizer), "batch", lambda self, texts, length: seen.extend(texts) or batch(self, texts, length)
    )
    pipe.generate("a cat", seed=1)
    assert seen == ["a cat", ""]
    seen.clear()
    monkeypatch.setattr(pipe.config, "mix_aspect", True)
    with pytest.warns(UserWarning, match="longer than the 6 tokens"):
        pipe.generate("a cat", seed=1, size=(16, 8))
    assert seen == ["a cat in a 16:9 aspect ratio.", "in a 16:9 aspect ratio."]

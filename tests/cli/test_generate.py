import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.model_directories import write_image_model
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from mlx_starflow.cli import main
from mlx_starflow.media.images import save_image
from mlx_starflow.media.metadata import read_metadata


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_image_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words, **options):
        return CliRunner().invoke(main, ["generate", *map(str, words)], **options)

    return call


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_one_picture(run, model):
    result = run("a cat", "-m", model, "--seed", 7, "-o", "cat.png", "-v")
    assert result.exit_code == 0, result.output
    assert "cat.png: 'a cat', seed 7" in result.output
    assert "tokens/s" in result.output
    assert pixels("cat.png").shape == (8, 8, 3)


def test_a_drawn_seed_is_reported(run, model):
    result = run("a cat", "-m", model)
    seed = result.output.split("seed ")[1].strip()
    assert read_metadata("out.png")["seeds"] == [int(seed)]


def test_grid_and_separate(run, model, tmp_path):
    assert run("a cat", "a dog", "-m", model, "-n", 3, "--seed", 1).exit_code == 0
    assert pixels("out.png").shape == (18, 28, 3)
    assert run("a cat", "a dog", "-m", model, "-n", 2, "--seed", 1, "--separate", "-o", "p.png").exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("p*")) == [f"p-{k}.png" for k in (1, 2, 3, 4)]
    assert read_metadata("p-3.png")["prompts"] == ["a dog"]


@pytest.mark.parametrize("bits", ["4", "8,4"])
def test_bits_of_keys_and_values(run, model, bits):
    """Files say what it was, and are made again with it."""
    assert run("a cat", "-m", model, "--seed", 1, "-o", "a.png").exit_code == 0
    assert "kv_bits" not in read_metadata("a.png")["settings"]
    result = run("a cat", "-m", model, "--seed", 1, "--kv-bits", bits, "--json", "-", "-o", "b.png")
    assert f'"kv_bits": "{bits}"' in result.output
    assert run("--like", "b.png", "-o", "c.png").exit_code == 0
    assert read_metadata("c.png")["settings"]["kv_bits"] == bits
    assert run("a cat", "-m", model, "--kv-bits", 5).exit_code == 2


@pytest.mark.parametrize("words", [["-n", 1], ["-n", 2, "--guidance", 2.5, "--method", "jacobi", "--size", "16x8"]])
def test_from_makes_the_picture_again(run, model, words):
    assert run("a cat", "a dog", "-m", model, "--temperature", 0.9, *words, "-o", "a.png").exit_code == 0
    result = run("--like", "a.png", "-o", "b.png")
    assert result.exit_code == 0, result.output
    assert (pixels("a.png") == pixels("b.png")).all()
    assert read_metadata("a.png") == read_metadata("b.png")


def test_from_brings_the_columns_back(run, model):
    assert run("a cat", "a dog", "-m", model, "-n", 2, "--columns", 4, "-o", "row.png").exit_code == 0
    assert run("--like", "row.png", "-o", "again.jpg").exit_code == 0
    assert pixels("row.png").shape == pixels("again.jpg").shape == (8, 38, 3)
    assert run("--like", "again.jpg", "-o", "other.webp", "--columns", 1).exit_code == 0
    assert pixels("other.webp").shape == (38, 8, 3)
    assert read_metadata("row.png") == read_metadata("again.jpg") != read_metadata("other.webp")


def test_the_best_of_several_prompts_say_how_they_were_made(run, model):
    result = run("a cat", "a dog", "-m", model, "--best-of", 2, "--seed", 3, "-o", "best.png")
    assert result.exit_code == 0, result.output
    found = read_metadata("best.png")
    assert found["prompts"] == ["a cat", "a dog"] and len(found["seeds"]) == 2
    result = run("--like", "best.png")
    assert result.exit_code == 2 and "was made by mlx-starflow generate --best-of" in result.output


def test_a_picture_cannot_have_a_model_downloaded(run, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_STARFLOW_CACHE", str(tmp_path))
    asked = []

    def snapshot_download(repository, **options):
        asked.append(options)
        raise LocalEntryNotFoundError(repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    metadata = {"model": "some/body", "prompts": ["a cat"], "seeds": [1], "settings": {}}
    save_image(Image.new("RGB", (8, 8)), tmp_path / "evil.png", metadata)
    result = run("--like", "evil.png")
    assert result.exit_code == 2 and "--model some/body" in result.output
    assert all(options.get("local_files_only") for options in asked)
    assert run("--like", "evil.png", "-m", "some/body").exit_code == 2
    assert "local_files_only" not in asked[-1]


@pytest.mark.parametrize(
    "words, first, second",
    [
        (["a cat", "--load-noise", "n.safetensors", "--seed", 0], "--load-noise", "--seed"),
        (["--like", "a.png", "-n", 1], "--like", "--images"),
        (["--like", "a.png", "--best-of", 1], "--like", "--best-of"),
        (["--like", "a.png", "a cat"], "--like", "prompts"),
        (["a cat", "-n", 2, "--separate", "--columns", 2], "--columns", "--separate"),
        (["a cat", "--columns", 2], "--columns", "--images"),
        (["a cat", "--data-parallel", "--steps-dir", "steps"], "--data-parallel", "--steps-dir"),
        (["a cat", "-m", ""], "unknown model ''", "give demo"),
    ],
)
def test_contradictions(run, words, first, second):
    result = run(*words)
    assert result.exit_code == 2 and len(result.output.splitlines()) == 1
    assert first in result.output and second in result.output


def test_no_metadata(run, model):
    assert run("a cat", "-m", model, "--no-metadata").exit_code == 0
    result = run("--like", "out.png")
    assert result.exit_code == 2 and "does not say how it was made" in result.output


def test_noise_files(run, model):
    assert run("a cat", "-m", model, "-n", 2, "--save-noise", "n.safetensors", "-o", "a.png").exit_code == 0
    assert run("a cat", "-m", model, "-n", 2, "--load-noise", "n.safetensors", "-o", "b.png").exit_code == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    result = run("--like", "b.png", "-o", "c.png")
    assert result.exit_code == 2 and "--load-noise" in result.output
    assert run("--like", "b.png", "-o", "c.png", "--load-noise", "n.safetensors").exit_code == 0
    assert (pixels("a.png") == pixels("c.png")).all()
    result = run("a cat", "-m", model, "--load-noise", "n.safetensors")
    assert result.exit_code == 2 and "these pictures need [1, 4, 4, 4]" in result.output
    run("a cat", "-m", model, "-n", 2, "--save-noise", "other.safetensors")
    result = run("--like", "b.png", "--load-noise", "other.safetensors")
    assert result.exit_code == 2 and "is not the noise" in result.output


def test_prompts_from_a_file_and_from_standard_input(run, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    result = run("--prompt-file", "prompts.txt", "-m", model)
    assert result.output.count("seed") == 2
    result = run("--prompt-file", "-", "-m", model, input="a red apple\n")
    assert "'a red apple'" in result.output


def test_steps(run, model, tmp_path):
    assert run("a cat", "-m", model, "--steps-dir", "steps").exit_code == 0
    names = sorted(path.name for path in (tmp_path / "steps").iterdir())
    assert names == [*(f"picture-1-step-{k}.png" for k in range(4)), "steps-1.png"]


def test_the_empty_prompt(run, model):
    assert run("", "-m", model).exit_code == 0


def test_a_long_prompt_warns(run, model):
    result = run("word " * 40, "-m", model)
    assert result.exit_code == 0
    assert "Warning: the prompt is longer than the 6 tokens" in result.output


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "there is no prompt"),
        (["a cat", "--guidance", "-1"], "guidance must be 0 or more"),
        (["a cat", "-m", "no-such-model"], "no-such-model"),
        (["a cat", "-o", "no/such/folder/a.png"], "does not exist"),
        (["a cat", "-o", "a.txt"], "are written as"),
        (["a cat", "--size", "huge"], "is not a size"),
        (["a cat", "--size", "9x9"], "multiples of 2 pixels"),
        (["--like", "missing.png"], "cannot be read as a picture"),
        (["a cat", "--load-noise", "missing.safetensors"], "cannot be read as a noise file"),
        (["a cat", "--seed", "-3"], "--seed"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(run, model, words, message):
    if words and "-m" not in words and "--like" not in words:
        words = [*words, "-m", model]
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1


@pytest.mark.parametrize(
    "part", ["model.safetensors", "config.json", "vae/model.safetensors", "text_encoder/spiece.model"]
)
def test_a_damaged_model(run, model, tmp_path, part):
    directory = write_image_model(tmp_path / "damaged")
    data = (directory / part).read_bytes()
    (directory / part).write_bytes(data[: len(data) // 2])
    result = run("a cat", "-m", directory)
    assert result.exit_code == 2, result.output
    assert part.split("/")[-1] in result.output
    assert "Traceback" not in result.output

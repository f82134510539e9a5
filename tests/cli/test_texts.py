"""`mlx-starflow generate`, `score` and `train` with models of text, as a user types them."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from helpers.commands import Command
from helpers.tiny_text import text_model

from mlx_starflow import load_text
from mlx_starflow.model_dir.files import read_config

generate, score, train, info = Command("generate"), Command("score"), Command("train"), Command("info")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text_model(tmp_path_factory.mktemp("text") / "model")


def test_texts_are_printed(model):
    result = generate("bad", "-m", model, "--seed", 3, "--length", 10, "--images", 2, "--verify")
    assert result.exit_code == 0, result.output
    right = load_text(model).generate("bad", seed=3, length=10, texts=2, progress=False)
    assert result.stdout == "\n----\n".join(right.texts) + "\n"
    assert result.stderr.startswith("'bad': |f(x) - z| at most")
    assert generate("-m", model, "--seed", 3).exit_code == 0


def test_texts_are_written(model, tmp_path):
    out, table = tmp_path / "out.txt", tmp_path / "out.json"
    arguments = ("bad ", "-m", model, "--seed", 3, "--temperature", 0.5, "--method", "rolling")
    assert generate(*arguments, "-o", out, "--json", table).stdout == ""
    rows = json.loads(table.read_text())["texts"]
    assert out.read_text() == rows[0]["text"] + "\n" and rows[0]["seed"] == 3
    assert "is there already: give --overwrite" in generate.mistake(*arguments, "-o", out)
    assert generate(*arguments, "-o", out, "--overwrite").exit_code == 0


def test_gaps_are_filled(model):
    result = generate("ba_ c_b", "-m", model, "--seed", 3, "--fill")
    assert result.exit_code == 0, result.output
    text = result.stdout.rstrip("\n")
    assert text[:2] == "ba" and text[3:5] == " c" and text[6] == "b" and "_" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "8x8"), "--size is for pictures"),
        (("--no-denoise",), "--no-denoise is for pictures"),
        (("--guidance", 1), "--guidance is for pictures"),
        (("--seed", 1, "--seed", 2), "give it once"),
        (("--fill",), "has no gap"),
        (("--fill", "--length", 8), "leave out --length"),
        (("--length", 2), "the prompt has 3: give more"),
        (("--temperature", 0), "temperature must be greater than 0"),
    ],
)
def test_what_generate_does_not_take(model, arguments, message):
    assert message in generate.mistake("bad", "-m", model, *arguments)


def test_options_of_texts_are_refused_for_pictures():
    assert "--length is for models of text, and demo is none" in generate.mistake("a cat", "--length", 8)
    assert "--fill is for models of text" in generate.mistake("a cat", "--fill", "-m", "demo")


def test_files_are_scored(model, tmp_path):
    first, second, table = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "scores.csv"
    first.write_text("bad cab dead beef")
    second.write_text("a cab")
    result = score(first, second, "-m", model, "--draws", 8, "--csv", table)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["text", "characters", "ELBO", "+-", "weighted"]
    right = load_text(model).score("bad cab dead beef", draws=8, progress=False)
    assert lines[1].split()[1:] == [
        "17", f"{right.bits_per_character:.4f}", f"{right.standard_error:.4f}", f"{right.importance_weighted:.4f}",
    ]  # fmt: skip
    assert lines[3] == "at most so many bits per character, by 8 draws of the codebook's noise"
    rows = list(csv.DictReader(table.open()))
    assert [row["file"] for row in rows] == [str(first), str(second)]
    found = json.loads(score(second, "-m", model, "--json", "-").stdout)
    assert found["texts"][0]["draws"] == 64 and found["unit"] == "bits per character"


def test_what_score_does_not_take(model, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("a zoo")
    assert "--map is for pictures" in score.mistake(text, "-m", model, "--map", tmp_path / "maps")
    assert f"{text}: this model does not know the character 'z'" in score.mistake(text, "-m", model)
    assert "cannot read" in score.mistake(tmp_path / "none.txt", "-m", model)
    text.write_bytes(b"\xff\xff")
    assert "is not UTF-8" in score.mistake(text, "-m", model)
    text.write_text("")
    assert "too short to score" in score.mistake(text, "-m", model)


def test_other_commands_say_what_it_is(model):
    assert "is a model of text, which generate, score and load_text take" in info.mistake(model)


CONFIG = {"model_type": "text_flow", "length": 16, "channels": 32, "layers_per_block": [1, 1], "head_dim": 16}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat, and the dog sat on the cat.\n" * 40 + "Q")
    return path


def test_train(text, tmp_path):
    config, out = tmp_path / "flow.json", tmp_path / "model"
    config.write_text(json.dumps(CONFIG))
    arguments = (text, "-o", out, "--model-config", config, "--batch-size", 4, "--validation", 0.1)
    result = train(*arguments, "--steps", 3)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "16 characters" in lines[0] and "held out" in lines[0]
    assert "bits per character of what is held out" in lines[-1]
    assert "nats/character" in result.stderr and "nats/dim" not in result.stderr
    stored = read_config(out)
    # What is rare is unknown.
    assert "Q" not in stored["alphabet"] and stored["alphabet"].endswith("\ufffd") and stored["components"] == [16, 0]
    assert (out / "samples.txt").read_text().count("----") == 3
    assert load_text(out).score("the Queen", draws=1, progress=False).characters == 9
    assert (out / "training/config.yaml").exists()
    # It goes on where it stopped, and not with other text.
    assert "resuming at step 3" in train(*arguments, "--steps", 5).stderr
    text.write_text(text.read_text().replace("dog", "cow"))
    assert "is of another run" in train.mistake(*arguments, "--steps", 8)


def test_a_resumed_training_is_the_uninterrupted_one(text, tmp_path):
    from mlx_starflow.training.config import TrainingOptions
    from mlx_starflow.training.recipes.text_flow import NewTextFlow

    def run(out, steps):
        options = TrainingOptions(steps=steps, batch_size=2, save_steps=2, lr=1e-3, warm_up=0.0)
        NewTextFlow(text, tmp_path / out, CONFIG, options, 0.1).run()
        return load_text(tmp_path / out).flow.codebook.mean

    # The schedule follows from the steps, so the interrupted one is cut short by hand.
    whole = run("whole", 4)
    shutil.copytree(tmp_path / "whole/training", tmp_path / "part/training")
    newest = sorted((tmp_path / "part/training/flow").glob("checkpoint-*"))[-1]
    newest.unlink()
    assert run("part", 4).tolist() == whole.tolist()


def test_what_train_does_not_take(text, tmp_path):
    arguments = (text, "-o", tmp_path / "model", "--preset", "text")
    for more, message in (
        (("--noise-std", 0.1), "--noise-std is for pictures"),
        (("--encoders", "demo"), "--encoders is for pictures"),
        (("--dry-run",), "--dry-run is for pictures"),
        (("--checkpoint-layers",), "--checkpoint-layers is for pictures"),
        (("--validation", 0, "--patience", 2), "--patience needs text"),
    ):
        assert message in train.mistake(*arguments, *more)
    text.write_text("aaabbb")
    assert "too short" in train.mistake(*arguments)
    assert "cannot read" in train.mistake(tmp_path / "none.txt", *arguments[1:])


def test_the_preset(text, tmp_path):
    out = tmp_path / "model"
    result = train(text, "-o", out, "--preset", "text", "--steps", 1, "--batch-size", 1, "--validation", 0.2)
    assert result.exit_code == 0, result.output
    assert read_config(out)["length"] == 128

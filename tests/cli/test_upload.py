"""`mlx-starflow upload` against a stand-in for the Hub on this machine: the real client, what is sent, and mistakes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from helpers.commands import Command
from helpers.hub_uploads import GOOD, READS_ONLY, UploadHub, upload_hub
from helpers.images import colours, write_images
from helpers.model_directories import write_class_model, write_image_model, write_trained_model
from helpers.students import write_student
from huggingface_hub.utils import close_session
from PIL import Image

from mlx_starflow.convert.official import LICENSE
from mlx_starflow.likelihood.calibration import calibrate
from mlx_starflow.media.images import save_image
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.pipelines import load

upload = Command("upload")
NAME = "jane/tiny"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    names = ["red", "green", "blue", "black"]
    write_images(folder, colours(names), [{"text": f"a {name} square"} for name in names])
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return write_image_model(tmp_path / "my model")


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    """A fine-tuning's."""
    folder = tmp_path_factory.mktemp("finetuned")
    model = write_image_model(folder / "jane's base")
    words = ["--steps", 2, "--batch-size", 2, "--lora", 2, "--validation", 0.5, "--draws", 1, "--samples", 2]
    assert Command("finetune")(model, pictures, "-o", folder / "run", *words).exit_code == 0
    return folder / "run"


@pytest.fixture
def hub(monkeypatch) -> Iterator[UploadHub]:
    with upload_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries to reach it
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", GOOD)
        close_session()
        yield server
        close_session()


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


# ---- what is sent


def test_a_model_and_back(hub, model, tmp_path, monkeypatch):
    (model / "training/flow").mkdir(parents=True)
    (model / "training/flow/checkpoint-1.safetensors").write_bytes(b"not to be sent")
    (model / "made_of.json").write_text('{"model": "/Users/jane/secret"}')
    (model / "NOTICE").write_text("drawn by | Jane")
    write_student(model / "student", model)
    result = upload(model, NAME, "--licence", "cc-by-4.0", "-p", "a cat", "-p", "a dog")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"published for all: {hub.url}/{NAME}"
    files = hub.repositories[NAME]
    assert sorted(files) == [
        *("NOTICE", "README.md", "config.json", "model.safetensors", "samples.png", "student/config.json"),
        *(
            "student/model.safetensors",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "text_encoder/spiece.model",
            "vae/config.json",
            "vae/model.safetensors",
        ),
    ]
    for name in set(files) - {"README.md", "samples.png"}:
        assert files[name] == (model / name).read_bytes(), name
    card = files["README.md"].decode()
    assert metadata(card) == {
        "license": "cc-by-4.0",
        "library_name": "mlx-starflow",
        "pipeline_tag": "text-to-image",
        "tags": ["mlx", "mlx-starflow", "normalizing-flow"],
    }
    for words in ("# tiny\n", f'generate "a cat" -m {NAME}', "a cat; a dog", "| flow | ", "drawn by | Jane"):
        assert words in card
    assert str(tmp_path) not in card and GOOD not in result.output
    sample = Image.open(io.BytesIO(files["samples.png"]))
    assert not sample.info and sample.width > 8
    for name, content in files.items():
        path = tmp_path / "fetched" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for student in (None, tmp_path / "fetched"):
        fetched = load(tmp_path / "fetched").generate("a cat", seed=1, student=student)
        own = load(model).generate("a cat", seed=1, student=student and model)
        assert fetched.images[0].tobytes() == own.images[0].tobytes()


def test_by_the_real_command(hub, model, tmp_path):
    """Through the environment, as a user points huggingface_hub to another Hub."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        **{"HF_ENDPOINT": hub.url, "HF_TOKEN": GOOD, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")},
    }
    command = [sys.executable, "-m", "mlx_starflow", "upload", str(model), NAME, "--private"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "published for you alone" in done.stdout and hub.private == {NAME}
    assert "there are no samples: -p PROMPT makes some" in done.stderr
    assert "No licence is named" in hub.repositories[NAME]["README.md"].decode()


def test_an_adapter(hub, run, tmp_path):
    for folder, name in ((run, "jane/run"), (run / "adapter", "jane/adapter")):
        result = upload(folder, name)
        assert result.exit_code == 0, result.output
    files = hub.repositories["jane/adapter"]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapters.safetensors", "samples.png"]
    assert files["adapters.safetensors"] == (run / "adapter/adapters.safetensors").read_bytes()
    kept = json.loads((run / "adapter/adapter_config.json").read_text())
    sent = json.loads(files["adapter_config.json"])
    assert sent["model"] == "jane's base" and {**kept, "model": "jane's base"} == sent
    card = files["README.md"].decode()
    for words in ("LoRA adapter of rank 2", "--lora jane/adapter 1", "the same, after fine-tuning"):
        assert words in card
    assert "lora" in metadata(card)["tags"] and str(run) not in card
    assert not Image.open(io.BytesIO(files["samples.png"])).info
    assert sorted(hub.repositories["jane/run"]) == sorted(files)


def test_likelihood_that_was_measured(model, pictures, run, tmp_path):
    trained = write_trained_model(tmp_path / "trained", pictures, steps=2)
    pipe = load(trained)
    data = pipe.to_data(sorted(pictures.glob("*.png")))
    calibrate(pipe, data, ["a red square"] * len(data), draws=2).save(trained)
    log = trained / "training/flow/log.jsonl"
    log.parent.mkdir(parents=True)
    rows = [(9.5, True), (1.25, True), (3.5, False)]
    log.write_text("".join(json.dumps({"step": 1, "validation_nll": nll, "best": best}) + "\n" for nll, best in rows))
    assert upload(trained, NAME, "--dry-run").exit_code == 0
    card = (trained / "README.md").read_text()
    assert "| 4 pictures, without a prompt, mean and spread | " in card and "with their prompts" in card
    assert "| held-out pictures of its training | 1.2500 |" in card
    assert upload(model, NAME, "--dry-run").exit_code == 0
    assert "log-likelihood" not in (model / "README.md").read_text()


def test_classes(tmp_path):
    model = write_class_model(tmp_path / "classes")
    (model / "classes.txt").write_text("cat\ndog\ncow\n")
    save_image(Image.new("RGB", (8, 8), "red"), model / "samples.png", {"model": "/home/jane"})
    result = upload(model, NAME, "--dry-run")
    assert result.exit_code == 0 and "classes.txt" in result.stdout and "samples.png" in result.stdout
    assert metadata((model / "README.md").read_text())["pipeline_tag"] == "unconditional-image-generation"


def test_a_dry_run_asks_nobody(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = upload(model, NAME, "--dry-run", "--private")
    assert result.exit_code == 0, result.output
    assert "model.safetensors" in result.stdout and "would be sent to jane/tiny, private; nothing was" in result.stdout
    assert hub.requests == []
    # The card is the user's now.
    card = model / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    again = upload(model, NAME, "--dry-run")
    assert f"the card is {card}, as it is" in again.stdout and card.read_text().endswith("Mine.\n")
    monkeypatch.setenv("HF_TOKEN", GOOD)
    assert upload(model, NAME).exit_code == 0
    assert hub.repositories[NAME]["README.md"] == card.read_bytes()
    assert upload(model, NAME, "--dry-run", "--overwrite").exit_code == 0
    assert "Mine." not in card.read_text()


# ---- Apple's weights


def test_apples_weights(hub, model, tmp_path):
    (model / "NOTICE").write_text(LICENSE + "\nWhoever passes them on")
    line = upload.mistake(model, NAME)
    assert "--i-have-read-the-licence" in line and "research purposes only" in line
    assert "--i-have-read" in upload.mistake(model, NAME, "--dry-run") and not (model / "README.md").exists()
    assert "leave it out" in upload(model, NAME, "--i-have-read-the-licence", "--licence", "mit").stderr
    assert hub.requests == []
    assert upload(model, NAME, "--i-have-read-the-licence").exit_code == 0
    card = hub.repositories[NAME]["README.md"].decode()
    assert metadata(card)["license"] == "apple-amlr" and "License Agreement" in card
    assert "NOTICE" in hub.repositories[NAME]


def test_adapters_of_apples_weights(run, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes((run / "adapter/adapters.safetensors").read_bytes())
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    base = Path(config["model"])
    (folder / "adapter_config.json").write_text(json.dumps({**config, "model": "apple/starflow"}))
    assert "--i-have-read-the-licence" in upload.mistake(folder, NAME, "--dry-run")
    assert upload(folder, NAME, "--dry-run", "--i-have-read-the-licence").exit_code == 0
    assert metadata((folder / "README.md").read_text())["base_model"] == "apple/starflow"
    (folder / "README.md").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (base / "NOTICE").write_text(LICENSE)
    try:
        assert "--i-have-read-the-licence" in upload.mistake(folder, NAME, "--dry-run")
    finally:
        (base / "NOTICE").unlink()


# ---- mistakes


def test_no_token_and_wrong_ones(hub, model, monkeypatch, tmp_path):
    for token, words in (("hf_unknowntoken", "does not know this token: log in"), (READS_ONLY, "may not write there")):
        monkeypatch.setenv("HF_TOKEN", token)
        result = upload(model, NAME)
        assert result.exit_code == 2 and words in result.stderr and token not in result.output
        assert result.stderr.startswith("Error: ") or "Error: cannot upload" in result.stderr.splitlines()[-1]
    assert NAME not in hub.repositories
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "nothing"))
    assert "nobody is logged in to the Hub here" in upload.mistake(model, NAME)


def test_a_name_that_is_taken(hub, model):
    hub.repositories[NAME] = {"mine.txt": b"kept"}
    result = upload(model, NAME)
    assert result.exit_code == 2 and "of that name already" in result.stderr and "--overwrite" in result.stderr
    assert hub.repositories[NAME] == {"mine.txt": b"kept"}
    assert "public" in upload(model, NAME, "--overwrite", "--private").stderr
    assert hub.repositories[NAME] == {"mine.txt": b"kept"}
    assert upload(model, NAME, "--overwrite").exit_code == 0
    assert {"mine.txt", "config.json"} <= hub.repositories[NAME].keys()


@pytest.mark.parametrize("where, hint", [("/api/repos/create", "try again"), ("/commit/", "again with --overwrite")])
def test_a_connection_that_breaks(hub, model, where, hint):
    hub.breaks = where
    result = upload(model, NAME)
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: cannot upload to jane/tiny: the connection to the Hub broke") and hint in last
    assert not hub.repositories.get(NAME)
    hub.breaks = ""
    assert upload(model, NAME, "--overwrite").exit_code == 0
    assert load_weights(model).keys() and "config.json" in hub.repositories[NAME]


def test_what_cannot_be_published(hub, model, tmp_path):
    assert "is no repository: give USER/NAME" in upload.mistake(model, "tiny")
    assert "is no repository" in upload.mistake(model, "jane/../tiny")
    assert "is not a folder" in upload.mistake(tmp_path / "nowhere", NAME)
    assert "neither a model's config.json nor an adapter's" in upload.mistake(tmp_path, NAME)
    (model / "config.json").write_text("{}")
    assert "model_type" in upload.mistake(model, NAME)
    assert hub.requests == []

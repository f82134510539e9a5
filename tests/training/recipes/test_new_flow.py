"""`mlx-starflow train` on a latent cache or with a flow's config, and a TarFlow on class folders."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from helpers.commands import Command
from helpers.model_directories import write_class_model, write_image_model
from PIL import Image

from mlx_starflow import StarflowError, load, load_flow
from mlx_starflow.model_dir.directory import ModelDirectory
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.training.config import TrainingConfig, TrainingOptions
from mlx_starflow.training.data.cache.build import CacheSettings, build_cache
from mlx_starflow.training.data.cache.reading import CachedLatents, LatentCache
from mlx_starflow.training.loop.checkpoint import checkpoint_files
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.recipes.flow_config import flow_config_of, read_flow_config
from mlx_starflow.training.recipes.new_flow import NewFlow

pytestmark = pytest.mark.usefixtures("uncompiled")
command = Command("train")
FLOW = {"channels": 64, "layers_per_block": [1, 1], "patch_size": 2, "use_softplus": True, "soft_clip": 4.0}
QUICK = "--steps 4 --batch-size 2 --lr 1e-3 --log-every 1".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Class folders; of 12 pictures one is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, colour in enumerate(["red", "green", "blue"] * 4):
        (folder / colour).mkdir(exist_ok=True)
        Image.new("RGB", (10, 12), colour).save(folder / colour / f"{index}.png")
    (folder / "red/0.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def cache(model, pictures, tmp_path_factory) -> Path:
    return build_cache(pictures, tmp_path_factory.mktemp("cache") / "c", model, CacheSettings()).folder


@pytest.fixture
def flow_file(tmp_path) -> Path:
    path = tmp_path / "flow.yaml"
    path.write_text(yaml.safe_dump(FLOW))
    return path


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training/flow/log.jsonl").read_text().splitlines()]


def test_from_a_cache_to_a_model(model, cache, flow_file, tmp_path):
    words = ["--model-config", flow_file, "--encoders", model, "--validation", "0.2", "--validate-every", "2"]
    done = command(cache, "-o", tmp_path / "a", *words, *QUICK, "--watch-every", "4")
    assert done.exit_code == 0, done.output
    assert "9 pictures, 2 held out; batch size 2, layers computed once" in done.stdout
    pipe = load(tmp_path / "a")
    config = pipe.flow.config
    assert (config.img_size, config.channel_size, config.txt_size, config.txt_dim) == (4, 4, 6, 32)
    assert config.channels == 64 and config.patch_size == 2
    assert pipe.generate("red", seed=1).images[0].size == (8, 8)
    rows = log(tmp_path / "a")
    assert [row["step"] for row in rows if "validation_nll" in row] == [2, 4]
    assert (
        Image.open(tmp_path / "a/samples.png").size
        == Image.open(tmp_path / "a/training/flow/samples/step-00000004.png").size
    )
    # The effective settings are a file that does the same again; a run that was stopped goes on to the same end.
    settings = yaml.safe_load((tmp_path / "a/training/config.yaml").read_text())
    assert settings["batch-size"] == 2 and settings["checkpoint-layers"] is False and settings["context-full"] == 0
    again = command("--config", tmp_path / "a/training/config.yaml", "-o", tmp_path / "b", "--save-steps", "2")
    assert again.exit_code == 0, again.output
    same(tmp_path / "a", tmp_path / "b")
    checkpoint_files(tmp_path / "b/training/flow")[0].unlink()
    again = command("--config", tmp_path / "b/training/config.yaml", "-o", tmp_path / "b")
    assert "resuming at step 2" in again.stderr
    same(tmp_path / "a", tmp_path / "b")


def test_starting_again_is_gone_on_with_after_a_kill(model, cache, flow_file, tmp_path, monkeypatch):
    words = [cache, "-o", tmp_path / "a", "--model-config", flow_file, "--encoders", model, *QUICK]
    assert command(*words).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", lambda trainer: 1 / 0)
        assert "ZeroDivisionError" in command(*words, "--no-resume").stderr
    assert not checkpoint_files(tmp_path / "a/training/flow")
    done = command(*words)
    assert done.exit_code == 0, done.output


def same(one: Path, other: Path) -> None:
    weights, others = (parameters(load_flow(path, dtype="float32")) for path in (one, other))
    assert weights.keys() == others.keys()
    assert all(mx.array_equal(weights[name], others[name]) for name in weights)


def test_from_pictures_and_an_official_config(model, pictures, tmp_path):
    official = {"img_size": 16, "channel_size": 4, "patch_size": 1, "channels": 64, "layers_per_block": "1 1",
                "txt_size": 6, "txt_dim": 32, "rope": 1, "nvp": 1, "lr": "1e-4", "dataset": "x"}  # fmt: skip
    official["img_size"] = 4
    path = tmp_path / "official.yaml"
    path.write_text(yaml.safe_dump({"arguments": [{key: value} for key, value in official.items()]}))
    words = ["--model-config", path, "--encoders", model, "--validation", "0", *QUICK]
    dry = command(pictures, "-o", tmp_path / "run", *words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "here: batch size 2" in dry.stdout and "16 GB Mac:" in dry.stdout and "optimizer" in dry.stdout
    assert re.search(r"^[\d.]+ m?s a step here, \d+ s for 4 steps$", dry.stdout, re.MULTILINE)
    assert not (tmp_path / "run").exists()
    done = command(pictures, "-o", tmp_path / "run", *words)
    assert done.exit_code == 0, done.output
    assert "red/0.png" in (tmp_path / "run/training/cache/skipped.txt").read_text()
    assert "11 pictures; batch" in done.stdout
    load(tmp_path / "run")


def test_beginning_with_the_weights_of_another_flow(model, cache, pictures, tmp_path):
    """Its config, its encoders; what no step has changed is as it was; quantized or not."""
    words = ["--init", model, "--validation", "0.2", *QUICK]
    done = command(cache, "-o", tmp_path / "a", *words, "--lr", "1e-12", "--ema", 0)
    assert done.exit_code == 0, done.output
    before, after = (parameters(load_flow(path, dtype="float32")) for path in (model, tmp_path / "a"))
    assert before.keys() == after.keys()
    assert all(mx.abs(before[name] - after[name]).max() < 1e-6 for name in before)
    one, other = (load_weights(path / "vae") for path in (model, tmp_path / "a"))
    assert one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]) for name in one)
    assert ModelDirectory(tmp_path / "a").pipeline == ModelDirectory(model).pipeline
    # A run that began with other weights does not go on with this one.
    other = quantize_model(model, tmp_path / "quantized", 8)
    said = command(cache, "-o", tmp_path / "a", "--init", other, *words[2:]).stderr
    assert "is of another run (other init): " in said
    done = command(pictures, "-o", tmp_path / "b", "--init", other, *words[2:])
    assert done.exit_code == 0, done.output
    assert "quantization" not in read_config(tmp_path / "b")
    rows = log(tmp_path / "a")
    assert [row["epoch"] for row in rows if "epoch" in row] == [round(step * 2 / 9, 3) for step in (1, 2, 3, 4)]
    wrong = {**flow_config_of(model), "channels": 128}
    run = NewFlow(cache, tmp_path / "c", wrong, TrainingOptions(batch_size=2), init=model)
    with pytest.raises(StarflowError, match="but its config says"):
        run.new()
    said = command(cache, "-o", tmp_path / "d", "--init", model, "--preset", "demo").stderr
    assert "--init says all of the flow: leave its config out" in said


def test_a_tarflow_that_begins_with_another_one(pictures, tmp_path):
    """With other classes their embeddings are new."""
    source = write_class_model(tmp_path / "source", num_classes=7)
    done = command(pictures, "-o", tmp_path / "run", "--init", source, *QUICK, "--lr", "1e-12", "--ema", 0)
    assert done.exit_code == 0, done.output
    before, after = (parameters(load_flow(path)) for path in (source, tmp_path / "run"))
    for name in before:
        if name.endswith("class_embed"):
            assert before[name].shape[0] == 7 and after[name].shape[0] == 3
        else:
            assert mx.abs(before[name] - after[name]).max() < 1e-6, name


def test_a_tarflow_on_class_folders(pictures, tmp_path):
    config = {"model_type": "tarflow", "img_size": 8, "patch_size": 2, "channels": 64, "blocks": 2,
              "layers_per_block": 1, "noise_std": 0.1}  # fmt: skip
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(config))
    dry = command(pictures, "-o", tmp_path / "run", "--model-config", path, "--dry-run")
    assert dry.exit_code == 0 and "here: batch size 32" in dry.stdout and not (tmp_path / "run").exists()
    done = command(pictures, "-o", tmp_path / "run", "--model-config", path, *QUICK)
    assert done.exit_code == 0, done.output
    assert "9 pictures, 2 held out" in done.stdout
    flow = load_flow(tmp_path / "run")
    assert flow.config.num_classes == 3 and flow.config.noise_std == 0.1
    assert (tmp_path / "run/classes.txt").read_text().split() == ["blue", "green", "red"]
    assert "red/0.png" in (tmp_path / "run/training/skipped.txt").read_text()
    assert Image.open(tmp_path / "run/samples.png").width == 2 * 128 + 2  # labelled, two by two
    preset = NewFlow(
        pictures, tmp_path / "p", {"model_type": "tarflow", **read_flow_config(path)}, TrainingOptions(batch_size=4)
    )
    assert preset.plan()[0].batch_size == 4


def test_resuming_a_flow_on_a_cache_with_something_changed(model, cache, flow_file, tmp_path):
    words = [cache, "-o", tmp_path / "run", "--encoders", model, "--validation", "0.2", *QUICK]
    done = command(*words, "--model-config", flow_file)
    assert done.exit_code == 0, done.output
    names = ("model.safetensors", "training/config.yaml")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]

    def refused(*more: object, **changes: object) -> str:
        flow_file.write_text(yaml.safe_dump({**FLOW, **changes}))
        return command(*words, "--model-config", flow_file, "--steps", 5, *more).stderr.splitlines()[-1]

    assert "is of another run (flow: head_dim default -> 32): " in refused(head_dim=32)
    assert "(flow: noise_std default -> 0.1)" in refused("--noise-std", 0.1)
    assert "(other held-out pictures, seed 0 -> 1)" in refused("--seed", 1)
    assert "(other held-out pictures)" in refused("--validation", 0.3)
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before


def test_resuming_a_tarflow_with_other_pictures(pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    config = tmp_path / "flow.json"
    config.write_text(json.dumps({"model_type": "tarflow", "img_size": 4, "patch_size": 2, "channels": 64,
                                  "blocks": 2, "layers_per_block": 1}))  # fmt: skip
    words = [folder, "-o", tmp_path / "run", "--model-config", config, *QUICK]
    assert command(*words).exit_code == 0

    def refused() -> str:
        return command(*words, "--steps", 5).stderr.splitlines()[-1]

    (folder / "red").rename(folder / "amber")
    assert "is of another run (classes blue, green, red -> amber, blue, green, other pictures" in refused()
    (folder / "amber").rename(folder / "red")
    Image.new("RGB", (4, 4), "red").save(folder / "red/00.png")
    assert "is of another run (other pictures" in refused()
    (folder / "red/00.png").unlink()
    assert command(*words, "--steps", 5).exit_code == 0


def test_an_output_that_cannot_be_is_refused_before_any_work(cache, model, pictures, flow_file, tmp_path):
    words = ["--encoders", model, "--model-config", flow_file, *QUICK]
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/model"):
        assert f"{out} cannot be written: {tmp_path / 'file'} is a file" in command.mistake(cache, "-o", out, *words)
    assert (tmp_path / "file").read_text() == "mine"
    assert "cannot be written: " in command.mistake(cache, "-o", tmp_path / ("a" * 300), *words)
    other = shutil.copytree(model, tmp_path / "other")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    refused = [
        command.mistake(cache, "-o", other, *words),
        command.mistake(pictures, "-o", other, "--steps", 1, "--autoencoder-steps", 1),
        command.mistake(pictures, "-o", other, "--preset", "tarflow", *QUICK),
    ]
    assert all(f"{other} holds another model" in line for line in refused)
    assert "('starflow', not 'tarflow')" in refused[2]
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_patience_without_validation(cache, model, flow_file, tmp_path):
    words = [cache, "-o", tmp_path / "run", "--encoders", model, "--model-config", flow_file, "--patience", 2, *QUICK]
    assert "--patience needs pictures to validate on" in command.mistake(*words, "--validation", 0)
    assert "patience must be 0 where there is no validation" in command.mistake(*words, "--validate-every", 0)
    assert not (tmp_path / "run").exists()


def test_the_presets_flow_fits_the_cache(cache, model, tmp_path):
    done = command(cache, "-o", tmp_path / "run", "--encoders", model, *QUICK, "--dry-run")
    assert done.exit_code == 0, done.output
    plain, saving = (
        NewFlow(cache, tmp_path, {"model_type": "starflow", **FLOW}, settings, str(model)).plan()[0].plan
        for settings in (TrainingOptions(), TrainingOptions(ema=0.0, optimizer="adafactor"))
    )
    assert plain.optimizer == 3 * plain.gradients and saving.optimizer == 0


def test_a_part_of_a_cache(cache):
    found = LatentCache(cache)
    part = CachedLatents(found, np.array([8, 3, 5]), patch_size=2)
    assert sorted(index for taken in part.order.once(2) for index in taken) == [0, 1, 2]
    config = TrainingConfig(steps=1, batch_size=2, context_full=0.5, caption_dropout=0.0)
    batch = part.batch(np.random.default_rng(0), config, 0.0)
    assert batch["context_mask"].shape == (2, 4)


def test_mistakes(cache, model, pictures, flow_file, tmp_path):
    run = [cache, "-o", tmp_path / "run", "--encoders", model]
    other = command.mistake(cache, "-o", tmp_path / "run", "--model-config", flow_file)
    assert "another autoencoder" in other and "or give --encoders" in other
    assert "a TarFlow reads pixels" in command.mistake(cache, "-o", tmp_path / "run", "--preset", "tarflow")

    def with_config(content: object) -> str:
        path = tmp_path / "wrong.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return command.mistake(*run, "--model-config", path)

    assert "txt_dim is 7, and the data's is 32" in with_config({**FLOW, "txt_dim": 7})
    assert "unknown key depth" in with_config({**FLOW, "depth": 7})
    assert "missing key channels" in with_config({"patch_size": 1, "layers_per_block": [1, 1]})
    assert "must be one of starflow, tarflow, itarflow, text_flow, not 'gan'" in with_config(
        {**FLOW, "model_type": "gan"}
    )
    assert "patch_size 3 does not divide" in with_config({**FLOW, "patch_size": 3})
    assert "must hold a flow's config" in with_config("flow")
    assert "neither YAML nor JSON" in with_config("a: [")
    assert "cannot read" in command.mistake(*run, "--model-config", tmp_path / "none.yaml")
    assert "needs no --autoencoder-steps" in command.mistake(*run, "--autoencoder-steps", 3)
    assert "validation must be in 0..0.5" in command.mistake(*run, "--validation", 0.7)
    assert not (tmp_path / "run/config.json").exists()

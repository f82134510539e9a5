"""From a folder of pictures to a model directory, by the library and by the command; and the example script."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from helpers.commands import message
from helpers.model_directories import edit_weights
from helpers.paths import EXAMPLES
from PIL import Image

from mlx_starflow import load
from mlx_starflow.cli import main
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import load_vae
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.models.starflow import FlowConfig
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.loop.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.recipes.presets import PRESETS, Preset, get_preset
from mlx_starflow.training.recipes.text_to_image import step_times, train_model

TINY = Preset(
    size=8,
    autoencoder={"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    text_encoder={"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    flow={
        "patch_size": 2, "head_dim": 32, "txt_size": 16, "channels": 32, "layers_per_block": [1, 1],
        "use_softplus": True, "soft_clip": 4.0,
    },
    views=2,
    autoencoder_training=TrainingConfig(steps=30, batch_size=6, lr=5e-3, log_every=10),
    flow_training=TrainingConfig(steps=30, batch_size=6, lr=5e-3, log_every=10),
    pipeline={"temperature": 0.9},
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("uncompiled")


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_pictures_without_captions_and_what_is_told(picture_folder, tmp_path):
    flat, told = tmp_path / "flat", []
    flat.mkdir()
    for number, path in enumerate(sorted(picture_folder.glob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    assert "but no captions" in message(train_model, flat, tmp_path / "model", TINY)
    quick = TrainingConfig(steps=2, batch_size=2, log_every=1)
    preset = replace(TINY, autoencoder_training=quick, flow_training=quick)

    def tell(progress):
        told.append((progress.phase, progress.done, progress.total))

    train_model(flat, tmp_path / "model", preset, caption="rex the dog", callback=tell)
    assert list(dict.fromkeys(phase for phase, *_ in told if phase)) == ["autoencoder", "encoding", "flow"]
    assert ("flow", 2, 2) in told and ("encoding", 12, 12) in told
    assert load(tmp_path / "model").generate("rex the dog", seed=1).images[0].size == (8, 8)


def test_a_dry_run(picture_folder, tmp_path):
    autoencoder, flow = step_times(TINY)
    assert re.fullmatch(r"autoencoder: [\d.]+ m?s a step here, \d+ s for 30 steps", autoencoder)
    assert re.fullmatch(r"flow: [\d.]+ m?s a step here, \d+ s for 30 steps", flow)
    words = ["--dry-run", "--batch-size", "2", "--preset", "small", "--caption", "x"]
    result = CliRunner().invoke(main, ["train", str(picture_folder), "-o", str(tmp_path / "run"), *words])
    assert result.exit_code == 0 and result.stdout.count("a step here") == 2, result.output
    assert not (tmp_path / "run").exists()


def test_pictures_to_a_model(picture_folder, tmp_path):
    told: list[str] = []
    out = train_model(picture_folder, tmp_path / "model", TINY, report=told.append)
    assert (
        len(told) == 3
        and told[0].startswith("6 pictures for the flow, 6 for the autoencoder")
        and told[-1] == f"wrote {out}"
    )
    for part in ("autoencoder", "flow"):
        first, *_, last = losses(out / "training" / part / "log.jsonl")
        assert last < first
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "starflow" and FlowConfig.from_dict(config) == TINY.flow_config()

    pipe = load(str(out))
    result = pipe.generate("a red square", seed=1)
    assert result.images[0].size == (8, 8)
    assert result.settings.temperature == 0.9

    # The latents that the directory's own numbers normalize have about unit variance.
    vae = load_vae(out / "vae")
    from mlx_starflow.media.image_folder import ImageFolder
    from mlx_starflow.training.recipes.autoencoder import encode_views

    folder = ImageFolder.read(picture_folder, size=16)
    latents = encode_views(vae, folder.images, 2, np.random.default_rng(TINY.flow_training.seed))
    normalized = (latents - vae.config.latents_mean) / vae.config.latents_std
    assert np.abs(normalized.mean(axis=(0, 1, 2, 3))).max() < 1e-3
    assert np.abs(normalized.std(axis=(0, 1, 2, 3)) - 1).max() < 1e-3


def test_other_sources_and_what_is_skipped(tmp_path):
    data = tmp_path / "pictures"
    for name in ("red", "blue"):
        (data / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 12 + number), name).save(data / name / f"{number}.png")
    (data / "red/bad.png").write_bytes(b"no picture")
    short = replace(TINY.flow_training, steps=2)
    preset = replace(TINY, flow_training=short, autoencoder_training=short)
    told: list[str] = []
    with pytest.warns(UserWarning, match="skipped 1: red/bad.png"):
        out = train_model(data, tmp_path / "model", preset, report=told.append)
    assert told[0].startswith("6 pictures for the flow")
    assert (out / "training/skipped.txt").read_text().startswith("red/bad.png\tnot a picture")


def test_an_interrupted_run_gives_the_same_model(picture_folder, tmp_path, monkeypatch):
    straight = train_model(picture_folder, tmp_path / "straight", TINY)
    resumed = tmp_path / "resumed"
    saves = replace(TINY, flow_training=replace(TINY.flow_training, save_steps=7))

    from mlx_starflow.training.recipes import text

    whole = text.CaptionedLatents.batch
    calls = []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 16:
            raise RuntimeError
        return whole(*arguments)

    monkeypatch.setattr(text.CaptionedLatents, "batch", breaks)
    with pytest.raises(RuntimeError):
        train_model(picture_folder, resumed, saves)
    assert not (resumed / "config.json").exists()
    train_model(picture_folder, resumed, saves)
    assert len(calls) == 16 + 30 - 14
    for name in ("model.safetensors", "text_encoder/model.safetensors", "text_encoder/spiece.model",
                 "vae/model.safetensors", "vae/config.json", "config.json"):  # fmt: skip
        assert (straight / name).read_bytes() == (resumed / name).read_bytes(), name


@pytest.mark.parametrize("stage", ["autoencoder", "flow"])
def test_starting_again_is_gone_on_with_after_a_kill(stage, picture_folder, tmp_path, monkeypatch):
    """A run that threw the checkpoints of a finished model away, and was killed before it had one of its own."""
    short = replace(TINY.flow_training, steps=1)
    preset = replace(TINY, flow_training=short, autoencoder_training=replace(TINY.autoencoder_training, steps=1))
    out = train_model(picture_folder, tmp_path / "model", preset)
    whole = Trainer.run

    def killed(trainer: Trainer) -> object:
        if trainer.folder.name == stage:
            raise RuntimeError
        return whole(trainer)

    other = replace(preset, autoencoder_training=replace(preset.autoencoder_training, lr=1e-2))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", killed)
        with pytest.raises(RuntimeError):
            train_model(picture_folder, out, other, resume=False)
    assert not checkpoint_files(out / "training/flow")
    train_model(picture_folder, out, other)
    straight = train_model(picture_folder, tmp_path / "straight", other)
    assert (out / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    # A model of somebody else's is still refused.
    for path in checkpoint_files(out / "training/flow"):
        path.unlink()
    weight = load_weights(out)["blocks.0.proj_out.weight"] + 1
    edit_weights(out, blocks__0__proj_out__weight=weight)
    assert "holds another model" in message(train_model, picture_folder, out, other)


def test_resuming_with_something_changed(picture_folder, tmp_path):
    short = replace(TINY.flow_training, steps=1)
    preset = replace(TINY, flow_training=short, autoencoder_training=replace(TINY.autoencoder_training, steps=1))
    out = train_model(picture_folder, tmp_path / "model", preset)
    before = (out / "config.json").read_bytes()

    def refused(**changes: object) -> str:
        return message(train_model, picture_folder, out, replace(preset, **changes))

    assert "another run (flow: head_dim 32 -> 16)" in refused(flow={**preset.flow, "head_dim": 16})
    assert "(flow: noise_std" in refused(flow_training=replace(short, noise_std=0.17))
    lines = (picture_folder / "metadata.jsonl").read_text()
    (picture_folder / "metadata.jsonl").write_text(lines.replace("disc", "ring"))
    assert "(other captions)" in refused()
    (picture_folder / "metadata.jsonl").write_text("".join(lines.splitlines(keepends=True)[1:]))
    assert "autoencoder is of another run (other pictures)" in refused()
    assert (out / "config.json").read_bytes() == before


def test_the_flow_reads_whole_captions(picture_folder, tmp_path):
    once = replace(TINY.flow_training, steps=1)
    preset = replace(TINY, flow={**TINY.flow, "txt_size": 2}, flow_training=once, autoencoder_training=once)

    def length(folder: Path, preset: Preset) -> tuple[int, bool]:
        told: list[str] = []
        train_model(picture_folder, folder, preset, report=told.append)
        return json.loads((folder / "config.json").read_text())["txt_size"], any("captions are cut" in s for s in told)

    # "a", colour and shape, as a piece each, and the end.
    assert length(tmp_path / "whole", preset) == (4, False)
    assert length(tmp_path / "cut", replace(preset, fits_text=False)) == (2, True)
    # A training of an older version goes on with the length that it had.
    (file,) = checkpoint_files(tmp_path / "cut/training/flow")
    checkpoint = load_checkpoint(file)
    del checkpoint.note["identity"]
    save_checkpoint(file.parent, checkpoint)
    assert length(tmp_path / "cut", preset) == (2, True)


def test_command(picture_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", TINY)
    out = tmp_path / "model"
    words = ["train", str(picture_folder), "-o", str(out), "--steps", "4", "--autoencoder-steps", "3"]
    result = CliRunner().invoke(main, [*words, "--batch-size", "2", "--lr", "0.001", "--seed", "5", "--log-every", "1"])
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output
    assert len(losses(out / "training/flow/log.jsonl")) == 4
    assert len(losses(out / "training/autoencoder/log.jsonl")) == 3
    result = CliRunner().invoke(main, ["generate", "a red disc", "-m", str(out), "-o", str(tmp_path / "x.png")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, [*words[:5], "6", *words[6:], "--batch-size", "2", "--log-every", "1"])
    assert result.exit_code == 0 and "resuming at step 4, with steps 4 -> 6" in result.stderr
    result = CliRunner().invoke(main, [*words, "--no-resume", "--text-length", "3"])
    assert result.exit_code == 0 and "resuming" not in result.stderr
    assert "captions are cut: they are longer than 3 tokens" in result.output
    assert len(losses(out / "training/flow/log.jsonl")) == 1
    assert json.loads((out / "config.json").read_text())["txt_size"] == 3


def test_settings_in_a_file(picture_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", TINY)
    out = tmp_path / "model"
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {picture_folder}\noutput: {out}\nsteps: 3\nautoencoder-steps: 2\nlr: 1e-3\n"
        "batch_size: 4\naccumulate: 2\noptimizer: sinkgd\nlog-every: 1\nresume: false\n"
    )
    result = CliRunner().invoke(main, ["train", "--config", str(file), "--steps", "5", "--watch-every", "5"])
    assert result.exit_code == 0, result.output
    assert len(losses(out / "training/flow/log.jsonl")) == 5
    assert (out / "training/flow/loss.png").exists() and (out / "training/flow/samples/step-00000005.png").exists()
    found = yaml.safe_load((out / "training/config.yaml").read_text())
    expected = {"steps": 5, "lr": 0.001, "optimizer": "sinkgd", "ema": 0.999, "output": str(out), "resume": False}
    assert {name: found[name] for name in expected} == expected
    # What was saved is a configuration file: it gives the same model again.
    before = (out / "model.safetensors").read_bytes()
    again = tmp_path / "again"
    saved = str(out / "training/config.yaml")
    result = CliRunner().invoke(main, ["train", "--config", saved, "-o", str(again)])
    assert result.exit_code == 0, result.output
    assert (again / "model.safetensors").read_bytes() == before


def test_validation_split(picture_folder, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (picture_folder / "metadata.jsonl").read_text().splitlines()]
    preset = replace(TINY, flow_training=replace(TINY.flow_training, steps=4, batch_size=2, validate_every=2))
    with pytest.raises(StarflowError, match="has nothing to validate on"):
        train_model(picture_folder, tmp_path / "out", preset)
    for row in rows[4:]:
        row["split"] = "validation"
    (picture_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = []
    train_model(picture_folder, tmp_path / "out", preset, report=told.append)
    assert told[0].startswith("4 pictures for the flow, 4 for the autoencoder")
    log = (tmp_path / "out/training/flow/log.jsonl").read_text().splitlines()
    assert sum("validation_nll" in line for line in log) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rate: 1", "there is no option learning-rate; see mlx-starflow train --help"),
        ("- steps", "holds no options: write lines such as steps: 400"),
        ("steps: [", "is not valid YAML: "),
        ("steps: many", "Invalid value for '--steps': 'many' is not a valid integer"),
        ("optimizer: sgd", "Invalid value for '--optimizer': 'sgd' is not one of"),
    ],
)
def test_mistakes_in_the_file_are_one_line(text, message, picture_folder, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    words = ["train", str(picture_folder), "-o", str(tmp_path / "out"), "--config", str(tmp_path / "run.yaml")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_interrupted_command(picture_folder, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_starflow.training.recipes.text_to_image.train_model", interrupted)
    assert CliRunner().invoke(main, ["train", str(picture_folder), "-o", str(tmp_path / "out")]).exit_code == 130


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "-o", "out"], "nowhere does not exist; give a folder of pictures"),
        (["PICTURES", "-o", "out", "--preset", "huge"], "unknown preset 'huge'; it must be one of small, demo"),
        (["PICTURES", "-o", "out", "--steps", "0"], "steps must be greater than 0, not 0"),
        (["PICTURES"], "Missing option '-o'"),
    ],
)
def test_mistakes_are_one_line(words, message, picture_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["train", *(w.replace("PICTURES", str(picture_folder)) for w in words)])
    assert result.exit_code == 2 and message in result.stderr


def test_presets_fit_together():
    for name in PRESETS:
        preset = get_preset(name)
        config = preset.flow_config()
        assert config.img_size % config.patch_size == 0 and config.txt_dim == preset.text_config(100).d_model
        assert all(block.channels % block.head_dim == 0 for block in config.blocks)
    with pytest.raises(StarflowError, match="unknown preset"):
        get_preset("")


def test_example(tmp_path, capsys):
    script = EXAMPLES / "train_flow.py"
    runpy.run_path(str(script))["main"]([str(tmp_path), "--steps", "12", "--channels", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(len(line) == 4 * 8 + 3 * 3 for line in lines)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 12

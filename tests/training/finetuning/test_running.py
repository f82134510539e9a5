"""How a fine-tuning goes on: validation and patience, pictures to watch, several processes, what it computes in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from helpers import processes
from helpers.commands import Command, message
from helpers.images import colours, write_images
from helpers.model_directories import write_image_model
from PIL import Image

from mlx_starflow import load_flow
from mlx_starflow.likelihood import exact_nll
from mlx_starflow.model_dir.adapters import Adapter
from mlx_starflow.model_dir.files import load_weights
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.training.data.cache.build import build_cache
from mlx_starflow.training.data.cache.reading import LatentCache
from mlx_starflow.training.finetuning import base
from mlx_starflow.training.finetuning import finetune as running
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.data import AnchorImages, AnchorSamples, FinetuneData, own_nll
from mlx_starflow.training.finetuning.finetune import finetune
from mlx_starflow.training.loop.checkpoint import read_arrays
from mlx_starflow.training.loop.distributed import share
from mlx_starflow.training.loop.validation import BEST

pytestmark = pytest.mark.usefixtures("uncompiled")
NAMES = ["red", "green", "blue", "black", "yellow", "white"]
QUICK = FinetuneConfig(steps=4, batch_size=2, rank=2, validation=0.4, draws=1, samples=0, log_every=1)
command = Command("finetune")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_images(folder, colours(NAMES), [{"text": f"a {name} square"} for name in NAMES])
    return folder


@pytest.fixture(scope="module")
def cache(model, pictures, tmp_path_factory) -> Path:
    return build_cache(pictures, tmp_path_factory.mktemp("cache") / "c", model).folder


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "checkpoints/log.jsonl").read_text().splitlines()]


def test_the_best_adapter_is_kept_and_patience_ends_the_run(model, cache, tmp_path):
    """With a learning rate that soon does harm."""
    settings = replace(QUICK, steps=200, lr=0.3, validate_every=1, patience=3)
    result = finetune(model, cache, tmp_path / "run", settings)
    measured = [row for row in log(tmp_path / "run") if "validation_nll" in row]
    nll = [row["validation_nll"] for row in measured]
    best = int(np.argmin(nll))
    assert len(nll) == best + 1 + 3 < 200
    kept = read_arrays(tmp_path / "run/checkpoints" / BEST)
    layers = Adapter.read(result.folder).layers
    assert {f"{path}.{part}" for path, parts in layers.items() for part in parts} == set(kept)
    assert all(mx.array_equal(layers[p][part], kept[f"{p}.{part}"]) for p in layers for part in layers[p])


def test_pictures_to_watch(model, cache, tmp_path):
    """Captions by seeds, labelled, as the model is sampled; adapters on some layers alone too."""
    settings = replace(QUICK, watch_every=2, layers=("main.0",))
    finetune(model, cache, tmp_path / "run", settings)
    run = tmp_path / "run/checkpoints"
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000002.png", "step-00000004.png"]
    with Image.open(run / "samples/step-00000004.png") as sheet:
        assert sheet.width == 2 * 128 + 2  # two seeds
        assert len(set(np.asarray(sheet.convert("L"))[12:, :].ravel().tolist())) > 10  # something is written there
    assert (run / "loss.png").exists()


def test_the_adapter_can_be_used_while_it_runs(model, cache, tmp_path, monkeypatch):
    batch, seen = FinetuneData.batch, []

    def spied(self, rng, config, progress):
        if (tmp_path / "run/adapter").exists():
            seen.append(load_flow(model, adapters=[(tmp_path / "run/adapter", 1.0)]))
        return batch(self, rng, config, progress)

    monkeypatch.setattr(FinetuneData, "batch", spied)
    finetune(model, cache, tmp_path / "run", replace(QUICK, save_seconds=0.0))
    assert len(seen) == 3
    assert Adapter.read(tmp_path / "run/adapter").layers


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_a_batch_in_parts_is_the_same_batch(model, cache, pictures, tmp_path, anchor):
    more = {"anchor": anchor, "anchor_data": str(pictures)} if anchor else {}
    settings = replace(QUICK, steps=2, batch_size=4, **more)
    whole = finetune(model, cache, tmp_path / "a", settings)
    parts = finetune(model, cache, tmp_path / "b", replace(settings, accumulate=2))
    for path, layer in Adapter.read(whole.folder).layers.items():
        other = Adapter.read(parts.folder).layers[path]["lora_b"]
        assert mx.abs(layer["lora_b"] - other).max() < 1e-4 < mx.abs(other).max()


def test_each_part_has_its_share_of_the_anchor(cache):
    found = LatentCache(cache)
    data = FinetuneData(found, np.arange(6), 0.3, AnchorImages(found), 0.25, parts=2)
    config = FinetuneConfig(batch_size=8, accumulate=2).training(8)
    parts = [share(data.batch(np.random.default_rng(0), config, 0.0), part, 2) for part in range(2)]
    assert [len(part["latents"]) for part in parts] == [3, 3]
    assert [len(part["anchor_x"]) for part in parts] == [1, 1]


@pytest.mark.parametrize(
    "changes", [{"optimizer": "muon"}, {"dtype": "bfloat16"}, {"kind": "full", "dtype": "bfloat16"}]
)
def test_optimizers_and_what_it_computes_in(model, cache, tmp_path, changes):
    result = finetune(model, cache, tmp_path / "run", replace(QUICK, **changes))
    rates = [row["lr"] for row in log(tmp_path / "run") if "lr" in row]
    highest = {"muon": 2e-2}.get(changes.get("optimizer"), 1e-4 if "kind" in changes else 2e-3)
    assert highest / 2 < max(rates) <= highest
    if "kind" in changes:
        assert load_weights(result.folder)["blocks.0.proj_in.weight"].dtype == mx.bfloat16
    checkpoint = mx.load(str(tmp_path / "run/checkpoints/checkpoint-00000004.safetensors"))
    assert {array.dtype for name, array in checkpoint.items() if name.startswith("weights:")} == {mx.float32}


def test_all_weights_are_trained_in_float32_where_this_machine_computes_in_half(model, cache, tmp_path, monkeypatch):
    """A step of 1e-4 is less than half precision can add to a weight."""
    monkeypatch.setattr(base, "training_dtype", lambda: mx.bfloat16)
    settings = replace(QUICK, kind="full", ema=0.0)
    result = finetune(model, cache, tmp_path / "run", settings)
    checkpoint = mx.load(str(tmp_path / "run/checkpoints/checkpoint-00000004.safetensors"))
    before = parameters(load_flow(model))
    moved = [name for name in before if mx.any(checkpoint[f"weights:{name}"] != before[name])]
    assert len(moved) > 0.9 * len(before)
    assert load_weights(result.folder)["blocks.0.proj_in.weight"].dtype == mx.bfloat16


def test_a_base_that_fits_badly_is_told(model, cache, tmp_path, monkeypatch):
    said: list[str] = []
    finetune(model, cache, tmp_path / "a", QUICK, report=said.append)
    assert not any("fits these pictures badly" in line for line in said)
    monkeypatch.setattr(running, "own_nll", lambda *arguments, **options: -2.5)
    finetune(model, cache, tmp_path / "b", QUICK, report=said.append)
    (line,) = (line for line in said if "fits these pictures badly" in line)
    assert "that of its own samples -2.50" in line
    finetune(model, cache, tmp_path / "b", replace(QUICK, steps=5), report=said.append)
    assert sum("fits these pictures badly" in line for line in said) == 1  # not again when it goes on


def test_what_a_flow_gives_for_its_own_samples(model, cache):
    """The entropy of what it has learned: NLL of many samples, measured as that of pictures is but without noise."""
    flow, found = load_flow(model), LatentCache(cache)
    images = np.arange(len(found))
    one = own_nll(flow, found, images, count=64, seed=0)
    flow.config = replace(flow.config, noise_std=0.0)
    other = AnchorSamples.draw(flow, found, images, 64, 1)
    expected = exact_nll(flow, other.x, mx.array(other.text), draws=1)
    assert abs(one - expected.mean) < 4 * expected.standard_error


def test_one_caption_for_a_flat_folder(model, tmp_path):
    write_images(tmp_path / "photos", colours(NAMES))
    words = ["--lora", 2, "--steps", 1, "--batch-size", 2, "--samples", 0, "--draws", 1, "--validation", 0.4]
    assert "no captions: give one for all of them (--caption)" in command.mistake(
        model, tmp_path / "photos", "-o", tmp_path / "run", *words
    )
    done = command(model, tmp_path / "photos", "-o", tmp_path / "run", *words, "--caption", "a photo of rex the dog")
    assert done.exit_code == 0, done.output
    assert set(LatentCache(tmp_path / "run/cache").captions) == {("a photo of rex the dog",)}
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["caption"] == "a photo of rex the dog"
    said = message(finetune, model, tmp_path / "run/cache", tmp_path / "b", replace(QUICK, caption="x"))
    assert "is a cache, whose captions are encoded already" in said


def test_folders_with_repeats_are_said(model, tmp_path):
    for name in ("10_rex", "2_dog"):
        write_images(tmp_path / "photos" / name, colours(NAMES[:3]))
    said: list[str] = []
    finetune(model, tmp_path / "photos", tmp_path / "run", replace(QUICK, validation=0.34), report=said.append)
    assert "the names of the folders give repeats: a pass takes each picture 2 to 10 times" in said
    repeats = LatentCache(tmp_path / "run/cache").repeats
    assert repeats.tolist() == [10] * 3 + [2] * 3
    (epoch,) = {row["epoch"] for row in log(tmp_path / "run") if row["step"] == 4}
    assert 8 / 36 < epoch < 8 / 12


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--patience", 2], "--patience does nothing alone: give --validate-every"),
        (["--validate-every", 2, "--validation", 0], "--validate-every needs pictures: leave out --validation 0"),
        (["--batch-size", 3, "--accumulate", 2], "accumulate must be a divisor of batch_size 3"),
        (["--batch-size", 2, "--accumulate", 2, "--anchor", 0.5], "an anchor needs a batch size of 2 or more for each"),
    ],
)
def test_mistakes(model, cache, tmp_path, words, expected):
    assert expected in command(model, cache, "-o", tmp_path / "run", *words).stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes(model, pictures, tmp_path):
    """One writes, and its adapter is that of one process alone; what one refuses, both do; a run goes on."""
    words = ["--lora", 2, "--steps", 3, "--batch-size", 4, "--samples", 2, "--draws", 1, "--validation", 0.34,
             "--anchor", 0.5, "--anchor-samples", 2, "--validate-every", 2, "--watch-every", 2,
             "--dtype", "float32"]  # fmt: skip

    def start(run: Path, *more: object) -> list[tuple[int, str, str]]:
        line = ["-m", "mlx_starflow", "finetune", model, pictures, "-o", run, *words, *more]
        return processes.finish(processes.start(tmp_path / "hosts", [line] * 2))

    ended = start(tmp_path / "two")
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "held-out NLL" in ended[0][1] and ended[1][1] == ""
    alone = command(model, pictures, "-o", tmp_path / "one", *words)
    assert alone.exit_code == 0, alone.output
    one, two = (Adapter.read(tmp_path / part / "adapter").layers for part in ("one", "two"))
    for path, layer in one.items():
        assert mx.abs(layer["lora_b"] - two[path]["lora_b"]).max() < 1e-4 < mx.abs(layer["lora_b"]).max()
    names = [sorted(p.name for p in (tmp_path / part).rglob("*") if p.is_file()) for part in ("one", "two")]
    assert names[0] == names[1]
    refused = start(tmp_path / "two", "--dropout", 0.1, "--scale", 3.0)
    assert [code for code, _, _ in refused] == [2, 2], refused
    assert all("is of another run (adapter: scale 2.0 -> 3.0)" in err for _, _, err in refused)
    again = start(tmp_path / "two", "--steps", 4)
    assert [code for code, _, _ in again] == [0, 0] and "resuming at step 3" in again[0][2]

"""`mlx-starflow finetune`: what a run leaves behind, its options from a file, its memory plan."""

from __future__ import annotations

import gc
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from helpers.commands import Command, message
from helpers.examples import run_example_here
from helpers.images import colours, write_images
from helpers.model_directories import write_image_model
from helpers.peaks import one_at_a_time
from helpers.tiny_flows import tiny_flow
from PIL import Image

from mlx_starflow import load_flow
from mlx_starflow.convert.official import ARGUMENTS
from mlx_starflow.kernels.memory import usable
from mlx_starflow.model_dir.adapters import Adapter
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.model_dir.quantization import quantize_module
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.planning.finetune_memory import Planner, training_plan
from mlx_starflow.training.data.batches import Order, split_samples
from mlx_starflow.training.data.cache.build import build_cache
from mlx_starflow.training.data.cache.reading import LatentCache
from mlx_starflow.training.finetuning.adapters import AdapterConfig, attach
from mlx_starflow.training.finetuning.base import finetune_planner, held_dtype
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.data import FinetuneData, finetune_loss
from mlx_starflow.training.finetuning.finetune import finetune
from mlx_starflow.training.loop.trainer import Trainer

command = Command("finetune")
QUICK = {"steps": 3, "batch_size": 2, "validation": 0.4, "draws": 1, "samples": 2, "log_every": 1}


def options(**values: object) -> list[object]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    names = ["red", "green", "blue", "black", "yellow", "white"]
    write_images(folder, colours(names), [{"text": f"a {name} square"} for name in names])
    return folder


@pytest.fixture(scope="module")
def cache(model, pictures, tmp_path_factory) -> Path:
    return build_cache(pictures, tmp_path_factory.mktemp("cache") / "c", model).folder


def test_a_run_and_the_same_from_its_config(model, pictures, tmp_path, uncompiled):
    run = tmp_path / "run"
    done = command(model, pictures, "-o", run, *options(lora=2, **QUICK))
    assert done.exit_code == 0, done.output
    assert "held-out NLL" in done.stdout
    adapter = Adapter.read(run / "adapter")
    assert adapter.config["base_fingerprint"] == fingerprint(model)
    assert adapter.config["rank"] == 2 and all(parts["lora_a"].shape[1] == 2 for parts in adapter.layers.values())
    report = json.loads((run / "report.json").read_text())
    assert report["pictures"] == 2 and report["change"] == pytest.approx(report["after"] - report["before"])
    assert Image.open(run / "grid.png").width > 8
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["lora"] == 2 and config["steps"] == 3 and config["lr"] == 2e-3
    # The file says all that a run needs; the command line comes first.
    again = command("--config", run / "config.yaml", "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    other = Adapter.read(tmp_path / "again/adapter")
    same = [mx.array_equal(other.layers[path]["lora_b"], parts["lora_b"]) for path, parts in adapter.layers.items()]
    assert all(same)


def test_dora_with_dropout_anchored_to_samples_of_the_base(model, cache, tmp_path, uncompiled):
    quantized = quantize_model(model, tmp_path / "quantized", 8)
    extra = {"dora": 2, "dropout": 0.2, "blocks": "deep", "anchor": 0.5, "anchor_samples": 3, "anchor_weight": 2}
    done = command(quantized, cache, "-o", tmp_path / "run", *options(**QUICK, **extra))
    assert done.exit_code == 0, done.output
    assert Adapter.read(tmp_path / "run/adapter").kind == "dora"
    rows = [json.loads(line) for line in (tmp_path / "run/checkpoints/log.jsonl").read_text().splitlines()]
    kl = [row["kl"] for row in rows if "kl" in row]
    assert kl[0] < 1e-6 < kl[-1]
    flow = load_flow(quantized, adapters=[(tmp_path / "run/adapter", 1)])
    assert "gain" in flow.blocks[1].attn_blocks[0].attention.qkv


def test_all_weights_anchored_to_pictures(model, cache, pictures, tmp_path, uncompiled):
    settings = FinetuneConfig(kind="full", anchor=0.5, anchor_data=str(pictures), lr=1e-3, **QUICK)
    result = finetune(model, cache, tmp_path / "run", settings)
    tuned, base = parameters(load_flow(result.folder)), parameters(load_flow(model))
    assert all(mx.any(tuned[name] != base[name]) for name in tuned if name.endswith("proj.weight"))
    assert result.after.prior.shape == (2,)


def test_resumed_is_uninterrupted(model, cache, tmp_path, uncompiled):
    whole = finetune(model, cache, tmp_path / "whole", FinetuneConfig(rank=2, **QUICK))
    part = {**QUICK, "samples": 0}
    kept = finetune(model, cache, tmp_path / "part", FinetuneConfig(rank=2, **part))
    again = finetune(model, cache, tmp_path / "part", FinetuneConfig(rank=2, **part))
    first, second, third = (Adapter.read(result.folder).layers for result in (whole, kept, again))
    for path, parts in first.items():
        assert mx.array_equal(parts["lora_b"], second[path]["lora_b"])
        assert mx.array_equal(parts["lora_b"], third[path]["lora_b"])


def test_resuming_with_something_changed(model, cache, tmp_path, uncompiled):
    settings = FinetuneConfig(rank=2, **{**QUICK, "steps": 1, "samples": 0})
    finetune(model, cache, tmp_path / "run", settings)
    names = ("adapter/adapters.safetensors", "config.yaml")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]

    def refused(base: Path = model, **changes: object) -> str:
        return message(finetune, base, cache, tmp_path / "run", replace(settings, steps=2, **changes))

    assert "is of another run (adapter: scale 2.0 -> 3.0): " in refused(scale=3.0)
    assert "(quantization none -> 8)" in refused(quantize="8")
    assert "(other held-out pictures, seed 0 -> 3)" in refused(seed=3)
    assert "adapter: blocks all -> deep" in refused(blocks="deep")
    other = shutil.copytree(model, tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    name = next(name for name in weights if name.endswith("qkv.weight"))
    save_model(other, {**weights, name: weights[name] + 1}, json.loads((other / "config.json").read_text()))
    assert "(other base model)" in refused(other)
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before


def test_mistakes_come_before_any_work(model, cache, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file is a file; give a folder" in command.mistake(model, cache, "-o", tmp_path / "file")
    for words, expected in (
        (["--seed", -1], "seed must be 0 or more"),
        (["--steps", 0], "steps must be greater than 0"),
        (["--lr", "nan"], "lr must be 0 or more"),
        (["--ema", 1], "ema must be in 0..1"),
    ):
        assert expected in command.mistake(model, cache, "-o", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_examples(model, cache, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    small = ["--model", model, "--steps", 2, "--batch-size", 2, "--rank", 2]
    shown = run_example_here("lora_style.py", cache, *small, "--out", tmp_path / "style")
    assert "held-out NLL" in shown and Image.open(tmp_path / "style/strengths.png").width > 80
    run_example_here("lora_trainer.py", cache, tmp_path / "trainer", *small)
    assert Adapter.read(tmp_path / "trainer/adapter").config["rank"] == 2
    shown = run_example_here(
        "reports/forgetting.py", cache, pictures, *small, "--measured", 2, "--out", tmp_path / "forgetting"
    )
    assert len(re.findall(r"new [+-]\d", shown)) == 3


def test_dry_run(model, pictures, tmp_path):
    done = command(model, pictures, "-o", tmp_path / "run", "--dry-run")
    assert done.exit_code == 0, done.output
    for word in ("weights", "gradients", "optimizer", "activations", "peak", "16 GB Mac: batch size 16, rank 16"):
        assert word in done.stdout
    assert re.search(r"^[\d.]+ m?s a step here, \d+ \w+ for 400 steps$", done.stdout, re.MULTILINE)
    kinds = (["--dora", 2, "--anchor", 0.3, "--dropout", 0.1], ["--full", "--anchor", 0.3], ["--quantize", "8"])
    for more in kinds:
        assert "a step here" in command(model, pictures, "-o", tmp_path / "run", "--dry-run", *more).stdout
    assert "does not exist" in command.mistake(model, tmp_path / "none", "-o", tmp_path / "run", "--dry-run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def full_size() -> FlowConfig:
    """That of the released model; its weights are never computed."""
    return FlowConfig.from_official({**ARGUMENTS["starflow_3B_t2i_256x256"], "txt_dim": 2048})


def planner(config: FlowConfig, settings: FinetuneConfig, default: mx.Dtype = mx.bfloat16) -> Planner:
    """For a machine whose default is bfloat16, as on a GPU, or another."""

    def make() -> STARFlow:
        flow = STARFlow(config)
        flow.set_dtype(held_dtype(settings, default))
        return flow

    return finetune_planner(make, settings, default)


def test_what_is_chosen_for_the_full_size(full_size):
    plans = planner(full_size, FinetuneConfig())
    small, middle, large = (plans.choose(usable(gigabytes * 2**30)) for gigabytes in (16, 32, 64))
    assert all(choice.checkpoint and choice.rank == 16 for choice in (small, middle, large))
    assert large.quantization is None and large.batch_size == 16
    assert middle.quantization is None and middle.batch_size == 8
    assert small.quantization == "mixed" and small.batch_size >= 2
    assert all(c.plan.peak <= usable(gb * 2**30) for c, gb in ((small, 16), (middle, 32), (large, 64)))
    # Less and less memory: samples go before the rank, and then nothing fits.
    chosen = [plans.choose(memory) for memory in np.linspace(12e9, 3e9, 160)]
    fitting = [choice for choice in chosen if choice]
    assert {choice.quantization for choice in fitting} == {"mixed"} and chosen[-1] is None
    order = [(choice.batch_size, choice.rank) for choice in fitting]
    assert order == sorted(order, reverse=True) and order[0][0] > 1 and order[-1] == (1, 4)
    assert len(plans.macs().splitlines()) == 3 and "16 GB Mac: batch size" in plans.macs()


def test_what_is_said_is_not_chosen(full_size):
    said = FinetuneConfig(batch_size=4, rank=3, quantize="none", checkpoint_layers=True, kind="dora")
    choice = planner(full_size, said).choose(200e9)
    assert (choice.batch_size, choice.rank, choice.quantization, choice.checkpoint) == (4, 3, None, True)
    assert planner(full_size, said).choose(8e9) is None
    # A full fine-tuning holds float32, its gradient, two moments and an average, and computes in a half copy on a GPU.
    for default, copies in ((mx.float32, 1), (mx.bfloat16, 1.5)):
        full = planner(full_size, FinetuneConfig(kind="full"), default).choose(200e9)
        assert full.rank == 0 and full.plan.weights == copies * full.plan.gradients
        assert full.plan.optimizer == 3 * full.plan.gradients
    quantized = planner(full_size, FinetuneConfig(quantize="4")).choose(200e9)
    assert quantized.quantization == "4"


def test_a_base_quantized_for_the_training_alone(model, cache, tmp_path, uncompiled):
    done = command(model, cache, "-o", tmp_path / "run", *options(lora=2, quantize=8, **QUICK))
    assert done.exit_code == 0, done.output
    assert "base quantized to 8" in done.stdout
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["base_quantized_to"] == "8"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["quantize"] == "8"
    load_flow(model, adapters=[(tmp_path / "run/adapter", 1)])


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(
    ("kind", "quantization", "batch_size", "img_size"),
    [
        ("lora", None, 16, 8),
        ("lora", "8", 4, 8),
        ("dora", None, 4, 8),
        ("full", None, 4, 8),
        ("lora", None, 2, 16),
        ("lora", "bfloat16", 8, 8),
    ],
)
def test_plan_is_above_what_is_measured(tmp_path, kind, quantization, batch_size, img_size, checkpoint):
    flow = tiny_flow(channels=128, layers_per_block=[1, 1, 3], txt_size=8, txt_dim=64, img_size=img_size)
    if quantization == "bfloat16":
        flow.set_dtype(mx.bfloat16)
    elif quantization:
        quantize_module(flow, quantization)
    if kind != "full":
        attach(flow, AdapterConfig(kind=kind, rank=8))
    mx.eval(flow.parameters())
    plan = training_plan(flow, batch_size, checkpoint=checkpoint)
    loss = partial(finetune_loss, gradient_checkpointing=checkpoint)

    class Data:
        order = Order(4)

        def batch(self, rng: np.random.Generator, *_: object) -> dict[str, np.ndarray]:
            shape = (batch_size, img_size, img_size, 4)
            latents, noise = rng.standard_normal((2, *shape), dtype=np.float32)
            return {
                "latents": latents,
                "noise": noise,
                "text": rng.standard_normal((batch_size, 8, 64), dtype=np.float32),
            }

    # What other tests left behind is not the run's.
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory() - plan.weights
    with one_at_a_time():
        mx.reset_peak_memory()
        Trainer(flow, Data(), FinetuneConfig(steps=2).training(batch_size), tmp_path, loss=loss).run()
    taken = mx.get_peak_memory() - others
    assert taken <= plan.peak <= 2.5 * taken


def test_parts_of_the_data(cache):
    found = LatentCache(cache)
    train, held_out = split_samples(len(found), 0.4, 100, 0)
    assert sorted([*train, *held_out]) == list(range(6)) and len(held_out) == 2
    data = FinetuneData(found, train, 0.3)
    rng = np.random.default_rng(0)
    taken = {int(data.subset[index]) for _ in range(8) for index in data.order.take(2, rng)}
    assert taken == set(train.tolist())
    assert len(split_samples(5000, 0.1, 100, 0)[1]) == 100


def test_mistakes(model, pictures, cache, tmp_path):
    run = tmp_path / "run"
    assert "exclude each other" in command.mistake(model, cache, "-o", run, *options(lora=2, dora=2))
    assert "does not exist" in command.mistake(model, tmp_path / "none", "-o", run)
    assert "rank must be 0 or more" in command.mistake(model, cache, "-o", run, *options(lora=-1))
    assert "quantize must be one of" in command.mistake(model, cache, "-o", run, *options(quantize=3))
    assert "leave out --quantize" in command.mistake(model, cache, "-o", run, "--full", *options(quantize=8))
    assert "no layer is called 'x'" in command.mistake(model, cache, "-o", run, *options(layers="x"))
    assert "must be in 0..0.5" in command.mistake(model, cache, "-o", run, *options(anchor=0.9))
    assert "give --anchor" in command.mistake(model, cache, "-o", run, *options(anchor_data=pictures))
    other = command("demo", cache, "-o", run, *options(**QUICK))
    assert other.exit_code == 2 and "another autoencoder" in other.stderr
    config = tmp_path / "config.yaml"
    config.write_text("stepps: 3\n")
    assert "there is no option stepps" in command.mistake(model, cache, "-o", run, "--config", config)
    config.write_text("steps: many\n")
    assert "'many' is not a valid integer" in command.mistake(model, cache, "-o", run, "--config", config)
    config.write_text("a: [")
    assert "not valid YAML" in command.mistake(model, cache, "-o", run, "--config", config)
    assert "cannot read" in command.mistake(model, cache, "-o", run, "--config", tmp_path / "none.yaml")

"""Training a TarFlow on pictures with classes, and the example that does it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import EXAMPLES
from PIL import Image

from mlx_starflow import load_flow
from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.nll import with_noise
from mlx_starflow.models.tarflow import TarFlow, TarFlowConfig
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.labelled_images import LabelledImages
from mlx_starflow.training.loop.objective import batch_loss, batch_nll, noisy
from mlx_starflow.training.loop.samples import draw_classes
from mlx_starflow.training.loop.trainer import Trainer

EXAMPLE = EXAMPLES / "train_tarflow.py"
TINY = {
    "img_size": 8, "channel_size": 3, "patch_size": 4, "channels": 32, "blocks": 2, "layers_per_block": 1,
    "head_dim": 32,
}  # fmt: skip


@pytest.fixture
def classes(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(10):
            picture = np.clip(np.array(colour) + rng.integers(-40, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def test_batches(classes):
    data = LabelledImages.read(str(classes), size=8)
    assert data.classes == ["blue", "red"] and np.bincount(data.labels).tolist() == [10, 10]
    config = TrainingConfig(steps=1, batch_size=20, caption_dropout=0.0)
    batch = data.batch(np.random.default_rng(0), config, 0.0)
    assert batch["latents"].shape == batch["noise"].shape == (20, 8, 8, 3)
    reddish = batch["latents"][..., 0].mean(axis=(1, 2)) > 0
    assert np.array_equal(batch["text"] == 1, reddish)
    dropped = data.batch(np.random.default_rng(0), TrainingConfig(steps=1, batch_size=20, caption_dropout=1.0), 0.0)
    assert (dropped["text"] == -1).all()
    train, held_out = data.split(5)
    assert len(train.images) == 16 and len(held_out.images) == 4 and held_out.classes == data.classes


def test_uniform_noise_is_dequantization():
    flow = TarFlow(TarFlowConfig(**TINY, noise_type="uniform"))
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (500, 8, 8, 3))
    x = (levels / 127.5 - 1).astype(np.float32)
    found = np.array(noisy(flow, mx.array(x), mx.array(rng.standard_normal(x.shape, dtype=np.float32))))
    offset = (found + 1) * 128 - levels
    assert offset.min() > -1e-3 and offset.max() < 1 + 1e-3
    assert np.abs(np.histogram(offset, 10, (0, 1))[0] / offset.size - 0.1).max() < 5e-3
    # The same levels as in scoring, which draws its noise in another way.
    offset = (with_noise(flow, x, 0) + 1) * 128 - levels
    assert offset.min() > -1e-3 and offset.max() < 1 + 1e-3
    with pytest.raises(StarflowError, match="noise_type must be gaussian or uniform"):
        TarFlowConfig(**TINY, noise_type="normal")


def test_weights_of_samples():
    flow = TarFlow(TarFlowConfig(**TINY, num_classes=2))
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 3, 8, 8, 3), dtype=np.float32)
    batch = {"latents": mx.array(x), "noise": mx.array(noise), "text": mx.array([0, 1, -1])}
    nll = np.array(batch_nll(flow, batch))
    loss, metrics = batch_loss(flow, batch)
    assert float(loss) == pytest.approx(nll.mean(), rel=1e-5) == float(metrics["nll"])
    loss, metrics = batch_loss(flow, {**batch, "weight": mx.array([0.5, 2.0, 0.0])})
    assert float(loss) == pytest.approx((nll * [0.5, 2, 0]).mean(), rel=1e-5)
    assert float(metrics["nll"]) == pytest.approx(nll.mean(), rel=1e-5)


def test_a_trainer_in_one_line(classes, tmp_path, uncompiled):
    flow = TarFlow(TarFlowConfig(**TINY, num_classes=2))
    data = LabelledImages.read(str(classes), size=8)
    config = TrainingConfig(steps=40, batch_size=8, lr=3e-3, log_every=10, dtype="bfloat16", checkpoint_layers=True)
    Trainer(flow, data, config, tmp_path / "run").run()
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert rows[-1]["tokens_per_second"] == pytest.approx(4 * rows[-1]["samples_per_second"], rel=1e-2)


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_example(classes, tmp_path, noise, capsys, uncompiled):
    out = tmp_path / "out"
    words = [str(classes), str(out), "--size", "8", "--channels", "64", "--blocks", "2", "--steps", "6"]
    runpy.run_path(str(EXAMPLE))["main"]([*words, "--batch-size", "4", "--noise", noise])
    assert "classes blue, red" in capsys.readouterr().out
    assert (out / "samples.png").exists() and (out / "training/loss.png").exists()
    flow = load_flow(out)
    assert flow.config.num_classes == 2 and flow.config.noise_type == noise
    assert len(draw_classes(flow)) == 2


@pytest.mark.parametrize(("count", "held"), [(3, 2), (9, 2), (12, 2), (19, 2), (20, 2), (30, 3)])
def test_few_images_are_held_out_too(count, held):
    data = LabelledImages(np.zeros((count, 2, 2, 3), np.uint8), ["a", "b", "c"] * (count // 3) + ["a"] * (count % 3))
    train, held_out = data.split(10)
    assert (train.order.count, held_out.order.count) == (count - held, held)
    assert train.classes == held_out.classes == data.classes


def test_too_few_images_to_hold_some_out():
    with pytest.raises(StarflowError, match="2 pictures are too few to hold some out: give more, or --validation 0"):
        LabelledImages(np.zeros((2, 2, 2, 3), np.uint8), ["a", "b"]).split(10)

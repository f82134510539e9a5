"""The learned denoiser learns the score of the flow beside it, from the same pass backwards."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_training import TinyData, make_model
from training.loop.test_config import lines
from training.loop.test_trainer import CONFIG, Crash, Stops, assert_same, crash, last_checkpoint

from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.sampling import denoise
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import Order
from mlx_starflow.training.loop.objective import batch_loss
from mlx_starflow.training.loop.score_matching import NAME, denoiser_loss, denoiser_weights, score_target
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign, trainable
from mlx_starflow.training.recipes.text import TextFlow

pytestmark = pytest.mark.usefixtures("uncompiled")
PICTURE = {
    "img_size": 4, "channel_size": 2, "patch_size": 1, "channels": 32, "layers_per_block": [1, 1], "head_dim": 32,
    "txt_size": 3, "txt_dim": 8, "use_softplus": True, "soft_clip": 4.0, "noise_std": 0.4,
    "learnable_self_denoiser": True,
}  # fmt: skip
VIDEO = {
    **PICTURE, "vid_size": "9:4", "temporal_causal": 2, "shallow_block_local": True, "conditional_denoiser": True,
    "denoiser_window": 2,
}  # fmt: skip


def make_flow(**settings: object) -> STARFlow:
    mx.random.seed(4)
    flow = STARFlow(FlowConfig(**settings))
    for part in (*flow.blocks, flow.learnable_self_denoiser):
        part.proj_out.weight = 0.1 * mx.random.normal(part.proj_out.weight.shape)
    return flow


def make_batch(flow: STARFlow) -> dict[str, mx.array]:
    """Four samples; one counts for nothing, one sees nothing but the text."""
    count, rng = 4, np.random.default_rng(0)
    frames = [3] if flow.config.vid_size else []
    latents, noise = rng.standard_normal((2, count, *frames, 4, 4, 2), dtype=np.float32)
    text = rng.standard_normal((count, 3, 8), dtype=np.float32)
    weight = np.array([0.5, 2.0, 0.0, 1.5], np.float32)
    keep = np.ones((count, latents.size // count // 2), np.float32)
    keep[3, 1:] = 0
    batch = {"latents": latents, "noise": noise, "text": text, "context_mask": keep, "weight": weight}
    return {name: mx.array(array) for name, array in batch.items()}


def step_gradients(flow: STARFlow, batch: dict[str, mx.array], **settings: object) -> tuple[dict, dict]:
    config = TrainingConfig(steps=1, batch_size=len(batch["latents"]), **settings)
    trainer = Trainer(flow, TinyData(), config, "/nonexistent")
    return trainer._steps._plain_gradients(batch, mx.array(0))


def expected_target(flow: STARFlow, batch: dict[str, mx.array]) -> mx.array:
    """Its definition, for each sample by itself: noise_std^2 / 0.3 * d(sum over dimensions of the NLL) / dx."""
    x = batch["latents"] + flow.config.noise_std * batch["noise"]
    nll = lambda x: flow(x, batch["text"]).nll().sum() * (x.size / len(x))  # noqa: E731
    return flow.config.noise_std**2 / 0.3 * mx.grad(nll)(x)


@pytest.mark.parametrize("settings", [PICTURE, VIDEO], ids=["picture", "video"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_step_is_both_trainings_done_apart(settings, checkpoint):
    flow = make_flow(**settings)
    batch = make_batch(flow)
    found, numbers = step_gradients(flow, batch, checkpoint_layers=checkpoint)
    names = denoiser_weights(flow)
    assert names and names == {name for name in found if name.startswith(NAME)}
    weights = trainable(flow)

    def of_flow(weights):
        assign(flow, weights)
        return batch_loss(flow, batch)[0]

    def of_denoiser(weights):
        assign(flow, weights)
        x = batch["latents"] + flow.config.noise_std * batch["noise"]
        # Samples 2 (it has no weight) and 3 (its context is hidden) do not count.
        return mx.square((x - denoise(flow, x, batch["text"])) / 0.3 - target)[:2].mean()

    target = expected_target(flow, batch)
    for part, loss in ((names, of_denoiser), (set(found) - names, of_flow)):
        expected = mx.grad(loss)({name: weights[name] for name in part})
        for name, gradient in expected.items():
            bound = 1e-5 * max(mx.abs(gradient).max().item(), 1e-3)
            assert mx.abs(found[name] - gradient).max().item() <= bound, name
    assert numbers["denoiser"].item() == pytest.approx(of_denoiser(weights).item(), rel=1e-5)
    assert numbers["loss"].item() == pytest.approx(of_flow(weights).item(), rel=1e-6)


@pytest.mark.parametrize("settings", [PICTURE, VIDEO], ids=["picture", "video"])
def test_target_and_gradient_against_finite_differences(settings):
    flow = make_flow(**settings)
    batch = make_batch(flow)
    del batch["context_mask"]
    probe = mx.zeros(batch["latents"].shape)
    gradient = mx.grad(lambda probe: batch_loss(flow, {**batch, "probe": probe})[0])(probe)
    target, counts = score_target(flow, batch, gradient)
    assert counts.tolist() == [1, 1, 0, 1]
    x = batch["latents"] + flow.config.noise_std * batch["noise"]
    direction = mx.random.normal(x.shape, key=mx.random.key(1))

    def nll(x):
        return np.array(flow(x, batch["text"]).nll(), np.float64) * (x.size / len(x))

    slope = (nll(x + 1e-2 * direction) - nll(x - 1e-2 * direction)) / 2e-2
    found = np.array((target * direction).reshape(len(x), -1).sum(axis=1)) * 0.3 / flow.config.noise_std**2
    chosen = np.array(counts) > 0
    np.testing.assert_allclose(found[chosen], slope[chosen], rtol=2e-3, atol=2e-2)

    weights = {name: weight for name, weight in trainable(flow).items() if name in denoiser_weights(flow)}

    def loss(weights):
        assign(flow, weights)
        return denoiser_loss(flow, batch, gradient)

    own = mx.grad(loss)(weights)
    norm = np.sqrt(sum(mx.square(g).sum().item() for g in own.values()))
    ahead, behind = (
        loss({name: w + t / norm * own[name] for name, w in weights.items()}).item() for t in (1e-3, -1e-3)
    )
    assert (ahead - behind) / 2e-3 == pytest.approx(norm, rel=1e-2)


def test_neither_loss_reaches_the_other_network():
    flow = make_flow(**VIDEO)
    batch = make_batch(flow)
    found, _ = step_gradients(flow, batch)
    alone = STARFlow(FlowConfig(**{**VIDEO, "learnable_self_denoiser": False}))
    assign(alone, {name: w for name, w in trainable(flow).items() if not name.startswith(NAME)})
    without, numbers = step_gradients(alone, batch)
    assert "denoiser" not in numbers
    for name, gradient in without.items():
        assert mx.array_equal(found[name], gradient), name
    # With the denoiser frozen, there is nothing to train it for.
    flow.learnable_self_denoiser.freeze()
    assert "denoiser" not in step_gradients(flow, batch)[1]


class Normal:
    """Data of a normal distribution, whose score with noise is known."""

    def __init__(self, std: float):
        self.std, self.order = std, Order(1)

    def batch(self, rng, config, progress):
        latents, noise = rng.standard_normal((2, config.batch_size, 4, 4, 2), dtype=np.float32)
        return {"latents": self.std * latents, "noise": noise}


def test_it_finds_the_score_of_a_normal_distribution(tmp_path):
    std, noise = 0.8, 0.4
    flow = make_flow(**{**PICTURE, "txt_size": 0, "txt_dim": 0})
    for block in flow.blocks:
        block.proj_out.weight = mx.zeros_like(block.proj_out.weight)
    # The flow as it is after training: z = x / sqrt(std^2 + noise^2), half of the logarithm in each block.
    scale = np.sqrt(np.sqrt(std**2 + noise**2))
    raw = 4 * np.arctanh((np.log(np.expm1(scale)) - 0.541324854612918) / 4)
    for block in flow.blocks:
        bias = np.array(block.proj_out.bias)
        bias[: bias.size // 2] = raw
        block.proj_out.bias = mx.array(bias)
    x = mx.random.normal((64, 4, 4, 2), key=mx.random.key(0)) * np.sqrt(std**2 + noise**2)
    assert mx.allclose(flow(x).z, x / np.sqrt(std**2 + noise**2), atol=1e-4)
    for block in flow.blocks:
        block.freeze()
    flow.learnable_self_denoiser.proj_out.weight *= 0
    config = TrainingConfig(steps=60, batch_size=8, lr=5e-3, context_full=0, context_partial=0, ema=0, log_every=10)
    Trainer(flow, Normal(std), config, tmp_path).run()
    error = denoise(flow, x) - x * std**2 / (std**2 + noise**2)
    assert mx.sqrt(mx.square(error).mean()).item() < 0.02 * std
    rows = lines(tmp_path)
    assert rows[-1]["denoiser"] < 0.02 * rows[0]["denoiser"]


def video_trainer(folder, config, data=None) -> Trainer:
    model = make_model(learnable_self_denoiser=True, conditional_denoiser=True)
    return Trainer(model, data or TinyData(), config, folder, loss=TextFlow.loss)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 5}, {"dtype": "bfloat16"}], ids=str)
def test_it_resumes_bit_for_bit_and_has_an_average(tmp_path, changes):
    config = replace(CONFIG, steps=6, save_steps=3, log_every=1, **changes)
    straight = video_trainer(tmp_path / "straight", config)
    averaged = straight.run()
    with pytest.raises(Crash):
        video_trainer(tmp_path / "halves", config, Stops(5, crash)).run()
    video_trainer(tmp_path / "halves", config).run()
    assert_same(last_checkpoint(tmp_path / "straight"), last_checkpoint(tmp_path / "halves"))
    name = f"flow.{NAME}proj_out.weight"
    assert mx.abs(averaged[name]).max() > 0 and not mx.array_equal(averaged[name], trainable(straight.model)[name])
    assert all(np.isfinite(row["denoiser"]) and row["denoiser-grad"] >= 0 for row in lines(tmp_path / "straight"))


def test_accumulated_and_compiled(tmp_path):
    config = replace(CONFIG, steps=3, batch_size=4, context_full=0.0, context_partial=0.0, log_every=1, ema=0.0)
    found = []
    for index, changes in enumerate(({}, {"accumulate": 2})):
        if index:
            mx.enable_compile()
        trainer = video_trainer(tmp_path / str(index), replace(config, **changes))
        trainer.run()
        found.append(lines(tmp_path / str(index)))
    for rows in found[1:]:
        for row, other in zip(rows, found[0], strict=True):
            for key in ("loss", "denoiser", "grad", "denoiser-grad"):
                assert row[key] == pytest.approx(other[key], rel=2e-3), key

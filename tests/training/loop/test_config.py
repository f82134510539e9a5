"""What the training loop can be told: accumulation, skipping, precision, frozen weights, validation, pictures."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_training import TinyData, make_model
from PIL import Image
from training.loop.test_trainer import CONFIG, Crash, Stops, assert_same, crash, last_checkpoint, make_trainer

from mlx_starflow.errors import StarflowError
from mlx_starflow.likelihood.nll import HALF_LOG_2PI
from mlx_starflow.training.config import OPTIMIZERS, TrainingConfig, TrainingOptions
from mlx_starflow.training.loop.checkpoint import checkpoint_files, load_checkpoint
from mlx_starflow.training.loop.run_log import RunLog, read_log
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.watch import draw_curves
from mlx_starflow.training.loop.weights import assign, trainable
from mlx_starflow.training.recipes.presets import get_preset
from mlx_starflow.training.recipes.text import TextFlow

pytestmark = pytest.mark.usefixtures("uncompiled")
# Without a share of masked samples the mean over micro-batches is that of the batch for metrics too.
PLAIN = replace(CONFIG, steps=3, batch_size=4, context_full=0.0, context_partial=0.0, log_every=1, warm_up=0.0)


def arrays(weights) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in weights.items()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def gradients(config, batch, **options):
    """What one step gives the optimizer, with clipping out of the way."""
    trainer = make_trainer(Path("/nonexistent"), replace(config, clip=1e9), **options)
    found = {}

    def note(gradients, lr, decay):
        found.update(arrays(gradients))

    if hasattr(trainer._steps, "_update"):
        trainer._steps._update = note
        numbers, _ = trainer._steps(batch, 0, 0.0, 0.0)
        return found, numbers
    found, numbers = trainer._steps._plain_gradients({n: mx.array(a) for n, a in batch.items()}, mx.array(0))
    return arrays(found), {name: float(value) for name, value in numbers.items()}


def test_accumulated_gradients_are_the_whole_batchs():
    batch = TinyData().batch(np.random.default_rng(1), PLAIN, 0.0)
    whole, numbers = gradients(PLAIN, batch)
    for parts in (2, 4):
        found, means = gradients(replace(PLAIN, accumulate=parts), batch)
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            assert np.abs(found[name] - gradient).max() <= 1e-5 * max(np.abs(gradient).max(), 1e-3), name
        assert means["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
        assert means["nll"] == pytest.approx(numbers["nll"], rel=1e-5)


def test_checkpointed_layers_have_the_same_gradients():
    batch = TinyData().batch(np.random.default_rng(1), PLAIN, 0.0)
    model = make_model()
    loss = lambda model, batch: model.loss(batch, gradient_checkpointing=True)  # noqa: E731
    trainer = Trainer(model, TinyData(), PLAIN, "/nonexistent", loss=loss)
    found, _ = trainer._steps._plain_gradients({n: mx.array(a) for n, a in batch.items()}, mx.array(0))
    whole, _ = gradients(PLAIN, batch)
    for name, gradient in arrays(found).items():
        assert np.abs(gradient - whole[name]).max() <= 1e-6 * max(np.abs(whole[name]).max(), 1e-3), name


def test_steps_with_large_gradients_are_skipped(tmp_path):
    def spoil(batch):
        batch["latents"] *= 30

    skip = replace(PLAIN, skip=50.0)
    trainer = make_trainer(tmp_path, skip, Stops(2, spoil))
    before = {}
    apply = trainer._steps._update

    def note(*arguments):
        before[trainer.step] = True
        apply(*arguments)

    trainer._steps._update = note
    trainer.run()
    assert sorted(before) == [0, 2]
    assert [line.get("skipped", 0) for line in lines(tmp_path)] == [0, 1, 0]
    assert lines(tmp_path)[1]["grad"] > 50


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_bfloat16_with_float32_weights(tmp_path, weights):
    model = make_model()
    assign(model, {name: w.astype(getattr(mx, weights)) for name, w in trainable(model).items()})
    seen = set()

    def loss(model, batch):
        seen.update(w.dtype for w in trainable(model).values())
        return model.loss(batch)

    trainer = Trainer(model, TinyData(), replace(PLAIN, dtype="bfloat16"), tmp_path, loss=loss)
    trainer.run()
    assert seen == {mx.bfloat16}
    for part in (trainable(model), trainer.average, trainer.optimizer.flat_state()):
        assert not any(array.dtype == mx.bfloat16 for array in part.values())
    reference = make_trainer(tmp_path / "float32", PLAIN)
    reference.run()
    assert lines(tmp_path)[0]["loss"] == pytest.approx(lines(tmp_path / "float32")[0]["loss"], rel=2e-2)


def test_no_average_takes_no_memory(tmp_path):
    trainer = make_trainer(tmp_path, replace(PLAIN, ema=0.0))
    found = trainer.run()
    assert trainer.average == {} and load_checkpoint(checkpoint_files(tmp_path)[0]).average == {}
    assert_same(arrays(found), arrays(trainable(trainer.model)))
    # An average may be asked for later: it starts from the weights.
    later = make_trainer(tmp_path, replace(PLAIN, steps=4))
    later.run()
    assert later.average.keys() == found.keys()


def test_only_trainable_weights_are_trained(tmp_path):
    model = make_model()
    model.freeze()
    model.flow.blocks[1].proj_out.unfreeze()
    names = {"flow.blocks.1.proj_out.weight", "flow.blocks.1.proj_out.bias"}
    before = arrays(flat(model))
    trainer = Trainer(model, TinyData(), PLAIN, tmp_path, loss=TextFlow.loss)
    assert set(trainer.run()) == names
    checkpoint = load_checkpoint(checkpoint_files(tmp_path)[0])
    assert set(checkpoint.weights) == set(checkpoint.average) == names
    assert {name.rsplit("/", 1)[0] for name in checkpoint.optimizer} - {"0", "1"} == names
    for name, weight in flat(model).items():
        assert np.array_equal(np.array(weight), before[name]) != (name in names), name


def flat(model) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_extra_term_of_the_loss(tmp_path, accumulate):
    def extra(model, batch, key):
        weight = model.flow.blocks[0].proj_in.weight
        return 0.1 * mx.square(weight).sum(), {"draw": mx.random.uniform(key=key)}

    config = replace(PLAIN, accumulate=accumulate, steps=6, save_steps=3)
    make_trainer(tmp_path / "straight", config, extra_loss=extra).run()
    rows = lines(tmp_path / "straight")
    assert rows[0]["loss"] == pytest.approx(rows[0]["nll"] + rows[0]["extra"], rel=1e-5)
    assert rows[5]["extra"] < rows[0]["extra"]
    assert len({row["draw"] for row in rows}) == 6
    with pytest.raises(Crash):
        make_trainer(tmp_path / "halves", config, Stops(5, crash), extra_loss=extra).run()
    make_trainer(tmp_path / "halves", config, extra_loss=extra).run()
    assert_same(last_checkpoint(tmp_path / "straight"), last_checkpoint(tmp_path / "halves"))
    assert [row["draw"] for row in lines(tmp_path / "halves")] == [row["draw"] for row in rows]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_and_resumes_bit_for_bit(tmp_path, optimizer):
    config = replace(CONFIG, steps=8, save_steps=4, optimizer=optimizer, accumulate=5)
    make_trainer(tmp_path / "straight", config).run()
    with pytest.raises(Crash):
        make_trainer(tmp_path / "halves", config, Stops(6, crash)).run()
    make_trainer(tmp_path / "halves", config).run()
    assert_same(last_checkpoint(tmp_path / "straight"), last_checkpoint(tmp_path / "halves"))
    rows = [[row["loss"] for row in lines(tmp_path / part)] for part in ("straight", "halves")]
    assert rows[0] == rows[1] and len(set(rows[0])) == 4
    other = replace(config, optimizer="adamw" if optimizer == "muon" else "muon")
    with pytest.raises(StarflowError, match=f"was trained with --optimizer {optimizer}"):
        make_trainer(tmp_path / "halves", other)


def held_out() -> TinyData:
    data = TinyData(7)
    data.latents = data.latents[::-1].copy()
    return data


def test_validation_is_exact_and_keeps_the_best(tmp_path, capsys):
    config = replace(CONFIG, steps=9, validate_every=3, noise_std=0.0, lr=1e-2, ema=0.5)
    trainer = make_trainer(tmp_path, config, validation=held_out(), nll=TextFlow.nll)
    best = trainer.run()
    rows = [row for row in lines(tmp_path) if "validation_nll" in row]
    assert [row["step"] for row in rows] == [3, 6, 9]
    found = min(rows, key=lambda row: row["validation_nll"])
    assert trainer.validation.state["step"] == found["step"] and found["best"]
    # By hand: the same noise, batch by batch, the whole context and the caption.
    data, rng = held_out(), np.random.default_rng([config.seed, 1])
    assign(trainer.model, best)
    plain = replace(config, context_full=0.0, context_partial=0.0, caption_dropout=0.0)
    values = []
    for chosen in (np.arange(5), np.arange(5, 7)):
        batch = data.arrays(chosen, rng, plain, 1.0)
        values += trainer.model.nll({name: mx.array(array) for name, array in batch.items()}).tolist()
    assert found["validation_nll"] == pytest.approx(np.mean(values) + HALF_LOG_2PI, abs=1e-5)
    assert found["standard_error"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(7), abs=1e-5)
    assert "training: step 3, validation" in capsys.readouterr().err
    assert_same(arrays(mx.load(str(tmp_path / "best.safetensors"))), arrays(best))


def test_early_stopping_survives_a_resume(tmp_path, capsys):
    # The learning rate is so high that what was never seen gets worse.
    config = replace(CONFIG, steps=40, validate_every=2, patience=3, lr=3e-2, save_steps=1, noise_std=0.0, ema=0.0)

    def run(folder, data=None):
        trainer = make_trainer(tmp_path / folder, config, data, validation=held_out(), nll=TextFlow.nll)
        return trainer, trainer.run()

    straight, best = run("straight")
    assert straight.step < 40 and straight.validation.state["worse"] == 3
    assert "stopped early: no better one 3 times in a row" in capsys.readouterr().err
    assert straight.validation.state["step"] == straight.step - 6
    with pytest.raises(Crash):
        run("halves", Stops(straight.step - 2, crash))
    resumed, again = run("halves")
    assert resumed.step == straight.step and resumed.validation.state == straight.validation.state
    assert_same(arrays(best), arrays(again))
    assert run("halves")[0].step == straight.step


def test_pictures_to_watch(tmp_path):
    seen = []

    def samples(model):
        seen.append(arrays(trainable(model)))
        return [Image.new("RGB", (8, 8), "red")] * 4

    config = replace(CONFIG, steps=4, watch_every=2, log_every=1, ema=0.9)
    trainer = make_trainer(tmp_path, config, samples=samples)
    trainer.run()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    assert Image.open(tmp_path / "samples/step-00000004.png").width == 18
    assert_same(seen[-1], arrays(trainer.average))
    curve = np.asarray(Image.open(tmp_path / "loss.png"))
    assert curve.shape == (420, 720, 3)
    assert ((curve == (31, 119, 180)).all(axis=-1)).sum() > 100
    # Watching changes nothing.
    make_trainer(tmp_path / "plain", replace(config, watch_every=0)).run()
    one, other = last_checkpoint(tmp_path), last_checkpoint(tmp_path / "plain")
    assert_same(one, other)


def test_the_log_forgets_what_is_done_again(tmp_path):
    config = replace(CONFIG, steps=8, save_steps=4, log_every=1)
    with pytest.raises(Crash):
        make_trainer(tmp_path, config, Stops(7, crash)).run()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 7, "lo')
    make_trainer(tmp_path, config).run()
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 9))


@pytest.mark.parametrize("limit", [3000, 100_000])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_intact(tmp_path, limit):
    config = replace(CONFIG, steps=6, save_steps=2)
    make_trainer(tmp_path, replace(config, steps=2)).run()
    before = last_checkpoint(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(StarflowError, match=r"cannot write the checkpoint .*00000004.*; make room") as raised:
            make_trainer(tmp_path, config).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert_same(before, last_checkpoint(tmp_path))
    assert not list(tmp_path.glob("partial-*"))
    make_trainer(tmp_path, config).run()
    assert load_checkpoint(checkpoint_files(tmp_path)[0]).step == 6


def test_lines_of_the_log_that_are_none(tmp_path):
    lines = [b'{"step": 1, "loss": 2.0}', b"\xff", b"[1]", b"3", b"[" * 100_000, b'{"step": "x"}', b'{"loss": NaN}',
             b'{"step": 2, "loss": Infinity}', b'{"step": 3, "loss": 1.5}']  # fmt: skip
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert [row.get("step") for row in read_log(tmp_path)] == [1, None, 2, 3]
    assert draw_curves(tmp_path) == tmp_path / "loss.png"
    RunLog(tmp_path, 1)
    assert [row.get("step") for row in read_log(tmp_path)] == [1, None]


def test_a_log_that_cannot_be_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n' * 400)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(StarflowError, match=r"cannot write .*log\.jsonl: .*make room"):
            make_trainer(tmp_path, PLAIN).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("optimizer", "lr"), [("muon", 2e-2), ("sinkgd", 2e-2), ("adafactor", 1e-3), ("adamw", 1e-3)])
def test_an_optimizer_has_a_rate_of_its_own(optimizer, lr):
    config = TrainingOptions(optimizer=optimizer).over(TrainingConfig(steps=1))
    assert config.lr == lr
    # Embeddings are AdamW's in any case.
    assert config.lr * config.embedding_factor == pytest.approx(1e-3 * 8)
    assert TrainingOptions(optimizer=optimizer, lr=3e-4).over(TrainingConfig(steps=1)).lr == 3e-4
    preset = get_preset("small")
    expected = preset.flow_training.lr if lr == 1e-3 else lr
    assert preset.adjusted(TrainingOptions(optimizer=optimizer)).flow_training.lr == expected


def test_loss_and_validation_are_in_one_unit(tmp_path):
    """One sample, without dropout and noise: the loss of the first step is the NLL of the same weights."""
    data = TinyData(1)
    config = replace(
        CONFIG, steps=1, batch_size=1, lr=1e-12, log_every=1, validate_every=1, caption_dropout=0.0,
        context_full=0.0, context_partial=0.0, watch_every=1,
    )  # fmt: skip
    data.arrays = partial(constant_noise, data.arrays)
    make_trainer(tmp_path, config, data, validation=data, nll=TextFlow.nll).run()
    step, validation = lines(tmp_path)
    assert step["loss"] == pytest.approx(validation["validation_nll"], abs=1e-4)
    assert step["nll"] == step["loss"] and step["unit"] == "nats per dimension"
    assert validation["standard_error"] is None


def constant_noise(arrays, *arguments):
    found = arrays(*arguments)
    return {**found, "noise": np.zeros_like(found["noise"])}


def test_the_log_of_an_older_version_is_taken_over_in_the_same_unit(tmp_path):
    rows = [{"step": 1, "loss": 0.5, "nll": 0.25, "lr": 1.0}, {"step": 1, "validation_nll": 1.5}, {"loss": 3}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        RunLog(tmp_path, 5)
        found = lines(tmp_path)
        assert found[0]["loss"] == pytest.approx(0.5 + HALF_LOG_2PI) and found[0]["nll"] == pytest.approx(1.168939)
        assert found[1:] == rows[1:]

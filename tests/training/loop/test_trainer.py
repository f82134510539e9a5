from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_training import TinyData, make_model

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.loop.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from mlx_starflow.training.loop.identity import digest
from mlx_starflow.training.loop.trainer import Trainer
from mlx_starflow.training.loop.weights import assign, trainable
from mlx_starflow.training.recipes.text import TextFlow

CONFIG = TrainingConfig(steps=10, batch_size=5, lr=3e-3, log_every=2)


def make_trainer(
    folder: Path, config: TrainingConfig = CONFIG, data: TinyData | None = None, *, model=None, **options
) -> Trainer:
    return Trainer(model or make_model(), data or TinyData(), config, folder, loss=TextFlow.loss, **options)


def last_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = load_checkpoint(checkpoint_files(folder)[0])
    parts = {part: getattr(checkpoint, part) for part in ("weights", "average", "optimizer")}
    arrays = {f"{part}:{name}": np.array(a) for part, values in parts.items() for name, a in values.items()}
    return {**arrays, "order": checkpoint.order, "random": np.array(json.dumps(checkpoint.random))}


ON_GPU = 1e-3
"""Of an array's largest number, by which two runs may differ on a GPU, where sums of embedding gradients have no fixed
order. On a CPU they are the same to the last bit."""


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        if mx.default_device().type == mx.cpu or not np.issubdtype(array.dtype, np.floating):
            assert np.array_equal(array, other[name]), name
        else:
            np.testing.assert_allclose(array, other[name], rtol=0, atol=ON_GPU * np.abs(array).max(), err_msg=name)


class Stops(TinyData):
    """Ends the run at one step in a way of your choice."""

    def __init__(self, at: int, how):
        super().__init__()
        self.count, self.at, self.how = 0, at, how

    def batch(self, *arguments):
        self.count += 1
        batch = super().batch(*arguments)
        if self.count == self.at:
            self.how(batch)
        return batch


class Crash(Exception):
    pass


def crash(batch):
    raise Crash


@pytest.mark.parametrize("compiled", [True, False])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, compiled, request):
    if not compiled:
        request.getfixturevalue("uncompiled")
    straight = make_trainer(tmp_path / "straight")
    averaged = straight.run()
    halves = replace(CONFIG, save_steps=5)
    with pytest.raises(Crash):
        make_trainer(tmp_path / "halves", halves, Stops(8, crash)).run()
    assert checkpoint_files(tmp_path / "halves")[0].name == "checkpoint-00000005.safetensors"
    second = make_trainer(tmp_path / "halves", halves)
    assert second.step == 5
    resumed = second.run()
    assert_same(last_checkpoint(tmp_path / "straight"), last_checkpoint(tmp_path / "halves"))
    assert_same(*({name: np.array(a) for name, a in part.items()} for part in (averaged, resumed)))
    weights, again = (trainable(trainer.model) for trainer in (straight, second))
    assert_same(*({name: np.array(a) for name, a in part.items()} for part in (weights, again)))
    # All of it moved, and the average is another thing than the weights.
    start = trainable(make_model())
    for name in weights:
        assert not np.array_equal(np.array(weights[name]), np.array(start[name])), name
        assert not np.array_equal(np.array(weights[name]), np.array(averaged[name])), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_it_resumes(tmp_path, capsys, uncompiled, number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    make_trainer(tmp_path / "straight").run()
    stop = Stops(4, lambda batch: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "stopped", data=stop, name="flow").run()
    assert "flow stopped at step 4 of 10 and is saved: run it again to resume" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    make_trainer(tmp_path / "stopped", name="flow").run()
    assert "flow: resuming at step 4\n" in capsys.readouterr().err
    assert_same(last_checkpoint(tmp_path / "straight"), last_checkpoint(tmp_path / "stopped"))


def test_the_loss_falls_and_the_log_says_so(tmp_path, capsys, uncompiled):
    trainer = make_trainer(tmp_path, replace(CONFIG, steps=60, batch_size=12, lr=1e-2, log_every=20, noise_std=0.1))
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60]
    assert lines[0]["loss"] > lines[1]["loss"] > lines[2]["loss"]
    assert lines[2]["loss"] < lines[0]["loss"] - 0.05
    assert set(lines[0]) == {"step", "loss", "grad", "nll", "nll-text-only", "lr", "samples_per_second",
                             "tokens_per_second", "memory_gb", "unit", "epoch", "elapsed"}  # fmt: skip
    assert [line["epoch"] for line in lines] == [step * 12 / trainer.data.order.length for step in (20, 40, 60)]
    assert 0 < lines[0]["elapsed"] < lines[1]["elapsed"] < lines[2]["elapsed"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad, uncompiled):
    def spoil(batch):
        batch["latents"][0] = bad

    with pytest.raises(StarflowError, match=r"flow: the (loss|gradient) is not finite at step 5; .*lower") as raised:
        make_trainer(tmp_path, replace(CONFIG, save_steps=3), Stops(5, spoil), name="flow").run()
    assert "checkpoint-00000003" in str(raised.value) and "\n" not in str(raised.value)
    assert load_checkpoint(checkpoint_files(tmp_path)[0]).step == 3
    make_trainer(tmp_path).run()
    assert load_checkpoint(checkpoint_files(tmp_path)[0]).step == 10


def test_a_checkpoint_of_after_the_trouble_began_is_not_called_intact(tmp_path, uncompiled):
    """The loss explodes at step 4, is saved so at step 6, and is not finite at step 8."""

    class Explodes(TinyData):
        count = 0

        def batch(self, *arguments):
            self.count += 1
            batch = super().batch(*arguments)
            batch["latents"] = batch["latents"] * {4: 1e4, 5: 1e4, 6: 1e4, 8: np.nan}.get(self.count, 1)
            return batch

    with pytest.raises(StarflowError, match="not finite at step 8") as raised:
        make_trainer(tmp_path, replace(CONFIG, save_steps=3, lr=1e-6), Explodes()).run()
    assert f"the checkpoint {tmp_path}/checkpoint-00000003.safetensors is intact: delete " in str(raised.value)
    assert "delete checkpoint-00000006.safetensors, which came too late, and try" in str(raised.value)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, uncompiled):
    trainer = make_trainer(tmp_path, replace(CONFIG, save_steps=2, steps=3))
    trainer.run()
    assign(trainer.model, {"flow.blocks.0.proj_in.weight": mx.full((32, 2), mx.nan)})
    with pytest.raises(StarflowError, match=r"a weight is not finite at step 3; the checkpoint .*3\.safetensors is"):
        trainer.save()
    assert len(checkpoint_files(tmp_path)) == 2


def test_no_checkpoint_is_sound(tmp_path, uncompiled):
    def spoil(batch):
        batch["latents"][0] = np.nan

    make_trainer(tmp_path, replace(CONFIG, steps=1)).run()
    checkpoint = load_checkpoint(checkpoint_files(tmp_path)[0])
    checkpoint.weights["flow.blocks.0.proj_in.weight"] *= mx.inf
    save_checkpoint(tmp_path, checkpoint)
    with pytest.raises(StarflowError, match="no checkpoint is of before it went astray: start again with --no-resume"):
        make_trainer(tmp_path, data=Stops(1, spoil)).run()


def test_what_a_killed_process_left_is_taken_away(tmp_path, uncompiled):
    (tmp_path / "partial-checkpoint-00000007.safetensors").write_bytes(b"half of it")
    make_trainer(tmp_path, replace(CONFIG, steps=1)).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001.safetensors", "log.jsonl"]


def test_a_finished_run_is_not_repeated(tmp_path, uncompiled):
    averaged = make_trainer(tmp_path).run()
    log = (tmp_path / "log.jsonl").read_text()
    again = make_trainer(tmp_path).run()
    assert_same(*({name: np.array(a) for name, a in part.items()} for part in (averaged, again)))
    assert (tmp_path / "log.jsonl").read_text() == log


def test_no_resume_starts_again(tmp_path, uncompiled):
    make_trainer(tmp_path).run()
    before = last_checkpoint(tmp_path)
    trainer = make_trainer(tmp_path, resume=False)
    assert trainer.step == 0 and not checkpoint_files(tmp_path)
    trainer.run()
    assert_same(before, last_checkpoint(tmp_path))


def test_weights_in_float16_are_refused(tmp_path, uncompiled):
    """They would overflow within steps; a dtype to compute in holds them in float32."""
    model = make_model()
    model.set_dtype(mx.float16)
    with pytest.raises(StarflowError, match="float16, whose range gradients leave: load the network with dtype"):
        make_trainer(tmp_path / "half", model=model)
    weights = make_trainer(tmp_path / "whole", replace(CONFIG, dtype="bfloat16", steps=2), model=model).run()
    assert {array.dtype for array in weights.values()} == {mx.float32}


def test_changed_settings_are_told(tmp_path, capsys, uncompiled):
    make_trainer(tmp_path, replace(CONFIG, steps=2)).run()
    make_trainer(tmp_path, replace(CONFIG, steps=3, lr=1e-3))
    assert "training: resuming at step 2, with steps 2 -> 3, lr 0.003 -> 0.001" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, uncompiled):
    make_trainer(tmp_path, replace(CONFIG, steps=1)).run()
    other = make_model()
    other.flow.blocks[0].proj_in.weight = mx.zeros((64, 2))
    with pytest.raises(StarflowError, match=r"flow.blocks.0.proj_in.weight is \[32, 2\], the model's is \[64, 2\]"):
        Trainer(other, TinyData(), CONFIG, tmp_path, loss=TextFlow.loss)


def test_a_damaged_checkpoint_is_told_and_the_older_used(tmp_path, capsys, uncompiled):
    make_trainer(tmp_path, replace(CONFIG, save_steps=5)).run()
    newest = checkpoint_files(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert make_trainer(tmp_path).step == 5
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps must be greater than 0, not 0"),
        ({"lr": -1.0}, "lr must be greater than 0"),
        ({"ema": 1.0}, "ema must be in 0..1, less than 1"),
        ({"caption_dropout": 1.5}, "caption_dropout must be in 0..1, not 1.5"),
        ({"noise_std": float("nan")}, "noise_std must be 0 or more"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(StarflowError, match=message):
        replace(CONFIG, **setting)


# ---- a checkpoint of something else

IDENTITY = {"flow": {"head_dim": 32}, "pictures": digest([1]), "held-out pictures": digest([2]), "classes": ["a", "b"]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"flow": {"head_dim": 64}}, "(flow: head_dim 32 -> 64)"),
        ({"flow": {}}, "(flow: head_dim 32 -> default)"),
        ({"flow": {"head_dim": 32, "noise_std": 0.1}}, "(flow: noise_std default -> 0.1)"),
        ({"pictures": digest([3])}, "(other pictures)"),
        ({"classes": ["b", "c"]}, "(classes a, b -> b, c)"),
        ({"held-out pictures": digest([4]), "pictures": digest([3])}, "(other pictures, other held-out pictures)"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, uncompiled, changes, expected):
    short = replace(CONFIG, steps=2)
    make_trainer(tmp_path, short, identity=IDENTITY).run()
    with pytest.raises(StarflowError) as error:
        make_trainer(tmp_path, CONFIG, identity={**IDENTITY, **changes})
    assert f"is of another run {expected}: " in str(error.value) and "\n" not in str(error.value)
    assert make_trainer(tmp_path, CONFIG, identity=IDENTITY).step == 2
    assert make_trainer(tmp_path, CONFIG, identity={**IDENTITY, **changes}, resume=False).step == 0


def test_another_seed_is_named_with_what_it_changed(tmp_path, uncompiled):
    make_trainer(tmp_path, replace(CONFIG, steps=2), identity=IDENTITY).run()
    with pytest.raises(StarflowError, match=r"\(other pictures, seed 0 -> 5\)"):
        make_trainer(tmp_path, replace(CONFIG, seed=5), identity={**IDENTITY, "pictures": digest([3])})


def test_checkpoints_that_do_not_know_it_resume(tmp_path, uncompiled):
    make_trainer(tmp_path, replace(CONFIG, steps=2)).run()
    assert make_trainer(tmp_path, identity=IDENTITY).step == 2

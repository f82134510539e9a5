"""Several processes as one: started as `mlx.launch --backend ring` starts them, on this machine."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import processes
from helpers.tiny_training import TinyData, make_model
from PIL import Image
from training.loop.test_config import held_out, lines
from training.loop.test_trainer import CONFIG, Stops, last_checkpoint, make_trainer

from mlx_starflow.cli import main
from mlx_starflow.errors import StarflowError
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.checkpoint import checkpoint_files
from mlx_starflow.training.loop.weights import trainable
from mlx_starflow.training.recipes.text import TextFlow

HERE = Path(__file__)
RNG = np.random.default_rng(0)
BATCH = replace(CONFIG, steps=4, batch_size=4, context_full=0.0, context_partial=0.0, log_every=1, warm_up=0.0)


def start(task: str, folder: Path, ranks: int = 2) -> list[subprocess.Popen]:
    return processes.start(folder, [[HERE, task, folder]] * ranks)


def finish(started: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Each one's exit code and what it said."""
    return [(code, out + err) for code, out, err in processes.finish(started)]


def run(task: str, folder: Path) -> list[str]:
    ended = finish(start(task, folder))
    assert [code for code, _ in ended] == [0, 0], ended
    return [words for _, words in ended]


@pytest.fixture(autouse=True)
def plain(uncompiled):
    pass


def test_two_processes_have_the_gradients_of_one(tmp_path):
    run("gradients", tmp_path)
    found = dict(np.load(tmp_path / "gradients.npz"))
    make_trainer(tmp_path / "one", BATCH)
    from training.loop.test_config import gradients

    batch = TinyData().batch(np.random.default_rng(1), BATCH, 0.0)
    whole, numbers = gradients(BATCH, batch)
    assert found.pop("loss") == pytest.approx(numbers["loss"], rel=1e-5)
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        assert np.abs(found[name] - gradient).max() <= 1e-5 * max(np.abs(gradient).max(), 1e-3), name


def test_a_learned_denoiser_too(tmp_path):
    run("denoiser", tmp_path)
    found, numbers = denoiser_gradients()
    expected = dict(np.load(tmp_path / "gradients.npz"))
    for name in ("loss", "denoiser"):
        assert expected.pop(name) == pytest.approx(numbers[name], rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(found[name] - gradient).max() <= 1e-5 * max(np.abs(gradient).max(), 1e-3), name


def denoiser_gradients() -> tuple[dict[str, np.ndarray], dict[str, float]]:
    from training.loop.test_config import gradients

    options = {"learnable_self_denoiser": True, "conditional_denoiser": True}
    return gradients(BATCH, TinyData().batch(np.random.default_rng(1), BATCH, 0.0), model=make_model(**options))


def test_a_run_of_two_is_a_run_of_one(tmp_path):
    """Weights, order of the data, validation and log; rank 0 alone writes, and a run of one goes on with it."""
    run("train", tmp_path / "two")
    assert not (tmp_path / "two/rank1").exists()
    one = train(tmp_path / "one")
    found, expected = last_checkpoint(tmp_path / "two/run"), last_checkpoint(tmp_path / "one/run")
    for name in ("order", "random"):
        assert np.array_equal(found[name], expected[name])
    for name, array in expected.items():
        if name.startswith("weights:"):
            assert np.abs(found[name] - array).max() < 1e-4, name
    rows = [lines(tmp_path / part / "run") for part in ("two", "one")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for row, other in zip(*rows, strict=True):
        for key in ("loss", "nll", "grad", "validation_nll", "standard_error"):
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-3), key
    assert one.step == 4
    resumed = train(tmp_path / "two", 6)
    assert resumed.step == 6
    # And two go on with what one did, also where rank 1 starts from other weights.
    run("resume", tmp_path / "two")
    assert checkpoint_files(tmp_path / "two/run")[0].name == "checkpoint-00000008.safetensors"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_others(tmp_path, victim):
    processes = start("endless", tmp_path)
    deadline = time.monotonic() + 60
    while len(checkpoint_files(tmp_path / "run")) < 2:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    os.kill(processes[victim].pid, signal.SIGKILL)
    code, words = finish(processes)[1 - victim]
    assert code == 2
    assert f"rank {1 - victim} ends because another process of this run has ended" in words
    assert "run the same command again to resume" in words
    last_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("wrong", ["nan", "zeros"])
def test_wrong_numbers_from_a_dead_rank_are_not_kept(tmp_path, wrong):
    """Such as MLX's ring makes of what it has not received when a connection closes."""
    code, words = finish(start(f"dead-{wrong}", tmp_path))[0]
    assert code == 2 and "rank 0 ends because another process of this run has ended" in words, words
    assert [file.name for file in checkpoint_files(tmp_path / "run")] == ["checkpoint-00000002.safetensors"]


def test_ctrl_c_in_one_stops_all(tmp_path):
    processes = start("endless", tmp_path)
    deadline = time.monotonic() + 60
    while len(checkpoint_files(tmp_path / "run")) < 2:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)
    os.kill(processes[1].pid, signal.SIGINT)
    ended = finish(processes)
    assert [code for code, _ in ended] == [130, 130], ended
    assert "is saved: run it again to resume" in ended[0][1] and "is saved" not in ended[1][1]


def test_a_loss_that_is_not_finite_in_one_stops_all(tmp_path):
    for code, words in finish(start("spoiled", tmp_path)):
        assert code == 2 and "is not finite at step 3" in words, words


def test_sharded_training_is_the_same_training(tmp_path):
    """With a stand-in for the one operation that the ring backend lacks."""
    run("whole", tmp_path / "whole")
    run("shares", tmp_path / "shares")
    found, expected = (last_checkpoint(tmp_path / part / "run") for part in ("shares", "whole"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        if name.startswith(("weights:", "average:")):
            assert np.abs(found[name] - array).max() < 1e-4, name
    rows = [lines(tmp_path / part / "run") for part in ("shares", "whole")]
    for row, other in zip(*rows, strict=True):
        for key in ("loss", "grad", "validation_nll"):
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-3), key


def test_sharding_is_refused_on_ring(tmp_path):
    for code, words in finish(start("sharded", tmp_path)):
        assert code == 2 and "--shard needs the nccl or jaccl backend" in words, words


def test_pictures_of_a_prompt_file_are_shared_out(tmp_path):
    """Two processes make the same files that one makes."""
    prompts = ["a red apple", "a rocket", "a cat face"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    said = run("pictures", tmp_path)
    assert [words.count("seed 5") for words in said] == [2, 1]
    CliRunner().invoke(main, ["generate", *prompts, "--seed", "5", "--separate", "-o", str(tmp_path / "one.png")])
    for number in (1, 2, 3):
        one, two = (np.asarray(Image.open(tmp_path / f"{name}-{number}.png")) for name in ("one", "two"))
        assert np.abs(one.astype(int) - two).max() <= 1
    result = CliRunner().invoke(main, ["generate", *prompts, "--data-parallel", "-o", str(tmp_path / "grid.png")])
    assert result.exit_code == 2 and "give --separate too" in result.stderr


def test_the_batch_must_divide(tmp_path):
    for code, words in finish(start("odd", tmp_path)):
        assert code == 2 and "batch_size 5 cannot be split into 2 parts" in words, words


def test_means_over_rows():
    group = mx.distributed.init()
    rows = [{"loss": 1.0, "nll": float("nan"), "text": 2.0}, {"loss": 3.0, "nll": float("nan"), "text": float("nan")}]
    means = distributed.mean_numbers(rows, group)
    assert means["loss"] == 2 and np.isnan(means["nll"]) and means["text"] == 2
    rows[0]["loss"] = float("inf")
    assert np.isnan(distributed.mean_numbers(rows, group)["loss"])


def test_one_process_alone_shares_nothing():
    group = mx.distributed.init()
    arrays = {"a": mx.ones(2)}
    assert distributed.from_first(arrays, {"x": 1}, group) == (arrays, {"x": 1})
    assert distributed.any_of(True, group) and not distributed.any_of(False, group)
    with pytest.raises(RuntimeError), distributed.peers("x", group):
        raise RuntimeError("connection lost")


# ---- what the processes do


def train(folder: Path, steps: int = 4, model_seed: int | None = None):
    config = replace(BATCH, steps=steps, validate_every=2)
    trainer = make_trainer(folder / "run", config, validation=held_out(), nll=TextFlow.nll)
    trainer.run()
    return trainer


def task(name: str, folder: Path) -> None:
    rank = distributed.world().rank()
    assert distributed.world().size() == 2
    if name == "gradients":
        from training.loop.test_config import gradients

        batch = TinyData().batch(np.random.default_rng(1), BATCH, 0.0)
        found, numbers = gradients(BATCH, batch)
        if rank == 0:
            np.savez(folder / "gradients.npz", loss=numbers["loss"], **found)
    elif name == "denoiser":
        found, numbers = denoiser_gradients()
        if rank == 0:
            np.savez(folder / "gradients.npz", loss=numbers["loss"], denoiser=numbers["denoiser"], **found)
    elif name == "train":
        # Another working folder for each rank: what rank 1 wrote would show.
        train(folder if rank == 0 else folder / "rank1")
    elif name == "resume":
        if rank == 1:
            global make_trainer
            whole = make_trainer

            def make_trainer(*arguments, **options):
                mx.random.seed(99)
                return whole(*arguments, **options)

        train(folder if rank == 0 else folder / "rank1", 8)
    elif name.startswith("dead-"):
        life = os.open(folder / "life", os.O_CREAT | os.O_RDWR)  # locked as long as rank 1 lives
        if rank == 1:
            fcntl.flock(life, fcntl.LOCK_EX)

        def lose(batch):
            if rank == 1:
                while not checkpoint_files(folder / "run"):
                    time.sleep(0.01)
                os._exit(1)
            fcntl.flock(life, fcntl.LOCK_EX)
            times = float("nan") if name == "dead-nan" else 0.0
            mx.distributed.all_sum = lambda x, *, group: x * times
            nn.average_gradients = lambda gradients, group: [gradient * times for gradient in gradients]

        make_trainer(folder / "run", replace(BATCH, steps=4, save_steps=2), Stops(3, lose)).run()
    elif name == "endless":
        make_trainer(folder / "run", replace(BATCH, steps=100_000, save_steps=2)).run()
    elif name == "spoiled":

        def spoil(batch):
            batch["latents"][3] = np.nan  # a sample of rank 1

        make_trainer(folder / "run", BATCH, Stops(3, spoil)).run()
    elif name == "sharded":
        make_trainer(folder / "run", replace(BATCH, shard=True)).run()
    elif name in ("whole", "shares"):
        if name == "shares":

            def sum_scatter(x, *, group):
                return mx.split(mx.distributed.all_sum(x, group=group), group.size())[group.rank()]

            mx.distributed.sum_scatter = sum_scatter
        config = replace(BATCH, validate_every=2, watch_every=4, accumulate=2, shard=name == "shares")
        sizes = []

        def samples(model):
            sizes.append(sum(w.size for w in trainable(model).values()))
            mx.eval(model.nll({n: mx.array(a) for n, a in TinyData().arrays(np.arange(2), RNG, BATCH, 1.0).items()}))
            return [Image.new("RGB", (4, 4))]

        options = {"validation": held_out(), "nll": TextFlow.nll, "samples": samples}
        trainer = make_trainer(folder / "run", config, **options)
        whole = trainable(trainer.model)
        result = trainer.run()
        after = trainable(trainer.model)
        assert {n: w.shape for n, w in after.items()} == {n: w.shape for n, w in whole.items()} and set(result) == set(
            whole
        )
        if name == "shares":
            layers = sum(w.size for n, w in whole.items() if "attn_blocks" in n)
            assert sizes == [sum(w.size for w in whole.values()) - layers // 2]
    elif name == "pictures":
        words = ["--prompt-file", str(folder / "prompts.txt"), "--seed", "5", "--separate", "--data-parallel"]
        main(["generate", *words, "-o", str(folder / "two.png")], standalone_mode=False)
    elif name == "odd":
        make_trainer(folder / "run", replace(BATCH, batch_size=5)).run()


if __name__ == "__main__":
    mx.disable_compile()
    try:
        task(sys.argv[1], Path(sys.argv[2]))
    except StarflowError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None

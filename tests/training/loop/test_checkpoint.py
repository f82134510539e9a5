from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.loop.checkpoint import (
    Checkpoint,
    check_resume,
    checkpoint_files,
    is_anonymous,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)


def make_checkpoint(step: int, size: int = 4) -> Checkpoint:
    """Every number in it is its step."""
    arrays = {"blocks.0.weight": mx.full((size,), float(step)), "scale": mx.array(float(step))}
    rng = np.random.default_rng(step)
    return Checkpoint(
        step=step,
        weights=arrays,
        average=arrays,
        optimizer={"0/step": mx.array(step, mx.uint64)},
        random=rng.bit_generator.state,
        order=np.array([step, 2], np.int64),
        config={"lr": 0.1},
    )


def is_whole(checkpoint: Checkpoint) -> bool:
    values = [*checkpoint.weights.values(), *checkpoint.average.values(), *checkpoint.optimizer.values()]
    return all((np.array(value) == checkpoint.step).all() for value in values)


def test_there_and_back(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "folder", make_checkpoint(7))
    checkpoint = load_checkpoint(path)
    assert path.name == "checkpoint-00000007.safetensors"
    assert checkpoint.step == 7 and is_whole(checkpoint) and checkpoint.config == {"lr": 0.1}
    assert checkpoint.optimizer["0/step"].dtype == mx.uint64
    assert checkpoint.order.tolist() == [7, 2] and checkpoint.order.dtype == np.int64
    rng = np.random.default_rng()
    rng.bit_generator.state = checkpoint.random
    assert rng.random() == np.random.default_rng(7).random()


def test_bfloat16_weights_and_other_generators(tmp_path):
    original = make_checkpoint(1)
    original.weights = {"w": mx.array([1.5], mx.bfloat16)}
    original.random = np.random.Generator(np.random.Philox(3)).bit_generator.state
    checkpoint = load_checkpoint(save_checkpoint(tmp_path, original))
    assert checkpoint.weights["w"].dtype == mx.bfloat16
    rng = np.random.Generator(np.random.Philox(0))
    rng.bit_generator.state = checkpoint.random
    assert rng.random() == np.random.Generator(np.random.Philox(3)).random()


def test_an_empty_order_survives(tmp_path):
    original = make_checkpoint(1)
    original.order = np.zeros(0, np.int64)
    assert load_checkpoint(save_checkpoint(tmp_path, original)).order.shape == (0,)


def test_two_are_kept(tmp_path):
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    for step in (5, 10, 9999, 123456789):
        save_checkpoint(tmp_path, make_checkpoint(step))
    assert [path.name for path in checkpoint_files(tmp_path)] == [
        "checkpoint-123456789.safetensors",
        "checkpoint-00009999.safetensors",
    ]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_one_is_refused_and_the_older_used(tmp_path, length):
    save_checkpoint(tmp_path, make_checkpoint(1))
    path = save_checkpoint(tmp_path, make_checkpoint(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with pytest.raises(StarflowError, match=r"checkpoint-00000002\.safetensors is damaged"):
        load_checkpoint(path)
    checkpoint, warning = load_latest(tmp_path)
    assert checkpoint.step == 1 and "00000002" in warning and "\n" not in warning
    checkpoint_files(tmp_path)[1].write_bytes(b"junk")
    with pytest.raises(StarflowError, match="damaged"):
        load_latest(tmp_path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "checkpoint-00000001.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((2,))})
    with pytest.raises(StarflowError, match="not of this program"):
        load_checkpoint(path)
    with pytest.raises(StarflowError, match="damaged or not"):
        load_checkpoint(tmp_path / "missing.safetensors")
    assert load_latest(tmp_path / "nowhere") == (None, "")


@pytest.mark.parametrize(
    "note",
    ["[" * 100_000, "[1]", "3", '{"step": "1", "random": {}, "config": {}}', '{"step": 1, "random": {}, "config": []}',
     '{"step": 1, "random": {}, "config": {}, "note": {"identity": 3}}', '{"step": -1, "random": {}, "config": {}}'],
)  # fmt: skip
def test_a_damaged_note_is_refused_and_the_older_used(tmp_path, note):
    good = save_checkpoint(tmp_path, make_checkpoint(1))
    arrays = {"order": mx.array([1, 2])}
    mx.save_safetensors(str(tmp_path / "checkpoint-00000002.safetensors"), arrays, {"training": note})
    with pytest.raises(StarflowError, match="damaged or not of this program"):
        load_checkpoint(tmp_path / "checkpoint-00000002.safetensors")
    latest, warning = load_latest(tmp_path)
    assert latest.step == 1 and "checkpoint-00000002" in warning
    check_resume(tmp_path, {}, 0)
    assert is_anonymous(tmp_path)  # as the good one is
    good.unlink()
    check_resume(tmp_path, {"flow": "x"}, 0)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StarflowError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "file", make_checkpoint(1))


def save_for_ever(folder: Path) -> None:
    latest, _ = load_latest(folder)
    step = latest.step if latest else 0
    while True:
        step += 1
        save_checkpoint(folder, make_checkpoint(step, size=1 << 20))


def test_kill_9_leaves_a_good_checkpoint(tmp_path):
    before = 0
    for kill in range(4):
        process = subprocess.Popen([sys.executable, __file__, str(tmp_path)])
        try:
            deadline = time.monotonic() + 30
            while len(files := checkpoint_files(tmp_path)) < 2 or int(files[0].stem.split("-")[1]) < before + 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(0.013 * kill)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        for path in checkpoint_files(tmp_path):
            assert is_whole(load_checkpoint(path))
        checkpoint, warning = load_latest(tmp_path)
        assert checkpoint.step > before and not warning
        before = checkpoint.step


if __name__ == "__main__":
    save_for_ever(Path(sys.argv[1]))

"""A training that is killed at random moments, over and over, still gives what an undisturbed one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.paths import TESTS
from training.loop.test_trainer import CONFIG, assert_same, last_checkpoint, make_trainer

from mlx_starflow.training.loop.checkpoint import checkpoint_files, load_checkpoint, load_latest

KILLS, SAVE = 20, 3
ENDLESS = replace(CONFIG, steps=100_000, save_steps=SAVE, log_every=1)


@pytest.mark.slow
def test_kill_9_twenty_times(tmp_path):
    rng = np.random.default_rng(0)
    before = done = 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        try:
            deadline = time.monotonic() + 60
            while not (files := checkpoint_files(tmp_path)) or load_step(files[0]) <= before:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
        finally:
            process.kill()
            process.wait()
        # Every checkpoint can be read, and no more is lost than was done since the last one.
        for path in checkpoint_files(tmp_path):
            load_checkpoint(path)
        checkpoint, warning = load_latest(tmp_path)
        done = int(logged[-1]["step"]) if (logged := whole_lines(tmp_path / "log.jsonl")) else 0
        assert not warning and checkpoint.step > before
        assert checkpoint.step >= done - SAVE
        before = checkpoint.step
    # What came of it is what an undisturbed run of as many steps gives.
    mx.disable_compile()
    try:
        straight = replace(ENDLESS, save_steps=before)
        trainer = make_trainer(tmp_path / "straight", straight)
        trainer.data.batch = stop_after(trainer, before)
        with suppress(StopIteration):
            trainer.run()
        assert_same(last_checkpoint(tmp_path / "straight"), last_checkpoint(tmp_path))
    finally:
        mx.enable_compile()


def stop_after(trainer, steps: int):
    batch = trainer.data.batch

    def limited(*arguments):
        if trainer.step == steps:
            raise StopIteration
        return batch(*arguments)

    return limited


def load_step(path: Path) -> int:
    return int(path.stem.split("-")[1])


def whole_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    mx.disable_compile()
    make_trainer(Path(sys.argv[1]), ENDLESS).run()

"""One writer at a time, and files that are replaced together."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import Command, message
from helpers.model_directories import SPIECE, same, save_flow, write_image_model
from helpers.tiny_flows import tiny_flow

from mlx_starflow.convert import convert_t5
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir import saving
from mlx_starflow.model_dir.directory import ModelDirectory, load_text_encoder
from mlx_starflow.model_dir.files import load_weights, read_config
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.transaction import locked, settle, transaction
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.training.finetuning.finetune import finetune
from mlx_starflow.training.loop.distributed import run_folder

HOLDER = """
import sys
from mlx_starflow.model_dir.transaction import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has locked a directory."""
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def old(model, tmp_path) -> Path:
    """Another model with the same configs."""
    out = shutil.copytree(model, tmp_path / "old")
    for part in ("text_encoder", "vae", "."):
        saving.save_model(out / part, {n: w + 1 for n, w in load_weights(out / part).items()}, read_config(out / part))
    return out


def tensors(directory: Path) -> dict[str, mx.array]:
    """All of a model's, by part and name."""
    opened = ModelDirectory(directory)
    parts = {"flow": opened.flow, "text_encoder": opened.text_encoder, "vae": opened.vae}
    return {f"{part}: {name}": w for part, network in parts.items() for name, w in network.weights().items()}


def test_a_second_writer_is_refused(old, model, tmp_path):
    before = tensors(old)
    quantize, convert = Command("quantize"), Command("convert")
    with holder(old) as process:
        line = f"Error: another mlx-starflow (pid {process.pid}) is writing {old}\n"
        assert quantize.mistake(model, "--quantize", 8, "-o", old) == line
        assert message(save_flow, old) == line[7:-1]
        # Parts have locks of their own, so that they can be converted at the same time.
        with transaction(old / "vae"):
            pass
    with holder(old / "vae") as process:
        assert (
            message(quantize_model, model, old, 8)
            == f"another mlx-starflow (pid {process.pid}) is writing {old / 'vae'}"
        )
    with holder(old / "text_encoder"):
        text = model / "text_encoder"
        assert "is writing" in convert.mistake("text-encoder", text, "-o", old / "text_encoder")
    assert same(tensors(old), before)
    process.wait()
    quantize_model(model, old, 8)  # the lock ended with the process that held it
    assert not list(old.rglob(".writing"))


def test_runs_lock_their_folder(model, tmp_path):
    with holder(tmp_path / "run") as process:
        for run in (lambda: finetune(model, _pictures(tmp_path), tmp_path / "run"), lambda: _enter(tmp_path / "run")):
            assert message(run) == f"another mlx-starflow (pid {process.pid}) is writing {tmp_path / 'run'}"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".writing"]


def _enter(folder: Path) -> None:
    with run_folder(folder):
        raise AssertionError("another run has the folder")


def _pictures(folder: Path) -> Path:
    from PIL import Image

    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "pictures/a.png")
    (folder / "pictures/metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    return folder / "pictures"


def test_measurements_are_refused_before_they_begin(old):
    with holder(old):
        for command in ("tune", "calibrate"):
            more = () if command == "tune" else (_pictures(old.parent), "-m")
            assert "is writing" in Command(command).mistake(*more, old)
    assert not (old / "sampling_plan.json").exists()


def test_one_thread_may_nest_and_another_may_not(tmp_path):
    said: list[str] = []
    with locked(tmp_path / "a/b"), locked(tmp_path / "a/b"):
        thread = threading.Thread(target=lambda: said.append(message(_enter, tmp_path / "a/b")))
        thread.start()
        thread.join()
    assert said == [f"another mlx-starflow (pid {os.getpid()}) is writing {tmp_path / 'a/b'}"]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_whole_model_is_replaced_or_none_of_it(error, old, model, tmp_path, monkeypatch):
    """Stopped at any rename, removal or change of a file's length."""
    before, stopped, outcomes = tensors(old), 0, []
    quantize_model(model, tmp_path / "new", 8)
    new = tensors(tmp_path / "new")
    real = {name: getattr(os, name) for name in ("replace", "unlink", "truncate")}
    (old / "mine.txt").write_text("stays")
    while True:
        out = shutil.copytree(old, tmp_path / f"out{stopped}")
        calls = 0

        def stopping(name: str, limit: int = stopped):
            def call(*arguments: object, **options: object) -> None:
                nonlocal calls
                calls += Path(str(arguments[0])).name != "pid" and not options.get("dir_fd")
                if calls == limit + 1:
                    calls += 1
                    raise error
                real[name](*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, stopping(name))
            try:
                quantize_model(model, out, 8)
                break
            except (KeyboardInterrupt, StarflowError):
                pass
        found = tensors(out)
        outcomes.append("new" if same(found, new) else "old" if same(found, before) else "mixed")
        assert (out / "mine.txt").read_text() == "stays"
        stopped += 1
    assert set(outcomes) == {"old", "new"}
    assert outcomes == sorted(outcomes, reverse=True)
    assert len(outcomes) > 10


def test_full_disk_leaves_the_old_model(old, model, monkeypatch):
    before, write, networks = tensors(old), saving.write_safetensors, []

    def full(files: dict[Path, object], *rest: object) -> None:
        write(files, *rest)
        networks.append(files)
        if len(networks) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_safetensors", full)
    assert message(quantize_model, model, old, 8) == f"cannot write {old}: No space left on device"
    assert same(tensors(old), before)
    assert not list(old.rglob(".writing"))


def test_killed_after_the_commit(old, model, tmp_path):
    """A reader finishes it, also one that reads a part alone."""
    code = f"""
import os, signal
from pathlib import Path
from mlx_starflow.model_dir import transaction
from mlx_starflow.model_dir.requantize import quantize_model
transaction._finish = lambda directory: (
    os.kill(os.getpid(), signal.SIGKILL) if (Path(directory) / ".writing/commit").exists() else None
)
quantize_model({str(model)!r}, {str(old)!r}, 8)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    quantize_model(model, tmp_path / "new", 8)
    encoder, _ = load_text_encoder(old / "text_encoder", "float32")
    assert same(parameters(encoder), load_weights(model / "text_encoder"))
    assert same(tensors(old), tensors(tmp_path / "new"))
    settle(old)
    assert not list(old.rglob(".writing/new"))


def test_a_reader_whose_model_is_written_again(old, model):
    opened = ModelDirectory(old)
    lazy = opened.flow.weights()
    expected = {name: mx.array(w) for name, w in load_weights(old).items()}
    mx.eval(expected)
    quantize_model(model, old, 8)
    assert same(lazy, expected)  # what was opened stays what it was
    for read in (opened.flow.weights, lambda: opened.text_encoder):
        assert message(read) == f"{old} was written again while it was being read: load it again"


def test_a_part_is_a_transaction_of_its_own(model, tmp_path):
    text = convert_t5(_hugging_face(model, tmp_path), tmp_path / "out/text_encoder")
    assert sorted(path.name for path in text.iterdir()) == ["config.json", "model.safetensors", "spiece.model"]
    save_flow(tmp_path / "out", tiny_flow("image"))
    assert ModelDirectory(tmp_path / "out").has("text_encoder")


def _hugging_face(model: Path, folder: Path) -> Path:
    shutil.copytree(model / "text_encoder", folder / "t5")
    shutil.copy(SPIECE, folder / "t5/spiece.model")
    return folder / "t5"

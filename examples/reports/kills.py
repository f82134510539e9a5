"""What writers leave when they are killed or meet another: kill -9 at each file-system event, and pairs in one folder.

    python examples/reports/kills.py

Each writer writes a tiny model over another one, with the same config, so that a mixture of both would load. It is
killed just before its first event (a file opened for writing, renamed, removed, cut; a folder made or removed), then
before its second, and so on. What loads afterwards is compared tensor by tensor with the old and the new model, and
then the same writer runs again. Pairs write two different models into one folder at the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml
from mlx.utils import tree_map
from PIL import Image

from mlx_starflow.convert import convert_release, export_model
from mlx_starflow.errors import StarflowError
from mlx_starflow.model_dir.directory import ModelDirectory, load_flow
from mlx_starflow.model_dir.files import read_config
from mlx_starflow.model_dir.hub import DEMO
from mlx_starflow.model_dir.requantize import quantize_model
from mlx_starflow.model_dir.saving import save_model
from mlx_starflow.model_dir.transaction import transaction
from mlx_starflow.model_dir.weights import parameters
from mlx_starflow.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mlx_starflow.models.starflow import FlowConfig, STARFlow
from mlx_starflow.models.t5 import T5Config, T5Encoder
from mlx_starflow.training.config import TrainingOptions
from mlx_starflow.training.finetuning.adapters import AdapterConfig, adapter_layers, attach, save_adapter
from mlx_starflow.training.finetuning.config import FinetuneConfig
from mlx_starflow.training.finetuning.finetune import finetune
from mlx_starflow.training.finetuning.fuse import fuse_model
from mlx_starflow.training.recipes.new_flow import NewFlow

FLOW = {
    "img_size": 4, "channel_size": 4, "patch_size": 1, "channels": 64, "layers_per_block": [1, 1],
    "txt_size": 6, "txt_dim": 32, "use_softplus": True, "soft_clip": 4.0,
}  # fmt: skip
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
ENDED, MISTAKE, FAULT = 0, 2, 3


def write_model(folder: Path, seed: int) -> Path:
    """A tiny model of pictures of 8x8."""
    mx.random.seed(seed)
    flow = STARFlow(FlowConfig.from_dict(FLOW))
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4))
    spiece = (DEMO / "text_encoder/spiece.model").read_bytes()
    size = json.loads((DEMO / "text_encoder/config.json").read_text())["vocab_size"]
    text = T5Encoder(T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))
    for network in (flow, vae, text):
        network.update(tree_map(lambda w: w + 0.02 * mx.random.normal(w.shape), network.parameters()))
    with transaction(folder):
        save_model(folder / "text_encoder", parameters(text), text.config.to_dict(), files={"spiece.model": spiece})
        save_model(folder / "vae", parameters(vae), vae.config.to_dict())
        save_model(folder, parameters(flow), {"model_type": "starflow", **flow.config.to_dict()})
    return folder


def write_adapter(model: Path, folder: Path) -> Path:
    """An adapter of a model's flow that changes it."""
    flow, config = load_flow(model), AdapterConfig(rank=2)
    attach(flow, config)
    for layer in adapter_layers(flow).values():
        layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape)
    return save_adapter(folder, flow, config)


def write_checkpoints(model: Path, folder: Path) -> None:
    """A model as the checkpoints that `convert` reads."""
    export_model(model, folder / "flow.safetensors")
    export_model(model / "vae", folder / "vae/diffusion_pytorch_model.safetensors")
    config = {**read_config(model / "vae"), "_class_name": "AutoencoderKL"}
    del config["model_type"]
    (folder / "vae/config.json").write_text(json.dumps(config))
    shutil.copytree(model / "text_encoder", folder / "text")
    arguments = {
        k: v
        for k, v in (read_config(model) | {"vae": "stabilityai/sd-vae-ft-ema", "img_size": 32}).items()
        if k != "txt_dim"
    }
    (folder / "flow.yaml").write_text(yaml.safe_dump({"arguments": [{k: v} for k, v in arguments.items()]}))


def write_pictures(folder: Path, count: int = 6) -> Path:
    """Small pictures of noise with captions."""
    folder.mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def writers(work: Path) -> dict[str, Callable[[Path, int], Any]]:
    """By name: writes its model number 0 or 1 into a folder (`finetune` into its folder `model`)."""
    source = work / "source"

    def convert(out: Path, number: int) -> None:
        parts: dict[str, Any] = {"text_encoder": work / "checkpoints/text", "vae": work / "checkpoints/vae"}
        checkpoint, config = work / "checkpoints/flow.safetensors", work / "checkpoints/flow.yaml"
        dtype = ("float32", "bfloat16", "float16")[number]
        convert_release("apple/starflow", out, checkpoint=checkpoint, config=config, dtype=dtype, **parts)

    def tune(out: Path, number: int) -> None:
        settings = FinetuneConfig(
            kind="full", steps=2, batch_size=2, validation=0, samples=0, seed=number, save_seconds=0.0
        )
        finetune(source, work / "pictures", out, settings)

    def train(out: Path, number: int) -> None:
        steps = (2, 3, 1)[number]  # each goes on with the run before
        options = TrainingOptions(steps=steps, batch_size=2, save_steps=1, watch_every=0, validate_every=0)
        config = {"model_type": "starflow", **{key: value for key, value in FLOW.items() if key != "txt_size"}}
        NewFlow(work / "pictures", out, config, options, str(source), validation=0.0).run()

    return {
        "convert": convert,
        "quantize": lambda out, number: quantize_model(source, out, (8, 4)[number]),
        "fuse": lambda out, number: fuse_model(source, [(work / "adapter", 1.0 + number)], out),
        "finetune": tune,
        "train": train,
    }


def digest(folder: Path) -> str:
    """Of all that a model directory loads: configs and tensors of its three networks."""
    model = ModelDirectory(folder)
    summary = hashlib.sha256()
    for network in (model.flow, model.text_encoder, model.vae):
        summary.update(json.dumps(network.content, sort_keys=True).encode())
        for name, array in sorted(network.weights().items()):
            summary.update(f"{name} {array.shape} {array.dtype}".encode())
            summary.update(bytes(memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8))))
    return summary.hexdigest()


# ---- processes of their own


class Child:
    """A function in a forked process; this one never computes, so that MLX works in its children."""

    def __init__(self, function: Callable[[], Any], kill_at: int = 0):
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        sys.stdout.flush()
        self.number = os.fork()
        if self.number == 0:
            self._live(function, kill_at)

    def _live(self, function: Callable[[], Any], kill_at: int) -> None:
        code, said, seen = FAULT, b"", 0
        if kill_at or kill_at < 0:

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal seen
                opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if event in CHANGES or (opened and not str(arguments[0]).startswith("/dev/")):
                    seen += 1
                    if seen == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            value = function()
            said, code = str(seen if kill_at else value).encode(), ENDED
        except StarflowError as error:
            said, code = str(error).encode(), MISTAKE
        except BaseException:
            said = traceback.format_exc().encode()
        os.pwrite(self.file.fileno(), said, 0)
        os._exit(code)

    def wait(self) -> tuple[int, str]:
        """How it ended (minus the signal's number, if one ended it), and what it returned or raised."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        said = os.pread(self.file.fileno(), 1 << 20, 0).decode()
        self.file.close()
        if status == FAULT:
            raise RuntimeError(said)
        return status, said


def apart(function: Callable[[], Any]) -> str:
    """What a function returns, computed in a process of its own."""
    code, said = Child(function).wait()
    if code != ENDED:
        raise RuntimeError(said)
    return said


class Trial:
    """One writer's models in a folder of its own."""

    def __init__(self, name: str, work: Path):
        self.name, self.write = name, writers(work)[name]
        self.before, self.out = work / f"{name}-before", work / f"{name}-out"
        if name in ("convert", "train"):
            apart(lambda: self.write(self.before, 2))  # they write again only what they have written
        else:
            shutil.copytree(work / "old", self.model(self.before))
        (self.model(self.before) / "mine.txt").write_text("stays")
        self.old = apart(lambda: digest(self.model(self.before)))
        self.new = [self.digest_of(number) for number in (0, 1)]

    def model(self, folder: Path) -> Path:
        return folder / "model" if self.name == "finetune" else folder

    def reset(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.before, self.out)

    def digest_of(self, number: int) -> str:
        self.reset()
        apart(lambda: self.write(self.out, number))
        return self.found()

    def found(self) -> str:
        """The digest of what is there, or why nothing loads."""
        _, said = Child(lambda: digest(self.model(self.out))).wait()
        if not (self.model(self.out) / "mine.txt").exists():
            return "a file of somebody else's is gone"
        return said

    def kills(self, most: int) -> Counter[str]:
        """What is there after each kill, and how the next run ends."""
        self.reset()
        _, events = Child(lambda: self.write(self.out, 0), kill_at=-1).wait()
        numbers = range(1, int(events) + 1)
        if most and len(numbers) > most:
            numbers = sorted({int(at) for at in np.linspace(1, int(events), most)})
        counts: Counter[str] = Counter()
        for number in numbers:
            self.reset()
            code, said = Child(lambda: self.write(self.out, 0), kill_at=number).wait()
            if code != -signal.SIGKILL:
                counts["not killed"] += 1
                continue
            found = self.found()
            kind = {self.old: "old", self.new[0]: "new"}.get(found, "mixed")
            counts["kills"] += 1
            counts[kind] += 1
            if kind == "mixed":
                print(f"{self.name}, event {number}: {found}")
            code, said = Child(lambda: self.write(self.out, 0)).wait()
            if code != ENDED or self.found() != self.new[0]:
                counts["not written again"] += 1
                print(f"{self.name}, event {number}, again: {said}")
        return counts

    def pairs(self, count: int) -> Counter[str]:
        """What two writers at the same time leave."""
        counts: Counter[str] = Counter()
        for _ in range(count):
            self.reset()
            both = [Child(lambda number=number: self.write(self.out, number)) for number in (0, 1)]
            ends = [child.wait() for child in both]
            counts["pairs"] += 1
            counts["refused"] += sum(code == MISTAKE and "another mlx-starflow (pid " in said for code, said in ends)
            found = self.found()
            ended = [new for new, (code, _) in zip(self.new, ends, strict=True) if code == ENDED]
            counts["one of both" if found in ended else "mixed"] += 1
            if found not in ended:
                print(f"{self.name}, pair: {found}, {ends}")
        return counts


def prepare(work: Path) -> None:
    source = write_model(work / "source", 1)
    write_model(work / "old", 2)
    write_adapter(source, work / "adapter")
    write_checkpoints(source, work / "checkpoints")
    write_pictures(work / "pictures")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("writers", nargs="*", default=["convert", "quantize", "fuse", "finetune", "train"])
    parser.add_argument("--most", type=int, default=0, help="kills of each writer; 0: at every event")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of each writer")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        apart(lambda: prepare(work))
        columns = ("kills", "old", "new", "mixed", "not written again", "pairs", "one of both", "refused")
        print(f"{'writer':10}" + "".join(f"{column:>18}" for column in columns))
        total: Counter[str] = Counter()
        for name in args.writers:
            trial = Trial(name, work)
            counts = trial.kills(args.most)
            pairs = trial.pairs(args.pairs)
            counts["mixed"] += pairs.pop("mixed", 0)
            counts += pairs
            total += counts
            print(f"{name:10}" + "".join(f"{counts[column]:18}" for column in columns), flush=True)
        print(f"{'all':10}" + "".join(f"{total[column]:18}" for column in columns))
        if total["mixed"] or total["not written again"] or total["not killed"]:
            raise SystemExit("mixed models, or writers that could not write again")


if __name__ == "__main__":
    main()

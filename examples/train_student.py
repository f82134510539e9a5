"""Train a student of a model in PyTorch, as `mlx-starflow distill` does in MLX; run it again to resume.

    python examples/train_student.py demo runs/student --make-pairs 16000 --prompt-file prompts.txt --minutes 40
    mlx-starflow generate "a fox to the left of a cactus at night" --student runs/student

It learns the same pairs by the same losses, in bfloat16, which on a CPU of Linux is several times faster in PyTorch
than in MLX, and writes the same folder: `OUT/pairs`, which `distill` may have made too, and the student, in 8 bits.
Needs PyTorch (`pip install '.[torch]'`). Held-out pairs say how good it is: the RMS error of what its heads predict, in
standard deviations of that.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_loop import Device, TimeIsUp, train
from torch_pairs import TorchPairs
from torch_training import student_errors, student_loss, without_padding, write_student

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.files import read_lines
from mlx_starflow.media.images import save_image
from mlx_starflow.model_dir.directory import load_student
from mlx_starflow.model_dir.fingerprint import fingerprint
from mlx_starflow.models.student import INVERSE, KINDS, MATCHING
from mlx_starflow.models.transformer import TransformerConfig
from mlx_starflow.pipelines import load
from mlx_starflow.reference.loading import load_flow
from mlx_starflow.reference.student import Student
from mlx_starflow.sampling.progress import watch
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import split_samples
from mlx_starflow.training.data.pairs.batches import REFINED, PairData
from mlx_starflow.training.data.pairs.files import SHARD, PairFolder
from mlx_starflow.training.recipes.student_network import student_config, student_scales, student_sheet

UNUSED = TrainingConfig(steps=1)
"""Settings that other training data read."""

HELD_OUT = 0.05
MOST_HELD_OUT = 512
PADDED_FROM = 0.8
"""The part of the training after which texts have their padding, as the finished student reads them."""

PARTS = 4
"""Of a batch, by the length of the text, before that."""

NOISE_AT_FIRST = 0.3
"""Factor of the weights that read the noise, where a student begins with its teacher's layers."""

SHOWN = 4
"""Held-out pairs on a sheet of samples."""


def make_pairs(teacher: str, out: Path, count: int, prompt_file: Path, device: Device) -> None:
    """Have so many pairs of the teacher's samples in `out/pairs`; those that are there stay."""
    lines = read_lines(prompt_file)
    source = TorchPairs(teacher, out, None, count, None, None, lines, (), 0, print, device=device.name)
    source.folder(True, watch(True))


class Batches:
    """Batch number n of endless passes over the pairs, each pass in an order of its own."""

    def __init__(self, data: PairData, size: int):
        self.data, self.size, self.count = data, size, data.order.count
        self.passes: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rows = np.arange(step * self.size, (step + 1) * self.size)
        chosen = np.array([self.order(int(row) // self.count)[row % self.count] for row in rows])
        rng = np.random.default_rng([7, step])
        return tensors(self.data.arrays(chosen, rng, UNUSED, 0.0))

    def order(self, number: int) -> np.ndarray:
        if number not in self.passes:
            self.passes = {n: order for n, order in self.passes.items() if n >= number - 1}
            self.passes[number] = np.random.default_rng([6, number]).permutation(self.count)
        return self.passes[number]


def tensors(arrays: dict[str, np.ndarray], device: str = "cpu") -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def begin_from(student: Student, teacher: str) -> None:
    """Give a new student what reads the text and the first layers of the flow's deep block, and little of its noise.

    Without tokens to read, that block predicts what the text says of every token: the student begins there, and learns
    what the noise adds.
    """
    deep = load_flow(teacher).blocks[-1]
    wanted, own = ({field.name: getattr(config, field.name) for field in fields(TransformerConfig)}
                   for config in (deep.config, student.config))  # fmt: skip
    if {**wanted, "num_layers": 0} != {**own, "num_layers": 0} or not student.config.txt_dim:
        raise StarflowError(
            f"--init-from-teacher needs a flow whose deep block is like a student, and a student of "
            f"{deep.config.channels} channels"
        )
    student.proj_txt.load_state_dict(deep.proj_txt.state_dict())
    for mine, its in zip(student.attn_blocks, deep.attn_blocks, strict=False):
        mine.load_state_dict(its.state_dict())
    with torch.no_grad():
        student.proj_in.bias.copy_(deep.proj_in.bias)
        student.proj_in.weight *= NOISE_AT_FIRST
        for layer in student.attn_blocks[len(deep.attn_blocks) :]:
            # New layers begin as nothing, lest what the others know be lost behind them.
            for last in (layer.attention.proj, layer.mlp.main[-1]):
                last.weight.zero_()
                last.bias.zero_()


class Judge:
    """What held-out pairs say about a student."""

    def __init__(self, data: PairData, grid: tuple[int, int], device: Device):
        batch = data.arrays(np.arange(data.order.count), np.random.default_rng(0), UNUSED, 0.0)
        self.batch, self.grid = tensors(batch, device.name), grid

    @torch.no_grad()
    def __call__(self, student: nn.Module, step: int) -> str:
        assert isinstance(student, Student)
        parts = [
            torch.stack([error.mean() for error in student_errors(student, self.part(start), self.grid)])
            for start in range(0, len(self.batch["noise"]), SHARD)
        ]
        errors = torch.stack(parts).mean(0).sqrt().tolist()
        named = {"velocity": errors[0]}
        if student.config.kind == INVERSE:
            named = {f"state {number}": error for number, error in enumerate(errors[:-1], 1)} | {"clean": errors[-1]}
        return "held out: " + ", ".join(f"{name} {error:.4f}" for name, error in named.items())

    def part(self, start: int) -> dict[str, Tensor]:
        return {name: array[start : start + SHARD] for name, array in self.batch.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="the model that the pairs are of")
    parser.add_argument("out", type=Path, help="the student's folder, with its pairs")
    parser.add_argument("--pairs", type=Path, help="folder of the pairs; OUT/pairs if it is left out")
    parser.add_argument("--make-pairs", type=int, metavar="N", help="have N of them in OUT/pairs, of --prompt-file")
    parser.add_argument("--prompt-file", type=Path, help="prompts of the pairs, one a line")
    parser.add_argument("--kind", choices=KINDS, default=INVERSE)
    parser.add_argument("--independent", action="store_true", help="fresh noise in the place of the pairs', to compare")
    parser.add_argument("--channels", type=int, help="width of the student; the flow's by default")
    parser.add_argument("--layers", type=int, help="of the student; half of the flow's by default")
    parser.add_argument("--init-from-teacher", action="store_true", help="begin with layers of the flow's deep block")
    parser.add_argument(
        "--refined", type=float, default=REFINED, help="share of steps fed with the student's own sample"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="train for so long, not for steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--watch-every", type=int, default=250, help="steps between looks at the held-out pairs")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, where there is no GPU")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="save and stop after so many minutes")
    args = parser.parse_args(arguments)
    if args.independent and args.kind != MATCHING:
        parser.error("--independent is for matching students: add --kind matching")
    if (args.make_pairs is None) != (args.prompt_file is None) or (args.make_pairs and args.pairs):
        parser.error("--make-pairs and --prompt-file go together, and without --pairs")
    device, deadline = Device.choose(args.threads), time.time() + 60 * args.stop_after
    if args.make_pairs:
        make_pairs(args.teacher, args.out, args.make_pairs, args.prompt_file, device)
    pipe, folder = load(args.teacher), PairFolder.found(args.pairs or args.out / "pairs")
    if folder.identity["teacher"] != fingerprint(pipe.directory):
        raise StarflowError(f"{folder.folder} holds pairs of another model than {args.teacher}")
    guidance, temperature = folder.identity["guidance"], folder.identity["temperature"]
    fresh = temperature if args.independent else None
    chosen, held_out = split_samples(SHARD * len(folder.numbers()), HELD_OUT, MOST_HELD_OUT, 0)
    matching = args.kind == MATCHING
    data = PairData(folder, chosen, matching=matching, independent=fresh, refined=args.refined)
    held = PairData(folder, held_out, matching=matching, independent=fresh, refined=0.0)
    config = student_config(
        pipe, args.kind, student_scales(folder, args.kind, fresh), folder.grid,
        guidance=guidance, temperature=temperature, channels=args.channels, layers=args.layers,
    )  # fmt: skip
    torch.manual_seed(0)
    student = Student(config)
    if args.init_from_teacher:
        begin_from(student, args.teacher)
    student.to(device.name)
    weights = sum(weight.numel() for weight in student.parameters())
    print(f"{weights / 1e6:.1f} M weights, {len(chosen)} pairs, {len(held_out)} held out", flush=True)
    device.compile(student)

    def loss(batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, float]]:
        batch = {name: tensor.to(device.name, non_blocking=True) for name, tensor in batch.items()}
        if progress >= PADDED_FROM or device.is_cuda or not config.txt_dim:
            return student_loss(student_errors(student, batch, folder.grid))
        length, parts = batch["condition"].shape[1], without_padding(batch, PARTS)
        errors = [student_errors(student, part, folder.grid, length) for part in parts]
        return student_loss([torch.cat(error) for error in zip(*errors, strict=True)])

    (args.out / "training").mkdir(parents=True, exist_ok=True)
    try:
        averaged = train(
            student,
            loss,
            Batches(data, args.batch),
            [{"params": list(student.parameters()), "lr": args.lr}],
            args.out / "training/student.pt",
            device,
            steps=args.steps,
            seconds=args.minutes and 60 * args.minutes,
            deadline=deadline,
            decay=0.998,
            watch=Judge(held, folder.grid, device),
            watch_every=args.watch_every,
        )
    except TimeIsUp as stopped:
        print(stopped, flush=True)
        return
    assert isinstance(averaged, Student)
    write(args.out, averaged, pipe, folder.read(held_out[:SHOWN]))


def write(out: Path, student: Student, pipe: Any, shown: dict[str, np.ndarray]) -> None:
    """The student's folder, and the sheet of what it makes of some pairs' noise."""
    write_student(out, student)
    save_image(student_sheet(pipe, load_student(out, pipe.model), shown).draw(), out / "samples.png")
    size = (out / "model.safetensors").stat().st_size / 1e6
    print(f"wrote {out} ({size:.1f} MB); samples beside the teacher's are in {out / 'samples.png'}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except StarflowError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)

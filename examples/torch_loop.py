"""The training loop of the examples that train in PyTorch: AdamW, averaged weights, checkpoints by the clock.

Batches are numbered, so a run that was stopped goes on with the batch after the last checkpoint's. Unless it is told
otherwise the learning rate is constant after a warm-up and falls in the last quarter of the steps or, where a time is
given, of the time: up to there either can be changed between two runs.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlx_starflow.training.loop.schedules import ema_decay


@dataclass(frozen=True)
class Device:
    """Where and how to train: worker processes make batches where there are cores for them; 0 for none."""

    name: str
    workers: int = 0
    save_every: float = 100.0

    @classmethod
    def choose(cls, threads: int) -> Device:
        """The GPU if there is one, else this many threads of the CPU."""
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            return cls("cuda", workers=max(os.cpu_count() - 2, 1), save_every=50.0)
        torch.set_num_threads(threads)
        return cls("cpu")

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.name, dtype=torch.bfloat16)

    def compile(self, *modules: nn.Module) -> None:
        """Compile for a GPU. On the CPU it gained nothing: the time goes to matrix products and convolutions."""
        if self.is_cuda:
            for module in modules:
                module.compile()


class Batches(Protocol):
    """Training data: batch number n, the same one whenever it is asked for."""

    def __getitem__(self, step: int) -> Any: ...


class TimeIsUp(Exception):
    """The time limit passed; the checkpoint is written."""


def learning_rate(step: int, progress: float, warm_up: int) -> float:
    """The factor at a step: linear at first, then 1, in the last quarter a half cosine down to 1%."""
    fallen = max(0.0, (progress - 0.75) / 0.25)
    return min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fallen)))


def save_atomically(state: dict, path: Path) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def read_averaged(model: nn.Module, checkpoint: Path) -> nn.Module:
    """The model with a checkpoint's averaged weights, for use."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    model.load_state_dict(state["averaged"])
    return model.eval().requires_grad_(False)


def train(
    model: nn.Module,
    loss_of: Callable[[Any, float], tuple[Tensor, dict[str, float]]],
    batches: Batches,
    groups: list[dict],
    checkpoint: Path,
    device: Device,
    *,
    steps: int,
    seconds: float | None = None,
    deadline: float = math.inf,
    decay: float = 0.999,
    betas: tuple[float, float] = (0.9, 0.98),
    schedule: Callable[[int, float, int], float] = learning_rate,
    saved: Callable[[], None] = lambda: None,
    watch: Callable[[nn.Module, int], str] | None = None,
    watch_every: int = 1000,
    log_every: int = 50,
) -> nn.Module:
    """Train for `steps` steps, or `seconds` of work if they are given; returns the averaged model, frozen.

    Args:
        model: on the device.
        loss_of: takes a batch and the progress in 0..1, gives the loss and numbers for the log.
        batches: see `Batches`; read ahead by worker processes if the device has any.
        groups: AdamW's parameter groups with their `lr`.
        checkpoint: written every `device.save_every` seconds and at the end; resumed from if it is there. One that
            holds averaged weights alone is where to start, or finished if it has all the steps.
        deadline: `time.time()` after which to save and stop.
        decay: of the averaged weights, at most.
        betas: AdamW's.
        schedule: the factor of the learning rate, of a step, the progress and the steps of the warm-up.
        saved: called after each checkpoint.
        watch: is given the averaged model now and then, and says something about it.

    Raises:
        TimeIsUp: the deadline passed.
        FloatingPointError: a gradient is not finite.
    """
    step, spent, state = 0, 0.0, {}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device.name)
        step, spent = state["step"], state.get("spent", 0.0)
        model.load_state_dict(state.get("model", state["averaged"]))
        print(f"{checkpoint.stem}: resuming at step {step}", flush=True)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.01, fused=True)
    peaks = [group["lr"] for group in groups]
    if state:
        averaged.load_state_dict(state["averaged"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(step)
    first, before, began = step, spent, time.time()
    warm_up = min(300, max(steps // 10, 1))

    def progress() -> float:
        return min(1.0, spent / seconds) if seconds else step / steps

    def save() -> float:
        state = {"model": model.state_dict(), "averaged": averaged.state_dict(), "step": step, "spent": spent}
        save_atomically({**state, "optimizer": optimizer.state_dict()}, checkpoint)
        saved()
        return time.time()

    last_save, sums = began, {}
    for batch in read_ahead(batches, step, 10**9 if seconds else steps, device.workers):
        done = progress()
        if done >= 1:
            break
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step - first if "optimizer" not in state else step, done, warm_up)
        loss, numbers = loss_of(batch, done)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite; the last checkpoint is {checkpoint}")
        optimizer.step()
        step, spent = step + 1, before + time.time() - began
        with torch.no_grad():
            weight = 1 - ema_decay(decay, step)
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), weight)
            for mine, other in zip(averaged.buffers(), model.buffers(), strict=True):
                mine.copy_(other)
        for name, value in {**numbers, "grad": norm}.items():
            sums.setdefault(name, []).append(value)
        last = progress() >= 1
        if step % log_every == 0:
            means = "  ".join(f"{name} {sum(v) / len(v):.4f}" for name, v in sums.items())
            rate = (step - first) / (time.time() - began)
            left = (seconds - spent if seconds else (steps - step) / rate) / 3600
            print(f"{checkpoint.stem} {step}  {means}  {rate:.2f} steps/s  {left:.1f} h left", flush=True)
            sums = {}
        if watch is not None and (step % watch_every == 0 or last):
            print(f"{checkpoint.stem} {step}  {watch(averaged, step)}", flush=True)
        if time.time() - last_save > device.save_every or last or time.time() > deadline:
            last_save = save()
        if time.time() > deadline and not last:
            raise TimeIsUp(f"{checkpoint.stem} stopped at step {step}, {progress():.0%} of the way")
    return averaged


def read_ahead(batches: Batches, start: int, stop: int, workers: int) -> Iterator[Any]:
    """Batches number start to stop - 1, in order."""
    if not workers:
        yield from (batches[step] for step in range(start, stop))
        return
    yield from torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4,
        pin_memory=torch.cuda.is_available(),
    )

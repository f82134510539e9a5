"""The training loop: a compiled step, checkpoints, a log. Resumed training equals uninterrupted one bit for bit."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten
from tqdm import tqdm

from mlx_starflow.errors import StarflowError
from mlx_starflow.training.checkpoint import Checkpoint, checkpoint_files, load_latest, save_checkpoint
from mlx_starflow.training.data import Order
from mlx_starflow.training.optim import GroupedAdamW, assign, check_same, cosine, ema_decay, trainable, update_average

Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: optimizer steps of the whole training.
        batch_size: samples a step.
        lr: highest learning rate.
        warm_up: share of the steps over which the learning rate rises; a cosine takes it down after that.
        betas, weight_decay: AdamW's.
        embedding_factor: the text embedding learns this much faster.
        clip: largest global norm of the gradient.
        ema: decay of the moving average of the weights; 0 is no average.
        noise_std: standard deviation of the noise on the latents.
        caption_dropout: share of samples that are trained without their caption, for guidance.
        context_full, context_partial: see `objective.context_keep`; the first falls late in training.
        seed: of everything random.
        save_seconds, save_steps: a checkpoint is written that often, by time and by steps (0: by time alone).
        log_every: steps between lines of the log.
    """

    steps: int
    batch_size: int = 32
    lr: float = 1e-3
    warm_up: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    embedding_factor: float = 8.0
    clip: float = 1.0
    ema: float = 0.999
    noise_std: float = 0.3
    caption_dropout: float = 0.1
    context_full: float = 0.5
    context_partial: float = 0.3
    seed: int = 0
    save_seconds: float = 180.0
    save_steps: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "clip", "embedding_factor", "log_every"):
            if not getattr(self, name) > 0:
                raise StarflowError(f"training: {name} must be greater than 0, not {getattr(self, name)}")
        for name in ("noise_std", "weight_decay", "seed", "save_seconds", "save_steps"):
            if not getattr(self, name) >= 0:
                raise StarflowError(f"training: {name} must be 0 or more, not {getattr(self, name)}")
        for name in ("warm_up", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise StarflowError(f"training: {name} must be in 0..1, less than 1, not {getattr(self, name)}")
        for name in ("caption_dropout", "context_full", "context_partial"):
            if not 0 <= getattr(self, name) <= 1:
                raise StarflowError(f"training: {name} must be in 0..1, not {getattr(self, name)}")


class TrainingData(Protocol):
    """Where batches come from. `order` is the only state besides the generator that is given to `batch`."""

    order: Order

    def batch(self, rng: np.random.Generator, config: TrainingConfig, progress: float) -> dict[str, np.ndarray]:
        """The arrays of one step at `progress` 0..1, noise and masks included, all drawn from `rng`."""
        ...


class Trainer:
    """Trains the trainable weights of `model`.

    Args:
        model: an MLX module.
        loss: `loss(model, batch)` -> (scalar loss, metrics). It is compiled: it must draw nothing random.
        data: gives the batches.
        config: settings.
        out_dir: folder of the checkpoints and of `log.jsonl`.
        name: what the progress bar and messages call this.
        resume: go on from the newest checkpoint in `out_dir`; if False, checkpoints and log there are deleted.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Batch], tuple[mx.array, dict[str, mx.array]]],
        data: TrainingData,
        config: TrainingConfig,
        out_dir: str | Path,
        *,
        name: str = "training",
        resume: bool = True,
    ):
        self.model, self.loss, self.data, self.config = model, loss, data, config
        self.folder, self.name = Path(out_dir), name
        self.step = 0
        self.rng = np.random.default_rng(config.seed)
        weights = trainable(model)
        self.average = dict(weights)
        self.optimizer = GroupedAdamW(
            weights,
            betas=config.betas,
            weight_decay=config.weight_decay,
            is_fast=lambda weight: weight.endswith("text_encoder.shared.weight"),
            factor=config.embedding_factor,
        )
        if resume:
            self._resume()
        else:
            for path in [*checkpoint_files(self.folder), self.folder / "log.jsonl"]:
                path.unlink(missing_ok=True)

    def run(self) -> dict[str, mx.array]:
        """Train up to `config.steps` and return the averaged weights by name; `model` holds the last ones.

        Ctrl-C finishes the step, saves and raises KeyboardInterrupt.

        Raises:
            StarflowError: the loss or its gradient is not finite, or a checkpoint cannot be written.
        """
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        step_once = self._compiled_step()
        saved, rows, began = time.monotonic(), [], time.monotonic()
        bar = tqdm(total=config.steps, initial=self.step, desc=self.name, disable=None)
        with bar, _interrupts() as interrupted:
            while self.step < config.steps:
                progress = self.step / config.steps
                batch = {key: mx.array(a) for key, a in self.data.batch(self.rng, config, progress).items()}
                lr = config.lr * cosine(progress, config.warm_up)
                decay = ema_decay(config.ema, self.step + 1)
                numbers = step_once(batch, mx.array(lr), mx.array(decay))
                mx.eval(numbers, self._state)
                row = {key: value.item() for key, value in numbers.items()}
                self._check_finite(row)
                self.step += 1
                rows.append(row)
                bar.update()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    seconds, began = time.monotonic() - began, time.monotonic()
                    bar.set_postfix_str(f"loss {self._log(rows, lr, seconds):.4f}")
                    rows = []
                due = time.monotonic() - saved >= config.save_seconds
                due = due or (config.save_steps and self.step % config.save_steps == 0)
                if due or interrupted.is_set() or self.step == config.steps:
                    self.save()
                    saved = time.monotonic()
                if interrupted.is_set():
                    break
        if interrupted.is_set():
            _say(f"{self.name} stopped at step {self.step} of {config.steps} and is saved: run it again to resume")
            raise KeyboardInterrupt
        return dict(self.average)

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        checkpoint = Checkpoint(
            step=self.step,
            weights=trainable(self.model),
            average=self.average,
            optimizer=self.optimizer.flat_state(),
            random=self.rng.bit_generator.state,
            order=self.data.order.left,
            config=asdict(self.config),
        )
        return save_checkpoint(self.folder, checkpoint)

    def _resume(self) -> None:
        checkpoint, warning = load_latest(self.folder)
        if warning:
            _say(f"{self.name}: {warning}")
        if checkpoint is None:
            return
        for part in (checkpoint.weights, checkpoint.average):
            check_same(part, trainable(self.model), f"the checkpoint in {self.folder}")
        self.optimizer.load_flat_state(checkpoint.optimizer)
        assign(self.model, checkpoint.weights)
        self.average.update(checkpoint.average)
        self.rng.bit_generator.state = checkpoint.random
        self.data.order.left = checkpoint.order
        self.step = checkpoint.step
        was, now = checkpoint.config, json.loads(json.dumps(asdict(self.config)))
        changes = ", ".join(f"{key} {was.get(key)} -> {value}" for key, value in now.items() if was.get(key) != value)
        _say(f"{self.name}: resuming at step {self.step}" + (f", with {changes}" if changes else ""))

    @property
    def _state(self) -> list[Any]:
        return [self.model.state, self.optimizer.state, self.average]

    def _compiled_step(self) -> Callable[[Batch, mx.array, mx.array], dict[str, mx.array]]:
        gradient = nn.value_and_grad(self.model, lambda batch: self.loss(self.model, batch))

        @partial(mx.compile, inputs=self._state, outputs=self._state)
        def step(batch: Batch, lr: mx.array, decay: mx.array) -> dict[str, mx.array]:
            (loss, metrics), gradients = gradient(batch)
            gradients, norm = clip_grad_norm(dict(tree_flatten(gradients)), self.config.clip)
            assign(self.model, self.optimizer.apply(gradients, trainable(self.model), lr))
            update_average(self.average, trainable(self.model), decay)
            return {"loss": loss, "grad": norm, **metrics}

        return step

    def _check_finite(self, row: dict[str, float]) -> None:
        for key, what in (("loss", "the loss"), ("grad", "the gradient")):
            if not math.isfinite(row[key]):
                last = next(iter(checkpoint_files(self.folder)), None)
                raise StarflowError(
                    f"{self.name}: {what} is not finite at step {self.step + 1}; "
                    + (f"the checkpoint {last} is intact: " if last else "")
                    + f"try a lower learning rate than {self.config.lr:g}"
                )

    def _log(self, rows: list[dict[str, float]], lr: float, seconds: float) -> float:
        """Append the means over `rows` to the log; returns the loss."""
        line: dict[str, float | None] = {"step": self.step}
        for key in rows[0]:
            values = [row[key] for row in rows if math.isfinite(row[key])]
            line[key] = round(float(np.mean(values)), 6) if values else None
        line["lr"] = lr
        line["samples_per_second"] = round(self.config.batch_size * len(rows) / max(seconds, 1e-9), 2)
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        return line["loss"]


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, so that a step is never cut in two; the second one is as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

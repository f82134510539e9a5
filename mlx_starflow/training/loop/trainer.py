"""The training loop: a compiled step, checkpoints, a log. Resumed training equals uninterrupted one bit for bit."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from mlx_starflow.errors import Cancelled, StarflowError
from mlx_starflow.likelihood.nll import HALF_LOG_2PI
from mlx_starflow.model_dir.transaction import locked
from mlx_starflow.sampling.progress import Callback, Counter, Watch, watch
from mlx_starflow.training.config import TrainingConfig
from mlx_starflow.training.data.batches import IndexedData, TrainingData
from mlx_starflow.training.loop import distributed
from mlx_starflow.training.loop.checkpoint import (
    Checkpoint,
    check_same_run,
    checkpoint_files,
    clean,
    load_latest,
    plain_state,
    save_checkpoint,
)
from mlx_starflow.training.loop.divergence import Losses, all_finite, is_sound
from mlx_starflow.training.loop.identity import Identity, plain
from mlx_starflow.training.loop.objective import Batch, batch_loss, batch_nll
from mlx_starflow.training.loop.reporting import Reporter, check_reporter, open_reporter
from mlx_starflow.training.loop.run_log import NAME as LOG
from mlx_starflow.training.loop.run_log import RunLog
from mlx_starflow.training.loop.schedules import cosine, ema_decay
from mlx_starflow.training.loop.step import ExtraLoss, Loss, StepMaker, count_tokens
from mlx_starflow.training.loop.validation import BEST, Validation
from mlx_starflow.training.loop.watch import SampleSheet, draw_curves, save_samples
from mlx_starflow.training.loop.weights import assign, check_same, trainable


def forget(folder: Path) -> None:
    """Delete the checkpoints and the log of a training in a folder, if there are any."""
    if folder.is_dir():
        with locked(folder):
            for path in [*checkpoint_files(folder), folder / LOG, folder / BEST]:
                path.unlink(missing_ok=True)


class Trainer:
    """Trains the trainable weights of `model`, and nothing else: `model.freeze` and `unfreeze` say which these are.

    With `mlx.launch` every process makes the same Trainer: each computes its share of every batch, and rank 0 alone
    writes files.

    Args:
        model: an MLX module.
        data: gives the batches.
        config: settings.
        out_dir: folder of the checkpoints, of `log.jsonl` and of images to watch.
        loss: `loss(model, batch)` -> (scalar loss, metrics); `batch_loss`, that of a flow, by default. It is compiled:
            it must draw nothing random. For a flow with a learned denoiser it must take its noisy data from
            `objective.noisy_data`, since the gradient with respect to that is what the denoiser learns, see
            `score_matching`; the error of its prediction is logged as `denoiser`.
        extra_loss: `extra_loss(model, batch, key)` -> (term, numbers): the scalar term is added to the loss, and it and
            the named scalars `numbers` are logged. `key` is a random key of MLX, another one in each step.
        validation: held-out data.
        nll: `nll(model, batch)` -> `[B]`, nats per dimension without log(2 pi) / 2, for validation; `batch_nll` by
            default.
        unit, constant: what validation adds to that, and what it calls the sum.
        samples: images that the model, with its averaged weights, makes every `config.watch_every` steps; a
            `SampleSheet` says what they show.
        publish: is given, on rank 0 and whenever a checkpoint has been written, the weights that `run` would return if
            it ended there.
        identity: what checkpoints are of besides their weights, such as the model's config and the data; a checkpoint
            of anything else is refused.
        name: what the progress bar and messages call this.
        resume: go on from the newest checkpoint in `out_dir`; if False, checkpoints and log there are deleted.
        progress, callback: see `Progress`, whose phase is `name` and which counts steps; on rank 0 alone there is a
            bar. To cancel it does what Ctrl-C does: the step is finished and saved.

    Attributes:
        step: steps done.
        average: averaged weights by name; {} without an average.
        peak_memory: of `run`, in bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        config: TrainingConfig,
        out_dir: str | Path = "runs/training",
        *,
        loss: Loss | None = None,
        extra_loss: ExtraLoss | None = None,
        validation: IndexedData | None = None,
        nll: Callable[[Any, Batch], mx.array] = batch_nll,
        unit: str = "nats/dim",
        constant: float = HALF_LOG_2PI,
        samples: Callable[[Any], Sequence[Image.Image] | SampleSheet] | None = None,
        publish: Callable[[Mapping[str, mx.array]], None] | None = None,
        identity: Identity | None = None,
        name: str = "training",
        resume: bool = True,
        progress: Watch = None,
        callback: Callback | None = None,
    ):
        self.progress = watch(progress, callback)
        self.model, self.data, self.config = model, data, config
        self.folder, self.name, self.samples, self.publish = Path(out_dir), name, samples, publish
        check_reporter(config.report_to)
        self.identity = plain(identity or {})
        self.group = distributed.world()
        self.writes = self.group.rank() == 0
        parts = config.accumulate * self.group.size()
        if config.batch_size % parts:
            raise StarflowError(
                f"training: batch_size {config.batch_size} cannot be split into {parts} parts "
                f"({self.group.size()} processes, {config.accumulate} micro-batches each)"
            )
        if config.shard and self.group.size() > 1:
            distributed.check_sharding(self.group)
        self.step = 0
        self.rng = np.random.default_rng(config.seed)
        self._steps = StepMaker(
            model,
            loss or partial(batch_loss, gradient_checkpointing=config.checkpoint_layers),
            extra_loss,
            config,
            self.group,
        )
        self.average, self.optimizer = self._steps.average, self._steps.optimizer
        self.peak_memory = 0
        self._check_peers: Callable[[], None] = lambda: None
        self._losses = Losses()
        self.validation = (
            None if validation is None else Validation(self.folder, validation, nll, config, self.group, unit, constant)
        )
        if self.writes:
            if resume:
                self._resume()
            else:
                forget(self.folder)
        self._share_state()

    def run(self) -> dict[str, mx.array]:
        """Train up to `config.steps`; `model` holds the last weights then.

        Ctrl-C and SIGTERM finish the step, save and raise KeyboardInterrupt; `Progress.cancel` raises Cancelled then.

        Returns:
            The weights to use, by name: with validation those that did best, else the averaged ones, or the last ones
            if there is no average.

        Raises:
            StarflowError: a loss, gradient or weight is not finite, a file cannot be written, or another process of the
                run has ended.
        """
        with distributed.peers(self.name, self.group) as check, distributed.run_folder(self.folder):
            self._check_peers = check
            if self.config.shard and self.group.size() > 1:
                self._steps.shard()
            return self._run()

    def _run(self) -> dict[str, mx.array]:
        config = self.config
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)
        reporting = config.report_to if self.writes else None
        reporter = open_reporter(reporting, self.folder, self.step, asdict(config))
        try:
            return self._loop(RunLog(self.folder, self.step, self.writes, reporter))
        finally:
            reporter.close()

    def _loop(self, log: RunLog) -> dict[str, mx.array]:
        config = self.config
        saved = began = time.monotonic()
        stopped = self._finished
        counting = self.progress.counting(self.name, config.steps, "step", done=self.step, shown=self.writes)
        with counting as counter, _interrupts() as interrupted:
            self.progress.tell()
            while self.step < config.steps and not stopped:
                share = self.step / config.steps
                batch = self.data.batch(self.rng, config, share)
                key = int(self.rng.integers(2**32)) if self._steps.random else 0
                lr = config.lr * cosine(share, config.warm_up)
                numbers, applied = self._steps(batch, key, lr, ema_decay(config.ema, self.step + 1))
                self._check_finite(numbers)
                self._losses.add(numbers["loss"])
                self.step += 1
                log.skipped += not applied
                now = time.monotonic()
                log.add(numbers, config.batch_size, count_tokens(self.model, batch), now - began)
                began = now
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    counter.remark(log.flush(self.step, lr, self.epoch))
                _advance(counter)
                self.peak_memory = mx.get_peak_memory()
                if self.validation and (last or _due(self.step, config.validate_every)):
                    stopped = self._validate(log)
                    if self.writes:
                        counter.write(f"{self.name}: {self.validation}")
                if config.watch_every and (last or _due(self.step, config.watch_every)):
                    self._watch(log.reporter)
                began = time.monotonic()
                stop = distributed.any_of(interrupted.is_set() or self.progress.cancelled, self.group)
                due = began - saved >= config.save_seconds or _due(self.step, config.save_steps)
                if due or stop or last or stopped:
                    self.save()
                    saved = began = time.monotonic()
                if stop:
                    break
            else:
                stop = False
        self._steps.unshard()
        if stop:
            if self.writes:
                _say(f"{self.name} stopped at step {self.step} of {config.steps} and is saved: run it again to resume")
            raise self._interruption()
        return self._best(self.average or trainable(self.model))

    def _interruption(self) -> BaseException:
        """The same on all ranks, whichever of them was stopped."""
        cancelled = distributed.any_of(self.progress.cancelled, self.group)
        return Cancelled("cancelled") if cancelled else KeyboardInterrupt()

    def _best(self, otherwise: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The weights to use: those that did best in validation or, where there is none, others."""
        best = self.validation.best_weights(trainable(self.model)) if self.validation else None
        return dict(otherwise) if best is None else best

    @property
    def epoch(self) -> float:
        """Passes over the data that have been done."""
        return self.step * self.config.batch_size / self.data.order.length

    @property
    def _finished(self) -> bool:
        return self.validation is not None and self.validation.exhausted

    def save(self) -> Path | None:
        """Write a checkpoint of the present state, on rank 0; None elsewhere."""
        weights, average, optimizer = self._steps.whole_state()
        if not self.writes:
            return None
        self._check_peers()
        if not all_finite([*weights.values(), *average.values()]):
            raise self._diverged("a weight", self.step)
        checkpoint = Checkpoint(
            step=self.step,
            weights=weights,
            average=average,
            optimizer=optimizer,
            random=self.rng.bit_generator.state,
            order=self.data.order.left,
            config=asdict(self.config),
            note={
                "identity": self.identity,
                "losses": self._losses.state(),
                **({"validation": self.validation.state} if self.validation else {}),
            },
        )
        written = save_checkpoint(self.folder, checkpoint)
        if self.publish is not None:
            self.publish(self._best(average or weights))
        return written

    def _resume(self) -> None:
        checkpoint, warning = load_latest(self.folder)
        if warning:
            _say(f"{self.name}: {warning}")
        if checkpoint is None:
            return
        where = f"the checkpoint in {self.folder}"
        check_same_run(self.folder, checkpoint.config, checkpoint.note, self.identity, self.config.seed)
        check_same(checkpoint.weights, trainable(self.model), where)
        if (was := checkpoint.config.get("optimizer", "adamw")) != self.config.optimizer:
            raise StarflowError(
                f"{where} was trained with --optimizer {was}: go on with that, or start again in another folder"
            )
        self.optimizer.load_flat_state(checkpoint.optimizer)
        assign(self.model, checkpoint.weights)
        if self.average:
            # A run without an average may go on with one: it starts from the weights.
            average = checkpoint.average or checkpoint.weights
            check_same(average, trainable(self.model), where)
            self.average.update(average)
        self.rng.bit_generator.state = checkpoint.random
        self.data.order.left = checkpoint.order
        self.step = checkpoint.step
        self._losses = Losses.of(checkpoint.note.get("losses"))
        if self.validation and "validation" in checkpoint.note:
            self.validation.state = checkpoint.note["validation"]
        was, now = checkpoint.config, json.loads(json.dumps(asdict(self.config)))
        changes = ", ".join(
            f"{key} {was[key]} -> {value}" for key, value in now.items() if was.get(key, value) != value
        )
        _say(f"{self.name}: resuming at step {self.step}" + (f", with {changes}" if changes else ""))

    def _share_state(self) -> None:
        """All processes go on from what rank 0 has."""
        if self.group.size() == 1:
            return
        state = {
            "step": self.step,
            "random": plain_state(self.rng.bit_generator.state),
            "order": self.data.order.left.tolist(),
            "validation": self.validation.state if self.validation else None,
        }
        with distributed.peers(self.name, self.group):
            state = self._steps.share_state(state)
        self.step = state["step"]
        self.rng.bit_generator.state = state["random"]
        self.data.order.left = np.array(state["order"], np.int64)
        if self.validation:
            self.validation.state = state["validation"]

    def _validate(self, log: RunLog) -> bool:
        assert self.validation is not None
        with self._averaged():
            line = self.validation.measure(self.model, self.step, self._whole_weights)
        log.write(line)
        return self._finished

    def _whole_weights(self) -> dict[str, mx.array]:
        weights = self._steps.whole_weights()
        if self.writes:
            self._check_peers()
        return weights

    def _watch(self, reporter: Reporter) -> None:
        # A model in shares can be used by all processes together alone.
        if self.samples is not None and (self.writes or self._steps.shards):
            with self._averaged():
                images = self.samples(self.model)
            if self.writes:
                reporter.image(self.step, "samples", save_samples(images, self.folder, self.step))
        if self.writes:
            draw_curves(self.folder)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model holds the averaged weights."""
        weights = trainable(self.model)
        assign(self.model, self.average or weights)
        try:
            yield
        finally:
            assign(self.model, weights)

    def _check_finite(self, numbers: dict[str, float]) -> None:
        for key, what in (
            ("loss", "the loss"),
            ("grad", "the gradient"),
            ("denoiser", "the denoiser's loss"),
            ("denoiser-grad", "the denoiser's gradient"),
        ):
            if not math.isfinite(numbers.get(key, 0.0)):
                raise self._diverged(what, self.step + 1)

    def _diverged(self, what: str, step: int) -> StarflowError:
        """What to say of numbers that are not finite: which checkpoint is of before they, or the loss, went astray."""
        files = checkpoint_files(self.folder) if self.writes else []
        good = next(filter(is_sound, files), None)
        advice = f"try a lower learning rate than {self.config.lr:g}"
        if good is None:
            again = "; no checkpoint is of before it went astray: start again with --no-resume" if files else ""
            return StarflowError(f"{self.name}: {what} is not finite at step {step}{again}; {advice}")
        later = files[: files.index(good)]
        if later:
            advice = f"delete {', '.join(path.name for path in later)}, which came too late, and {advice}"
        return StarflowError(
            f"{self.name}: {what} is not finite at step {step}; the checkpoint {good} is intact: {advice}"
        )


def _advance(counter: Counter, steps: int = 1) -> None:
    """Count steps; that the training is cancelled is heeded where it can be saved."""
    with suppress(Cancelled):
        counter.advance(steps)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C or SIGTERM into an event, so that no step is cut in two; the second one is as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(*_: Any) -> None:
        event.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        restore()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

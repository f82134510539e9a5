"""Numbers and images of a training in other programs' windows: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mlx_starflow.errors import StarflowError, one_line

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Where a training can report to, and the package that each needs."""

PROJECT = "mlx-starflow"
"""Of runs at Weights & Biases, unless WANDB_PROJECT names another."""

_NOT_NUMBERS = ("step", "elapsed", "epoch")


class Reporter(Protocol):
    """What the log's lines and the images to watch go to besides the run's folder."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, after `step` steps."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """An image that has been written."""
        ...

    def close(self) -> None:
        """Everything has been said."""
        ...


class NoReporter:
    """A `Reporter` that reports to nobody."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def image(self, step: int, name: str, path: Path) -> None:
        pass

    def close(self) -> None:
        pass


def check_reporter(kind: str | None) -> None:
    """Raise StarflowError if `kind` needs a package that is not there: better before the work than in it."""
    if kind is not None and find_spec(PACKAGES[kind]) is None:
        raise StarflowError(f"--report-to {kind} needs {PACKAGES[kind]}: pip install {PACKAGES[kind]}")


def open_reporter(kind: str | None, folder: Path, step: int, settings: Mapping[str, Any]) -> Reporter:
    """Where a run reports to.

    Args:
        kind: one of `PACKAGES`; None: to nobody.
        folder: of the run.
        step: where it goes on.
        settings: of the training.

    Raises:
        StarflowError: the package is missing, or refuses.
    """
    check_reporter(kind)
    if kind is None:
        return NoReporter()
    try:
        return (_TensorBoard if kind == "tensorboard" else _Wandb)(folder, step, settings)
    except Exception as error:  # of the packages' many parts: no login, no connection, no room
        advice = "; wandb login, or WANDB_MODE=offline to keep the run on this machine" if kind == "wandb" else ""
        raise StarflowError(f"--report-to {kind}: {one_line(error, first=True)}{advice}") from None


def plain_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log that are worth a curve."""
    return {
        name: float(value)
        for name, value in line.items()
        if name not in _NOT_NUMBERS and isinstance(value, int | float) and not isinstance(value, bool)
    }


class _TensorBoard:
    """Files of events in `folder/tensorboard`, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        # What an interrupted run said of steps that are done again is not shown.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as opened:
            self._writer.add_image(name, np.asarray(opened.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run at Weights & Biases, which a resumed training goes on with; its own files are in `folder/wandb`."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        import wandb

        number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        # Nobody may be asked for a login where nobody sits.
        mode = os.environ.get("WANDB_MODE") or (None if wandb.api.api_key or sys.stdin.isatty() else "offline")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=folder.parent.name if folder.name in ("checkpoints", "flow", "autoencoder") else folder.name,
            id=number,
            resume="allow",
            dir=str(folder),
            config=dict(settings),
            mode=mode,
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()

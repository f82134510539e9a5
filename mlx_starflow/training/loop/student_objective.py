"""What students are trained with: squared errors of an inverse student's heads, and flow matching."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx

from mlx_starflow.models.student import INVERSE, Student
from mlx_starflow.training.loop.objective import Batch, Metrics


def student_errors(
    student: Student, batch: Batch, grid: tuple[int, int], gradient_checkpointing: bool = False
) -> list[mx.array]:
    """Mean squared error of each head and sample, `[B]`, in variances of what it predicts.

    The batch is `PairData`'s. A matching student's error is that of the velocity x - z at x_t = (1 - t) z + t x.
    """
    evaluate = partial(student, gradient_checkpointing=gradient_checkpointing)
    noise, clean, condition = batch["noise"], batch["clean"], batch.get("condition")
    if student.config.kind == INVERSE:
        states = batch["states"]
        targets = [*(states[:, number] for number in range(states.shape[1])), clean]
        previous = None
        if "refined" in batch:
            previous = mx.stop_gradient(student(noise, grid, condition)[-2])
        outputs = evaluate(noise, grid, condition, previous)
    else:
        time = batch["time"][:, None, None]
        targets = [clean - noise]
        outputs = evaluate((1 - time) * noise + time * clean, grid, condition, time=batch["time"])
    return [
        mx.square((output - target) / scale).mean(axis=(1, 2))
        for output, target, scale in zip(outputs, targets, student.config.scales, strict=True)
    ]


def student_loss(
    student: Student,
    batch: Batch,
    grid: tuple[int, int],
    gradient_checkpointing: bool = False,
    transport: float = 0.0,
) -> tuple[mx.array, Metrics]:
    """The loss for `Trainer`: the mean of the states' errors and the error of the data, or the velocity's.

    `transport`: weigh a pair (z, x) by exp(-|x - z|^2 / (transport * d)), d being the numbers in x, and let the weights
    of a batch have the mean 1 (W-CFM, arXiv 2507.22270, where noise and data are drawn independently); 0: all alike.
    """
    errors = student_errors(student, batch, grid, gradient_checkpointing)
    weight: Any = 1.0
    if transport:
        cost = mx.square(batch["clean"] - batch["noise"]).mean(axis=(1, 2))
        weight = mx.softmax(-cost / transport) * cost.shape[0]
    if student.config.kind != INVERSE:
        loss = (weight * errors[0]).mean()
        return loss, {"velocity": loss}
    *states, clean = [(weight * error).mean() for error in errors]
    metrics = {"sample": states[-1], "clean": clean}
    return sum(states[1:], states[0]) / len(states) + clean, metrics


def student_error(student: Student, batch: Batch, grid: tuple[int, int]) -> mx.array:
    """What validation measures of each sample, `[B]`: the error of the data, or of the velocity."""
    return student_errors(student, batch, grid)[-1]

"""Sampling with a flow's student: approximate samples in a few evaluations, and first guesses for exact ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.flow import Flow, active_blocks
from mlx_starflow.models.student import INVERSE, MATCHING, Student
from mlx_starflow.sampling.decoder import check_finite
from mlx_starflow.sampling.progress import Watch, watch

STEPS = {INVERSE: 1, MATCHING: 4}
"""Of a student, unless somebody says otherwise."""

MOST_STEPS = 1000

Solver = Literal["euler", "heun"]


@dataclass(frozen=True)
class StudentSample:
    """What a student makes of noise.

    Attributes:
        data: clean data, shaped as the flow's, float32.
        states: the flow's states as an inverse student guesses them, tokens `[B, N, C]` in raster order, deep block
            first, the last of them the flow's sample with its noise; of a matching student none.
        evaluations: of the student.
    """

    data: mx.array
    states: list[mx.array]
    evaluations: int


def sample_student(
    student: Student,
    z: mx.array,
    condition: mx.array | None = None,
    steps: int | None = None,
    *,
    solver: Solver = "euler",
    progress: Watch = False,
) -> StudentSample:
    """Noise -> data, about as the flow would make it of the same noise.

    Args:
        z: noise, as the flow's `sample` takes it.
        condition: text embeddings `[B, L, D]`, or integer labels `[B]`.
        steps: of an inverse student evaluations, each after the first fed with the sample of the one before; of a
            matching student steps from noise to data; None: `STEPS`.
        solver: of a matching student: "euler", one evaluation a step, or "heun", two of them but one in the last.
        progress: a `Progress`, or whether to show a progress bar.

    Raises:
        StarflowError: the number of steps is out of bounds, or noise or condition do not fit.
    """
    kind = student.config.kind
    steps = STEPS[kind] if steps is None else steps
    if not 1 <= steps <= MOST_STEPS:
        raise StarflowError(f"a student takes 1 to {MOST_STEPS} steps, not {steps}")
    tokens, grid = student.tokens(z), student.grid(z.shape)
    with watch(progress).counting("flow", steps, "step", label="student", leave=False) as counter:
        if kind == INVERSE:
            outputs: list[mx.array] = []
            for _ in range(steps):
                outputs = student(tokens, grid, condition, outputs[-2] if outputs else None)
                mx.eval(outputs)
                counter.advance()
            *states, x = outputs
            evaluations = steps
        else:
            states, x, evaluations = [], tokens, 0
            for step in range(steps):
                x, count = _step(student, x, grid, condition, step / steps, 1 / steps, solver)
                mx.eval(x)
                evaluations += count
                counter.advance()
    check_finite(x, "what the student made of the noise")
    return StudentSample(student.data(x, z.shape), states, evaluations)


def _step(
    student: Student,
    x: mx.array,
    grid: tuple[int, int],
    condition: mx.array | None,
    time: float,
    width: float,
    solver: Solver,
) -> tuple[mx.array, int]:
    """x_t -> x_(t + width), and the evaluations that took."""

    def velocity(x: mx.array, t: float) -> mx.array:
        return student(x, grid, condition, time=mx.full((x.shape[0],), t))[0]

    first = velocity(x, time)
    after = x + width * first
    # At the end of the line Heun's second evaluation would be at data, where a velocity means little.
    if solver == "euler" or time + 1.5 * width > 1:
        return after, 1
    return x + width / 2 * (first + velocity(after, time + width)), 2


def check_drafts(student: Student, flow: Flow) -> list[int]:
    """Numbers of the flow's blocks that an inverse student guesses the data of, in the order of sampling.

    Raises StarflowError if it is of another kind, or of a flow with more or fewer blocks.
    """
    if student.config.kind != INVERSE:
        raise StarflowError("a matching student knows no states between blocks: drafts need an inverse student")
    active = active_blocks(flow)
    if len(active) != student.config.states:
        raise StarflowError(
            f"this student guesses the data of {student.config.states} blocks, and the flow has {len(active)}: it is "
            "another flow's"
        )
    return active


def drafts(student: Student, flow: Flow, z: mx.array, condition: mx.array | None = None) -> dict[int, mx.array]:
    """What each block adds to the tokens that it reads, as a student guesses it for noise z: by the block's number,
    tokens `[B, N, C]` in raster order.

    One evaluation of the student. A block's first guess is what it reads, which is exact, and this: what the student
    has got wrong in the blocks before does not count. Whatever it guesses, the window that begins there ends at the
    flow's own sample.

    Raises:
        StarflowError: as `check_drafts`, or noise or condition do not fit.
    """
    active = check_drafts(student, flow)
    *states, _ = student(student.tokens(z), student.grid(z.shape), condition)
    before = [flow.noise_tokens(z), *states[:-1]]
    return {index: after - first for index, first, after in zip(active, before, states, strict=True)}

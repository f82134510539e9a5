"""Students in a pipeline: the settings that go with one, and sampling by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_starflow.errors import StarflowError
from mlx_starflow.models.student import INVERSE
from mlx_starflow.pipelines.base import Pipeline
from mlx_starflow.pipelines.mlx_backend import MLXBackend
from mlx_starflow.pipelines.results import GenerationSettings, GenerationStats
from mlx_starflow.sampling.methods import DRAFT
from mlx_starflow.sampling.progress import Progress


def with_student(
    pipe: Pipeline,
    settings: GenerationSettings,
    student: str | Path | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    steps: int | None = None,
    method: str | None = None,
) -> GenerationSettings:
    """The settings with these values; where a student makes the images, with what it has learned.

    Raises:
        StarflowError: a value is out of range, the backend has no students, or this one has learned another
            guidance or from another model.
    """
    name = None if student is None else str(student)
    if student is not None and method is None and settings.method != DRAFT:
        method = "auto"  # whatever the model's own way of sampling the flow is
    chosen = settings.updated(guidance=guidance, temperature=temperature, method=method, student=name, steps=steps)
    if chosen.student is None:
        return chosen
    backend = pipe.backend
    if not isinstance(backend, MLXBackend):
        raise StarflowError("students need the mlx backend: leave the student out")
    config = backend.student(chosen.student).config
    if chosen.method == DRAFT:
        if config.kind != INVERSE:
            raise StarflowError(f"{chosen.student} is a matching student, and drafts need an inverse one")
        return chosen
    if backend.adapters:
        raise StarflowError(
            f"{chosen.student} has learned from {pipe.name} without adapters: leave them out, take its drafts "
            "(--method draft), or teach it the style (distill --lora)"
        )
    if student is not None:
        chosen = chosen.updated(
            guidance=config.guidance if guidance is None else None,
            temperature=config.temperature if temperature is None else None,
        )
    if chosen.guidance != config.guidance:
        raise StarflowError(
            f"{chosen.student} has learned the guidance {config.guidance:g} and knows no other: leave the guidance "
            "out, or distill another student"
        )
    return chosen


def sample_by_student(
    pipe: Pipeline,
    z: Any,
    condition: Any,
    blocks: int,
    settings: GenerationSettings,
    stats: GenerationStats,
    keep_steps: bool,
    progress: Progress,
) -> list[Any]:
    """Noise of the settings' temperature -> clean data; before them, with `keep_steps`, the noise, and the flow's
    states as an inverse student guesses them.

    `blocks`: of the flow, none of which is evaluated.
    """
    backend = pipe.backend
    assert isinstance(backend, MLXBackend) and settings.student is not None  # or `with_student` would have said so
    with pipe.phases.run(stats, "flow", progress):
        made = backend.sample_student(z, condition, settings, progress)
        student = backend.student(settings.student)
    noise = student.tokens(z)
    stats.count([0] * blocks, noise.shape[0] * noise.shape[1], made.evaluations)
    if not keep_steps:
        return [made.data]
    return [*(student.data(tokens, z.shape) for tokens in (noise, *made.states)), made.data]

"""Images and videos of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.pipelines import VideoPipeline
from mlx_starflow.pipelines.image_maker import ImageMaker
from mlx_starflow.server import requests
from mlx_starflow.server.gallery import Gallery, LooseItem, data_url, encoded
from mlx_starflow.server.jobs import Event, Job, Result
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.models import Model, Models
from mlx_starflow.server.work.parts import Work, check_count, chosen_upscaler, read_image, show

BATCH = 8
"""Images sampled at once, as `mlx-starflow generate` does."""


def generate(request: requests.Generate, gallery: Gallery, limits: Limits) -> Work:
    """Images of a prompt. Raises StarflowError."""
    check_count(limits, request.n * request.best_of, "n" if request.best_of == 1 else "n times best_of")

    def work(models: Models, job: Job) -> Result:
        opened = models.get(request.model)
        pipe: ImageMaker = opened.image_pipeline if isinstance(opened, VideoPipeline) else opened
        model = models.find(request.model)
        student = None if request.student is None else models.student(model, request.student)
        settings = pipe.with_student(
            pipe.settings, student, request.guidance, request.temperature, request.steps, request.method
        ).updated(attn_temp=request.attn_temp, denoise=request.denoise, size=request.size)
        if request.verify and settings.samples_by_student:
            raise StarflowError("what a student makes is not exact, and has no certificate: leave verify out")
        size, samples = settings.size or pipe.size, request.n * request.best_of
        upscaler = chosen_upscaler(models, request, size)
        # The images that the command makes of this seed, unless memory is short: then they are the same up to rounding.
        batch = _batch(models, model, size, min(BATCH, samples), settings.guidance > 0)
        stream = pipe.stream(
            request.prompt,
            seed=request.seed,
            images=request.n,
            best_of=request.best_of,
            settings=settings,
            batch_size=batch,
            verify=pipe.method(settings) != "sequential" if request.verify is None else request.verify,
            progress=job.progress,
        )
        pictures: list[dict[str, Any]] = []
        for made in stream:
            certificate = None if made.certificate is None else asdict(made.certificate)
            more = {"prompt": made.prompt, "seed": made.seed, "certificate": certificate, "fit": made.fit}
            if upscaler is not None:
                made = made.upscaled(upscaler, progress=job.progress)
            item = (gallery.add if request.keep else LooseItem)(made.image, made.metadata)
            pictures.append(show(job, item, len(pictures), more))
        stats = stream.stats
        told = {
            "seconds": stats.seconds,
            "memory": stats.memory,
            "tokens": stats.tokens,
            "evaluations": stats.evaluations,
            "student_evaluations": stats.student_evaluations,
        }
        return {"pictures": pictures, "settings": settings.to_dict(), "stats": told}

    return work


def video(request: requests.Video, gallery: Gallery, limits: Limits) -> Work:
    """A video, whose frames are told as they come."""

    def work(models: Models, job: Job) -> Result:
        pipe, model = models.get(request.model), models.find(request.model)
        if not isinstance(pipe, VideoPipeline):
            raise StarflowError(f"{model.id} makes pictures, not videos")
        if (request.frames or 1) > limits.frames:
            raise StarflowError(f"frames must be at most {limits.frames} here, not {request.frames}")
        size, frames = request.size or pipe.settings.size, request.frames or pipe.settings.frames
        guidance = pipe.settings.guidance if request.guidance is None else request.guidance
        models.check_room(model, size, 1, guidance > 0, min(frames, pipe.format.trained))
        stream = pipe.stream(
            request.prompt,
            seed=request.seed,
            image=None if request.image is None else read_image(request.image),
            frames=request.frames,
            size=request.size,
            fps=request.fps,
            guidance=request.guidance,
            temperature=request.temperature,
            method=request.method,
            attn_temp=request.attn_temp,
            denoise=request.denoise,
            previews=request.previews,
            progress=job.progress,
        )
        upscaler = chosen_upscaler(models, request, stream.size)

        def told() -> Iterator[Image.Image]:
            for index, frame in enumerate(stream):
                shown = {"index": index, "frames": stream.frames, "image": data_url(encoded(frame))}
                job.publish(Event("frame", shown))
                yield frame

        # Frames are told as they are made, and enlarged for the file.
        made = list(told() if upscaler is None else upscaler.frames(told(), progress=job.progress))
        metadata = stream.metadata if upscaler is None else upscaler.upscaled(stream.metadata)
        item = gallery.add_video(made, stream.fps, metadata)
        shown = show(job, item, 0, {"prompt": request.prompt, "seed": stream.seed})
        return {"pictures": [shown], "frames": len(made), "fps": stream.fps}

    return work


def _batch(models: Models, model: Model, size: tuple[int, int], batch: int, guided: bool) -> int:
    """How many images fit into memory at once, at most `batch`. Raises StarflowError if not one does."""
    frames = 1 if model.about["kind"] == "videos" else None
    while batch > 1:
        try:
            models.check_room(model, size, batch, guided, frames)
            return batch
        except StarflowError:
            batch //= 2
    models.check_room(model, size, 1, guided, frames)
    return 1

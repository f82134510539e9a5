"""Images edited by the noise that they come from."""

from __future__ import annotations

from typing import Any

from PIL import Image

from mlx_starflow.errors import StarflowError
from mlx_starflow.media.pixels import UnreadableImage, decode_transparency, no_remarks
from mlx_starflow.pipelines.upscaling import Upscaler
from mlx_starflow.server import requests
from mlx_starflow.server.gallery import Gallery
from mlx_starflow.server.jobs import Job, Result
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.models import AnyPipeline, Models
from mlx_starflow.server.work.parts import Work, check_count, chosen_upscaler, keep_all, open_for_image, read_image


def reprompt(request: requests.Reprompt, gallery: Gallery, limits: Limits) -> Work:
    """An image's noise under another prompt. Raises StarflowError."""
    check_count(limits, len(request.strengths), "the number of strengths")

    def work(models: Models, job: Job) -> Result:
        pipe, upscaler = _editor(models, request)
        edit = pipe.reprompt(
            read_image(request.image),
            request.source,
            request.target,
            request.strengths,
            size=request.size,
            method=request.method,
            progress=job.progress,
        )
        return keep_all(
            job, gallery, edit.images, edit.metadata, [{"strength": place} for place in edit.places], upscaler
        )

    return work


def vary(request: requests.Vary, gallery: Gallery, limits: Limits) -> Work:
    """Images near one. Raises StarflowError."""
    check_count(limits, request.n * len(request.strengths), "n times the number of strengths")

    def work(models: Models, job: Job) -> Result:
        pipe, upscaler = _editor(models, request)
        edit = pipe.vary(
            read_image(request.image),
            request.prompt,
            request.strengths,
            images=request.n,
            temperature=request.temperature,
            seed=request.seed,
            size=request.size,
            method=request.method,
            progress=job.progress,
        )
        more = [
            {"strength": place, "seed": how["seeds"][0]} for place, how in zip(edit.places, edit.metadata, strict=True)
        ]
        return keep_all(job, gallery, edit.images, edit.metadata, more, upscaler)

    return work


def interpolate(request: requests.Interpolate, gallery: Gallery, limits: Limits) -> Work:
    """Images between two. Raises StarflowError."""
    check_count(limits, len(request.shares), "the number of shares")

    def work(models: Models, job: Job) -> Result:
        pipe, upscaler = _editor(models, request)
        edit = pipe.interpolate(
            read_image(request.first),
            read_image(request.second),
            (request.prompts[0], request.prompts[1]),
            request.shares,
            size=request.size,
            method=request.method,
            progress=job.progress,
        )
        return keep_all(job, gallery, edit.images, edit.metadata, [{"share": place} for place in edit.places], upscaler)

    return work


def inpaint(request: requests.Inpaint, gallery: Gallery, limits: Limits) -> Work:
    """An image whose free part is painted anew. Raises StarflowError."""
    check_count(limits, request.n, "n")
    if (request.mask is None) == (request.rectangle is None):
        raise StarflowError("give a mask, or a rectangle x,y,w,h: what of the image is free")

    def work(models: Models, job: Job) -> Result:
        pipe, upscaler = _editor(models, request)
        mask: Image.Image | str = request.rectangle or ""
        if request.mask is not None:
            mask = _mask(request.mask)
        own = {
            "steps": request.steps,
            "rounds": request.rounds,
            "strength": request.strength,
            "feather": request.feather,
        }
        chosen: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        made = pipe.inpaint(
            read_image(request.image),
            mask,
            request.prompt,
            images=request.n,
            seed=request.seed,
            size=request.size,
            method=request.method,
            progress=job.progress,
            **chosen,
        )
        seeds = [{"seed": request.seed + number} for number in range(request.n)]
        result = keep_all(job, gallery, made.images, made.metadata, seeds, upscaler)
        return result | {"nll": made.nll.T.tolist()}

    return work


def _editor(models: Models, request: requests.Edit) -> tuple[AnyPipeline, Upscaler | None]:
    """The model of an edit, for which there is room, and what enlarges its images, if that is asked for."""
    pipe = open_for_image(models, request.model, request.size)
    return pipe, chosen_upscaler(models, request, request.size)


def _mask(content: bytes) -> Image.Image:
    """White where an image is free: where the mask is transparent, or white if all of it is opaque."""
    try:
        with no_remarks():
            opacity = decode_transparency(content)
    except UnreadableImage as error:
        raise StarflowError(f"the mask cannot be read: {error}") from None
    if opacity is None or opacity.getextrema() == (255, 255):  # such as every canvas of a browser makes
        return read_image(content)
    return opacity.point(lambda value: 255 - value)

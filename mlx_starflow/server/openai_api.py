"""The endpoints that tools know from OpenAI's API: models, and images generated, edited and varied.

Fields that mean nothing to a flow (quality, style and such) are taken and ignored; those that are nobody's are
refused. `seed`, `guidance`, `temperature`, `method`, `student`, `steps` and `upscale` are ours: OpenAI's client sends
them as `extra_body`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from mlx_starflow.media.noise import draw_seed
from mlx_starflow.media.pixels import UnreadableImage, decode_transparency, no_remarks
from mlx_starflow.server import requests, work
from mlx_starflow.server.api import accepts, converted, in_format
from mlx_starflow.server.jobs import Event, Job
from mlx_starflow.server.refusals import Refusal
from mlx_starflow.server.requests import (
    FlowMethod,
    Method,
    Picture,
    Seed,
    Size,
    Steps,
    Student,
    Text,
    Upscale,
)
from mlx_starflow.server.service import Service, server_sent

Format = Literal["png", "jpeg", "webp"]


class Answered(requests.Request):
    """How images are answered, and what is ignored."""

    n: int | None = Field(default=None, ge=1, description="images; 1 by default")
    size: Size = None
    seed: Seed | None = Field(default=None, description="of the first image; drawn if left out")
    upscale: Upscale = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100, description="quality of JPEG and WebP")
    stream: bool | None = None
    partial_images: int | None = Field(
        default=None, ge=0, le=3, description="of a stream: how many previews of each image"
    )
    background: Literal["auto", "opaque"] | None = None
    quality: str | None = Field(default=None, description="ignored")
    style: str | None = Field(default=None, description="ignored")
    moderation: str | None = Field(default=None, description="ignored")
    user: str | None = Field(default=None, description="ignored")
    safety_identifier: str | None = Field(default=None, description="ignored")


class Generation(Answered):
    """Images of a prompt."""

    prompt: Text
    guidance: float | None = Field(default=None, ge=0, le=1000)
    temperature: float | None = Field(default=None, ge=0, le=1000)
    method: Method | None = None
    student: Student = None
    steps: Steps = None


class Editing(Answered):
    """An image painted anew where a mask is transparent; without a mask and transparency, all of it re-prompted."""

    image: Picture
    prompt: Text
    mask: Picture | None = None
    method: FlowMethod | None = None
    input_fidelity: str | None = Field(default=None, description="ignored")


class Variation(Answered):
    """Images near an image."""

    image: Picture
    prompt: Text = ""
    method: FlowMethod | None = None
    strength: float = Field(default=0.3, ge=0, le=1)


def router(service: Service) -> APIRouter:
    """The endpoints."""
    api = APIRouter(prefix="/v1")
    gallery, limits = service.gallery, service.limits

    @api.get("/models", summary="The models.")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(about) for about in service.models.describe()]})

    @api.get("/models/{id:path}", summary="One of the models.")
    async def model(id: str) -> JSONResponse:
        return JSONResponse(_model(service.models.find(id).about))

    @api.post("/images/generations", summary="Images of a prompt.", openapi_extra=accepts(Generation))
    async def generations(request: Request) -> Response:
        asked = await service.bodies.read(request, Generation)
        own = requests.Generate(
            model=asked.model,
            prompt=asked.prompt,
            n=asked.n or 1,
            seed=asked.seed,
            size=asked.size,
            guidance=asked.guidance,
            temperature=asked.temperature,
            method=asked.method,
            student=asked.student,
            steps=asked.steps,
            upscale=asked.upscale,
        )
        about = {"prompt": asked.prompt, "n": own.n, "seed": asked.seed}
        job = service.submit(
            "generate",
            asked.model,
            work.generate(own, gallery, limits),
            previews=(asked.partial_images or 0) if asked.stream else 0,
            about=about,
            streamed=bool(asked.stream),
        )
        return await _answer(service, request, job, asked, "image_generation")

    @api.post("/images/edits", summary="An image edited.", openapi_extra=accepts(Editing))
    async def edits(request: Request) -> Response:
        asked = await service.bodies.read(request, Editing)
        mask = asked.mask
        if mask is None and await run_in_threadpool(_has_holes, asked.image):
            mask = asked.image
        common: dict[str, Any] = {
            "model": asked.model,
            "image": asked.image,
            "size": asked.size,
            "method": asked.method,
            "upscale": asked.upscale,
        }
        if mask is None:
            if (asked.n or 1) > 1:
                raise Refusal(400, "without a mask there is one image alone: leave out n, or send a mask", param="n")
            to = requests.Reprompt.model_construct(**common, source="", target=asked.prompt, strengths=[1.0])
            kind, made = "reprompt", work.reprompt(to, gallery, limits)
        else:
            painted = requests.Inpaint.model_construct(
                **common,
                mask=mask,
                rectangle=None,
                prompt=asked.prompt,
                n=asked.n or 1,
                seed=draw_seed() if asked.seed is None else asked.seed,
                steps=None,
                rounds=None,
                strength=None,
                feather=None,
            )
            kind, made = "inpaint", work.inpaint(painted, gallery, limits)
        job = service.submit(kind, asked.model, made, about={"prompt": asked.prompt, "n": asked.n or 1})
        return await _answer(service, request, job, asked, "image_edit")

    @api.post("/images/variations", summary="Images near one.", openapi_extra=accepts(Variation))
    async def variations(request: Request) -> Response:
        asked = await service.bodies.read(request, Variation)
        near = requests.Vary.model_construct(
            model=asked.model,
            image=asked.image,
            size=asked.size,
            method=asked.method,
            upscale=asked.upscale,
            prompt=asked.prompt,
            strengths=[asked.strength],
            n=asked.n or 1,
            seed=draw_seed() if asked.seed is None else asked.seed,
            temperature=None,
        )
        about = {"prompt": asked.prompt, "n": near.n}
        job = service.submit("vary", asked.model, work.vary(near, gallery, limits), about=about)
        return await _answer(service, request, job, asked, "image_edit")

    return api


def _model(about: dict[str, Any]) -> dict[str, Any]:
    return {"id": about["id"], "object": "model", "created": 0, "owned_by": "mlx-starflow", "kind": about["kind"]}


def _has_holes(image: bytes) -> bool:
    """Whether parts of an image are transparent."""
    try:
        with no_remarks():
            opacity = decode_transparency(image)
    except UnreadableImage as error:
        raise Refusal(400, f"image: the image cannot be read: {error}", param="image") from None
    return opacity is not None and opacity.point(lambda value: 255 * (value < 128)).getbbox() is not None


async def _answer(service: Service, request: Request, job: Job, asked: Answered, kind: str) -> Response:
    """Images as OpenAI's API answers them, together or as a stream."""
    format = asked.output_format or "png"
    if asked.stream:
        told = partial(_told, service, asked, kind, format)
        return service.stream(job, told, cancels=True)
    result = await service.result(job, request)
    data = []
    for picture in result["pictures"]:
        shown: dict[str, Any] = {"id": picture["id"], "seed": picture.get("seed")}
        if asked.response_format == "url":
            shown["url"] = f"{request.url.scheme}://{request.headers['host']}/api/gallery/{picture['id']}.{format}"
        else:
            content = await in_format(service, picture["id"], format, asked.output_compression)
            shown["b64_json"] = base64.b64encode(content).decode()
        data.append(shown)
    first = result["pictures"][0]
    return JSONResponse(
        {
            "created": int(job.created),
            "data": data,
            "background": "opaque",
            "output_format": format,
            "size": f"{first['width']}x{first['height']}",
        }
    )


async def _told(service: Service, asked: Answered, kind: str, format: Format, event: Event) -> AsyncIterator[bytes]:
    """What a stream of OpenAI's API says of an event."""
    common = {"created_at": int(time.time()), "background": "opaque", "quality": "auto", "output_format": format}
    if event.name == "preview":
        content = base64.b64decode(event.data["image"].partition(",")[2])
        if format != "png":
            content = await run_in_threadpool(converted, content, format, {}, asked.output_compression)
        name = f"{kind}.partial_image"
        size = f"{event.data['width']}x{event.data['height']}"
        shown = {"b64_json": base64.b64encode(content).decode(), "partial_image_index": event.data["number"]}
        yield server_sent(name, {"type": name, **shown, **common, "size": size, "index": event.data["index"]})
    elif event.name == "picture":
        content = await in_format(service, event.data["id"], format, asked.output_compression)
        name = f"{kind}.completed"
        size = f"{event.data['width']}x{event.data['height']}"
        more = {"index": event.data["index"], "id": event.data["id"], "seed": event.data.get("seed")}
        shown = {"b64_json": base64.b64encode(content).decode()}
        yield server_sent(name, {"type": name, **shown, **common, "size": size, **more})
    elif event.name in ("failed", "cancelled"):
        yield server_sent("error", {"type": "error", "error": event.data["error"]})
    elif event.name == "done":
        yield b"data: [DONE]\n\n"

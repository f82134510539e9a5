"""The server's own endpoints: what only a flow can do, jobs, and the gallery.

Every job's endpoint takes `?mode=`: "wait" (the default) answers with the result, "stream" with events, and in both
of them hanging up cancels the job; "background" answers at once with the job, whose events are at
`/api/jobs/ID/events`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import BytesIO
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from mlx_starflow import __version__
from mlx_starflow.server import requests, work
from mlx_starflow.server.gallery import FORMATS, encoded
from mlx_starflow.server.jobs import PREVIEW
from mlx_starflow.server.refusals import Refusal
from mlx_starflow.server.service import Service
from mlx_starflow.server.work import Work

Mode = Literal["wait", "background", "stream"]

ALL = 1_000_000
"""Previews: one after each block."""

FOREVER = "private, max-age=31536000, immutable"


def accepts(kind: type[requests.Request], *, example: dict[str, Any] | None = None) -> dict[str, Any]:
    """What OpenAPI says of a body that is read by hand: JSON or a form."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    content: dict[str, Any] = {"schema": schema} | ({"example": example} if example else {})
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": content, "multipart/form-data": {"schema": schema}},
        }
    }


def router(service: Service) -> APIRouter:
    """The endpoints."""
    api = APIRouter(prefix="/api")
    gallery, limits = service.gallery, service.limits

    def job(
        path: str,
        kind: type[requests.Request],
        make: Callable[[Any], Work],
        *,
        example: dict[str, Any],
        about: tuple[str, ...] = ("prompt",),
    ) -> None:
        async def endpoint(request: Request, mode: Annotated[Mode, Query()] = "wait") -> Response:
            asked = await service.bodies.read(request, kind)
            told = {name: getattr(asked, name) for name in about}
            previews = ALL if getattr(asked, "previews", False) else 0
            kind_of_job = path if getattr(asked, "keep", True) else PREVIEW
            made = service.submit(
                kind_of_job, asked.model, make(asked), previews=previews, about=told, streamed=mode == "stream"
            )
            return await service.answer(made, request, mode)

        api.add_api_route(
            f"/{path}",
            endpoint,
            methods=["POST"],
            name=path,
            summary=(kind.__doc__ or "").strip(),
            openapi_extra=accepts(kind, example=example),
            response_class=JSONResponse,
        )

    image = "20261127-140312-123456-ab12cd34"
    job(
        "generate",
        requests.Generate,
        lambda asked: work.generate(asked, gallery, limits),
        example={"prompt": "a fox to the left of a cactus at night", "seed": 7, "previews": True},
        about=("prompt", "n", "seed"),
    )
    job("score", requests.Score, work.score, example={"image": image, "prompt": "a cat"})
    job(
        "classify",
        requests.Classify,
        lambda asked: work.classify(asked, limits),
        example={"image": image, "labels": ["a cat", "a dog"]},
        about=("labels",),
    )
    job(
        "encode",
        requests.Encode,
        lambda asked: work.encode(asked, gallery),
        example={"image": image, "prompt": "a cat"},
    )
    job("decode", requests.Decode, lambda asked: work.decode(asked, gallery, limits), example={"noise": "..."})
    job(
        "reprompt",
        requests.Reprompt,
        lambda asked: work.reprompt(asked, gallery, limits),
        example={"image": image, "source": "a dog", "target": "a cat", "strengths": [0.5, 1.0]},
        about=("source", "target", "strengths"),
    )
    job(
        "vary",
        requests.Vary,
        lambda asked: work.vary(asked, gallery, limits),
        example={"image": image, "prompt": "a cat", "n": 4},
        about=("prompt", "n", "strengths", "seed"),
    )
    job(
        "interpolate",
        requests.Interpolate,
        lambda asked: work.interpolate(asked, gallery, limits),
        example={"first": image, "second": image, "shares": [0.5]},
        about=("prompts", "shares"),
    )
    job(
        "inpaint",
        requests.Inpaint,
        lambda asked: work.inpaint(asked, gallery, limits),
        example={"image": image, "rectangle": "32,32,64,64", "prompt": "a cat"},
        about=("prompt", "n", "seed"),
    )
    job(
        "video",
        requests.Video,
        lambda asked: work.video(asked, gallery, limits),
        example={"prompt": "waves", "frames": 17, "seed": 1},
        about=("prompt", "seed", "frames"),
    )

    # ---- jobs

    @api.get("/jobs", summary="Jobs that are known, the newest first.")
    async def jobs() -> JSONResponse:
        worker = service.worker
        told = {
            "jobs": [service.describe(each) for each in worker.jobs()],
            "waiting": worker.waiting,
            "busy": worker.busy,
        }
        return JSONResponse(told | {"queue": limits.queue})

    def found(id: str) -> Any:
        each = service.worker.find(id)
        if each is None:
            raise Refusal(404, "there is no such job, or it is long gone", code="not_found")
        return each

    @api.get("/jobs/{id}", summary="A job and, if it is done, its result.")
    async def one_job(id: str) -> JSONResponse:
        each = found(id)
        return JSONResponse({"job": service.describe(each), "result": each.result})

    @api.get("/jobs/{id}/events", summary="A job's events as they happen; hanging up changes nothing.")
    async def events(id: str) -> StreamingResponse:
        return service.stream(found(id), cancels=False)

    @api.delete("/jobs/{id}", summary="Cancel a job.")
    async def cancel(id: str) -> JSONResponse:
        each = found(id)
        service.worker.cancel(each)
        return JSONResponse({"job": service.describe(each)})

    # ---- the gallery

    @api.get("/gallery", summary="Finished pictures, the newest first.")
    def items(
        limit: Annotated[int, Query(ge=1, le=500)] = 50, before: Annotated[str | None, Query(max_length=64)] = None
    ) -> JSONResponse:
        page, more = gallery.page(limit, before)
        return JSONResponse({"items": [each.describe() for each in page], "more": more})

    @api.get("/gallery/{name}", summary="A picture's file, or, without a suffix, what is known about it.")
    def item(name: str, request: Request, download: bool = False) -> Response:
        id, point, suffix = name.partition(".")
        each = gallery.find(id)
        if not point:
            return JSONResponse({"item": each.describe()})
        if suffix not in FORMATS or (each.kind == "video" and suffix != "webp"):
            raise Refusal(404, "there is no such picture in the gallery", code="not_found")
        tag = f'"{hashlib.sha256(name.encode()).hexdigest()[:16]}"'
        headers = {"ETag": tag, "Cache-Control": FOREVER}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if download:
            headers["Content-Disposition"] = f'attachment; filename="{name}"'
        content = gallery.content(each)
        if each.kind == "image" and suffix != "png":
            content = converted(content, suffix, each.metadata)
        return Response(content, media_type=FORMATS[suffix], headers=headers)

    @api.delete("/gallery/{id}", summary="Delete a picture.")
    def remove(id: str) -> JSONResponse:
        gallery.remove(id)
        return JSONResponse({"deleted": id})

    # ---- the server

    @api.get("/models", summary="The models, and what they are asked with.")
    async def models() -> JSONResponse:
        return JSONResponse({"models": service.models.describe(), "default": service.models.default})

    @api.get("/server", summary="Version, limits, and how often images can be enlarged.")
    async def server() -> JSONResponse:
        names = ("queue", "images", "body", "pixels", "prompt", "labels", "frames", "timeout")
        told = {name: getattr(limits, name) for name in names} | {"memory": service.models.memory}
        upscale = list(service.models.upscaling.scales)
        about = {"version": __version__, "limits": told, "upscale": upscale, "needs_key": service.security.has_key}
        return JSONResponse(about)

    @api.post("/session", summary='Let a browser in: {"key": ...} sets a cookie.')
    async def session(request: Request) -> JSONResponse:
        asked = await service.bodies.read(request, requests.Session)
        if not service.security.knows(asked.key):
            raise Refusal(401, "the key is wrong", code="invalid_api_key")
        return JSONResponse({"ok": True}, headers={"Set-Cookie": service.security.cookie()})

    return api


def converted(content: bytes, format: str, metadata: dict[str, Any], quality: int | None = None) -> bytes:
    """A PNG of the gallery as a file of another format, with the same metadata."""
    with Image.open(BytesIO(content), formats=("PNG",)) as image:
        return encoded(image.convert("RGB"), format, metadata, quality)


async def in_format(service: Service, id: str, format: str, quality: int | None = None) -> bytes:
    """The bytes of an image of the gallery in a format. Raises Refusal."""
    item = service.gallery.find(id)
    content = service.gallery.content(item)
    if format == "png":
        return content
    return await run_in_threadpool(converted, content, format, item.metadata, quality)

"""The application: all endpoints, the page, and what every request goes through."""

from __future__ import annotations

import time
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_starflow import __version__
from mlx_starflow.errors import StarflowError
from mlx_starflow.server import api, openai_api
from mlx_starflow.server.refusals import Refusal, refusal_of
from mlx_starflow.server.security import SecurityMiddleware
from mlx_starflow.server.service import Service

if TYPE_CHECKING:
    from importlib.abc import Traversable

MEDIA = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
"""Media types of the page's files by their suffixes; no others are served."""

ROUTINE = ("/api/jobs", "/studio/{name}")
"""Routes that an open page asks for all the time: they are counted, and logged only where something is wrong."""


def create_app(service: Service) -> FastAPI:
    """The application of a service, whose worker has been started."""
    app = FastAPI(
        title="mlx-starflow",
        version=__version__,
        description="Images and videos of flows: OpenAI's endpoints for images, and what only a flow can do.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.include_router(openai_api.router(service))
    app.include_router(api.router(service))
    page = {each.name: each.read_bytes() for each in _page()}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page["index.html"], media_type=MEDIA["html"], headers={"Cache-Control": "no-cache"})

    @app.get("/studio/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in page:
            raise Refusal(404, "there is no such file", code="not_found")
        kind = MEDIA[name.rpartition(".")[2]]
        return Response(page[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/health", summary="Whether the server is there.")
    async def health() -> JSONResponse:
        return JSONResponse({"ok": True})

    @app.get("/metrics", summary="Numbers for Prometheus.", response_class=PlainTextResponse)
    def metrics() -> PlainTextResponse:
        worker = service.worker
        gauges = {"queue_length": worker.waiting, "busy": int(worker.busy), "models_loaded": service.models.loaded}
        return PlainTextResponse(service.metrics.text(dict(gauges)), media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.exception_handler(StarflowError)
    async def mistaken(request: Request, error: StarflowError) -> JSONResponse:
        told = refusal_of(error)
        return JSONResponse(told.body(), told.status, told.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:]))
        told = Refusal(400, f"{place}: {first['msg']}", code="invalid_value", param=place or None)
        return JSONResponse(told.body(), told.status)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        told = Refusal(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None)
        return JSONResponse(told.body(), told.status, error.headers)

    app.add_middleware(SecurityMiddleware, security=service.security)
    app.add_middleware(Watch, service=service)
    return app


def _page() -> list[Traversable]:
    folder = files("mlx_starflow.server") / "studio"
    return [each for each in folder.iterdir() if each.name.rpartition(".")[2] in MEDIA]


class Watch:
    """Counts and logs every request, and answers what nobody foresaw."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            self.service.log.error("fault", trace=f"{type(error).__name__}: {error}")
            if not status:
                refusal = Refusal(500, "this should not have happened; the server's log says more", code="internal")
                await JSONResponse(refusal.body(), 500, {"x-should-retry": "false"})(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.count("requests", route=route, status=str(status))
            if status != 200 or route not in ROUTINE:
                client = scope.get("client")
                self.service.log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"][:200],
                    status=status,
                    seconds=round(time.perf_counter() - began, 4),
                    client=client[0] if client else "",
                )

"""What all endpoints share: the worker, the gallery, the limits; how a request becomes a job, and a job an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_starflow.server.bodies import Bodies
from mlx_starflow.server.gallery import Gallery
from mlx_starflow.server.jobs import ENDS, Event, Job, Result
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.logs import Log
from mlx_starflow.server.metrics import Metrics
from mlx_starflow.server.models import Models
from mlx_starflow.server.refusals import refusal_of
from mlx_starflow.server.security import Security
from mlx_starflow.server.work import Work
from mlx_starflow.server.worker import Worker

QUIET = 15.0
"""Seconds after which a stream of events says that it is still there."""

STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Service:
    """A server's parts.

    Args:
        models: that may be asked for; `start` finds them and loads the first.
        gallery: for what is finished.
        limits, security, log: see there.
    """

    def __init__(
        self,
        models: Models,
        gallery: Gallery,
        limits: Limits | None = None,
        security: Security | None = None,
        log: Log | None = None,
    ):
        self.models, self.gallery = models, gallery
        self.limits, self.security = limits or Limits(), security or Security()
        self.log, self.metrics = log or Log(), Metrics()
        self.bodies = Bodies(self.limits, gallery)
        self.worker = Worker(models, self.limits.queue, ended=self._ended, fault=self._fault)

    def start(self) -> None:
        """Load the first model and begin to work. Raises StarflowError."""
        self.worker.start()

    # ---- jobs

    def submit(
        self,
        kind: str,
        model: str | None,
        work: Work,
        *,
        previews: int = 0,
        about: dict[str, Any] | None = None,
        streamed: bool = False,
    ) -> Job:
        """Put work into the queue; `streamed` jobs are watched from their beginning. Raises Refusal."""
        found = self.models.find(model)
        job = Job(kind, found.id, work, previews, self.limits.timeout, about or {})
        if streamed:
            job.attend()
        return self.worker.submit(job)

    def describe(self, job: Job) -> dict[str, Any]:
        """What clients are told about a job, with its place in the queue."""
        return job.describe() | {"position": self.worker.position(job)}

    async def result(self, job: Job, request: Request) -> Result:
        """What has come of a job; a client that hangs up before cancels it. Raises Refusal."""
        done = asyncio.wrap_future(job.future)
        gone = asyncio.ensure_future(_hung_up(request))
        either: set[asyncio.Future[Any]] = {done, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not done.done():
                self.worker.cancel(job)
        try:
            return await done
        except Exception as error:
            raise refusal_of(error) from None

    def stream(
        self, job: Job, told: Callable[[Event], AsyncIterator[bytes]] | None = None, *, cancels: bool
    ) -> StreamingResponse:
        """A job's events as they happen.

        Args:
            told: makes what is sent of an event; by default the event itself.
            cancels: a client that hangs up cancels the job.
        """

        async def events() -> AsyncIterator[bytes]:
            with job.watch() as watcher:
                while True:
                    try:
                        event = await asyncio.wait_for(watcher.get(), QUIET)
                    except (TimeoutError, asyncio.TimeoutError):
                        yield b": still there\n\n"
                        continue
                    if told is None:
                        yield server_sent(event.name, event.data)
                    else:
                        async for part in told(event):
                            yield part
                    if event.name in ENDS:
                        return

        def left() -> None:
            if cancels and not job.ended:
                self.worker.cancel(job)

        return Events(events(), left)

    async def answer(self, job: Job, request: Request, mode: str) -> Response:
        """A job's answer, in the mode that the client wants: "wait", "background" or "stream". Raises Refusal."""
        if mode == "background":
            return JSONResponse({"job": self.describe(job)}, 202, {"Location": f"/api/jobs/{job.id}"})
        if mode == "stream":
            return self.stream(job, cancels=True)
        result = await self.result(job, request)
        return JSONResponse({"job": self.describe(job), "result": result})

    # ---- the end

    def stop(self, grace: float) -> None:
        """Tell the queue, let the job that runs finish for so many seconds, and end."""
        self.worker.stop(grace)

    def _ended(self, job: Job) -> None:
        ran = (job.finished or 0.0) - job.started if job.started else 0.0
        waited = (job.started or job.finished or job.created) - job.created
        self.metrics.count("jobs", kind=job.kind, state=job.state)
        self.metrics.count("job_seconds", max(ran, 0.0), kind=job.kind)
        self.metrics.count("wait_seconds", max(waited, 0.0))
        if job.result is not None:
            self.metrics.count("images", len(job.result.get("pictures", ())))
        values: dict[str, object] = {"job": job.id, "kind": job.kind, "model": job.model, "state": job.state}
        values |= {"seconds": round(ran, 4), "waited": round(waited, 4)}
        self.log.info("job", **values, **({"reason": job.error["message"]} if job.error else {}))

    def warned(self, message: Warning | str, *_: object) -> None:
        """A warning, as `warnings.showwarning` is given it: told to whom it concerns."""
        if not self.worker.warn(str(message)):
            self.log.info("warning", message=str(message))

    def _fault(self, job: Job, text: str) -> None:
        self.log.error("fault", job=job.id, kind=job.kind, trace=text)


class Events(StreamingResponse):
    """Server-sent events; `left` is called when all are sent, or the client has gone, however early."""

    def __init__(self, events: AsyncIterator[bytes], left: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers=STREAM)
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


def server_sent(name: str, data: dict[str, Any]) -> bytes:
    """An event as it goes over the wire."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def _hung_up(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        continue

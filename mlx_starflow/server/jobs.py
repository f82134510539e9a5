"""Jobs: what is asked for, how far it is, and what those who watch are told.

A job's life is `queued`, `running` and then `done`, `failed` or `cancelled`. The worker's thread changes it; event
loops watch it through `watch`, each with a queue of its own. Whoever begins to watch late is told what he has missed
and still matters: the state, the newest previews, the pictures so far.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_starflow.sampling.progress import Progress
from mlx_starflow.server.gallery import data_url, encoded
from mlx_starflow.server.refusals import refusal_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_starflow.server.models import Models

SECONDS = 0.1
"""Between two events that say how far a job is, at least, within a block."""

BEHIND = 1000
"""Events that a watcher may be behind by; then those that say how far the job is are left out for him."""

PREVIEW = "preview"
"""The kind of jobs whose images nobody keeps: they are in the result."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Event:
    """What watchers are told: `name` is "state", "progress", "preview", "picture", "frame", or how the job ended."""

    name: str
    data: dict[str, Any]


class Watcher:
    """A queue of events in an event loop, filled from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        def deliver() -> None:
            if event.name != "progress" or self._events.qsize() < BEHIND:
                self._events.put_nowait(event)

        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop has ended, and with it who waited
            return

    async def get(self) -> Event:
        return await self._events.get()


ENDS = ("done", "failed", "cancelled")
"""States that a job ends in, and the events that say so."""


@dataclass(eq=False)
class Job:
    """Something to be computed, once, by the worker.

    Attributes:
        kind: "generate", "score" and so on.
        model: id of the model that it needs.
        work: computes the result; it gets the models and this job, and hands `progress` down.
        previews: so many times, after blocks, the images are decoded as they are then, and told; of a video, if it is
            not 0, each latent frame that is sampled.
        id: of the job, not to be guessed.
        state: see above.
        result: what came of it, plain values, of a job that is done.
        error: of one that failed or was cancelled.
        warnings: what was doubtful, in sentences.
        progress: how far it is, and the way to stop it.
        future: is fulfilled with the result, or the error, at the end.
    """

    kind: str
    model: str
    work: Callable[[Models, Job], Result]
    previews: int = 0
    timeout: float = float("inf")
    about: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "queued"
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    result: Result | None = None
    error: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    future: Future[Result] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.progress = Progress(self._tell)
        self.timed_out = False
        self._lock = threading.Lock()
        self._watchers: list[Watcher] = []
        self._first: Watcher | None = None
        self._shown: dict[tuple[str, int], Event] = {}
        self._told, self._at, self._blocks, self._previewed = 0.0, ("", -1), 0, 0
        self._deadline = float("inf")

    # ---- for those who wait

    def describe(self) -> dict[str, Any]:
        """What a client is told about the job: plain values."""
        counted = {"phase": "", "block": None, "done": 0, "total": None, "unit": ""}
        if self.state == "running":
            counted = self._counted()
        return {
            "id": self.id,
            "kind": self.kind,
            "model": self.model,
            "state": self.state,
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
            "about": self.about,
            "progress": counted,
            "warnings": list(self.warnings),
            "error": self.error,
        }

    def attend(self) -> None:
        """Whoever watches first, later on, is told all from now on, however fast it goes."""
        self._first = self._attached()

    def _attached(self) -> Watcher:
        watcher = Watcher()
        with self._lock:
            watcher.put(Event("state", {"job": self.describe()}))
            for event in self._shown.values():
                watcher.put(event)
            if self.state in ENDS:
                watcher.put(self._end())
            else:
                self._watchers.append(watcher)
        return watcher

    @contextmanager
    def watch(self) -> Iterator[Watcher]:
        """Events from now on, after those that tell what there is already."""
        first, self._first = self._first, None
        watcher = first or self._attached()
        try:
            yield watcher
        finally:
            with self._lock:
                if watcher in self._watchers:
                    self._watchers.remove(watcher)

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    # ---- for who works

    def begin(self) -> None:
        self.state, self.started = "running", time.time()
        self._deadline = time.monotonic() + self.timeout
        self.publish(Event("state", {"job": self.describe()}))

    def end(self, outcome: Result | BaseException, *, cancelled: bool = False) -> None:
        """It has come to this result, or to this error. Whoever waits is told; later calls change nothing."""
        with self._lock:
            if self.state in ENDS:
                return
            self.finished = time.time()
            if isinstance(outcome, BaseException):
                self.error = refusal_of(outcome).body()["error"]
                self.state = "cancelled" if cancelled else "failed"
            else:
                self.result, self.state = outcome, "done"
            watchers, self._watchers, event = self._watchers, [], self._end()
            for watcher in watchers:
                watcher.put(event)
            self._shown = {key: event for key, event in self._shown.items() if key[0] == "picture"}
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)
        # What was asked for may hold pictures, and is not needed any more.
        self.work = _nothing

    def publish(self, event: Event, keep: int | None = None) -> None:
        """Tell those who watch; with `keep`, also those who will, instead of the event of this name and number."""
        with self._lock:
            if keep is not None:
                self._shown[event.name, keep] = event
            for watcher in self._watchers:
                watcher.put(event)

    def _end(self) -> Event:
        data: dict[str, Any] = {"job": self.describe()}
        return Event(self.state, data | ({"result": self.result} if self.state == "done" else {"error": self.error}))

    def _counted(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "phase": progress.phase,
            "block": progress.block,
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
        }

    def _tell(self, progress: Progress) -> None:
        """Before each step: is it time to stop, and is there something to show?"""
        now = time.monotonic()
        if now > self._deadline:
            self.timed_out = True
            progress.cancel()
            return
        place = progress.phase, -1 if progress.block is None else progress.block
        before, self._at = self._at, place
        if self.previews and place[0] == "preview":
            self._preview_frame(progress.done)
        elif self.previews and self.kind != "video" and before[0] == place[0] == "flow" and before[1] > place[1] >= 0:
            self._preview(before[1])
        if place != before or now - self._told > SECONDS:
            self._told = now
            self.publish(Event("progress", self._counted()))

    def _preview_frame(self, number: int) -> None:
        """A latent frame of a video has been sampled: tell what it looks like so far."""
        for image in self.progress.preview():
            shown: dict[str, Any] = {"index": 0, "latent_frame": number, "latent_frames": self.progress.total}
            shown |= {"width": image.width, "height": image.height, "image": data_url(encoded(image))}
            self.publish(Event("preview", shown), keep=0)

    def _preview(self, block: int) -> None:
        """Block `block` has been inverted: tell what there is, if this is one of those that are told about."""
        # The first one that is done is the last of the flow; after block 0 there is the picture itself.
        self._blocks = max(self._blocks, block)
        number = self._blocks - block
        if (number + 1) * self.previews // self._blocks == number * self.previews // self._blocks:
            return
        for index, image in enumerate(self.progress.preview()):
            shown: dict[str, Any] = {
                "index": index,
                "block": block,
                "number": self._previewed,
                "width": image.width,
                "height": image.height,
            }
            shown["image"] = data_url(encoded(image))
            self.publish(Event("preview", shown), keep=index)
        self._previewed += 1


def _nothing(models: Models, job: Job) -> Result:
    raise AssertionError("a job runs once")

"""The one thread that touches the device: it takes jobs from a bounded queue, one after another.

MLX's arrays belong to the thread that made them, and two samplings at once would share memory and time without being
faster. So all of MLX, loading included, happens here. A job that is cancelled while it waits is never begun; one that
runs ends at its next network evaluation, through its `Progress`, and what it held is freed before the next one
begins.
"""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import mlx.core as mx

from mlx_starflow.errors import Cancelled, StarflowError, printable
from mlx_starflow.kernels.memory import bounded
from mlx_starflow.server.jobs import PREVIEW, Job
from mlx_starflow.server.models import Models
from mlx_starflow.server.refusals import Refusal, Stopping, TimedOut

REMEMBERED = 64
"""Jobs that have ended and can still be asked for."""

REMEMBERED_PREVIEWS = 4
"""Of those that hold their images, since nobody else does, and of which there are many while somebody types."""

MOST_WARNING = 500
"""Characters of a warning, which may quote a prompt."""

OFTEN = 1.0
"""Seconds between two looks at models that nobody uses."""


class Worker:
    """Runs jobs, in the order that they come in.

    Args:
        models: what they need.
        most: jobs that may wait.
        ended: is called with each job that has ended, in the worker's thread.
        fault: is told of exceptions that nobody foresaw, with the traceback.
    """

    def __init__(
        self,
        models: Models,
        most: int,
        *,
        ended: Callable[[Job], None] = lambda job: None,
        fault: Callable[[Job, str], None] = lambda job, text: None,
    ):
        self.models, self.most = models, most
        self._ended, self._fault = ended, fault
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0  # of a job, lately

    # ---- for everybody

    def start(self) -> None:
        """Open the models and begin. Raises StarflowError if they cannot be opened."""
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="worker", daemon=True)
        self._thread.start()
        opened.result()

    def submit(self, job: Job) -> Job:
        """Put a job into the queue. Raises Refusal, 429 if the queue is full and 503 if the server is about to end."""
        with self._changed:
            if self._stopping:
                raise Refusal(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
            if len(self._waiting) >= self.most:
                raise Refusal(
                    429,
                    f"{len(self._waiting)} jobs are waiting already, which is all that may: try again later",
                    code="queue_full",
                    headers={"Retry-After": str(self.retry_after())},
                )
            self._waiting.append(job)
            self._jobs[job.id] = job
            self._forget()
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, at its next network evaluation if it runs."""
        job.progress.cancel()
        with self._changed:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        if waits:
            job.end(Cancelled("cancelled"), cancelled=True)
            self._ended(job)

    def find(self, id: str) -> Job | None:
        """The job of an id, if it is still known."""
        return self._jobs.get(id)

    def jobs(self) -> list[Job]:
        """All that are known, the newest first."""
        with self._changed:
            return list(self._jobs.values())[::-1]

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return self._running is not None

    def position(self, job: Job) -> int | None:
        """How many jobs come before this one; None unless it waits."""
        with self._changed:
            return self._waiting.index(job) + (self._running is not None) if job in self._waiting else None

    def retry_after(self) -> int:
        """Seconds until there is room in the queue, by guess: what a job has taken lately."""
        return max(1, min(600, round(self._seconds)))

    def stop(self, grace: float) -> None:
        """Take no more jobs, tell those that wait, let the one that runs finish for so many seconds, and end it then.

        Returns when the thread has ended, or could not be ended.
        """
        with self._changed:
            self._stopping = True
            waiting, running = list(self._waiting), self._running
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            job.progress.cancel()
            job.end(Stopping("the server has stopped before this job began"))
            self._ended(job)
        self._thread.join(grace)
        if running is not None and self._thread.is_alive():
            running.progress.cancel()
        self._thread.join(grace + 5)

    def warn(self, text: str) -> bool:
        """Put a warning down to the job that this thread is running; False if it runs none."""
        job = self._running
        if job is None or threading.current_thread() is not self._thread:
            return False
        job.warnings.append(printable(text)[:MOST_WARNING])
        return True

    # ---- the thread

    def _run(self, opened: Future[None]) -> None:
        with bounded():
            try:
                self.models.open()
            except BaseException as error:
                opened.set_exception(error)
                return
            opened.set_result(None)
            self._serve()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    if not self._changed.wait(OFTEN):
                        break
                if self._stopping:
                    return
                job = self._running = self._waiting.popleft() if self._waiting else None
            if job is None:
                self.models.rest()
                continue
            self._do(job)
            with self._changed:
                self._running = None
            del job

    def _do(self, job: Job) -> None:
        began = time.monotonic()
        failed = True
        try:
            job.progress.check()
            job.begin()
            result = job.work(self.models, job)
            failed = False
            self._count(began)
            job.end(result)
        except Cancelled as error:
            if job.timed_out:
                job.end(TimedOut(f"the job was not done after {job.timeout:g} seconds, which is the server's limit"))
            elif self._stopping:
                job.end(Stopping("the server has stopped before this job was done"))
            else:
                job.end(_bare(error), cancelled=True)
        except (StarflowError, Refusal) as error:
            job.end(_bare(error))
        except Exception as error:
            self._fault(job, "".join(traceback.format_exception(error)))
            job.end(_bare(error))
        if failed:
            # Frames of the traceback held arrays until here.
            gc.collect()
            mx.clear_cache()
        self._ended(job)

    def _count(self, began: float) -> None:
        self._seconds = 0.7 * self._seconds + 0.3 * (time.monotonic() - began)

    def _forget(self) -> None:
        ended = [job for job in self._jobs.values() if job.ended]
        previews = [job for job in ended if job.kind == PREVIEW]
        others = [job for job in ended if job.kind != PREVIEW]
        for jobs, most in ((previews, REMEMBERED_PREVIEWS), (others, REMEMBERED)):
            for job in jobs[: max(0, len(jobs) - most)]:
                del self._jobs[job.id]


def _bare(error: Exception) -> Exception:
    """An exception without the frames it came through, which hold what they computed with."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error

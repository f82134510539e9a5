"""The worker: one job after another, a bounded queue, cancelling, and the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import mlx.core as mx
import pytest
from helpers.metal import OWN, Metal

from mlx_starflow.errors import Cancelled, StarflowError
from mlx_starflow.server.jobs import PREVIEW, Event, Job
from mlx_starflow.server.models import Models
from mlx_starflow.server.refusals import Refusal, Stopping, TimedOut
from mlx_starflow.server.worker import REMEMBERED, REMEMBERED_PREVIEWS, Worker


class NoModels(Models):
    def __init__(self) -> None:
        self.rested = 0

    def open(self) -> None:
        return

    def rest(self) -> None:
        self.rested += 1


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(NoModels(), 2)
    made.start()
    yield made
    made.stop(1)


def job(work: Callable[[Job], dict] = lambda job: {}, **options: object) -> Job:
    return Job("test", "none", lambda models, own: work(own), **options)


def steps(gate: threading.Event) -> Callable[[Job], dict]:
    """Work that takes steps until it is told to end; says how many it took."""

    def work(own: Job) -> dict:
        count = 0
        gate.wait(5)
        while count < 10_000:
            own.progress.tell()
            count += 1
            time.sleep(0.001)
        return {"count": count}

    return work


def wait(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_jobs_run_one_after_another_in_one_thread(worker):
    threads, order = set(), []

    def work(own: Job) -> dict:
        threads.add(threading.get_ident())
        order.append(own.about["number"])
        return {"number": own.about["number"]}

    jobs = []
    for number in range(5):
        jobs.append(job(work, about={"number": number}))
        wait(lambda: worker.waiting < 2)
        worker.submit(jobs[-1])
    assert [each.future.result(5)["number"] for each in jobs] == [0, 1, 2, 3, 4] == order
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_memory_is_bounded_as_long_as_the_server_lives(monkeypatch):
    metal, held = Metal(monkeypatch), []

    class Loading(NoModels):
        def open(self) -> None:
            held.append(metal.bounds)

    def work(own: Job) -> dict:
        held.append(metal.bounds)
        with own.progress.running("flow"), own.progress.counting("flow", 1, "tok") as counter:
            counter.advance()
        return {"given back": metal.given_back}

    worker = Worker(Loading(), 2)
    worker.start()
    assert worker.submit(job(work)).future.result(5) == {"given back": 1}
    assert held == [True, True] and metal.bounds
    worker.stop(1)
    assert metal.limits == OWN


def test_a_full_queue_says_when_to_come_back(worker):
    gate = threading.Event()
    running = worker.submit(job(lambda own: (gate.wait(5) and {}) or {}))
    wait(lambda: running.state == "running")
    waiting = [worker.submit(job()), worker.submit(job())]
    assert [worker.position(each) for each in [running, *waiting]] == [None, 1, 2]
    with pytest.raises(Refusal) as refusal:
        worker.submit(job())
    assert refusal.value.status == 429 and int(refusal.value.headers["Retry-After"]) >= 1
    gate.set()
    for each in waiting:
        assert each.future.result(5) == {}


def test_a_running_job_is_cancelled_at_its_next_step(worker):
    gate = threading.Event()
    gate.set()
    running = worker.submit(job(steps(gate)))
    wait(lambda: running.state == "running")
    worker.cancel(running)
    with pytest.raises(Cancelled):
        running.future.result(1)
    assert running.state == "cancelled" and running.error["code"] == "cancelled"
    assert worker.submit(job(lambda own: {"fine": 1})).future.result(5) == {"fine": 1}


def test_a_waiting_job_is_cancelled_at_once(worker):
    gate = threading.Event()
    running, begun = worker.submit(job(lambda own: (gate.wait(5) and {}) or {})), []
    wait(lambda: running.state == "running")
    waiting = worker.submit(job(lambda own: begun.append(1) or {}))
    worker.cancel(waiting)
    assert waiting.state == "cancelled" and worker.waiting == 0
    gate.set()
    running.future.result(5)
    assert not begun
    worker.cancel(running)  # which has ended, and stays as it is
    assert running.state == "done"


def test_a_job_may_not_run_for_ever(worker):
    gate = threading.Event()
    gate.set()
    running = worker.submit(job(steps(gate), timeout=0.05))
    with pytest.raises(TimedOut, match=r"0\.05 seconds"):
        running.future.result(5)
    assert running.state == "failed" and running.error["code"] == "timeout"


def test_faults_are_told_to_the_log_and_not_to_the_client():
    told: list[str] = []
    worker = Worker(NoModels(), 2, fault=lambda job, text: told.append(text))
    worker.start()

    def work(own: Job) -> dict:
        raise KeyError("/secret/path")

    failed = worker.submit(job(work))
    with pytest.raises(KeyError):
        failed.future.result(5)
    assert "secret" not in failed.error["message"] and failed.error["code"] == "internal"
    assert "Traceback" in told[0] and "/secret/path" in told[0]

    def mistaken(own: Job) -> dict:
        raise StarflowError("a size of 7x7 does not fit")

    failed = worker.submit(job(mistaken))
    with pytest.raises(StarflowError):
        failed.future.result(5)
    assert failed.error["message"] == "a size of 7x7 does not fit" and len(told) == 1
    worker.stop(1)


def test_the_end_tells_the_queue_and_waits_for_the_job_that_runs():
    worker, gate = Worker(NoModels(), 3), threading.Event()
    worker.start()
    running = worker.submit(job(lambda own: (gate.wait(5) and {"finished": True}) or {}))
    wait(lambda: running.state == "running")
    waiting = worker.submit(job())
    ending = threading.Thread(target=worker.stop, args=(5,))
    ending.start()
    with pytest.raises(Stopping, match="before this job began"):
        waiting.future.result(5)
    with pytest.raises(Refusal, match="stopping"):
        worker.submit(job())
    gate.set()
    ending.join(5)
    assert running.result == {"finished": True}


def test_the_end_cancels_what_takes_too_long():
    worker, gate = Worker(NoModels(), 3), threading.Event()
    gate.set()
    worker.start()
    running = worker.submit(job(steps(gate)))
    wait(lambda: running.state == "running")
    worker.stop(0.1)
    with pytest.raises(Stopping, match="before this job was done"):
        running.future.result(1)


def test_old_jobs_are_forgotten(worker):
    first = worker.submit(job())
    for _ in range(REMEMBERED + 5):
        wait(lambda: worker.waiting == 0)
        worker.submit(job()).future.result(5)
    assert worker.find(first.id) is None and len(worker.jobs()) <= REMEMBERED + 1


def test_previews_are_forgotten_first(worker):
    first = worker.submit(job())
    first.future.result(5)
    for _ in range(REMEMBERED):
        wait(lambda: worker.waiting == 0)
        worker.submit(Job(PREVIEW, "none", lambda models, own: {})).future.result(5)
    assert worker.find(first.id) is first
    assert len([each for each in worker.jobs() if each.kind == PREVIEW]) <= REMEMBERED_PREVIEWS + 1


def test_who_watches_late_is_told_what_there_is(worker):
    async def watched(own: Job) -> list[str]:
        names = []
        with own.watch() as watcher:
            while not names or names[-1] not in ("done", "failed", "cancelled"):
                names.append((await watcher.get()).name)
        return names

    def work(own: Job) -> dict:
        own.publish(Event("preview", {"index": 0}), keep=0)
        own.publish(Event("preview", {"index": 0}), keep=0)
        own.publish(Event("picture", {"index": 0}), keep=0)
        return {}

    own = worker.submit(job(work))
    own.future.result(5)
    # Previews of what is finished are of no use.
    assert asyncio.run(watched(own)) == ["state", "picture", "done"]


# ---- with real models, over HTTP


def hold(server, prompt: str = "a cat") -> str:
    """A job that takes long: its id."""
    asked = {"prompt": prompt, "size": "96x96", "method": "sequential", "n": 6}
    id = server.client.post("/api/generate?mode=background", json=asked).json()["job"]["id"]
    wait(lambda: server.client.get(f"/api/jobs/{id}").json()["job"]["progress"]["phase"] == "flow")
    return id


def state(server, id: str) -> str:
    return server.client.get(f"/api/jobs/{id}").json()["job"]["state"]


def test_delete_cancels_within_an_evaluation_and_frees_memory(server):
    memory = []
    for _ in range(2):  # rope frequencies of a size are kept from the first time on
        id = hold(server)
        assert server.client.delete(f"/api/jobs/{id}").status_code == 200
        wait(lambda id=id: state(server, id) == "cancelled")
        memory.append(mx.get_active_memory())
    assert memory[1] < memory[0] + 2**16
    told = server.client.get(f"/api/jobs/{id}").json()["job"]
    assert told["finished"] and told["error"]["code"] == "cancelled"
    assert server.post("/api/generate", prompt="a cat", seed=1).status_code == 200


@pytest.mark.parametrize("mode", ["wait", "stream"])
def test_hanging_up_cancels(server, mode):
    asked = {"prompt": "a cat", "size": "96x96", "method": "sequential", "n": 6}
    with httpx.Client(base_url=server.url, timeout=1.0) as client, pytest.raises(httpx.TimeoutException):
        if mode == "wait":
            client.post("/api/generate", json=asked)
        else:
            with client.stream("POST", "/api/generate?mode=stream", json=asked) as answer:
                for part in answer.iter_bytes():
                    if b'"flow"' in part:
                        raise httpx.ReadTimeout("enough")
    newest = server.client.get("/api/jobs").json()["jobs"][0]
    wait(lambda: state(server, newest["id"]) == "cancelled")


def test_hanging_up_on_the_events_of_a_job_changes_nothing(server):
    id = hold(server)
    with server.client.stream("GET", f"/api/jobs/{id}/events") as answer:
        next(answer.iter_bytes())
    assert state(server, id) == "running"
    server.client.delete(f"/api/jobs/{id}")
    wait(lambda: state(server, id) == "cancelled")

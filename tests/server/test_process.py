"""`mlx-starflow serve` as a process: keys, logs, signals, and a gallery that survives."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import httpx
import pytest
from helpers.commands import Command
from helpers.servers import Process

serve = Command("serve")


@pytest.fixture
def start(directories, tmp_path):
    processes = []

    def started(*arguments: object, **options: object) -> Process:
        given = ("-m", directories["pictures"], "--gallery", tmp_path / "gallery", *arguments)
        processes.append(Process(*given, **options))
        return processes[-1]

    yield started
    for each in processes:
        each.process.kill()
        each.process.communicate()


def test_the_history_survives_kill_9(start):
    first = start()
    made = httpx.post(f"{first.url}/api/generate", json={"prompt": "a cat", "seed": 1, "n": 2}, timeout=60).json()
    ids = [each["id"] for each in made["result"]["pictures"]][::-1]
    content = httpx.get(f"{first.url}/api/gallery/{ids[0]}.png").content
    # Kill it in the middle of work.
    asked = {"prompt": "a cat", "n": 10}
    httpx.post(f"{first.url}/api/generate?mode=background", json=asked, timeout=60)
    first.process.kill()
    first.process.wait(20)
    second = start()
    items = httpx.get(f"{second.url}/api/gallery").json()["items"]
    assert [each["id"] for each in items][-2:] == ids
    for item in items:
        answer = httpx.get(f"{second.url}{item['url']}")
        assert answer.status_code == 200 and len(answer.content) == item["bytes"]
    assert httpx.get(f"{second.url}/api/gallery/{ids[0]}.png").content == content


def test_sigterm_ends_it_when_the_job_that_runs_is_done(start):
    process = start("--log-json")
    answers: list[httpx.Response] = []
    asked = {"prompt": "a cat", "size": "32x32", "method": "sequential", "n": 4}

    def ask() -> None:
        answers.append(httpx.post(f"{process.url}/api/generate", json=asked, timeout=60))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    while httpx.get(f"{process.url}/api/jobs").json()["waiting"] != 2:
        pass
    code, said = process.stop()
    for client in clients:
        client.join(20)
    assert code == 0
    assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
    lines = [json.loads(line) for line in said.splitlines()]
    assert sorted(line["state"] for line in lines if line["event"] == "job") == ["done", "failed", "failed"]
    assert "was trained at 8x8" in answers[0].text + answers[1].text + answers[2].text  # told to whom it concerns
    assert all({"time", "level", "event"} <= set(line) for line in lines)
    assert "a cat" not in said  # prompts are nobody's business
    paths = [line.get("path") for line in lines]
    assert "/api/generate" in paths and "/api/jobs" not in paths  # nor are all the looks at the queue


def test_a_job_that_takes_too_long_is_cancelled_at_the_end(start):
    process = start("--grace", "0")
    asked = {"prompt": "a cat", "size": "96x96", "method": "sequential", "n": 10}
    httpx.post(f"{process.url}/api/generate?mode=background", json=asked, timeout=60)
    code, said = process.stop()
    assert code == 0 and "before this job was done" in said


def test_a_key_from_the_environment(start):
    process = start(environment={"MLX_STARFLOW_API_KEY": "correct-horse"})
    assert httpx.get(f"{process.url}/v1/models").status_code == 401
    assert httpx.get(f"{process.url}/").status_code == 200
    with_key = {"Authorization": "Bearer correct-horse"}
    assert httpx.get(f"{process.url}/v1/models", headers=with_key).status_code == 200
    with httpx.Client(base_url=process.url) as browser:
        assert browser.post("/api/session", json={"key": "wrong"}).status_code == 401
        assert browser.post("/api/session", json={"key": "correct-horse"}).status_code == 200
        assert browser.get("/api/gallery").status_code == 200
    _, said = process.stop()
    assert "correct-horse" not in said


def test_mistakes_are_one_line(tmp_path, directories):
    gallery = ("--gallery", tmp_path)
    assert "give it a key with --api-key" in serve.mistake("--host", "0.0.0.0", *gallery)
    assert "none-such" in serve.mistake("-m", tmp_path / "none-such", *gallery)
    said = serve.mistake("-m", "demo", "-m", directories["pictures"], "--lora", "adapter", 1, *gallery)
    assert "adapters fit one model" in said
    taken = Process("-m", directories["pictures"], *gallery)
    try:
        port = taken.url.rpartition(":")[2]
        assert f"cannot listen at 127.0.0.1, port {port}" in serve.mistake("--port", port, *gallery)
    finally:
        taken.process.kill()
        taken.process.communicate()


def test_without_the_extra_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['fastapi'] = None; from mlx_starflow.cli import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "Error: the server needs packages that are not installed: pip install fastapi uvicorn python-multipart"
    ]

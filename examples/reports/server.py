"""What a server adds to a picture, carries and withstands: `mlx-starflow serve` on this machine, asked over HTTP.

    python examples/reports/server.py
    python examples/reports/server.py --requests 200 --pictures 10

The latency is that of a picture from `POST /v1/images/generations`, over that of the same picture by `pipe.generate` in
this process: one after the other in turns, so that whatever else the machine does is the same for both. Then pictures a
second for one client and for eight at once; the memory of the process over 300 mixed requests; and a thousand requests
of which a third are malformed or hostile: wrong types, huge sizes, decompression bombs, names that lead elsewhere,
bodies that stop half way, clients that hang up, wrong Host and Origin. Needs the extra `serve`, and httpx.
"""

from __future__ import annotations

import argparse
import base64
import random
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from mlx_starflow import load

KEY = "a-key-for-this-report"
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
PROMPTS = ["a cat", "a red apple", "a rocket", "a slice of pizza", "a dog"]


@contextmanager
def serving(model: str, *options: str) -> Iterator[str]:
    """A server as a process of its own: its address."""
    with tempfile.TemporaryDirectory() as gallery, open(f"{gallery}/log.txt", "w") as log:
        command = [sys.executable, "-m", "mlx_starflow", "serve", "--port", "0", "-m", model, "--gallery", gallery]
        process = subprocess.Popen(
            [*command, "--api-key", KEY, *options], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
            assert process.poll() is None, "the server has ended"
        finally:
            process.terminate()
            print(f"\nstopped by SIGTERM: exit code {process.wait(60)}")


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=AUTHORIZATION, timeout=120)


def asked(client: httpx.Client, path: str, **values: Any) -> httpx.Response:
    """The answer, asked for again when the queue is full."""
    while True:
        answer = client.post(path, json=values)
        if answer.status_code != 429:
            return answer
        time.sleep(0.05)


# ---- latency and throughput


def latency(url: str, model: str, pictures: int) -> None:
    pipe = load(model)
    bare, served = [], []
    with client_of(url) as client:
        for seed in range(pictures + 3):
            began = time.perf_counter()
            pipe.generate("a cat", seed=seed)
            between = time.perf_counter()
            answer = asked(client, "/v1/images/generations", prompt="a cat", seed=seed)
            ended = time.perf_counter()
            assert answer.status_code == 200, answer.text
            if seed >= 3:  # the first ones compile and load
                bare.append(between - began)
                served.append(ended - between)
    added = [1e3 * (after - before) for before, after in zip(bare, served, strict=True)]
    print(f"latency of a picture, {pictures} in turns: median, and the fastest")
    print(f"  pipe.generate           {1e3 * statistics.median(bare):8.1f} ms {1e3 * min(bare):8.1f} ms")
    print(f"  /v1/images/generations  {1e3 * statistics.median(served):8.1f} ms {1e3 * min(served):8.1f} ms")
    print(f"  added                   {statistics.median(added):8.1f} ms {1e3 * (min(served) - min(bare)):8.1f} ms")


def overhead(url: str, count: int) -> None:
    """What is not the job's own time: reading, queue, gallery, answer."""
    with client_of(url) as client:
        outside = []
        for seed in range(count):
            began = time.perf_counter()
            job = asked(client, "/api/generate", prompt="a cat", seed=seed).json()["job"]
            outside.append(1e3 * (time.perf_counter() - began - (job["finished"] - job["started"])))
        print(f"  outside of the job      {statistics.median(outside):8.1f} ms (reading, queue, answer)")


def throughput(url: str, pictures: int) -> None:
    rates = {}
    for clients in (1, 8):
        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool, client_of(url) as client:
            answers = list(
                pool.map(lambda seed: asked(client, "/api/generate", prompt="a cat", seed=seed), range(pictures))
            )
        assert all(answer.status_code == 200 for answer in answers)
        rates[clients] = pictures / (time.perf_counter() - began)
    told = ", ".join(f"{clients} at once {rate:.2f} pictures/s" for clients, rate in rates.items())
    print(f"throughput, {pictures} pictures: {told}; ratio {rates[8] / rates[1]:.2f}")


# ---- memory


def memory_of(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.partition(" ") for line in lines) if name.endswith("_bytes")}


def mixed(client: httpx.Client, number: int, picture: str, about: dict[str, Any]) -> Callable[[], httpx.Response]:
    """One of the things that may be asked for."""
    prompt, rng = PROMPTS[number % len(PROMPTS)], random.Random(number)
    (width, height), step = about["size"], about["step"]
    size = f"{width + rng.choice([-step, 0, step])}x{height}"
    quarter = f"{width // 4},{height // 4},{width // 2},{height // 2}"
    noise = client.post("/api/encode", json={"image": picture, "check": False}) if number % 9 == 8 else None
    choices: list[tuple[str, dict[str, Any]]] = [
        ("/api/generate", {"prompt": prompt, "seed": number, "n": 1 + number % 2}),
        ("/api/score", {"image": picture, "prompt": prompt, "draws": 1 + number % 3}),
        ("/api/classify", {"image": picture, "labels": PROMPTS[:2], "draws": 1}),
        ("/v1/images/generations", {"prompt": prompt, "size": size, "seed": number}),
        ("/api/encode", {"image": picture, "prompt": prompt, "check": bool(number % 2)}),
        ("/api/reprompt", {"image": picture, "target": prompt, "strengths": [1.0]}),
        ("/api/vary", {"image": picture, "prompt": prompt, "seed": number}),
        ("/api/inpaint", {"image": picture, "rectangle": quarter, "steps": 1, "rounds": 1, "seed": number}),
        ("/api/decode", {"noise": noise.json()["result"]["noise"] if noise is not None else ""}),
    ]
    path, values = choices[number % len(choices)]
    return lambda: asked(client, path, **values)


def memory(url: str, requests: int) -> None:
    with client_of(url) as client:
        picture = asked(client, "/api/generate", prompt="a cat", seed=1).json()["result"]["pictures"][0]["id"]
        about = client.get("/api/models").json()["models"][0]
        early: dict[str, float] = {}
        for number in range(requests):
            answer = mixed(client, number, picture, about)()
            assert answer.status_code == 200, (number, answer.text)
            if number == min(19, requests // 2):
                early = memory_of(client)
        late = memory_of(client)
    print(f"memory, {requests} mixed requests, MiB after the first 20 and at the end:")
    for name, what in {"resident": "the process", "mlx_active": "MLX's arrays", "mlx_cache": "MLX's cache"}.items():
        before, after = (values[f"mlx_starflow_{name}_bytes"] / 2**20 for values in (early, late))
        change = f"{100 * (after / before - 1):+.1f}%" if before else "none"
        print(f"  {what:<14} {before:8.1f} {after:8.1f}  {change}")


# ---- hostile requests


def bomb(side: int) -> str:
    """A PNG of a few kilobytes that has so many pixels in a row and in a column."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + data).decode()


def half_sent(url: str, hangs_up_at_once: bool) -> str:
    """A request whose body stops half way."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /api/generate HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode())
        if not hangs_up_at_once:
            time.sleep(0.1)
    return "hung up"


def gone(url: str) -> str:
    """A client that asks for work and does not wait for it."""
    try:
        httpx.post(
            f"{url}/api/generate",
            json={"prompt": "a cat", "n": 8},
            headers=AUTHORIZATION,
            timeout=httpx.Timeout(5, read=0.05),
        )
    except httpx.TimeoutException:
        return "hung up"
    return "refused"  # the queue was full


def hostile(url: str, client: httpx.Client, number: int) -> str:
    """One of the things that must be refused: "refused" or "hung up", or else what came."""
    rng = random.Random(number)
    bad_values: list[dict[str, Any]] = [
        {"prompt": 5},
        {"prompt": ["a"]},
        {"prompt": "a", "n": 10**12},
        {"prompt": "a", "n": "many"},
        {"prompt": "a", "size": "65536x65536"},
        {"prompt": "a", "size": "63x63"},
        {"prompt": "a" * 100_000},
        {"prompt": "a", "seed": -(2**80)},
        {"prompt": "a", "guidance": "inf"},
        {"prompt": "a", "model": "../../../etc/passwd"},
        {"prompt": "a", "no such field": 1},
    ]

    def refused(answer: httpx.Response) -> str:
        # 429 is an answer of its own: too much at a time.
        return "refused" if 400 <= answer.status_code < 500 else f"status {answer.status_code}"

    json = {"Content-Type": "application/json"}
    cases: list[Callable[[], str]] = [
        lambda: refused(client.post("/api/generate", json=rng.choice(bad_values))),
        lambda: refused(client.post("/v1/images/generations", json=rng.choice(bad_values))),
        lambda: refused(client.post("/api/score", json={"image": bomb(rng.choice([5000, 13000, 60000]))})),
        lambda: refused(client.post("/api/score", json={"image": base64.b64encode(rng.randbytes(2000)).decode()})),
        lambda: refused(client.post("/v1/images/edits", files={"image": ("../../x.png", rng.randbytes(999))})),
        lambda: refused(client.post("/api/decode", json={"noise": base64.b64encode(rng.randbytes(500)).decode()})),
        lambda: refused(client.post("/api/generate", content=b"[" * 10**5, headers=json)),
        lambda: refused(client.post("/api/generate", content=rng.randbytes(5000), headers=json)),
        lambda: refused(client.get(f"/api/gallery/..%2f..%2f{rng.choice(['etc%2fpasswd', 'log.txt'])}")),
        lambda: refused(client.delete("/api/gallery/%2e%2e%2flog.txt")),
        lambda: refused(client.post("/api/generate", json={"prompt": "a"}, headers={"Host": "evil.example"})),
        lambda: refused(client.post("/api/generate", json={"prompt": "a"}, headers={"Origin": "http://evil.example"})),
        lambda: refused(client.post("/api/generate", json={"prompt": "a"}, headers={"Authorization": "Bearer wrong"})),
        lambda: half_sent(url, bool(number % 2)),
        lambda: gone(url),
    ]
    return cases[number % len(cases)]()


def thousand(url: str, requests: int) -> None:
    counts: Counter[str] = Counter()
    lock, most = threading.Lock(), [0.0]
    with client_of(url) as client, ThreadPoolExecutor(8) as pool:
        picture = asked(client, "/api/generate", prompt="a cat", seed=1).json()["result"]["pictures"][0]["id"]
        before = memory_of(client)["mlx_starflow_resident_bytes"]

        def one(number: int) -> None:
            try:
                if number % 3 == 2:
                    said = f"hostile, {hostile(url, client, number // 3)}"
                else:
                    answer = asked(client, *_cheap(number, picture)[:1], **_cheap(number, picture)[1])
                    said = "valid, answered" if answer.status_code == 200 else f"valid, status {answer.status_code}"
            except Exception as error:
                said = f"{'hostile' if number % 3 == 2 else 'valid'}, {type(error).__name__}"
            with lock:
                counts[said] += 1
                if number % 50 == 0:
                    most[0] = max(most[0], memory_of(client)["mlx_starflow_resident_bytes"])

        list(pool.map(one, range(requests)))
        after = memory_of(client)["mlx_starflow_resident_bytes"]
        alive = client.get("/health").status_code == 200
    print(f"{requests} requests by 8 clients, a third malformed or hostile:")
    for said, count in sorted(counts.items()):
        print(f"  {said:<28} {count:5}")
    megabytes = [value / 2**20 for value in (before, most[0], after)]
    print("  memory of the process: {:.0f} MiB before, {:.0f} at most, {:.0f} after".format(*megabytes))
    print(f"  the server answers: {alive}")


def _cheap(number: int, picture: str) -> tuple[str, dict[str, Any]]:
    """Valid work that does not take long."""
    choices: list[tuple[str, dict[str, Any]]] = [
        ("/api/generate", {"prompt": PROMPTS[number % 5], "seed": number, "verify": False, "denoise": False}),
        ("/api/score", {"image": picture, "draws": 1}),
        ("/api/encode", {"image": picture, "check": False}),
        ("/api/classify", {"image": picture, "labels": PROMPTS[:2], "draws": 1}),
    ]
    return choices[number // 3 % len(choices)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pictures", type=int, default=40, help="for latency and throughput")
    parser.add_argument("--mixed", type=int, default=300, help="requests that memory is watched over")
    parser.add_argument("--requests", type=int, default=1000, help="of which a third are hostile")
    parts = ("speed", "memory", "hostile")
    parser.add_argument("--only", choices=parts, action="append", help="of the parts; all by default")
    args = parser.parse_args()
    chosen = args.only or parts
    if "speed" in chosen:
        with serving(args.model, "--memory", "4") as url:
            latency(url, args.model, args.pictures)
            overhead(url, args.pictures)
            throughput(url, args.pictures)
    if "memory" in chosen:
        with serving(args.model, "--memory", "4") as url:
            memory(url, args.mixed)
    if "hostile" in chosen:
        with serving(args.model, "--memory", "4", "--queue", "64") as url:
            thousand(url, args.requests)


if __name__ == "__main__":
    main()

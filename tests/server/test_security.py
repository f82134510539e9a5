"""Who is heard, and what hostile requests get."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import time
import zlib

import httpx
import pytest
from helpers.commands import message
from PIL import Image
from starlette.datastructures import Headers

from mlx_starflow.server import run
from mlx_starflow.server.refusals import Refusal
from mlx_starflow.server.security import Security

KEY = "correct-horse"


def refused(security: Security, method: str = "POST", path: str = "/api/generate", **headers: str) -> int:
    """The status of the refusal; 200 if there is none."""
    own = {"host": "127.0.0.1:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        security.check(method, path, Headers(own))
    except Refusal as refusal:
        return refusal.status
    return 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:80@evil.example", 403),
        ("10.0.0.1", 403),
        ("", 403),
        ("[::1", 403),
        ("studio.lan", 200),
    ],
)
def test_hosts(host, status):
    assert refused(Security(names=["Studio.lan"]), host=host) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1:9000", 403),
        ("http://localhost:8000", 403),
    ],
)
def test_origins(origin, status):
    assert refused(Security(), origin=origin) == status


def test_pages_of_other_sites_cannot_even_read():
    assert refused(Security(), "GET", "/api/gallery", sec_fetch_site="cross-site") == 403
    assert refused(Security(), "GET", "/api/gallery", sec_fetch_site="same-site") == 403
    assert refused(Security(), "GET", "/", sec_fetch_site="cross-site") == 200
    assert refused(Security(), "GET", "/api/gallery", sec_fetch_site="same-origin") == 200


def test_other_machines_need_a_key():
    assert "give it a key" in message(Security, "0.0.0.0")
    assert "give it a key" in message(Security, "192.168.1.2")
    for key in ("short", "with spaces in it", "schlüssel-lang"):
        assert "8 or more" in message(Security, "0.0.0.0", key)
    security = Security("0.0.0.0", KEY)
    assert refused(security, host="192.168.1.2:8000") == 401  # an address of the machine, whichever
    assert refused(security, host="evil.example", authorization=f"Bearer {KEY}") == 403


def test_keys():
    security = Security(key=KEY)
    assert refused(security) == 401
    for given in (f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer", KEY, "Bearer \xff"):
        assert refused(security, authorization=given) == 401
    assert refused(security, authorization=f"Bearer {KEY}") == 200
    assert refused(security, authorization=f"bearer {KEY}") == 200
    assert refused(security, "GET", "/") == 200 and refused(security, "GET", "/studio/studio.js") == 200
    assert refused(security, "GET", "/metrics") == 401
    cookie = security.cookie().partition(";")[0]
    assert KEY not in cookie and "HttpOnly" in security.cookie() and "SameSite=Strict" in security.cookie()
    assert refused(security, cookie=cookie) == 200
    assert refused(security, cookie=cookie + "x") == 401
    assert refused(Security(key=KEY), cookie=cookie) == 401  # another run of the server
    assert refused(security, cookie=cookie, origin="http://evil.example") == 403


def test_answers_never_have_cors_headers(server):
    answer = server.client.options("/api/generate", headers={"Access-Control-Request-Method": "POST"})
    assert answer.status_code == 405
    for path in ("/", "/api/models", "/nope"):
        headers = server.client.get(path).headers
        assert not [name for name in headers if name.startswith("access-control")]
        assert (
            headers["x-content-type-options"] == "nosniff"
            and "default-src 'self'" in headers["content-security-policy"]
        )


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10000))
        + chunk(b"IEND", b"")
    )


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


MISTAKES = [
    ({"prompt": 5}, "prompt: input should be a valid string"),
    ({"prompt": None}, "prompt:"),
    ({}, "prompt: field required"),
    ({"prompt": "a", "n": "2"}, "n:"),
    ({"prompt": "a", "n": 10**9}, "at most 6"),
    ({"prompt": "a", "n": -1}, "n:"),
    ({"prompt": "a", "n": 1.5}, "n:"),
    ({"prompt": "a", "n": True}, "n:"),
    ({"prompt": "a", "n": 3, "best_of": 3}, "at most 6"),
    ({"prompt": "a", "seed": -1}, "seed:"),
    ({"prompt": "a", "seed": 2**70}, "seed:"),
    ({"prompt": "a", "size": "65536x65536"}, "would take"),
    ({"prompt": "a", "size": "99999999x8"}, "size:"),
    ({"prompt": "a", "size": [8, 8]}, "size:"),
    ({"prompt": "a", "size": "8x"}, "size:"),
    ({"prompt": "a", "size": "7x7"}, "multiples of 2"),
    ({"prompt": "a", "guidance": "nan"}, "guidance:"),
    ({"prompt": "a", "guidance": -1}, "guidance:"),
    ({"prompt": "a", "method": "magic"}, "method:"),
    ({"prompt": "x" * 4001}, "at most 4000 characters"),
    ({"prompt": "a", "model": "../../etc/passwd"}, "there is no model"),
    ({"prompt": "a", "model": "labels"}, "takes no prompt"),
    ({"prompt": "a", "__class__": 1}, "there is no such field"),
]


@pytest.mark.parametrize(("values", "said"), MISTAKES)
def test_mistakes_are_one_sentence_about_the_field(server, values, said):
    answer = server.client.post("/api/generate", json=values)
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert said in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"a":' * 100_000, {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"", {}, 400),
        (b"NaN", {}, 400),
        (b'{"prompt": "a", "guidance": NaN}', {}, 400),
        (b'{"prompt": "a", "guidance": 1e999}', {}, 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b'{"prompt": "a", "\\ud800": 1}', {}, 400),
        (b"prompt=a", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"prompt", {"content-type": "text/plain"}, 415),
        (b"--x\r\n", {"content-type": "multipart/form-data"}, 400),
        (b"--x\r\nnonsense", {"content-type": "multipart/form-data; boundary=x"}, 400),
    ],
)
def test_bodies_that_are_none(server, body, headers, status):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        answer = client.post("/api/generate", content=body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_body_without_a_length_that_does_not_end(server):
    def forever():
        for _ in range(100):
            yield b"x" * 2**20

    with httpx.Client(base_url=server.url, timeout=30) as client:
        try:
            answer = client.post("/api/generate", content=forever(), headers={"content-type": "application/json"})
            assert answer.status_code == 413
        except httpx.TransportError:  # the connection was closed before all was sent
            pass
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "content", [bomb(30000, 30000), bomb(16000, 10000), bomb(5000, 5000), b"", b"GIF89a", b"\0" * 100]
)
def test_images_that_are_none_or_too_large(server, content):
    for answer in (
        server.post("/api/score", image=b64(content)),
        server.client.post("/v1/images/variations", files={"image": ("a.png", content)}),
    ):
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"


def test_a_picture_that_is_cut_off_is_a_mistake(server):
    target = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(target, "PNG")
    answer = server.post("/api/score", image=b64(target.getvalue()[:2000]))
    assert answer.status_code == 400 and "cannot be read" in answer.json()["error"]["message"]


def test_noise_that_is_none(server):
    for content in (b"", b"\0" * 100, struct.pack("<Q", 2**60), b"\x02\0\0\0\0\0\0\0{}"):
        answer = server.post("/api/decode", noise=b64(content))
        assert answer.status_code == 400 and "scratch" not in answer.text, answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/api/gallery/../../etc/passwd",
        "/api/gallery/..%2f..%2fetc%2fpasswd",
        "/api/gallery/%2e%2e%2f.png",
        "/api/gallery/.scratch-0.png",
        "/api/gallery/20261127-140312-123456-ab12cd34.png",
        "/api/gallery/%00",
        "/studio/../app.py",
        "/studio/..%2fapp.py",
        "/studio/",
        "//etc/passwd",
    ],
)
def test_names_that_lead_elsewhere(server, path):
    for method in ("GET", "DELETE"):
        answer = server.client.request(method, path)
        assert answer.status_code in (404, 405) and "root:" not in answer.text


def test_uploads_write_nothing_but_the_gallery(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    image = io.BytesIO()
    Image.effect_noise((1500, 1500), 80).save(image, "PNG")  # above what a form would keep in memory
    files = {"image": ("../../../evil.png", image.getvalue())}
    before = sorted(path.name for path in server.service.gallery.folder.iterdir())
    assert server.client.post("/api/score", files=files, data={"draws": "1"}).status_code == 200
    assert sorted(path.name for path in server.service.gallery.folder.iterdir()) == before
    # MLX's CPU backend compiles in a folder of its own there, in half precision.
    assert [path.name for path in tmp_path.iterdir() if path.name != "mlx"] == []


def raw(server, data: bytes, wait: float = 1.0) -> bytes:
    """What comes back of bytes that are sent as they are."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(data)
        connection.settimeout(wait)
        try:
            return connection.recv(65536)
        except TimeoutError:
            return b""


@pytest.mark.parametrize(
    "data",
    [
        b"\0\xff\xfe nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,
        b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http(server, data):
    answer = raw(server, data)
    assert not answer or answer.split()[1] in (b"400", b"403", b"415", b"431")
    assert server.client.get("/health").status_code == 200


def test_a_body_that_says_it_is_too_long_is_not_read(server):
    head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for length in (b"99999999999", b"9" * 4000):
        answer = raw(server, head + b"Content-Length: " + length + b"\r\n\r\n", 5)
        assert answer.split()[1] in (b"413", b"400")


def test_half_a_body_and_a_client_that_is_gone(server):
    data = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    data += b"Content-Length: 999\r\n\r\n{"
    for _ in range(20):
        raw(server, data, 0.01)
    deadline = time.monotonic() + 10
    while server.service.bodies.reading and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not server.service.bodies.reading
    assert server.post("/api/generate", prompt="a cat").status_code == 200


def test_headers_that_do_not_come(server, monkeypatch):
    monkeypatch.setattr(run, "IDLE", 0.2)
    for said in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(said)
            assert connection.recv(100) == b""  # closed by the server


def test_errors_of_the_page_and_the_paths_are_json(server):
    for method, path, status in (
        ("GET", "/nope", 404),
        ("PUT", "/api/generate", 405),
        ("GET", "/api/gallery?limit=0", 400),
    ):
        answer = server.client.request(method, path)
        assert answer.status_code == status
        assert json.loads(answer.text)["error"]["message"]

"""A stand-in for the Hugging Face Hub that takes uploads, through the endpoints that huggingface_hub asks."""

from __future__ import annotations

import base64
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

GOOD, READS_ONLY = "hf_goodtoken", "hf_readtoken"
COMMIT = "0" * 40


class UploadHub(http.server.ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repositories: files by name, by repository.
        private: repositories that are.
        breaks: the part of a request's path at which the connection is cut; "" never is.
        requests: method and path of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.breaks = ""
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    server = UploadHub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_POST = do_PUT = do_GET

    def answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append((self.command, path))
        if hub.breaks and hub.breaks in path:
            self.close_connection = True
            self.connection.close()
        elif path.startswith("/stored/"):
            hub.stored[path.removeprefix("/stored/")] = content
            self.reply(200, {})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif (token := self.headers.get("Authorization", "").removeprefix("Bearer ")) not in (GOOD, READS_ONLY):
            self.reply(401, {"error": f"Invalid credentials {token}"})
        elif token == READS_ONLY and self.command != "GET":
            self.reply(403, {"error": f"{token} may not"})
        else:
            self.answer_user(path, content)

    def answer_user(self, path: str, content: bytes) -> None:
        hub = self.server
        if path == "/api/repos/create":
            wanted = json.loads(content)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in hub.repositories:
                self.reply(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
                return
            hub.repositories[name] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                hub.private.add(name)
            self.reply(200, {"url": f"{hub.url}/{name}", "name": name})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
            modes = [{**file, "uploadMode": _mode(file["path"]), "shouldIgnore": False} for file in _files(content)]
            self.reply(200, {"files": modes})
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/stored/{each['oid']}"}}}
                for each in json.loads(content)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repositories[found[1]][value["path"]] = hub.stored[value["oid"]]
            address = f"{hub.url}/{found[1]}/commit/{COMMIT}"
            self.reply(200, {"success": True, "commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/revision/main)?", path):
            self.reply(200, {"id": found[1], "sha": COMMIT, "private": found[1] in hub.private, "siblings": []})
        else:
            self.reply(404, {"error": f"no {path}"})

    def reply(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _files(content: bytes) -> list[dict[str, object]]:
    return [{"path": each["path"]} for each in json.loads(content)["files"]]


def _mode(path: object) -> str:
    return "lfs" if str(path).endswith((".safetensors", ".model", ".png")) else "regular"

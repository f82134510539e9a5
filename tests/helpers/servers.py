"""Servers: one in this process, and `mlx-starflow serve` as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import httpx
import uvicorn

from mlx_starflow.server.run import configured, listen
from mlx_starflow.server.service import Service


class Running:
    """A server that listens; `client` talks to it."""

    def __init__(self, service: Service):
        self.service = service
        service.start()
        self._socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(configured(service))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def post(self, path: str, **values: object) -> httpx.Response:
        return self.client.post(path, json=values)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self.service.stop(5)
        self._thread.join(20)
        self._socket.close()


class Process:
    """`mlx-starflow serve` as a process."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None):
        command = [sys.executable, "-m", "mlx_starflow", "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.split()[-1] if self.line else ""

    def stop(self) -> tuple[int, str]:
        """End it: its exit code, and what it wrote to standard error."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

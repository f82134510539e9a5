"""Running the server: its socket, its signals, and its end."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import warnings
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.server.app import create_app
from mlx_starflow.server.service import Service

MOST_HEADERS = 32 * 1024
"""Bytes of a request's headers."""

IDLE = 30
"""Seconds that a connection may do nothing between two requests."""


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""

LARGE = 1 << 22
"""Bytes of an array that has pages of its own; with a sixteenth of that, a picture takes a sixth longer."""


class Protocol(H11Protocol):
    """HTTP/1.1; a connection whose headers do not come is closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(IDLE, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Tells the queue first when it has to end: what is open are the connections of those who wait."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float):
        super().__init__(config)
        self._service, self._grace = service, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await asyncio.get_running_loop().run_in_executor(None, self._service.stop, self._grace)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket there. Raises StarflowError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sends small answers at once, and not 40 ms later, over sockets that say that they are TCP.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(512)
    except (OSError, OverflowError) as error:
        raise StarflowError(f"the server cannot listen at {host}, port {port}: {one_line(error)}") from None
    return listening


def configured(service: Service) -> uvicorn.Config:
    """How HTTP is spoken, within the limits."""
    return uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        http=Protocol,
        ws="none",
        loop="asyncio",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=service.limits.connections,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MOST_HEADERS,
    )


def give_memory_back() -> None:
    """Have glibc give large arrays pages of their own, which go back when they are freed.

    By itself it learns to keep ever larger ones in its heap, where small objects lie between them: the process then has
    a tenth more memory at one time than at another. Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGE)


def serve(
    service: Service,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    grace: float = 30.0,
    ready: Callable[[str], None] = print,
) -> None:
    """Run until SIGTERM or Ctrl-C; then tell the queue, and let the job that runs finish for `grace` seconds.

    Args:
        service: whose worker is started here.
        port: 0 is any that is free.
        ready: is called with the address when the server can be reached.

    Raises:
        StarflowError: a model cannot be loaded, or the port is taken.
    """
    with listen(host, port) as listening, warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # each job has its own
        warnings.showwarning = service.warned  # type: ignore[assignment]  # its other arguments are not shown
        give_memory_back()
        service.start()
        name = f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{listening.getsockname()[1]}")
        try:
            Server(configured(service), service, grace).run(sockets=[listening])
        except KeyboardInterrupt:  # the signal that it was ended by, which uvicorn raises again
            return

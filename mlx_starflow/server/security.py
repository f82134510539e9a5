"""Who is heard: the names that the server answers to, pages of other sites, and keys.

A page of another site, open in the browser of whoever runs the server, can send requests to it, and by a name of its
own that suddenly means 127.0.0.1 (DNS rebinding) even read the answers. So `Host` must be a name of this machine and
`Origin`, which browsers send with everything that changes something, the server itself. Nothing answers with CORS
headers. Where the server can be reached from other machines, a key is needed as well; it is compared in constant
time. A browser has it in a cookie that scripts cannot read and other sites do not send.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_starflow.errors import StarflowError
from mlx_starflow.server.refusals import Refusal

LOCAL = ("localhost", "127.0.0.1", "::1")

COOKIE = "mlx-starflow"

OPEN = ("/", "/health", "/api/session")
"""What is answered without the key: the page, which then asks for it."""

OPEN_FOLDER = "/studio/"

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
        "object-src 'none'"
    ),
}
"""What every answer says to browsers."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Security:
    """The rules.

    Args:
        host: that the server listens at.
        key: that clients have to have; None: none.
        names: that the server answers to besides those of this machine.

    Raises:
        StarflowError: other machines can reach the server, and there is no key.
    """

    def __init__(self, host: str = "127.0.0.1", key: str | None = None, names: Sequence[str] = ()):
        self.local = is_loopback(host)
        if not self.local and not key:
            raise StarflowError(f"other machines can reach a server at {host}: give it a key with --api-key")
        if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
            raise StarflowError("a key has 8 or more ASCII characters, without spaces")
        self._key = None if key is None else _digest(key)
        self._session = secrets.token_urlsafe(32)
        self.names = {*LOCAL, *(name.lower() for name in names)}
        if not self.local:
            own = socket.gethostname().lower()
            self.names |= {own, f"{own}.local", host.lower()}

    @property
    def has_key(self) -> bool:
        return self._key is not None

    def knows(self, key: str) -> bool:
        """Whether this is the key; takes as long wherever it differs."""
        return self._key is None or hmac.compare_digest(_digest(key), self._key)

    def cookie(self) -> str:
        """The header that lets a browser in from now on, until the server ends."""
        return f"{COOKIE}={self._session}; HttpOnly; SameSite=Strict; Path=/"

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise Refusal unless a request is to be heard."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            raise Refusal(403, "the server does not answer to this name (Host): see --allow-host", code="host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != hosts[0].lower():
            raise Refusal(403, "pages of other sites cannot use this server (Origin)", code="origin")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and not (method == "GET" and path == "/"):
            raise Refusal(403, "pages of other sites cannot use this server (Sec-Fetch-Site)", code="origin")
        if self._key is None or path in OPEN or path.startswith(OPEN_FOLDER):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.knows(given.strip()):
            return
        if _cookie(headers, self._session):
            return
        raise Refusal(
            401,
            "the key is missing or wrong: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_own(self, host: str) -> bool:
        name = host.lower()
        if name.startswith("["):
            name, bracket, port = name[1:].partition("]")
            if not bracket or (port and not port.startswith(":")):
                return False
            port = port.removeprefix(":")
        else:
            name, _, port = name.partition(":")
        if port and not (port.isascii() and port.isdecimal()):
            return False
        if name in self.names:
            return True
        try:
            # An address is no name that could mean something else tomorrow.
            return not self.local and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _cookie(headers: Headers, session: str) -> bool:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    return found is not None and hmac.compare_digest(found.value.encode(), session.encode())


class SecurityMiddleware:
    """Asks `Security` before anything of a request is read, and puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, security: Security):
        self.app, self.security = app, security

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
            await send(message)

        try:
            self.security.check(scope["method"], scope["path"], Headers(scope=scope))
        except Refusal as refusal:
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, answer)
            return
        await self.app(scope, receive, answer)

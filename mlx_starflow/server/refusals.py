"""What a client is told when it gets nothing: a status, and an error as OpenAI's API has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_starflow.errors import Cancelled, NotFinite, StarflowError, printable

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""`type` of an error by its status; others are "invalid_request_error", or "server_error" from 500 on."""

NO_RETRY = {"x-should-retry": "false"}
"""Tells OpenAI's clients, which repeat what ends with 409 or 500 and above, that another try ends the same."""


class Refusal(Exception):
    """Why a request is not answered.

    Attributes:
        status: of HTTP.
        message: one sentence.
        code: a word that programs can compare, or None.
        param: name of the field that is wrong, or None.
        headers: that go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, printable(message), code
        self.param = None if param is None else printable(param)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is answered: {"error": {"message", "type", "param", "code"}}."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class TimedOut(StarflowError):
    """A job took longer than the server allows."""


class Stopping(StarflowError):
    """The server ends before the job is done."""


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told about an exception that ended its job; nothing of one that nobody foresaw."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Cancelled):
        return Refusal(409, "the job was cancelled", code="cancelled", headers=NO_RETRY)
    if isinstance(error, TimedOut):
        return Refusal(504, str(error), code="timeout", headers=NO_RETRY)
    if isinstance(error, Stopping):
        return Refusal(503, str(error), code="stopping", headers={"Retry-After": "5"})
    if isinstance(error, NotFinite):
        return Refusal(500, str(error), code="not_finite", headers=NO_RETRY)
    if isinstance(error, StarflowError):
        return Refusal(400, str(error), code="invalid_value")
    if isinstance(error, MemoryError):
        return Refusal(500, "there was no memory for this: ask for less at a time", code="memory", headers=NO_RETRY)
    return Refusal(500, "this should not have happened; the server's log says more", code="internal", headers=NO_RETRY)

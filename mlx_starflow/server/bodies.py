"""Reading what clients send: bounded in size and time, kept in memory, and never a file name of theirs used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from mlx_starflow.media.files import parse_json
from mlx_starflow.server.gallery import Gallery
from mlx_starflow.server.limits import Limits
from mlx_starflow.server.refusals import Refusal

FIELDS = 64
"""Of a form, besides files."""

FILES = 4

Asked = TypeVar("Asked", bound=BaseModel)


class Bodies:
    """Reads the bodies of requests, so many at a time.

    Args:
        limits: of bytes, of seconds, and of bodies at a time.
        gallery: for ids that stand for images.

    Attributes:
        reading: how many are being read.
    """

    def __init__(self, limits: Limits, gallery: Gallery):
        self.limits, self._gallery, self.reading = limits, gallery, 0

    async def read(self, request: Request, kind: type[Asked]) -> Asked:
        """What a request asks for, JSON or a form. Raises Refusal."""
        with self._counted():
            values, is_form = await self._values(request)
            values = _lists(values, kind) if is_form else values
            context = {"limits": self.limits, "gallery": self._gallery}
            validate = partial(kind.model_validate, values, strict=not is_form, context=context)
            try:
                # Looking at images takes longer than the event loop should.
                if any(len(value) > 4096 for value in values.values() if isinstance(value, str | bytes)):
                    return await run_in_threadpool(validate)
                return validate()
            except ValidationError as error:
                raise _refusal(error) from None

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self.reading >= self.limits.bodies:
            raise Refusal(429, "too many requests are being read: try again", code="busy", headers={"Retry-After": "1"})
        self.reading += 1
        try:
            yield
        finally:
            self.reading -= 1

    async def _values(self, request: Request) -> tuple[dict[str, Any], bool]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("application/json", "multipart/form-data"):
            raise Refusal(415, "send JSON (Content-Type: application/json) or a form (multipart/form-data)")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > self.limits.body:
            raise self._too_large()
        if kind == "multipart/form-data":
            return await self._form(request), True
        content = b"".join([chunk async for chunk in self._chunks(request)])
        try:
            values = parse_json(content)
        except ValueError:
            raise Refusal(400, "the body is not valid JSON", code="invalid_json") from None
        if not isinstance(values, dict):
            raise Refusal(400, "the body is not a JSON object", code="invalid_json")
        return values, False

    async def _form(self, request: Request) -> dict[str, Any]:
        parser = MultiPartParser(
            request.headers, self._chunks(request), max_files=FILES, max_fields=FIELDS, max_part_size=self.limits.body
        )
        parser.spool_max_size = self.limits.body + 1  # nothing is written to a disk
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise Refusal(400, f"the form cannot be read: {error.message}", code="invalid_form") from None
        values: dict[str, Any] = {}
        try:
            for name, value in form.multi_items():
                own: Any = await value.read() if isinstance(value, UploadFile) else value
                if name.endswith("[]"):
                    name, own = name[:-2], [own]
                if name in values:
                    before = values[name]
                    own = [
                        *(before if isinstance(before, list) else [before]),
                        *(own if isinstance(own, list) else [own]),
                    ]
                values[name] = own
        finally:
            await form.close()
        return values

    async def _chunks(self, request: Request) -> AsyncGenerator[bytes, None]:
        """A body as it comes. Raises Refusal if it is too long, or comes too slowly, or not to its end."""
        end, size = time.monotonic() + self.limits.read_timeout, 0
        stream = request.stream()
        while True:
            try:
                chunk = await asyncio.wait_for(anext(stream, b""), max(0.0, end - time.monotonic()))
            except (TimeoutError, asyncio.TimeoutError):
                raise Refusal(
                    408,
                    f"the body took longer than {self.limits.read_timeout:g} seconds",
                    headers={"Connection": "close"},
                ) from None
            except ClientDisconnect:
                raise Refusal(400, "the client has hung up") from None
            if not chunk:
                return
            size += len(chunk)
            if size > self.limits.body:
                raise self._too_large()
            yield chunk

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            f"a request has at most {self.limits.body:,} bytes here",
            code="too_large",
            headers={"Connection": "close"},
        )


def _lists(values: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """Fields of a form, those that are lists as lists and others alone; a text of a list may have commas in between."""
    made = dict(values)
    for name, value in values.items():
        field = kind.model_fields.get(name)
        if field is None:
            continue
        is_list = get_origin(field.annotation) is list
        if is_list and not isinstance(value, list):
            made[name] = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
        elif not is_list and isinstance(value, list):
            if len(value) > 1:
                raise Refusal(400, f"{name}: there may be one alone, not {len(value)}", param=name)
            made[name] = value[0]
    return made


def _refusal(error: ValidationError) -> Refusal:
    """The first thing that is wrong, in one sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))[:100]
    said = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = "there is no such field"
    said = said[:1].lower() + said[1:]
    return Refusal(400, f"{place}: {said}" if place else said, code="invalid_value", param=place or None)

"""The server's routes: OpenAI's chat completions and models, and its health.

    body (bounded) -> request (checked, images to bytes) -> worker's line -> whole answer, or server-sent events

A request is in the lobby from its first byte on; when its client goes away it leaves the line, or its answer ends
before the next token. What is wrong before the first piece of text becomes a status of 4xx or 5xx, in streams too, and
later an event `error`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vltrain.errors import InputError
from vltrain.files.strict_json import parse_json
from vltrain.serve.chat_request import ChatRequest, read_request
from vltrain.serve.chat_response import END, Completion, event
from vltrain.serve.errors import ApiError, bad_request, internal
from vltrain.serve.lobby import Lobby, Reserved
from vltrain.serve.pictures import ImageReader
from vltrain.serve.shelf import Shelf
from vltrain.serve.worker import Done, Gone, Job, Piece, Worker

logger = logging.getLogger(__name__)

READ_SECONDS = 60.0  # that a body may take to arrive
METHODS = {"/v1/chat/completions": "POST", "/v1/models": "GET"}
PARSED_AT_ONCE = 2  # bodies, each of which takes some times its size meanwhile


@dataclass(frozen=True, kw_only=True)
class Limits:
    """max_waiting requests beside the one that is answered; timeout_seconds from a request's arrival to its end; the
    rest of one request."""

    max_waiting: int = 256
    max_request_bytes: int = 32 * 1024**2
    max_images: int = 16
    timeout_seconds: float = 300.0


class ClientGone(Exception):
    """There is nobody to answer."""


class ChatCompletions:
    """POST /v1/chat/completions, as an ASGI application.

    Args:
        images: reads what requests show.
    """

    def __init__(self, shelf: Shelf, worker: Worker, images: ImageReader, limits: Limits) -> None:
        self._shelf, self._worker, self._images, self._limits = shelf, worker, images, limits
        self.lobby = Lobby(limits.max_waiting, limits.max_request_bytes)
        self._parsing = anyio.CapacityLimiter(PARSED_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(scope, receive, send)
        try:
            with self.lobby.entered():
                async with asyncio.timeout(self._limits.timeout_seconds), contextlib.AsyncExitStack() as held:
                    await self._answer(reply, await self._read(scope, receive, held))
        except ClientGone:
            pass
        except TimeoutError:
            told = f"no whole answer within {self._limits.timeout_seconds:g} seconds (--timeout)"
            await reply.fail(ApiError(504, told, kind="server_error", code="timeout"))
        except ApiError as error:
            await reply.fail(error)
        except Exception:
            logger.exception("a request failed")
            await reply.fail(internal())

    async def _read(self, scope: Scope, receive: Receive, held: contextlib.AsyncExitStack) -> ChatRequest:
        """The checked request; its bytes are counted until `held` ends. Raises ApiError and ClientGone."""
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site may send others without asking
            raise ApiError(
                415, f"Content-Type: found {kind[:60]!r}, expected application/json", code="unsupported_media_type"
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                415, "Content-Encoding: expected a body that is not compressed", code="unsupported_media_type"
            )
        declared = headers.get("content-length")
        reserved = await self.lobby.reserve(
            self._limits.max_request_bytes if declared is None else int(declared)
        )  # the gates have looked at it
        held.callback(reserved.shrink, 0)
        return await self._parse(receive, reserved)

    async def _parse(self, receive: Receive, reserved: Reserved) -> ChatRequest:
        body = bytearray()
        try:
            async with asyncio.timeout(READ_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the request's body did not arrive within {READ_SECONDS:g} seconds", code="timeout"
            ) from None

        def parse() -> ChatRequest:
            try:
                value = parse_json(bytes(body), "body")
            except InputError as error:
                raise bad_request(str(error), code="invalid_json") from None
            return read_request(value, self._images, max_images=self._limits.max_images)

        request = await anyio.to_thread.run_sync(parse, limiter=self._parsing)
        self._shelf.entry(request.model)
        reserved.shrink(sum(map(len, request.images)) + sum(len(turn.text) for turn in request.turns))
        return request

    async def _answer(self, reply: _Reply, request: ChatRequest) -> None:
        job = Job(request)
        watch = asyncio.create_task(_cancel_when_gone(reply.receive, job))
        started = time.monotonic()
        try:
            self._worker.submit(job)
            done = await (reply.stream if request.stream else reply.whole)(request, job)
        finally:
            watch.cancel()
            self._worker.withdraw(job)
        logger.info(
            "%s: %d + %d tokens, %s, %.2f s",
            request.model,
            done.prompt_tokens,
            done.completion_tokens,
            done.reason,
            time.monotonic() - started,
        )


async def _cancel_when_gone(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def events_of(job: Job) -> AsyncIterator[Piece | Done]:
    """The pieces of an answer, and at last Done. Raises ApiError, and ClientGone."""
    while True:
        found = await job.next()
        if isinstance(found, ApiError):
            raise found
        if isinstance(found, Gone):
            raise ClientGone
        yield found
        if isinstance(found, Done):
            return


class _Reply:
    """What is sent to one client."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self.receive, self._send, self._has_started = scope, receive, send, False

    async def whole(self, request: ChatRequest, job: Job) -> Done:
        pieces: list[Piece] = []
        async for found in events_of(job):
            if isinstance(found, Piece):
                pieces.append(found)
            else:
                value = Completion(request.model).whole(pieces, found, logprobs=request.logprobs)
                self._has_started = True
                await JSONResponse(value)(self._scope, self.receive, self._send)
                return found
        raise AssertionError("an answer without an end")

    async def stream(self, request: ChatRequest, job: Job) -> Done:
        completion = Completion(request.model)
        async for found in events_of(job):
            if not self._has_started:
                await self._start(completion)
            if isinstance(found, Piece):
                await self._event(event(completion.part(found, logprobs=request.logprobs)))
                continue
            await self._event(event(completion.last(found)))
            if request.with_usage:
                await self._event(event(completion.counts(found)))
            await self._event(END, more=False)
            return found
        raise AssertionError("an answer without an end")

    async def fail(self, error: ApiError) -> None:
        """Sends an error: as the answer, or as the last event of a stream that has begun."""
        if not self._has_started:
            self._has_started = True
            await error.response()(self._scope, self.receive, self._send)
        else:
            await self._event(event(error.body()), more=False)

    async def _start(self, completion: Completion) -> None:
        self._has_started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._event(event(completion.first()))

    async def _event(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def build_app(shelf: Shelf, worker: Worker, *, images: Path | None, limits: Limits) -> Starlette:
    """The application without its gates.

    Args:
        images: folder below which requests may name files; None: none may.
    """
    reader = ImageReader(images, shelf.served.config.data.max_image_pixels)
    completions = ChatCompletions(shelf, worker, reader, limits)
    created = int(time.time())

    async def models(request: Request) -> Response:
        listed = [_model(entry.id, created) for entry in shelf.entries]
        return JSONResponse({"object": "list", "data": listed})

    async def one_model(request: Request) -> Response:
        return JSONResponse(_model(shelf.entry(request.path_params["name"]).id, created))

    async def health(request: Request) -> Response:
        status = "shutting down" if worker.is_draining else "ok" if worker.is_healthy else "failing"
        told = {
            "status": status,
            "model": shelf.entries[0].id,
            "running": int(worker.is_running),
            "waiting": worker.waiting,
        }
        return JSONResponse(told, status_code=200 if status == "ok" else 503)

    async def nothing_here(request: Request) -> Response:
        path = request.url.path
        if path in METHODS:
            raise ApiError(
                405, f"{path}: found the method {request.method}, expected {METHODS[path]}", code="method_not_allowed"
            )
        raise ApiError(
            404, f"{path[:200]}: no such route; there are {', '.join(METHODS)} and /health", code="not_found"
        )

    routes = [
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/v1/{rest:path}", nothing_here, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]
    app = Starlette(routes=routes, exception_handlers={ApiError: _told, HTTPException: _told_by_starlette})
    app.state.lobby = completions.lobby
    return app


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "vltrain"}


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _told_by_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else None
    return ApiError(
        error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}", code=code
    ).response()

"""The socket, and the way from the first request to the last: uvicorn, with a line that is sent home when the server is
asked to end."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import uvicorn
from starlette.types import ASGIApp

from vltrain.errors import InputError
from vltrain.serve.worker import Worker

LAST_ANSWER_SECONDS = 5.0  # that the running answer may take when the server ends
GRACE_SECONDS = 7  # that all replies may take then
MORE_CONNECTIONS = 256  # than requests may wait: pages, and clients that keep theirs open
MAX_PAGE_MESSAGE_BYTES = 1 << 20  # of a web socket


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before hours of loading: clients that come early wait in it. Port 0: a free one. Raises
    InputError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: no such host ({getattr(error, 'strerror', None) or error})") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(
            f"--port {port}: cannot listen on {host}:{port} ({error.strerror}); end what listens there, or "
            "choose another --port"
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, worker: Worker, greeting: str) -> None:
        super().__init__(config)
        self._worker, self._greeting = worker, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._greeting, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.drain()
        asyncio.get_running_loop().call_later(LAST_ANSWER_SECONDS, self._worker.cut)
        await super().shutdown(sockets)


def make_server(app: ASGIApp, worker: Worker, *, max_waiting: int, greeting: str) -> uvicorn.Server:
    """A server whose `run(sockets=[...])` serves until SIGTERM or SIGINT, raised again at its end, or `should_exit`;
    `greeting` is printed once it serves."""
    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=2 * max_waiting + MORE_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        ws_max_size=MAX_PAGE_MESSAGE_BYTES,
    )
    return _Server(config, worker, greeting)

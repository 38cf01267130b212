"""What every request passes before anything of it is done, for HTTP and web sockets alike.

A page that somebody opens in a browser can send requests to this machine. So the Host must be one that is meant (a name
of a foreign site that was made to lead here is refused, an address is none that a site can own), the Origin must be the
same, and nothing is allowed to be read across origins.
Starlette's TrustedHostMiddleware knows no addresses of version 6, and none of a whole class.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vltrain.serve.errors import ApiError, internal

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)  # need no key
# Nothing is loaded from elsewhere, by nobody's page is ours framed. The page's library writes inline scripts and
# styles, and compiles templates.
HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Gates:
    """Args: `names` are hosts beside localhost and addresses; `key` is asked for where it is not None; `max_body_bytes`
    of any request."""

    def __init__(self, app: ASGIApp, *, names: Collection[str], key: str | None, max_body_bytes: int) -> None:
        self.app, self._names, self._key, self._max_body_bytes = (
            app,
            {name.lower().rstrip(".") for name in names},
            key,
            max_body_bytes,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._judge(scope, headers)
            await self.app(scope, self._counted(receive, headers), guarded_send)
        except ApiError as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            elif not started:
                await error.response()(scope, receive, guarded_send)
        except Exception:
            # What the page's library lets through, too: nothing of it reaches the client.
            logger.exception("a request failed")
            if scope["type"] == "http" and not started:
                await internal().response()(scope, receive, guarded_send)

    def _judge(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_meant(_name_of(host)):
            told = "expected localhost, an address, or a name of --host or --allow-hosts"
            raise ApiError(403, f"Host: found {host[:100]!r}, {told}", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(
                403,
                f"Origin: found {origin[:100]!r}: pages of other sites may not send requests here",
                code="origin_not_allowed",
            )
        if (
            self._key is not None
            and scope["path"] not in OPEN_PATHS
            and not _holds_key(headers.get("authorization", ""), self._key)
        ):
            raise ApiError(
                401,
                "no valid API key: expected 'Authorization: Bearer KEY' (from a browser: the key as the password)",
                code="invalid_api_key",
            )
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit() or int(declared[:20]) > self._max_body_bytes:
            raise self._too_large(f"{declared[:20]} bytes")

    def _is_meant(self, name: str | None) -> bool:
        if name is None:
            return False
        if name in self._names or name == "localhost":
            return True
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return False

    def _counted(self, receive: Receive, headers: Headers) -> Receive:
        """`receive` that refuses the rest of a body, of a length that was not declared, once it is too large."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                if total > self._max_body_bytes:
                    raise self._too_large("more")
            return message

        return counted

    def _too_large(self, found: str) -> ApiError:
        told = (
            f"the request's body: found {found}, expected {self._max_body_bytes:,} bytes at most "
            "(--max-request-bytes); send fewer or smaller images"
        )
        return ApiError(413, told, code="request_too_large")


def _name_of(host: str) -> str | None:
    """The name in a Host header, without its port; None where it is malformed."""
    if not host or not host.isascii() or any(mark in host for mark in "/@?#\\ ,"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises for one that is none
        return parts.hostname.rstrip(".") if parts.hostname else None
    except ValueError:
        return None


def _holds_key(authorization: str, key: str) -> bool:
    scheme, _, text = authorization.partition(" ")
    found = text.strip()
    if scheme.lower() == "basic":
        try:
            found = base64.b64decode(found, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(found.encode(errors="replace"), key.encode(errors="replace"))

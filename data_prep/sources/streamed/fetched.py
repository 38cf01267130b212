"""Images at addresses, for those who ask for them: over http and https only, so many bytes, seconds and redirects at
most, and from public addresses unless told otherwise.

A name is looked up once, and the connection goes to the very address that was looked at, so that a name server cannot
answer one thing to the look and another to the connection. Each redirect is looked at anew. Proxies of the environment
are not used: what is private to them could not be told.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from vltrain.errors import InputError

REDIRECTS, TRIES, PAUSE = 3, 3, 0.5  # seconds before the second try, and twice as many before the third
_PIECE = 1 << 16
_ELSEWHERE = (301, 302, 303, 307, 308)
_LATER = (408, 429, 500, 502, 503, 504)


class _Again(Exception):
    """What may be otherwise in a moment."""


@dataclass(frozen=True)
class Limits:
    """How much an address may cost: bytes, and seconds of one try. `private`: also addresses of this machine and its
    network."""

    most_bytes: int
    seconds: float
    private: bool


@dataclass(frozen=True)
class Fetched:
    """The image at an address; called in a worker process for its bytes. Raises InputError for one that cannot be had
    within the limits, `TRIES` times where trying again may help."""

    address: str
    limits: Limits

    def __call__(self) -> bytes:
        told = ""
        for number in range(TRIES):
            try:
                return self._fetched()
            except _Again as error:
                told = str(error)
            if number + 1 < TRIES:
                time.sleep(PAUSE * 2**number)
        raise InputError(f"{self.address}: {told}, {TRIES} times")

    def _fetched(self) -> bytes:
        deadline, place = time.monotonic() + self.limits.seconds, self.address
        for _ in range(REDIRECTS + 1):
            try:
                found = self._answer(place, deadline)
            except (OSError, http.client.HTTPException) as error:  # ssl's and timeouts are OSErrors
                raise _Again(f"cannot be fetched ({_words(error)})") from None
            if isinstance(found, bytes):
                return found
            place = urljoin(place, found)
        raise InputError(f"{self.address}: leads on more than {REDIRECTS} times")

    def _answer(self, place: str, deadline: float) -> bytes | str:
        """The bytes at an address, or where it says they are."""
        url = _checked(place, self.address)
        connection = self._connection(url, deadline)
        try:
            path = (url.path or "/") + (f"?{url.query}" if url.query else "")
            connection.request("GET", path, headers={"User-Agent": "vltrain", "Accept": "image/*"})
            answer = connection.getresponse()
            if answer.status in _ELSEWHERE and (elsewhere := answer.getheader("Location")):
                return elsewhere
            if answer.status in _LATER:
                raise _Again(f"answered {answer.status} {answer.reason}")
            if answer.status != 200:
                raise InputError(f"{self.address}: answered {answer.status} {answer.reason}")
            return self._body(answer, connection, deadline)
        finally:
            connection.close()

    def _body(self, answer: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float) -> bytes:
        data, most = bytearray(), self.limits.most_bytes
        while piece := self._piece(answer, connection, deadline):
            data += piece
            if len(data) > most:
                raise InputError(f"{self.address}: larger than {most:,} bytes (url_megabytes=)")
        if answer.length:
            raise _Again(f"ended {answer.length:,} bytes early")
        return bytes(data)

    def _piece(
        self, answer: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float
    ) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _Again(f"took longer than {self.limits.seconds:g} s (url_seconds=)")
        if connection.sock is not None:  # whoever sends a byte at a time has no more time than others
            connection.sock.settimeout(left)
        return answer.read1(_PIECE)

    def _connection(self, url: SplitResult, deadline: float) -> http.client.HTTPConnection:
        host = str(url.hostname)
        port = url.port or (443 if url.scheme == "https" else 80)
        left = max(0.001, deadline - time.monotonic())
        plain = socket.create_connection((self._looked_up(host, port), port), timeout=left)
        connection = http.client.HTTPConnection(host, port, timeout=left)
        connection.default_port = 443 if url.scheme == "https" else 80  # which the header Host leaves out
        connection.auto_open = 0  # by another look at its name
        try:
            connection.sock = (
                ssl.create_default_context().wrap_socket(plain, server_hostname=host)
                if url.scheme == "https"
                else plain
            )
        except BaseException:
            plain.close()
            raise
        return connection

    def _looked_up(self, host: str, port: int) -> str:
        """The first address of a name. Raises InputError if one of them is private and none may be."""
        found = [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for one in found:
            if not self.limits.private and not _is_public(one):
                raise InputError(
                    f"{self.address}: {host} is {one}, an address of this machine or its network; it is fetched with "
                    "urls=fetch_private only"
                )
        return found[0]


def _checked(place: str, address: str) -> SplitResult:
    named = address if place == address else f"{address}: leads to {place!r:.120}"
    try:
        url = urlsplit(place)
        _ = url.port
    except ValueError as error:
        raise InputError(f"{named}: is no address ({error})") from None
    if url.scheme not in ("http", "https") or not url.hostname:
        raise InputError(f"{named}: expected an address with http or https")
    if not place.isascii() or any(character <= " " for character in place):
        raise InputError(f"{named}: holds characters that an address writes as %XX")
    return url


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    found = inner or found
    return found.is_global and not found.is_multicast


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__

"""A real HTTP server of a folder's files, by byte ranges, that fails as it is told to."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Faults:
    """What becomes of answers. Shares of all reads, drawn with a fixed seed; or of the names given.

    fail      status 503, or a connection that is cut amid the bytes, by turns
    flip      one bit of the answer is another
    status    name -> status of every answer
    hang      names of which nothing comes
    only      faults befall these names alone; () all
    places    of so many places of 4 KiB one fails and one is flipped, each the first time that it is read; 0: none
    """

    fail: float = 0.0
    flip: float = 0.0
    status: dict[str, int] = field(default_factory=dict)
    hang: set[str] = field(default_factory=set)
    only: tuple[str, ...] = ()
    places: int = 0
    ranges: bool = True


@dataclass
class ObjectStore:
    """`requests`, `failed`, `flipped`: how many there were, of each name."""

    folder: Path
    address: str
    faults: Faults = field(default_factory=Faults)
    requests: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    flipped: Counter[str] = field(default_factory=Counter)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Serves a folder until the block ends."""
    chance, guard, closing = random.Random(7), threading.Lock(), threading.Event()
    read: set[tuple[str, int]] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            name, faults = self.path.rpartition("/")[2], store.faults
            with guard:
                store.requests[name] += 1
                befalls = not faults.only or name.startswith(faults.only)
                first = self._is_first(faults.places) if befalls else -1
                fails = (befalls and chance.random() < faults.fail) or first == 0
                flips = (befalls and chance.random() < faults.flip) or first == 1
                store.failed[name] += fails
                cuts = fails and store.failed.total() % 2 == 0
            if name in faults.hang:
                closing.wait(30)
                self.close_connection = True
                return
            path = store.folder / self.path.lstrip("/")
            status = faults.status.get(name, 200 if path.is_file() else 404)
            if status != 200 or (fails and not cuts):
                self._answer(503 if fails else status, b"")
                return
            start, end, status = 0, path.stat().st_size, 200
            asked = self.headers.get("Range")
            if asked and faults.ranges:
                first, last = asked.removeprefix("bytes=").split("-")
                start, end, status = int(first), min(int(last) + 1, end), 206
                if start >= end:
                    self._answer(416, b"")
                    return
                with guard:
                    store.ranges.append((name, start, end))
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
            if flips and data:
                with guard:
                    store.flipped[name] += 1
                    place = chance.randrange(len(data))
                data = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
            self._answer(status, data, cuts)

        def _is_first(self, places: int) -> int:
            """Which of `places` is read, where it is for the first time; else -1."""
            start = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
            key = (self.path, int(start) >> 12) if start and places else None
            if key is None or key in read:
                return -1
            read.add(key)
            return key[1] % places

        def do_HEAD(self) -> None:
            self._answer(405, b"")

        def _answer(self, status: int, data: bytes, cuts: bool = False) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[: len(data) // 2] if cuts else data)
            if cuts:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store = ObjectStore(folder, f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield store
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        time.sleep(0)

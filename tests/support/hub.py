"""A Hugging Face Hub of one data set on this machine: as much of its interface as `datasets` asks when it streams."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@contextmanager
def loopback_hub(name: str, folder: Path, *, gated: bool = False) -> Generator[tuple[str, list[str]]]:
    """Serves the folder as the data set `name`. Gives the address, and what was asked (`METHOD path`); `gated`: only
    the token `hf_good` may read it."""
    asked: list[str] = []

    class Handler(_Handler):
        pass

    Handler.name, Handler.folder, Handler.gated, Handler.asked = name, folder, gated, asked
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    name: str
    folder: Path
    gated: bool
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        api, files = f"/api/datasets/{self.name}", f"/datasets/{self.name}/resolve/"
        if path == "/":
            return self._send(200, b"")
        if not path.startswith((f"{api}/", files)) and path != api:
            return self._fail(404, "RepoNotFound")
        if self.gated and not path == api and self.headers.get("Authorization") != "Bearer hf_good":
            return self._fail(401, "GatedRepo")
        if found := re.fullmatch(rf"{api}(?:/revision/(\w+))?", path):
            if found[1] not in (None, "main", COMMIT):
                return self._fail(404, "RevisionNotFound")
            return self._json(self._info())
        if path.startswith(f"{api}/tree/"):
            below = path.removeprefix(f"{api}/tree/").partition("/")[2]
            return self._json([self._entry(one) for one in self._files() if one.startswith(below)])
        if path.startswith(f"{api}/paths-info/"):
            wanted = [unquote(one) for one in re.findall(r"paths=([^&]+)", body.decode())] or json.loads(body)["paths"]
            return self._json([self._entry(one) for one in wanted if one in self._files()])
        if path.startswith(files):
            return self._file(path.removeprefix(files).partition("/")[2])
        self._fail(404, "EntryNotFound")

    def _files(self) -> list[str]:
        return sorted(str(one.relative_to(self.folder)) for one in self.folder.rglob("*") if one.is_file())

    def _entry(self, name: str) -> dict[str, Any]:
        data = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _info(self) -> dict[str, Any]:
        return {
            "_id": "1", "id": self.name, "sha": COMMIT, "private": False, "gated": "auto" if self.gated else False,
            "disabled": False, "downloads": 0, "likes": 0, "tags": [], "cardData": {"license": "cc-by-sa-4.0"},
            "siblings": [{"rfilename": one} for one in self._files()],
        }  # fmt: skip

    def _file(self, name: str) -> None:
        if not (self.folder / name).is_file():
            return self._fail(404, "EntryNotFound")
        data = (self.folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(206, data[first : last + 1], headers)
        self._send(200, data, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, code: int, kind: str) -> None:
        self._send(code, b"{}", {"X-Error-Code": kind, "X-Error-Message": kind})

    def _send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

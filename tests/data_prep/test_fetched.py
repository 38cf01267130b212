"""Images at addresses: fetched only if asked for, from a server of this test, within bytes, seconds, redirects and
tries; and never from this machine's network unless told so."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.prepare import prepare
from data_prep.sources.streamed import fetched
from data_prep.sources.streamed.fetched import Fetched, Limits
from tests.support import tables
from vltrain.errors import InputError

PICTURE = tables.picture(3)


class Handler(BaseHTTPRequestHandler):
    asked: dict[str, int] = {}

    def do_GET(self):
        path = self.path
        self.asked[path] = count = self.asked.get(path, 0) + 1
        if path.startswith("/hop"):
            left = int(path[4:])
            self.send_response(302)
            self.send_header("Location", f"/hop{left - 1}" if left > 1 else "/a.png")
            self.end_headers()
        elif path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        elif path == "/busy.png" and count < 3 or path == "/never.png":
            self.send_error(503)
        elif path == "/slow.png":
            self.send_response(200)
            self.end_headers()
            for _ in range(20):  # a byte at a time, each well within any timeout of its own
                time.sleep(0.1)
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
        elif path == "/cut.png":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PICTURE) + 9))
            self.end_headers()
            self.wfile.write(PICTURE)
        elif path == "/gone.png":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetched, "PAUSE", 0.01)
    Handler.asked = {}
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


LIMITS = Limits(most_bytes=1 << 20, seconds=0.5, private=True)


def test_what_is_there(server):
    assert Fetched(f"{server}/a.png?size=3", LIMITS)() == PICTURE
    assert Fetched(f"{server}/hop3", LIMITS)() == PICTURE
    assert Fetched(f"{server}/busy.png", LIMITS)() == PICTURE and Handler.asked["/busy.png"] == 3


@pytest.mark.parametrize(
    ("path", "told", "tries"),
    [
        ("/hop4", "leads on more than 3 times", 1),
        ("/elsewhere", "leads to 'file:///etc/passwd': expected an address with http", 1),
        ("/never.png", "answered 503 Service Unavailable, 3 times", 3),
        ("/slow.png", r"took longer than 0.5 s \(url_seconds=\), 3 times|timed out", 3),
        ("/cut.png", "ended 9 bytes early, 3 times|IncompleteRead", 3),
        ("/gone.png", "answered 404 Not Found$", 1),
        ("/a b.png", "holds characters that an address writes as %XX", 0),
    ],
)
def test_what_is_not(server, path, told, tries):
    with pytest.raises(InputError, match=told) as raised:
        Fetched(f"{server}{path}", LIMITS)()
    assert str(raised.value).startswith(server) and Handler.asked.get(path, 0) == tries


def test_bytes_are_bounded(server):
    with pytest.raises(InputError, match=r"larger than 50 bytes \(url_megabytes=\)"):
        Fetched(f"{server}/a.png", Limits(50, 5, True))()


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:127.0.0.1",
                "0.0.0.0", "224.0.0.1"]
)  # fmt: skip
def test_private_addresses_are_not_asked(monkeypatch, address):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80)),
              (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]  # fmt: skip
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer)
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("connected"))
    with pytest.raises(InputError, match=r"example.org is .*, an address of this machine or its network; .*private"):
        Fetched("http://example.org/a.png", Limits(100, 1, False))()


def test_the_address_that_was_looked_at_is_connected_to(monkeypatch):
    """Whatever a second look at the name would say."""
    looks = []

    def look(host, port, **_):
        looks.append(host)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34" if len(looks) == 1 else "127.0.0.1", port))
        ]

    def connect(place, timeout):
        assert place == ("93.184.216.34", 80) and timeout <= 1
        raise OSError("as far as this test goes")

    monkeypatch.setattr(fetched, "TRIES", 1)
    monkeypatch.setattr(socket, "getaddrinfo", look)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(InputError, match="cannot be fetched .as far as this test goes., 1 times"):
        Fetched("http://example.org/a.png", Limits(100, 1, False))()
    assert looks == ["example.org"]


def test_a_table_of_addresses(server, tmp_path):
    rows = [{"question": f"{number}?", "answer": "a", "image": f"{server}/{number % 3}.png"} for number in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    options = {"val_fraction": "0", "urls": "fetch_private"}
    assert prepare("datasets", tmp_path / "rows.parquet", tmp_path / "out", options, workers=1) == {"train": 6}
    assert Handler.asked == {f"/{number}.png": 1 for number in range(3)}, "each once"
    assert [path.read_bytes() for path in (tmp_path / "out").rglob("*.png")] == [PICTURE] * 3
    with pytest.raises(InputError, match=r"sample 'train-0': http://127.0.0.1:\d+/0.png: 127.0.0.1 is 127.0.0.1"):
        prepare("datasets", tmp_path / "rows.parquet", tmp_path / "no", {**options, "urls": "fetch"}, workers=1)
    rows[4]["image"] = f"{server}/gone.png"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"sample 'train-4': http://.*/gone.png: answered 404 Not Found"):
        prepare("datasets", tmp_path / "rows.parquet", tmp_path / "no", options, workers=1)
    assert not (tmp_path / "no").exists()

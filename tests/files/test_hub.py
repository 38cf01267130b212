"""A hub name that can't be read is told at once, and what is in the cache is read without the hub."""

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from vltrain.errors import InputError
from vltrain.files import hub
from vltrain.files.locate import locate


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A cache of its own; what the hub's package is set to comes back afterwards."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.why_silent.cache_clear()
    yield tmp_path
    hub.why_silent.cache_clear()


def test_a_hub_that_does_not_answer(asked, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"'owner/nam': no such file.*the hub does not answer.*is it spelled right"):
        locate("owner/nam")
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1", "children need not ask again"
    (asked / "models--owner--name").mkdir()
    assert locate("owner/name") == "owner/name"


def test_a_hub_that_answers(asked, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(503)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert locate("owner/name") == "owner/name"
        assert not constants.HF_HUB_OFFLINE
    finally:
        server.shutdown()

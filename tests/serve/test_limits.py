"""The server under load, and at its end: who waits, who is sent home, whose answer is cut. With a stand-in for the
model."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.fake import FakeModel, content, refused, running, wait_until
from vltrain.serve.app import Limits


def test_more_than_may_wait_are_told_to_come_again():
    with running(limits=Limits(max_waiting=2)) as server, ThreadPoolExecutor(3) as pool:
        server.model.hold.clear()
        asked = [pool.submit(server.ask, f"{number}") for number in range(3)]
        wait_until(
            lambda: (
                server.client.get("/health").json() | {"status": "", "model": ""}
                == {"status": "", "model": "", "running": 1, "waiting": 2}
            )
        )
        found = server.ask("one more")
        assert "--max-waiting 2" in refused(found, 429) and int(found.headers["retry-after"]) > 0
        server.model.hold.set()
        assert sorted(content(one.result()) for one in asked) == ["[] 1 0", "[] 1 1", "[] 1 2"]
        assert content(server.ask("again")) == "[] 1 again" and server.app.state.lobby.inside == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_answer(stream):
    with running(model=FakeModel(seconds_a_token=0.02)) as server:
        asked = {"model": "fake", "messages": [{"role": "user", "content": "x" * 2000}], "stream": stream}
        if stream:
            with server.client.stream("POST", "/v1/chat/completions", json=asked) as found:
                next(found.iter_text())
            wait_until(lambda: server.model.num_tokens > 0)
        else:
            with pytest.raises(httpx.TimeoutException):
                server.post(asked, timeout=0.3)
        wait_until(lambda: not server.worker.is_running, 2)  # the whole answer would take 40 s
        assert 0 < server.model.num_tokens < 200 and server.app.state.lobby.inside == 0


def test_a_client_that_goes_while_it_waits_leaves_the_line():
    with running() as server, ThreadPoolExecutor(1) as pool:
        server.model.hold.clear()
        first = pool.submit(server.ask, "first")
        wait_until(lambda: server.worker.is_running)
        with pytest.raises(httpx.TimeoutException):
            server.post({"model": "fake", "messages": [{"role": "user", "content": "second"}]}, timeout=0.3)
        wait_until(lambda: server.worker.waiting == 0 and server.app.state.lobby.inside == 1)
        server.model.hold.set()
        assert content(first.result()) == "[] 1 first" and len(server.model.calls) == 1


def test_an_answer_that_takes_too_long():
    with running(limits=Limits(timeout_seconds=0.3), model=FakeModel(seconds_a_token=0.02)) as server:
        assert "0.3 seconds (--timeout)" in refused(server.ask("x" * 2000), 504)
        wait_until(lambda: not server.worker.is_running, 2)
        streamed = server.ask("x" * 2000, stream=True).text.strip().splitlines()
        assert json.loads(streamed[-1].removeprefix("data: "))["error"]["code"] == "timeout" and len(streamed) > 3


def test_bodies_beyond_the_memory_wait_to_be_read():
    """Sixteen whole bodies are in memory at once: a seventeenth is not read before one of them has gone."""
    with running(limits=Limits(max_request_bytes=10_000, max_waiting=40)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            b"application/json\r\nContent-Length: 10000\r\n\r\n"
        )
        clients = [socket.create_connection((host, int(port)), timeout=10) for _ in range(16)]
        for client in clients:
            client.sendall(head)
        wait_until(lambda: server.app.state.lobby.inside == 16)
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(server.ask, "late")
            wait_until(lambda: server.app.state.lobby.inside == 17)
            time.sleep(0.1)
            assert not late.done() and server.worker.waiting == 0 and not server.model.calls
            clients.pop().close()
            assert content(late.result(timeout=10)) == "[] 1 late"
        for client in clients:
            client.close()
        wait_until(lambda: server.app.state.lobby.inside == 0)


def test_a_server_that_ends_finishes_its_answer_and_sends_the_line_home():
    answers: dict[str, httpx.Response] = {}
    with running() as server:
        server.model.hold.clear()
        threads = [
            threading.Thread(target=lambda text=text: answers.update({text: server.ask(text)}))
            for text in ("first", "second")
        ]
        threads[0].start()
        wait_until(lambda: server.worker.is_running)
        threads[1].start()
        wait_until(lambda: server.worker.waiting == 1)
        server.worker.drain()
        threads[1].join(timeout=10)
        assert "being stopped" in refused(answers["second"], 503) and "retry-after" in answers["second"].headers
        assert server.client.get("/health").status_code == 503
    threads[0].join(timeout=10)
    assert content(answers["first"]) == "[] 1 first"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_outlasts_the_servers_end_is_cut(stream):
    with running(model=FakeModel(seconds_a_token=0.02)) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, "x" * 2000, stream=stream)
        wait_until(lambda: server.model.num_tokens > 2)
        assert server.worker.end(timeout_seconds=5)
        found = asked.result()
        error = json.loads(found.text.strip().splitlines()[-1].removeprefix("data: ")) if stream else found.json()
        assert error["error"]["code"] == "shutting_down" and found.status_code == (200 if stream else 503)


def test_a_server_that_fails_again_and_again_says_so():
    with running() as server:
        for _ in range(3):
            assert server.client.get("/health").status_code == 200
            refused(server.ask("a long boom"), 500)
        assert server.client.get("/health").json()["status"] == "failing"
        content(server.ask("fine"))
        assert server.client.get("/health").json()["status"] == "ok"

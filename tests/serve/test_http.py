"""The server over real sockets, with a stand-in for the model: answers, mistakes, hostile requests, and what stays out
of reach."""

from __future__ import annotations

import json
import os
import socket
import zlib

import openai
import pytest

from tests.serve.fake import content, data_url, image_part, png, refused, running, text_part
from vltrain.data.text.asked import Asked
from vltrain.serve.app import Limits
from vltrain.serve.errors import ApiError
from vltrain.serve.pictures import ImageReader


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.png").write_bytes(png(9, 9))
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.png").write_bytes(png(5, 2))
    (folder / "ä b.png").write_bytes(png(6, 2))
    (folder / "notes.txt").write_text("no image")
    (folder / "out.png").symlink_to(outside / "secret.png")
    (folder / "outside").symlink_to(outside)
    (folder / "within.png").symlink_to(folder / "sub" / "a.png")
    (folder.parent / (folder.name + "-beside")).mkdir()
    (folder.parent / (folder.name + "-beside") / "a.png").write_bytes(png(8, 8))
    with running(images=folder, limits=Limits(max_request_bytes=200_000, max_images=3)) as server:
        server.folder, server.outside = folder, outside
        yield server


def test_an_answer_has_openais_shape(server):
    body = server.ask("hello").json()
    assert body["object"] == "chat.completion" and body["model"] == "fake" and body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "[] 1 hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}


def test_images_stand_in_front_of_the_text_but_between_texts(server):
    first, second = image_part(data_url(png(4, 3))), image_part(data_url(png(2, 2)))
    assert content(server.ask([first, second, text_part("a bare q")])) == "<image>\n<image>\na bare q"
    assert content(server.ask([text_part("a bare q"), first, second])) == "<image>\n<image>\na bare q"
    assert (
        content(server.ask([text_part("a bare A"), first, text_part("B"), second])) == "a bare A\n<image>\nB\n<image>"
    )
    assert content(server.ask([text_part("q"), first, second])).startswith("['4x3', '2x2'] 1 ")


def test_a_marker_that_is_typed_stays_text(server):
    assert content(server.ask("a bare <image>")) == r"a bare <\image>"


def test_a_conversation_reaches_the_model_turn_by_turn(server):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [image_part(data_url(png()))]},
        {"role": "assistant", "content": "a cat", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "sure?"},
    ]
    assert content(server.post({"model": "fake", "messages": messages})) == "['4x3'] 4 sure?"
    turns = server.model.calls[-1]["turns"]
    assert [(turn.role, turn.text) for turn in turns] == [
        ("system", "be brief"),
        ("user", "<image>"),
        ("assistant", "a cat"),
        ("user", "sure?"),
    ]


def test_questions_are_put_as_the_trainings_were():
    """As `vltrain ask` does; what is put so already, or has images between its words, stays."""
    with running() as server:
        server.model.asked = Asked(begin="Q: ", end="\nA:")
        image = image_part(data_url(png()))
        assert content(server.ask("bare")) == "Q: bare\nA:" and content(server.ask("Q: bare\nA:")) == "Q: bare\nA:"
        assert content(server.ask([image, text_part("bare")])) == "<image>\nQ: bare\nA:"
        assert content(server.ask([text_part("bare a"), image, text_part("b")])) == "bare a\n<image>\nb"
    with running(as_is=True) as server:
        server.model.asked = Asked(begin="Q: ", end="\nA:")
        assert content(server.ask("bare")) == "bare"


def test_the_clients_settings_reach_the_model(server):
    content(
        server.ask(
            "x",
            temperature=0.5,
            top_p=0.9,
            seed=3,
            max_tokens=9,
            user="me",
            n=1,
            frequency_penalty=0,
            response_format={"type": "text"},
            store=False,
        )
    )
    call = server.model.calls[-1]
    assert (call["temperature"], call["top_p"], call["seed"], call["max_new_tokens"]) == (0.5, 0.9, 3, 9)
    content(server.ask("x"))
    call = server.model.calls[-1]
    assert (call["temperature"], call["top_p"], call["seed"], call["max_new_tokens"]) == (None, None, None, None)


def test_sampling_without_a_seed_has_another_one_each_time(server):
    seeds = set()
    for _ in range(5):
        server.ask("x", temperature=1)
        seeds.add(server.model.calls[-1]["seed"])
    assert len(seeds) == 5


def test_a_stream_joins_to_the_answer(server):
    client = server.openai()
    chunks = list(
        client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "a b c"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "[] 1 a b c"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_first_piece_of_a_stream_comes_before_the_answer_is_whole(server):
    server.model.hold.clear()
    client = server.openai()
    with client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "bare abc"}], stream=True
    ) as stream:
        first = [next(stream).choices[0].delta.content, next(stream).choices[0].delta.content]
        assert first == ["", "b"]
        server.model.hold.set()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "are abc"


def test_an_answer_that_is_cut_says_so(server):
    assert server.ask("bare abc", max_completion_tokens=4).json()["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "message": {"role": "assistant", "content": "bare", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_an_answer_and_are_no_part_of_it(server, stream):
    client = server.openai()
    asked = {"model": "fake", "messages": [{"role": "user", "content": "bare one END two"}], "stop": ["EN?", "END"]}
    if stream:
        choices = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        assert (
            "".join(choice.delta.content or "" for choice in choices) == "bare one "
            and choices[-1].finish_reason == "stop"
        )
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.message.content == "bare one " and choice.finish_reason == "stop"


@pytest.mark.parametrize("settings", [{}, {"stop": "ab"}])
def test_log_probabilities_are_the_tokens(server, settings):
    """Token k of the stand-in has the log-probability -k."""
    client = server.openai()
    asked = {"model": "fake", "messages": [{"role": "user", "content": "bare_xy_ab"}], "logprobs": True, **settings}
    expected = "bare_xy_" if settings else "bare_xy_ab"
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    for found in (whole, streamed):
        assert "".join(one.token for one in found) == expected
        assert [one.logprob for one in found] == [-float(number) for number in range(len(found))]
        assert all(bytes(one.bytes).decode() == one.token for one in found)


def test_models_and_health(server):
    client = server.openai()
    assert [one.id for one in client.models.list()] == ["fake"] and client.models.retrieve("fake").owned_by == "vltrain"
    assert server.client.get("/health").json() == {"status": "ok", "model": "fake", "running": 0, "waiting": 0}
    assert "did you mean 'fake'" in refused(server.client.get("/v1/models/fkae"), 404)


MISTAKES = {
    "unknown key": ({"temprature": 1}, "did you mean 'temperature'"),
    "n": ({"n": 2}, "n: found 2, expected 1"),
    "n of another type": ({"n": True}, "n: found true"),
    "tools": ({"tools": [{"type": "function"}]}, "calls no tools"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 5}, "top_logprobs"),
    "penalty": ({"frequency_penalty": 0.5}, "no penalties"),
    "penalty of another type": ({"frequency_penalty": False}, "frequency_penalty"),
    "json mode": ({"response_format": {"type": "json_object"}}, "response_format"),
    "temperature": ({"temperature": 2.5}, "from 0 to 2"),
    "negative temperature": ({"temperature": -1}, "from 0 to 2"),
    "temperature as text": ({"temperature": "0"}, "temperature"),
    "temperature as a truth": ({"temperature": True}, "temperature"),
    "top_p": ({"temperature": 1, "top_p": 0}, "top_p"),
    "top_p without effect": ({"top_p": 0.5}, "has no effect"),
    "seed": ({"seed": 1.5}, "seed"),
    "large seed": ({"seed": 2**70}, "seed"),
    "max_tokens zero": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens huge": ({"max_tokens": 10**18}, "max_tokens"),
    "max_tokens beyond the context": (
        {"max_tokens": 5000},
        "max_tokens: found 5000, expected at most 1000: the question has 7 tokens, and the LLM 1007 positions",
    ),
    "two lengths": ({"max_tokens": 1, "max_completion_tokens": 2}, "one of the two"),
    "stop": ({"stop": ["a"] * 5}, "stop"),
    "empty stop": ({"stop": [""]}, "stop"),
    "nested stop": ({"stop": [["a"]]}, "stop"),
    "stream": ({"stream": "yes"}, "stream"),
    "stream options": ({"stream_options": {"include_usage": True}}, "without stream"),
    "model of another type": ({"model": 3}, "model"),
    "no model": ({"model": None}, "model"),
    "messages of another type": ({"messages": {"role": "user"}}, "messages"),
    "no messages": ({"messages": []}, "messages"),
    "a message of another type": ({"messages": ["hi"]}, "messages[0]"),
    "role": ({"messages": [{"role": "usr", "content": "x"}]}, "did you mean 'user'"),
    "role of another type": ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    "tool role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content of another type": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "nested content": (
        {"messages": [{"role": "user", "content": [[{"type": "text", "text": "x"}]]}]},
        "messages[0].content[0]",
    ),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        "messages[0].content[0]",
    ),
    "text of another type": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}]},
        "content[0].text",
    ),
    "image by the assistant": (
        {"messages": [{"role": "assistant", "content": [image_part(data_url(png()))]}]},
        "by the user",
    ),
    "image as a text": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:"}]}]},
        "image_url",
    ),
    "detail": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": data_url(png()), "detail": "high"}}],
                }
            ]
        },
        "no effect",
    ),
    "key of a message": ({"messages": [{"role": "user", "content": "x", "cache": 1}]}, "'cache'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(server, name):
    change, expected = MISTAKES[name]
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], **change}
    assert expected in refused(server.post(body))


IMAGES = {
    "no network": ("https://example.org/a.png", "fetches nothing from the network"),
    "no network, other case": ("HTTP://169.254.169.254/latest/meta-data", "fetches nothing from the network"),
    "ftp": ("ftp://x/a.png", "scheme"),
    "javascript": ("javascript:alert(1)", "scheme"),
    "truncated base64": (data_url(png())[:-3], "base64"),
    "truncated image": (data_url(png(20, 20)[:40]), "image"),
    "no base64": ("data:image/png,abc", "data:image/png;base64"),
    "no data": ("data:image/png;base64,", "empty"),
    "text as an image": (data_url(b"hello"), "not a readable image"),
    "text that says so": (data_url(b"hello", "text/plain"), "text/plain"),
    "svg": (data_url(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml"), "not a readable image"),
    "too many pixels": (data_url(png(100, 100)), "more than the allowed 1000"),
    "line end in base64": (data_url(png()).replace(",", ",\n"), "base64"),
    "parent": ("../secret.png", "leads out"),
    "parent within": ("sub/../../x.png", "leads out"),
    "absolute": ("/etc/passwd", "leads out"),
    "file url outside": ("file:///etc/passwd", "not below the folder"),
    "file url of a host": ("file://host/etc/passwd", "expected file:///"),
    "no such file": ("sub/b.png", "No such file"),
    "no image": ("notes.txt", "not a readable image"),
    "a folder": ("sub", "not a regular file"),
    "the folder": (".", "is no path"),
    "NUL": ("sub/a\0.png", "is no path"),
    "link to a file outside": ("out.png", "leads out"),
    "link to a folder outside": ("outside/secret.png", "leads out"),
    "a long path": ("a" * 9000, "characters"),
    "a long name": ("a" * 4000, "cannot be read"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_refused(server, name):
    url, expected = IMAGES[name]
    message = refused(server.ask([image_part(url), text_part("q")]))
    assert expected in message and "secret" not in message.replace(url, "") and str(server.outside) not in message


def test_files_below_the_folder_are_read(server):
    for url in (
        "sub/a.png",
        "within.png",
        f"file://{server.folder}/sub/a.png",
        f"file://localhost{server.folder}/sub/a.png",
    ):
        assert content(server.ask([image_part(url), text_part("q")])).startswith("['5x2']"), url
    assert content(server.ask([image_part(f"file://{server.folder}/%C3%A4%20b.png"), text_part("q")])).startswith(
        "['6x2']"
    )
    assert content(server.ask([image_part("ä b.png"), text_part("q")])).startswith("['6x2']")


def test_file_urls_outside_are_refused_however_they_are_written(server):
    for path in (
        f"{server.folder}/../secret.png",
        f"{server.folder}/%2e%2e/{server.outside.name}/secret.png",
        f"{server.folder}-beside/a.png",
        str(server.folder),
        f"{server.folder}/outside/secret.png",
        f"{server.folder}/sub/%00",
        f"/proc/self/cwd/{server.folder}/sub/a.png",
    ):
        refused(server.ask([image_part(f"file://{path}"), text_part("q")]))


def test_a_folder_that_becomes_a_link_meanwhile_leads_nowhere(server):
    """What was looked at before must not be remembered."""
    place = server.folder / "swapped"
    place.mkdir()
    (place / "secret.png").write_bytes(png(7, 2))
    assert content(server.ask([image_part("swapped/secret.png"), text_part("q")])).startswith("['7x2']")
    (place / "secret.png").unlink()
    place.rmdir()
    place.symlink_to(server.outside)
    assert "leads out" in refused(server.ask([image_part("swapped/secret.png"), text_part("q")]))


def test_without_a_folder_no_file_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with running() as server:
        for url in ("a.png", f"file://{tmp_path}/a.png", "/etc/passwd", "../a.png"):
            assert "reads no files" in refused(server.ask([image_part(url), text_part("q")]))


def test_too_many_images(server):
    assert "found 4 images, expected 3" in refused(server.ask([image_part(data_url(png()))] * 4))


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb_is_refused_by_its_header(server):
    assert "900000000 pixels" in refused(server.ask([image_part(data_url(bomb())), text_part("q")]))


BODIES = {
    "nothing": b"",
    "cut short": b'{"model": "fake", "messages": [',
    "no JSON": b"hello",
    "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": 1e999}',
    "a key twice": b'{"model": "fake", "model": "fake"}',
    "no UTF-8": b'{"model": "\xff"}',
    "NUL bytes": b'{"model": "fa\0ke"}',
    "only NUL": bytes(100),
    "half a character": b'{"model": "\\ud800"}',
    "deeply nested": b"[" * 100_000,
    "nested objects": b'{"messages":' * 5000 + b"1" + b"}" * 5000,
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "many digits": b'{"seed": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", BODIES)
def test_malformed_bodies(server, name):
    refused(server.post(BODIES[name]))


def test_bodies_that_are_too_large(server):
    asked = {"model": "fake", "messages": [{"role": "user", "content": "x" * 300_000}]}
    message = refused(server.post(asked), 413)
    assert "200,000 bytes" in message and "--max-request-bytes" in message

    def pieces():  # no length is declared
        for _ in range(40):
            yield b" " * 10_000

    found = server.client.post("/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"})
    refused(found, 413)


def test_a_declared_length_is_judged_before_a_byte_is_read(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            b"application/json\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "headers", [{"content_type": "text/plain"}, {"content_type": ""}, {"content_encoding": "gzip"}]
)
def test_other_kinds_of_bodies(server, headers):
    """A page of another site may send text/plain without asking."""
    refused(server.post({"model": "fake"}, **headers), 415)


def test_other_methods_and_routes(server):
    assert "expected POST" in refused(server.client.get("/v1/chat/completions"), 405)
    refused(server.client.delete("/v1/models"), 405)
    assert "/v1/chat/completions" in refused(server.client.post("/v1/completions", json={}), 404)
    for path in (
        "/",
        "/../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/docs",
        "/openapi.json",
        "/v1/models/..%2f..%2fetc%2fpasswd",
    ):
        refused(server.client.get(path), 404)


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_within_the_model_says_nothing_of_it(server, stream, caplog):
    found = server.ask("a long boom", stream=stream)
    assert "secret" not in found.text and "Traceback" not in found.text and "internal error" in found.text
    if not stream:
        refused(found, 500)
    else:  # after the first piece, in the stream
        assert (
            json.loads(found.text.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
        )
    assert content(server.ask("still there")) == "[] 1 still there"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "a@localhost",
        "localhost/x",
        "[::1",
        "0x7f.1",
    ],
)
def test_names_of_others_are_refused(server, host):
    """DNS rebinding: a page's own name that was made to lead here."""
    refused(server.client.get("/health", headers={"host": host}), 403 if host else 403)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:80", "192.168.1.7:8000", "own.example:80"]
)
def test_own_names_and_addresses_pass(host):
    with running(names=["own.example"]) as server:
        assert server.client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"])
def test_pages_of_others_are_refused(server, origin):
    asked = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    refused(server.post(asked, origin=origin), 403)
    found = server.client.options(
        "/v1/chat/completions", headers={"origin": origin, "access-control-request-method": "POST"}
    )
    assert found.status_code == 403 and "access-control-allow-origin" not in found.headers
    assert server.post(asked, origin=server.url).status_code == 200


def test_a_key_is_asked_for():
    with running(key="s3cret") as server:
        asked = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
        for headers in (
            {},
            {"authorization": "Bearer s3cre"},
            {"authorization": "Bearer"},
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
        ):
            assert "API key" in refused(server.post(asked, **headers), 401)
        assert server.post(asked, authorization="Bearer s3cret").status_code == 200
        assert server.client.get("/v1/models", auth=("anybody", "s3cret")).status_code == 200
        assert server.client.get("/health").status_code == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize("url", ["out.png", "outside/secret.png", "within.png"])
def test_a_link_that_is_put_in_after_the_path_was_looked_at_is_not_followed(server, monkeypatch, url):
    """What the look says is the path itself, as if no link had been there."""
    reader = ImageReader(server.folder, 1000)
    with monkeypatch.context() as patched:
        patched.setattr(os.path, "realpath", lambda path, **_: os.path.abspath(path))
        with pytest.raises(ApiError, match="cannot be read"):
            reader.read(url, "image")
    assert reader.read("sub/a.png", "image") == png(5, 2)

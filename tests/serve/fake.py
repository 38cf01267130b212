"""A server with a stand-in for the model: real sockets, real requests, answers that say what was asked."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
from PIL import Image

from vltrain.data.images import open_rgb
from vltrain.data.text.asked import Asked
from vltrain.errors import InputError
from vltrain.evaluate.answering.decoding import Token
from vltrain.inference.answer import AnswerStream
from vltrain.inference.model import LoadedModel
from vltrain.schema import Turn
from vltrain.serve import server
from vltrain.serve.app import Limits, build_app
from vltrain.serve.gates import Gates
from vltrain.serve.shelf import Shelf
from vltrain.serve.worker import Worker

MAX_PIXELS = 1000


class FakeModel:
    """Says its last question again, a token a character, behind the images' sizes and the number of turns.

    `hold`: an answer waits for it at its second token. A question with "boom" fails within the model. One token in
    `seconds_a_token`.
    """

    def __init__(self, *, seconds_a_token: float = 0.0) -> None:
        self.config = SimpleNamespace(
            eval=SimpleNamespace(temperature=0.0), data=SimpleNamespace(max_image_pixels=MAX_PIXELS)
        )
        self.asked: Asked | None = None
        self.multi_turn = self.is_tuned = True
        self.hold = threading.Event()
        self.hold.set()
        self.seconds_a_token = seconds_a_token
        self.calls: list[dict[str, Any]] = []
        self.num_tokens = 0

    def phrase(self, question: str) -> str:
        return question if self.asked is None else self.asked.phrase(question)

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Says everything in capitals."""
        self.is_tuned = False
        try:
            yield
        finally:
            self.is_tuned = True

    def stream(
        self,
        turns: Sequence[Turn],
        images: Sequence[bytes] = (),
        *,
        max_new_tokens: int | None = None,
        cancel: threading.Event | None = None,
        **settings: Any,
    ) -> AnswerStream:
        self.calls.append({"turns": turns, "max_new_tokens": max_new_tokens, **settings})
        sizes = [open_rgb(image, MAX_PIXELS, f"image {number + 1}").size for number, image in enumerate(images)]
        if max_new_tokens is not None and max_new_tokens > 1000:
            raise InputError(
                f"max_new_tokens: found {max_new_tokens}, expected at most 1000: the question has 7 tokens, and "
                "the LLM 1007 positions"
            )
        text = (
            f"{[f'{width}x{height}' for width, height in sizes]} {len(turns)} {turns[-1].text}"
            if "bare" not in turns[-1].text
            else turns[-1].text
        )

        text = text if self.is_tuned else text.upper()

        def tokens() -> Iterator[Token]:
            for number, one in enumerate(text[:max_new_tokens]):
                if number == 1:
                    self.hold.wait()
                if "boom" in text and number == 5:
                    raise RuntimeError("secret internals at /root/secret")
                time.sleep(self.seconds_a_token)
                self.num_tokens += 1
                yield Token(0, ord(one), -float(number), False)
            if max_new_tokens is None or len(text) < max_new_tokens:
                yield Token(0, 0, 0.0, True)

        return AnswerStream(tokens(), lambda ids: "".join(map(chr, ids)), num_prompt_tokens=7, cancel=cancel)


class Running:
    """A server that runs in a thread: `url`, its `model`, `worker` and `app`."""

    def __init__(self, model: Any, worker: Worker, app: Any, url: str) -> None:
        self.model, self.worker, self.app, self.url = model, worker, app, url
        self.client = httpx.Client(base_url=url, timeout=20)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, body: Any, *, timeout: float = 10, **headers: str) -> httpx.Response:
        """`body`: what is sent, as JSON unless it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {
            "content-type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        return self.client.post("/v1/chat/completions", content=data, headers=named, timeout=timeout)

    def ask(self, content: Any, **settings: Any) -> httpx.Response:
        return self.post({"model": "fake", "messages": [{"role": "user", "content": content}], **settings})


@contextmanager
def running(
    *,
    images: Path | None = None,
    limits: Limits = Limits(),
    names: Sequence[str] = (),
    key: str | None = None,
    model: FakeModel | LoadedModel | None = None,
    as_is: bool = False,
) -> Iterator[Running]:
    model = model or FakeModel()
    shelf = Shelf("fake", "step 1", model, [], lambda checkpoint: model)  # type: ignore[arg-type]
    worker = Worker(shelf, as_is=as_is)
    app = build_app(shelf, worker, images=images, limits=limits)
    listener = server.bind("127.0.0.1", 0)
    gates = Gates(app, names=names, key=key, max_body_bytes=limits.max_request_bytes)
    uvicorn_server = server.make_server(gates, worker, max_waiting=limits.max_waiting, greeting="")
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    found = Running(model, worker, app, server.url_of(listener))
    try:
        yield found
    finally:
        if isinstance(model, FakeModel):
            model.hold.set()
        uvicorn_server.should_exit = True
        thread.join(timeout=20)
        worker.end(timeout_seconds=5)
        found.client.close()
        listener.close()
        assert not thread.is_alive()


def png(width: int = 4, height: int = 3, colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "PNG")
    return stream.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def refused(response: httpx.Response, status: int = 400) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"] and "\n" not in error["message"]
    return error["message"]


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""Answers in the JSON of OpenAI's chat completions, whole and as chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from vltrain.serve.worker import Done, Piece, TokenText

END = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Completion:
    """One answer's id, time and model, which all of its objects say."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, pieces: list[Piece], done: Done, *, logprobs: bool) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        told = _logprobs([token for piece in pieces for token in piece.tokens]) if logprobs else None
        choice = {"index": 0, "message": message, "logprobs": told, "finish_reason": done.reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(done)}

    def first(self) -> dict[str, Any]:
        """The chunk before any text."""
        return self._chunk({"role": "assistant", "content": ""})

    def part(self, piece: Piece, *, logprobs: bool) -> dict[str, Any]:
        return self._chunk(
            {"content": piece.text} if piece.text else {},
            _logprobs(list(piece.tokens)) if logprobs and piece.tokens else None,
        )

    def last(self, done: Done) -> dict[str, Any]:
        return self._chunk({}, None, done.reason)

    def counts(self, done: Done) -> dict[str, Any]:
        """The chunk behind the last, for who asked for it."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(done)}

    def _chunk(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def usage(done: Done) -> dict[str, int]:
    """Counts of tokens; an image counts as those that the language model reads of it."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }


def _logprobs(tokens: list[TokenText]) -> dict[str, Any]:
    content = [
        {"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode()), "top_logprobs": []}
        for one in tokens
    ]
    return {"content": content, "refusal": None}

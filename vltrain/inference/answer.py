"""An answer, and its text as it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vltrain.evaluate.answering.decoding import Token

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no whole character, or not yet
OnToken = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says to a question.

    text       without surrounding space, as `vltrain evaluate` judges it
    token_ids  the new tokens, without the one that ended them
    tokens     the text that each of them made certain: "" where a character is not whole yet; joined, they are `text`
    logprobs   the natural logarithm of each token's probability at temperature 1, among all rows of the LLM's head, in
               fp32
    finished   False where `max_new_tokens` or the caller ended it
    """

    text: str
    token_ids: list[int] = field(repr=False)
    tokens: list[str] = field(repr=False)
    logprobs: list[float] = field(repr=False)
    finished: bool

    def __str__(self) -> str:
        return self.text


class TextPieces:
    """Tokens to text, piece by piece: what was given never changes, and the pieces joined are the text of all tokens,
    stripped.

    Held back: characters of which only some bytes are there, and space, which may be the last. Each token reads the
    whole answer again: some microseconds for each of its tokens, far from what a forward takes.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode, self._ids, self._given = decode, [], ""

    def add(self, token_id: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token_id)
        return self._give(self._text().rstrip(UNKNOWN).rstrip())

    def finish(self) -> str:
        """What was held back, at the end."""
        return self._give(self._text())

    def _text(self) -> str:
        return self._decode(self._ids).strip()

    def _give(self, certain: str) -> str:
        if not certain.startswith(self._given):
            return ""  # a part of what was given waits for its end again
        piece, self._given = certain[len(self._given) :], certain
        return piece


class AnswerStream(Iterator[str]):
    """The pieces of an answer's text, as they come; `answer()` is what has come so far. `num_prompt_tokens`: that the
    question has, with its images'.

    Closing it, leaving its `with` block or dropping it ends the model's work; so does `cancel`, from any thread, before
    the next token.
    """

    def __init__(
        self,
        tokens: Iterator[Token],
        decode: Callable[[list[int]], str],
        *,
        num_prompt_tokens: int,
        on_token: OnToken | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self._tokens, self._on_token, self._cancel = tokens, on_token, cancel
        self._pieces = TextPieces(decode)
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[float] = []
        self._finished = self._closed = False

    def __next__(self) -> str:
        while not self._closed:
            piece = self._step()
            if piece:
                return piece
        raise StopIteration

    def _step(self) -> str:
        """The text of one token more; the rest at the end."""
        token = None if self._cancel is not None and self._cancel.is_set() else next(self._tokens, None)
        if token is None or token.ends:
            self._finished = token is not None
            self.close()
            piece = self._pieces.finish()
            if self._texts:
                self._texts[-1] += piece
            return piece
        if self._on_token is not None:
            self._on_token(token.id, token.logprob)
        piece = self._pieces.add(token.id)
        self._ids.append(token.id)
        self._logprobs.append(token.logprob)
        self._texts.append(piece)
        return piece

    def answer(self) -> Answer:
        """What has come so far; the whole answer once the stream has ended."""
        return Answer(
            text="".join(self._texts),
            token_ids=list(self._ids),
            tokens=list(self._texts),
            logprobs=list(self._logprobs),
            finished=self._finished,
        )

    def close(self) -> None:
        """Ends the model's work. May be called again."""
        self._closed = True
        close = getattr(self._tokens, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

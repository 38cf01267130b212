"""The one thread that asks models: requests wait in a line, answers go back piece by piece to the event loop that
asked.

Requests are answered one after the other, in the order they came; a model's forwards would only slow each other down.
Trade-off: no continuous batching, which engines that a merged model is exported for have.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from vltrain.data.text.pieces import split_front_images
from vltrain.errors import InputError, one_line
from vltrain.inference.answer import AnswerStream
from vltrain.inference.model import LoadedModel
from vltrain.schema import IMAGE_MARKER, Turn
from vltrain.serve.chat_request import ChatRequest
from vltrain.serve.errors import ApiError, bad_request, internal, unavailable
from vltrain.serve.stopping import StopTexts

logger = logging.getLogger(__name__)

_LENGTH = "max_new_tokens"  # what models call it
FAILURES_IN_A_ROW = 3  # of ours, after which the server calls itself unhealthy


class Models(Protocol):
    """Where models are looked up, see `vltrain.serve.shelf`."""

    def asked(self, name: str) -> AbstractContextManager[LoadedModel]: ...


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """A token's part of the text, and the logarithm of its probability."""

    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The next part of an answer, and the tokens that are wholly in what was given so far."""

    text: str
    tokens: tuple[TokenText, ...]


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end of an answer. reason: `stop` where model or a stop text ended it, `length` at its longest."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


class Gone:
    """The client has gone, and nobody reads on."""


Event = Piece | Done | ApiError | Gone


class Job:
    """One request on its way: made, awaited and cancelled on an event loop, answered by the worker's thread."""

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()  # as long as an answer at most

    def emit(self, event: Event) -> None:
        """For any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and its clients with it
            self.cancelled.set()

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled.set()
        self.emit(Gone())

    async def next(self) -> Event:
        return await self._events.get()


class Worker:
    """Answers jobs one by one.

    `as_is`: questions are not put as the training's were. `waiting`: how many stand in line; `is_running`: whether one
    is answered; `is_healthy`: it is not failing again and again.
    """

    def __init__(self, models: Models, *, as_is: bool = False) -> None:
        self._models, self._as_is = models, as_is
        self._line: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_draining = False
        self._current: Job | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def is_running(self) -> bool:
        return self._current is not None

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self._failures < FAILURES_IN_A_ROW

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the line. Raises ApiError, 503, where the server ends."""
        with self._changed:
            if self._is_draining:
                raise _ending()
            self._line.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Cancels a job wherever it is: it leaves the line, or its answer ends before the next token."""
        job.cancelled.set()
        with self._changed:
            if job in self._line:
                self._line.remove(job)

    def drain(self) -> None:
        """Takes nothing more and sends the line home; the answer that is being given goes on."""
        with self._changed:
            self._is_draining = True
            left = list(self._line)
            self._line.clear()
            self._changed.notify()
        for job in left:
            job.emit(_ending())

    def cut(self) -> None:
        """Ends the running answer before its next token."""
        current = self._current
        if current is not None:
            current.emit(_ending())
            current.cancelled.set()

    def end(self, timeout_seconds: float) -> bool:
        """Drains, cuts, and waits for the thread. Whether it has ended."""
        self.drain()
        self.cut()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _answer(self, job: Job) -> Iterator[Event]:
        with self._models.asked(job.request.model) as model:
            request = (
                job.request
                if self._as_is
                else replace(job.request, turns=tuple(phrased(model, turn) for turn in job.request.turns))
            )
            yield from answer(model, request, job.cancelled)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._is_draining)
                if not self._line:
                    return
                job = self._current = self._line.popleft()
            try:
                for event in () if job.cancelled.is_set() else self._answer(job):
                    job.emit(event)
                self._failures = 0
            except ApiError as error:
                job.emit(error)
            except (MemoryError, torch.OutOfMemoryError) as error:
                logger.error("out of memory on a request: %s", one_line(str(error)))
                job.emit(
                    unavailable(
                        "out of memory for this request; send smaller or fewer images, or a shorter conversation",
                        "out_of_memory",
                    )
                )
            except Exception:
                self._failures += 1
                logger.exception("an answer failed")
                job.emit(internal())
            finally:
                self._current = None
                del job  # its images


def _ending() -> ApiError:
    return unavailable("the server is being stopped", "shutting_down")


def answer(model: LoadedModel, request: ChatRequest, cancelled: threading.Event) -> Iterator[Event]:
    """Asks the model. Ends without Done where it was cancelled. Raises ApiError for what the model cannot be asked."""
    settings = {"max_new_tokens": request.max_new_tokens, "temperature": request.temperature, "top_p": request.top_p}
    temperature = model.config.eval.temperature if request.temperature is None else request.temperature
    seed = request.seed
    if temperature == 0 and request.top_p not in (None, 1.0):
        raise bad_request(
            f"top_p: found {request.top_p:g}: has no effect, since a temperature of 0 is greedy; leave it out, "
            "or give a temperature",
            "top_p",
        )
    if temperature > 0:
        # Asked again without a seed, a client expects another answer.
        seed = secrets.randbits(31) if seed is None else seed % 2**63
    try:
        stream = model.stream(request.turns, request.images, **settings, seed=seed, cancel=cancelled)
    except InputError as error:
        message, is_length = str(error).removeprefix("sample 'question': "), str(error).startswith(_LENGTH)
        raise bad_request(
            message.replace(_LENGTH, "max_tokens", 1) if is_length else message,
            "max_tokens" if is_length else "messages",
        ) from None
    with stream:
        yield from _events(stream, request, cancelled)


def phrased(model: LoadedModel, turn: Turn) -> Turn:
    """A question as `vltrain ask` puts it: as the training's were, behind its images; one with images between its words
    stays as it is."""
    front, text = split_front_images(turn.text)
    if turn.role != "user" or IMAGE_MARKER in text or not text.strip():
        return turn
    return replace(turn, text=front + model.phrase(text))


def _events(stream: AnswerStream, request: ChatRequest, cancelled: threading.Event) -> Iterator[Event]:
    stops = StopTexts(request.stop)
    given = num_sent = 0
    for piece in stream:
        text = stops.add(piece)
        given += len(text)
        tokens = _tokens(stream, given, is_end=False)[num_sent:] if request.logprobs else ()
        num_sent += len(tokens)
        if text or tokens:
            yield Piece(text=text, tokens=tokens)
        if stops.has_stopped:
            break
    answer = stream.answer()
    if cancelled.is_set() and not answer.finished and not stops.has_stopped:
        return
    rest = stops.finish()
    tokens = _tokens(stream, given + len(rest), is_end=True)[num_sent:] if request.logprobs else ()
    if rest or tokens:
        yield Piece(text=rest, tokens=tokens)
    reason = "stop" if answer.finished or stops.has_stopped else "length"
    yield Done(reason=reason, prompt_tokens=stream.num_prompt_tokens, completion_tokens=len(answer.token_ids))


def _tokens(stream: AnswerStream, num_characters: int, *, is_end: bool) -> tuple[TokenText, ...]:
    """The tokens that begin in the first so many characters; before the end without the last one, to which what was
    held back may be added."""
    answer, found, end = stream.answer(), [], 0
    for text, logprob in zip(answer.tokens, answer.logprobs):
        if end >= num_characters and text:
            break
        end += len(text)
        if end > num_characters and not is_end:
            break
        found.append(TokenText(text=text, logprob=logprob))
    return tuple(found if is_end else found[: max(0, min(len(found), len(answer.tokens) - 1))])

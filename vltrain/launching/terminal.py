"""The conversation of `vltrain ask`: questions by line, answers as they come.

Where the run's template holds conversations and its training had some, earlier questions and answers are read with each
new one, images with the question that they came with. Else each question stands alone, about the images named last.
Lines that come through a pipe are asked the same way, and the first mistake ends it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vltrain.errors import InputError, nearest
from vltrain.launching.asking import Request, say_all, tell
from vltrain.schema import Turn, escape_markers

if TYPE_CHECKING:
    from vltrain.inference.model import LoadedModel

COMMANDS = {
    "/image": "FILE: an image for the next question",
    "/clear": "forget images and conversation",
    "/quit": "end",
    "/help": "this",
}


class _Talk:
    """`turns` and `images`: what was said and shown so far; `waiting`: images of the next question."""

    def __init__(self, model: LoadedModel, request: Request) -> None:
        self.model, self.request = model, request
        self.remembers = model.multi_turn and (model.asked is None or model.asked.multi_turn)
        self.waiting = list(request.images)
        self.named_last = False  # an image, so that another one joins it
        self.turns: list[Turn] = []
        self.images: list[Path] = []

    def show(self, name: str) -> None:
        """Takes an image for the next question. Where questions stand alone, the first of them takes the place of those
        before."""
        if not name:
            raise InputError("/image: found no file, expected /image FILE")
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"/image {name}: no such file, expected an image")
        if not self.remembers and not self.named_last:
            self.waiting = []
        self.waiting.append(path)
        self.named_last = True

    def clear(self) -> None:
        self.turns, self.images, self.waiting, self.named_last = [], [], [], False

    def ask(self, text: str) -> None:
        turn = self.model.question(text, len(self.waiting), as_is=self.request.as_is)
        turns, images = [*self.turns, turn], [*self.images, *self.waiting]
        answer = say_all(self.model, self.request, turns, images)
        self.named_last = False
        if not self.remembers:
            return
        if answer.text:  # nothing said is nothing to go on from
            self.turns, self.images = [*turns, Turn(role="assistant", text=escape_markers(answer.text))], images
            self.waiting = []


def converse(model: LoadedModel, request: Request) -> None:
    """Reads lines from stdin until it ends, or `/quit`. Raises InputError for a mistake in lines that nobody typed."""
    talk, typed = _Talk(model, request), sys.stdin.isatty()
    if typed:
        print(f"{model.run}: ask; {', '.join(COMMANDS)}; Ctrl-D ends it", file=sys.stderr)
    if not talk.remembers:
        why = "its template holds one" if not model.multi_turn else "its training had one at a time"
        tell(f"each question stands alone: {why}")
    for line in _lines(typed):
        try:
            if not _obey(talk, line):
                return
        except InputError as error:
            if not typed:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            if not typed:
                raise
            tell("answer interrupted; Ctrl-D ends the conversation")


def _lines(typed: bool) -> Iterator[str]:
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited, and earlier ones found
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise InputError(f"stdin: not text ({error}), expected UTF-8") from None
        if not typed and not line:
            return
        if line.strip():
            yield line.strip()


def _obey(talk: _Talk, line: str) -> bool:
    """Does what a line says. Returns whether the conversation goes on."""
    word, _, rest = line.partition(" ")
    if not word.startswith("/"):
        talk.ask(line)
    elif word == "/image":
        talk.show(rest.strip())
    elif word == "/clear":
        talk.clear()
    elif word == "/quit":
        return False
    elif word == "/help":
        print("\n".join(f"{name:8}{what}" for name, what in COMMANDS.items()), file=sys.stderr)
    else:
        raise InputError(f"unknown command '{word}', {nearest(word, COMMANDS)}")
    return True

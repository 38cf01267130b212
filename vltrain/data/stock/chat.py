"""A conversation as a stock model's own processor writes and tokenises it, with loss on the answers.

As template `chat` (`vltrain.data.text.chat`): rendered and tokenised at once, special tokens told apart by where they
stand, and the same checks of each sample. What differs is how an image comes in: as an entry of a turn's content, which
the processor's chat template writes in its own way, and in whose place then stands what the processor puts there for a
picture of that size.

Where a template ends an answer with nothing that generation could stop at (LLaVA-1.5's), the answer ends with the
tokenizer's end of sequence.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from vltrain.data.stock.processor import StockProcessor
from vltrain.data.text.chat import BEGIN, END, ChatEncoder, Message, Rendered
from vltrain.data.text.pieces import MARKER, Piece
from vltrain.errors import InputError
from vltrain.schema import Turn, unescape_markers

_RESERVED = re.compile(f"[{chr(0xFF000)}-{chr(0xFFFFD)}{chr(0x100000)}-{chr(0x10FFFD)}]")
_REPLACEMENT = "in_text"  # a key of an image's entry that no template reads


class StockChat(ChatEncoder):
    """A `ChatEncoder` of a processor."""

    def __init__(self, processor: StockProcessor) -> None:
        """Raises InputError for a chat template that drops images, or parts of a turn."""
        self._image_token = processor.image_token
        self._video_token: str | None = getattr(processor.inner, "video_token", None)
        own: dict[str, Any] = processor.inner.__dict__
        named = {one for name, one in own.items() if name.endswith("_token") and isinstance(one, str)}
        self._plain_roles = frozenset[str]()
        tokenizer = processor.tokenizer
        super().__init__(tokenizer, {*named, self._image_token})
        outer, bare = processor.inner.tokenizer, processor.tokenizer.encode_markup("a")
        around = [int(one) for one in outer("a")["input_ids"]]
        place = next((start for start in range(len(around)) if around[start : start + len(bare)] == bare), None)
        if place is None or len(around) != place + len(bare):
            raise InputError(
                f"{processor.where}: its tokenizer ends every text with further tokens, so no prompt could be "
                "answered; save it with add_eos_token false"
            )
        self._front, self._bos = [] if processor.writes_itself else around[:place], outer.bos_token or ""
        self._plain_roles = frozenset(role for role in ("system", "assistant") if not self._takes_lists(role))
        self._trims = self._rendered_of("  a  ") == self._rendered_of("a")
        self._ends_answers = self._has_ends()
        asked: list[Message] = [self._message("user", self.content("a"))]
        self._in_front = [] if self.begins_itself(tokenizer.render_chat(asked)) else self._front

    def content(self, text: str) -> Any:
        return [{"type": "text", "text": text}]

    def messages(self, turns: Sequence[Turn], in_text: Sequence[str]) -> list[Message]:
        """The turns as the template takes them; `in_text`: what stands in the place of each image."""
        replacements, found = iter(in_text), list[Message]()
        for turn in turns:
            if reserved := _RESERVED.search(turn.text):
                raise InputError(
                    f"a turn holds the private-use character U+{ord(reserved[0]):X}, which is reserved here; remove it"
                )
            if self._video_token and self._video_token in turn.text:
                raise InputError(
                    f"a turn holds {self._video_token!r}, which is where this model's processor puts a video; videos "
                    "are not read here: list frames of one as images, or remove the word"
                )
            texts = MARKER.split(turn.text.strip()) if turn.role == "user" else [turn.text.strip()]
            parts: list[dict[str, str]] = []
            for number, text in enumerate(map(unescape_markers, texts)):
                if number:
                    parts.append({"type": "image", _REPLACEMENT: next(replacements)})
                if text := text.strip() if self._trims else text:
                    parts.append({"type": "text", "text": text})
            found.append(self._message(turn.role, parts))
        return found

    def text(self, messages: Sequence[Message]) -> str:
        """A prompt as the template writes it, for the processor itself."""
        return self.tokenizer.render_chat(messages, True)

    def spells(self, turns: Sequence[Turn]) -> bool:
        """Whether a turn's text spells a special token, which is text here and would be the token there."""
        return any(self._spelled.search(unescape_markers(turn.text)) for turn in turns)

    def begins_itself(self, text: str) -> bool:
        """Whether a text begins with what the tokenizer would put in front."""
        return bool(self._bos) and text.startswith(self._bos)

    def ids(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Of a rendered conversation, with what the tokenizer puts in front."""
        return [*self._in_front, *self.encode(self.render(messages, add_generation_prompt))[0]]

    def pieces(self, messages: Sequence[Message]) -> Iterator[Piece]:
        found = list(super().pieces(messages))
        if self._in_front:
            yield Piece(self._in_front)
        # What stands behind a last answer that the template does not end is nobody's.
        yield from found if self._ends_answers else found[:-1]

    def ended(self, answer: Piece) -> Piece:
        if answer.num_closing:
            return answer
        return answer._replace(ids=[*answer.ids, self.tokenizer.eos_id], num_closing=1)

    def closing(self, ids: list[int], offsets: list[tuple[int, int]], behind: int, bound: int) -> int:
        return super().closing(ids, offsets, behind, bound) if self._ends_answers else behind

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        marked = [_with_marks(message) for message in messages]
        rendered = self.tokenizer.render_chat(marked, add_generation_prompt)
        replacements = iter(_replacements(messages))
        text, contents = "", list[tuple[int, int]]()

        def written(markup: str) -> str:
            if END in markup:
                raise InputError("the processor's chat template writes a text twice, or only its end")
            parts = markup.split(self._image_token)
            filled = parts[0]
            for part in parts[1:]:
                if (replacement := next(replacements, None)) is None:
                    raise InputError("the processor's chat template writes more images than there are")
                filled += replacement + part
            return self._mark(filled)

        for message in messages:
            begin = end = -1
            for said in _texts(message):
                markup, begun, rest = rendered.partition(BEGIN)
                content, closed, rendered = rest.partition(END)
                if not begun or not closed or content != said:
                    raise InputError(
                        "the processor's chat template drops or reorders texts, or writes only a part of one "
                        f"({said[:40]!r})"
                    )
                text += written(markup)
                begin = len(text) if begin < 0 else begin
                text += content
                end = len(text)
            contents.append((begin if begin >= 0 else len(text), end if end >= 0 else len(text)))
        if BEGIN in rendered:
            raise InputError("the processor's chat template writes a turn twice")
        text += written(rendered)
        left = len(list(replacements))
        if left:
            raise InputError(
                f"the processor's chat template drops {left} image(s): it writes {self._image_token!r} for none of "
                "them; take a template that does"
            )
        return Rendered(text=text, contents=contents)

    def require_own_ids(self, messages: Sequence[Message], rendered: Rendered, ids: list[int]) -> None:
        own, replacements = self.tokenizer.render_chat(messages), iter(_replacements(messages))
        if any(self._spelled.search(text) for message in messages for text in _texts(message)):
            return  # text here, control tokens there
        own = re.sub(re.escape(self._image_token), lambda _: next(replacements), own)
        if self.unmarked(rendered.text) != own:
            raise InputError("the processor's chat template rewrites the texts of turns")
        if self.tokenizer.encode_markup(own) != ids:
            raise InputError("tokenised at once, these turns are other tokens than the processor's own")

    def _message(self, role: str, parts: list[dict[str, str]]) -> Message:
        if role in self._plain_roles:
            return {"role": role, "content": "".join(part["text"] for part in parts)}
        return {"role": role, "content": parts}

    def _takes_lists(self, role: str) -> bool:
        """Whether the template writes what is said in that role as a list of entries, as it does a user's."""
        asked = {"role": "user", "content": self.content("b")}
        said = {"role": role, "content": self.content("a")}
        try:
            self.render([said, asked] if role == "system" else [asked, said])
        except InputError:
            return False
        return True

    def _has_ends(self) -> bool:
        """Whether the template ends an answer with a special token."""
        whole = self.render([self._message(role, self.content("a")) for role in ("user", "assistant")])
        ids, offsets = self.encode(whole)
        behind = bisect_left(offsets, whole.contents[-1][1], key=lambda span: span[0])
        return super().closing(ids, offsets, behind, len(whole.text)) > behind

    def _rendered_of(self, text: str) -> str:
        return self.tokenizer.render_chat([{"role": "user", "content": self.content(text)}])


def _replacements(messages: Sequence[Message]) -> list[str]:
    return [part[_REPLACEMENT] for message in messages for part in _parts(message) if part["type"] == "image"]


def _texts(message: Message) -> list[str]:
    return [part["text"] for part in _parts(message) if part["type"] == "text"]


def _parts(message: Message) -> list[dict[str, str]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _with_marks(message: Message) -> Message:
    parts = [
        {**part, "text": f"{BEGIN}{part['text']}{END}"} if part["type"] == "text" else part for part in _parts(message)
    ]
    return {**message, "content": parts[0]["text"] if isinstance(message["content"], str) else parts}

"""Template `chat`: turns as the tokenizer's own chat template writes them, tokenised as the chat model's own tokenizer
does.

The whole conversation is rendered and tokenised at once, so that spaces, line ends and word marks fall where the model
was tuned on them.
Turn by turn, a sentencepiece vocabulary would put a word mark in front of each. Loss lies on the tokens of assistant
turns, found by their places in the rendered text, up to the special token that ends them.

Three things are written into the conversation for the way and found again in what the template made of it: a mark
before and one behind each turn's content, and one in the place of each image, which splits the text as a special token
does. Two kinds of spelling are told apart by where they stand: a special token in what the template wrote is that
token, in a turn's content it is text.

Nothing of this is taken on trust. Of every sample it is checked that the template wrote each turn whole and in order,
that the tokens are those of the tokenizer's own `apply_chat_template` and encoding (where no turn spells a special
token), and that the prompt by itself, as it is asked in evaluation, gives the tokens in front of the answer. What is
otherwise is refused, at the latest when it is packed or asked.

Trade-off: three renderings and two encodings a sample. Turns are stripped of surrounding space, as most templates do
themselves.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import tokenizers

from vltrain.data.text.backend import make_special
from vltrain.data.text.pieces import IMAGE_PREFIX, MARKER, Piece, name_missing_image
from vltrain.data.text.tokenizer import Tokenizer, TransformersTokenizer
from vltrain.errors import InputError
from vltrain.schema import IMAGE_TOKEN, Turn, unescape_markers

# Of a plane that is nobody's, so that no vocabulary's normalizer knows them: content begins, content ends, an image,
# and from the last on the special tokens that the template wrote.
BEGIN, END, _IMAGE, _FIRST_SPECIAL = (chr(0xFFF00), chr(0xFFF01), chr(0xFFF02), 0xFF000)
_ROOM, _MORE_SPECIAL = 0xF00, 0x100000
_MARKS = re.compile(f"[{chr(_FIRST_SPECIAL)}-{chr(0xFFFFD)}]")
_PROBE = (
    Turn(role="user", text="Image: N/A\nred?"),
    Turn(role="assistant", text="yes"),
    Turn(role="user", text="blue?"),
    Turn(role="assistant", text="no"),
)
_SPANS = (
    "the prompt by itself has other tokens than in front of its answer, where its end is tokenised with the "
    "beginning of that; use template 'mmt'"
)
_METHOD = "turns tokenised at once"


Message: TypeAlias = Mapping[str, Any]
"""Role and content of a turn, as chat templates take it."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as the template wrote it. `text`: special tokens and images as single marks; `contents`: [begin,
    end) of each turn's."""

    text: str
    contents: list[tuple[int, int]]


def chat_pieces(turns: tuple[Turn, ...], tokenizer: Tokenizer, visual_tokens: int) -> Iterator[Piece]:
    """The pieces of a conversation. Raises InputError for a template that cannot be trained on, see the module."""
    messages = [{"role": turn.role, "content": _content(turn)} for turn in name_missing_image(turns)]
    for piece in _encoder(tokenizer).pieces(messages):
        yield piece if piece.predicted else Piece(_expand(piece.ids, visual_tokens))


def chat_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special token by which the template ends an answer, and the tokenizer's own."""
    answer = list(chat_pieces(_PROBE[:2], tokenizer, 1))[1]
    return tuple(dict.fromkeys((answer.ids[-1], tokenizer.eos_id)))


def answer_prefix(tokenizer: Tokenizer) -> str:
    """What a prompt has behind the text that the template renders with its generation prompt: mostly nothing."""
    encoder = _encoder(tokenizer)
    messages: Sequence[Message] = [{"role": turn.role, "content": turn.text} for turn in _PROBE[:2]]
    whole = encoder.render(messages)
    _, gap = encoder.prompt_end(messages, whole, encoder.encode(whole)[0])
    begin = len(encoder.render(messages[:-1], True).text)
    return encoder.unmarked(whole.text[begin : whole.contents[-1][0] - len(gap)])


def chat_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) over the tokenizer, how turns are tokenised, and what the template writes."""
    texts: list[str] = []
    for turns in (_PROBE[:2], _PROBE):
        try:
            texts.append(tokenizer.render_chat([{"role": turn.role, "content": turn.text} for turn in turns]))
        except InputError as error:  # of templates for one question and answer
            texts.append(str(error))
    return hashlib.sha256(json.dumps([tokenizer.fingerprint, _METHOD, texts]).encode()).hexdigest()


def _special_mark(place: int) -> str:
    """Of the special token at that place: of a further plane that is nobody's where the first is full."""
    return chr(_FIRST_SPECIAL + place) if place < _ROOM else chr(_MORE_SPECIAL + place - _ROOM)


def _content(turn: Turn) -> str:
    if found := _MARKS.search(turn.text):
        raise InputError(
            f"a turn holds the private-use character U+{ord(found[0]):X}, which is reserved here; remove it"
        )
    text = (
        MARKER.sub(f"{IMAGE_PREFIX}{_IMAGE}\n", turn.text.strip()).strip() if turn.role == "user" else turn.text.strip()
    )
    return unescape_markers(text)


def _expand(ids: list[int], visual_tokens: int) -> list[int]:
    return [one for number in ids for one in ([IMAGE_TOKEN] * visual_tokens if number == IMAGE_TOKEN else [number])]


@functools.lru_cache(maxsize=4)
def _encoder(tokenizer: Tokenizer) -> ChatEncoder:
    if not isinstance(tokenizer, TransformersTokenizer):
        raise InputError("this tokenizer has no chat template; use template 'mmt' or a tokenizer that brings one")
    return ChatEncoder(tokenizer)


class ChatEncoder:
    """A tokenizer's backend in which special tokens are written as marks, and nothing else becomes one."""

    def __init__(self, tokenizer: TransformersTokenizer, control: Collection[str] = ()) -> None:
        """`control`: further added tokens that no turn's text becomes."""
        self.tokenizer = tokenizer
        asked: list[Message] = [{"role": "user", "content": self.content(_PROBE[0].text)}]
        self.opens_answers = tokenizer.render_chat(asked, True) != tokenizer.render_chat(asked)
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend)
        added = self._backend.get_added_tokens_decoder()
        # What the template writes is control, also where the tokenizer does not call it special.
        written = {
            number
            for number, token in added.items()
            if (token.content in (tokenizer.chat_template or "") and not token.content.isspace())
            or token.content in control
        }
        special = {number: token for number, token in sorted(added.items()) if token.special or number in written}
        make_special(self._backend, [token.content for token in special.values()])
        self._ends = tokenizer.special_ids | special.keys()
        marks = {number: _special_mark(place) for place, number in enumerate(special)}
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        self._backend.add_tokens(  # pyright: ignore[reportUnknownMemberType] its stub says a list, not of what
            [
                tokenizers.AddedToken(marks[number], special=False, **{flag: getattr(token, flag) for flag in flags})
                for number, token in special.items()
            ]
            + [tokenizers.AddedToken(_IMAGE, special=False, normalized=False)]
        )
        self._backend.encode_special_tokens = True
        self._meant = {self._backend.token_to_id(mark): number for number, mark in marks.items()} | {
            self._backend.token_to_id(_IMAGE): IMAGE_TOKEN
        }
        self._mark_of = {token.content: marks[number] for number, token in special.items()}
        self._unmarked = {ord(mark): content for content, mark in self._mark_of.items()}
        self._spelled = re.compile("|".join(map(re.escape, sorted(self._mark_of, key=len, reverse=True))) or r"(?!)")
        plain = (number for number, token in special.items() if not any(getattr(token, flag) for flag in flags))
        self._stand_in = next(((special[number].content, number) for number in plain), None)

    def content(self, text: str) -> Any:
        """A text as the template takes it."""
        return text

    def pieces(self, messages: Sequence[Message]) -> Iterator[Piece]:
        """A conversation that ends with an answer. Raises InputError for a template that cannot be trained on."""
        whole = self.render(messages)
        ids, offsets = self.encode(whole)
        self.require_own_ids(messages, whole, ids)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        prompt_length, gap = self.prompt_end(messages, whole, ids)
        given = 0
        for number in answers:
            begin, end = whole.contents[number]
            bound = whole.contents[number + 1][0] if number + 1 < len(messages) else len(whole.text)
            begin -= len(gap) if whole.text[:begin].endswith(gap) else 0
            first = next(place for place, (start, stop) in enumerate(offsets) if stop > begin or start >= begin)
            spans = offsets[first][0] < begin
            if number == answers[-1] and prompt_length is not None:
                first, spans = prompt_length, False
            behind = bisect_left(offsets, end, lo=first, key=lambda span: span[0])
            closing = self.closing(ids, offsets, behind, bound)
            yield Piece(ids[given:first])
            fault = _SPANS if spans or (number == answers[-1] and prompt_length is None) else ""
            answer = Piece(ids[first:closing], predicted=True, opens_answer=True, num_closing=closing - behind)
            yield self.ended(answer)._replace(fault=fault)
            given = closing
        yield Piece(ids[given:])

    def ended(self, answer: Piece) -> Piece:
        """The answer with what ends it."""
        if not answer.num_closing:
            raise InputError(
                "the tokenizer's chat template ends an assistant turn with no special token, so generation could not "
                "stop; use 'mmt'"
            )
        return answer

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """The conversation with marks in it. Raises InputError where the template did not write each content, whole and
        in order."""
        marked = [{**message, "content": f"{BEGIN}{message['content']}{END}"} for message in messages]
        rendered = self.tokenizer.render_chat(marked, add_generation_prompt)
        text = ""
        contents: list[tuple[int, int]] = []
        for message in messages:
            markup, begun, rest = rendered.partition(BEGIN)
            content, ended, rendered = rest.partition(END)
            if not begun or not ended or content != message["content"] or END in markup:
                raise InputError(
                    "the tokenizer's chat template drops or reorders turns, or writes only a part of one "
                    f"({content[:40]!r}); use template 'mmt'"
                )
            text += self._mark(markup)
            contents.append((len(text), len(text) + len(content)))
            text += content
        if BEGIN in rendered:
            raise InputError("the tokenizer's chat template writes a turn twice; use template 'mmt'")
        return Rendered(text=text + self._mark(rendered), contents=contents)

    def encode(self, rendered: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids with IMAGE_TOKEN for each image, their places in the text)."""
        found = self._backend.encode(rendered.text, add_special_tokens=False)
        return [self._meant.get(number, number) for number in found.ids], found.offsets

    def require_own_ids(self, messages: Sequence[Message], rendered: Rendered, ids: list[int]) -> None:
        """The tokenizer by itself renders and tokenises these messages to the same. Raises InputError."""
        own = self.tokenizer.render_chat(messages)
        if self.unmarked(rendered.text) != own:
            raise InputError("the tokenizer's chat template rewrites the text of turns; use template 'mmt'")
        if any(self._spelled.search(message["content"]) for message in messages):
            return  # text here, control tokens there
        if _IMAGE in own:
            if self._stand_in is None:
                return
            own = own.replace(_IMAGE, self._stand_in[0])
            ids = [self._stand_in[1] if number == IMAGE_TOKEN else number for number in ids]
        if self.tokenizer.encode_markup(own) != ids:
            raise InputError(
                "tokenised at once, these turns are other tokens than the tokenizer's own; use template 'mmt'"
            )

    def prompt_end(self, messages: Sequence[Message], whole: Rendered, ids: list[int]) -> tuple[int | None, str]:
        """(tokens of the prompt by itself, or None where they are no prefix of `ids`; the space between its text and
        the last answer).

        Raises: InputError where its text is not what stands in front of the answer.
        """
        begin = whole.contents[-1][0]
        prompt = self.render(messages[:-1], True).text
        if not whole.text.startswith(prompt) or len(prompt) > begin:
            raise InputError(
                "the chat template's generation prompt is not what it writes before an answer; use template 'mmt'"
            )
        gap = whole.text[len(prompt) : begin]
        if gap.strip() and self.opens_answers:
            raise InputError(
                f"between its generation prompt and an answer the chat template writes {gap[:40]!r}; use template 'mmt'"
            )
        # A template without a generation prompt: the model is asked with all that stands before an answer when it is
        # trained.
        ends = [len(prompt)] if not gap.strip() else [begin, len(whole.text[:begin].rstrip(" "))]
        for end in ends:
            asked, _ = self.encode(Rendered(text=whole.text[:end], contents=[]))
            if asked == ids[: len(asked)]:
                return len(asked), whole.text[end:begin]
        return None, whole.text[ends[-1] : begin]

    def closing(self, ids: list[int], offsets: list[tuple[int, int]], behind: int, bound: int) -> int:
        """The place behind the special token that ends the answer whose content ends before token `behind`; that itself
        where none does."""
        for place in range(behind, len(ids)):
            if ids[place] in self._ends:
                return place + 1
            if offsets[place][0] >= bound:
                break
        return behind

    def unmarked(self, text: str) -> str:
        """A rendered text as the template wrote it."""
        return text.translate(self._unmarked)

    def _mark(self, markup: str) -> str:
        return self._spelled.sub(lambda found: self._mark_of[found[0]], markup)

"""One face for sentencepiece models, Hugging Face tokenizers and GGUF files.

A bare LLaMA `tokenizer.model` goes to sentencepiece directly: that is the vocabulary's own implementation, and it never
turns text into a control token. Everything else goes through transformers, also a `tokenizer.model` whose folder holds
files that say more than it (`vltrain.data.text.tokenizer_files`). Trade-off: tokenizers without a fast (Rust) backend
are refused.

The fingerprint covers the vocabulary, the merges and the ids of probe texts, so that shards packed with one tokenizer
are refused by a model that has another, wherever the two were loaded from.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from vltrain.data.text.backend import (
    SAME_EVERY_DAY,
    OuterTokenizer,
    load_outer,
    make_special,
    reset_backend,
    rows_of,
    state_of,
)
from vltrain.data.text.instruction import InstructionSource, InstructionTokenizer
from vltrain.data.text.tokenizer_files import (
    JSON,
    KNOWN_FILES,
    MODEL,
    TokenizerFiles,
    default_template,
    find_in,
    read_files,
    require_agreement,
)
from vltrain.errors import InputError
from vltrain.files.locate import locate

# Spaces, line ends, digits, case, accents, CJK and an emoji: what normalisers and pre-tokenizers differ in.
_PROBES = (
    "Question: Which one?\nAnswer:",
    "  two  spaces",
    "a\tb\r\nc",
    "1234567 3.14",
    "it's",
    "Éa ﬁ ½",
    "你好 🙂",
    "<s></s>",
)
# Markup, questions and one-word answers come again and again: that many short texts (in characters) are remembered with
# their ids.
SHORT_TEXT = 64
MAX_KNOWN = 4096


class Tokenizer(ABC):
    """Text to token ids and back. Picklable, so that worker processes get the one that the main process loaded.

    bos_id         id put in front of a sequence, or None where the vocabulary has none
    eos_id         id that ends an answer
    end_ids        further ids after which the model's own generation_config ends an answer
    unk_id         id of what the vocabulary cannot spell, or None where it spells everything or drops it
    vocab_size     the largest id and one more: rows that a table for these ids has; there may be gaps below
    special_ids    control tokens; text never becomes one of them
    chat_template  Jinja source, or None
    word_prefix    "" where a text's first word is tokenised like a later word (LLaMA), else " "
    fingerprint    SHA-256 (hex) over the vocabulary as used
    instruction    what a Q-Former reads prompts with, or None; part of the fingerprint
    """

    bos_id: int | None
    eos_id: int
    vocab_size: int
    special_ids: frozenset[int]
    end_ids: tuple[int, ...] = ()
    unk_id: int | None = None
    chat_template: str | None = None
    word_prefix: str = ""
    fingerprint: str = ""
    instruction: InstructionTokenizer | None = None
    _known: dict[str, list[int]]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token is added, and none is made of text that spells one."""
        if len(text) > SHORT_TEXT:
            return self._encode(text)
        if text not in self._known:
            if len(self._known) == MAX_KNOWN:
                self._known.clear()
            self._known[text] = self._encode(text)
        return list(self._known[text])

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """`encode`, done anew."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each."""
        return [self.encode(text) for text in texts]

    def decode_all(self, many_ids: Sequence[list[int]]) -> list[str]:
        """`decode` of each."""
        return [self.decode(ids) for ids in many_ids]

    @abstractmethod
    def encode_markup(self, text: str) -> list[int]:
        """Ids of a chat template's own text, in which the spelling of a special token means that token."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""

    @abstractmethod
    def _state(self) -> tuple[str, bytes]:
        """The library that reads it, with the version if that decides how it writes it, and all that decides its
        tokens, as written by it."""

    def state(self) -> dict[str, str]:
        """By library, SHA-256 (hex) of all that decides the tokens of a text, a Q-Former's too: normalizers and
        pre-tokenizers, of which a fingerprint knows only what they do to the probes. Another version of a library may
        write the same otherwise."""
        states = [self._state(), *([self.instruction.state()] if self.instruction is not None else [])]
        return {
            library: hashlib.sha256(b"".join(data for name, data in states if name == library)).hexdigest()
            for library, _ in states
        }

    def special_names(self) -> dict[int, str]:
        """Special tokens as a text of markup spells them, by id."""
        return {}

    @abstractmethod
    def unknown_parts(self, text: str) -> list[str]:
        """The parts of `text` that become the unknown token, in order."""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The chat template's text for `messages` (role, content), the same on every day."""
        raise InputError("this tokenizer has no chat template; use template 'mmt' or a tokenizer that brings one")

    def _settle(self, vocabulary: Any, chat_template: Any = None) -> None:
        """Derives `word_prefix` and `fingerprint` once encoding works; `vocabulary` and the templates are what JSON can
        hold."""
        self._known = {}
        self.word_prefix = "" if self.encode("x a") == self.encode("x") + self.encode("a") else " "
        probes = [self.encode(text) for text in _PROBES]
        facts = [vocabulary, self.bos_id, self.eos_id, chat_template, probes]
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` file as a SentencePieceProcessor. `end_ids`: of the generation_config.json beside it."""

    def __init__(self, path: Path, model: Any, end_ids: tuple[int, ...] = ()) -> None:
        self._model = model
        if model.eos_id() < 0:
            raise InputError(f"{path}: the vocabulary has no end-of-sequence token; answers could never end")
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.eos_id = model.eos_id()
        self.vocab_size = model.get_piece_size()
        every_id = list(range(self.vocab_size))
        controls = zip(every_id, model.is_control(every_id), model.is_unknown(every_id), strict=True)
        self.special_ids = frozenset(piece for piece, control, unknown in controls if control or unknown)
        self.unk_id = model.unk_id()
        self.end_ids = _checked_ends(end_ids, str(path.parent), self.special_ids, self.vocab_size)
        self._settle([model.id_to_piece(every_id), model.get_score(every_id)])

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=1)

    def decode_all(self, many_ids: Sequence[list[int]]) -> list[str]:
        return self._model.decode(list(many_ids), num_threads=1)

    def _state(self) -> tuple[str, bytes]:
        return "sentencepiece", self._model.serialized_model_proto()

    def encode_markup(self, text: str) -> list[int]:
        raise InputError("a bare sentencepiece model has no chat template; use template 'mmt'")

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([int(one) for one in ids])

    def unknown_parts(self, text: str) -> list[str]:
        pieces = self._model.encode(text, out_type="immutable_proto").pieces
        return [piece.surface for piece in pieces if piece.id == self.unk_id]


class TransformersTokenizer(Tokenizer):
    """Any fast tokenizer that transformers can load, GGUF files included."""

    def __init__(
        self,
        name: str,
        gguf_file: str | None = None,
        files: TokenizerFiles | None = None,
        processors: tuple[OuterTokenizer, str | None] | None = None,
    ) -> None:
        """Args:
        files: what its folder's files say, checked against it.
        processors: the tokenizer of a processor that was loaded from `name`, and its chat template, taken for the
            folder's.
        """
        where = f"{name}/{gguf_file}" if gguf_file else name
        try:
            self._outer = load_outer(name, gguf_file=gguf_file) if processors is None else processors[0]
        except Exception as error:  # on damaged files its readers raise whatever their parsing happens to run into
            detail = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{where}: no tokenizer could be loaded from there ({detail[0]})") from None
        if not self._outer.is_fast:
            raise InputError(f"{where}: this tokenizer has no fast (Rust) backend; convert it to tokenizer.json first")
        if (eos_id := self._outer.eos_token_id) is None:
            raise InputError(f"{where}: the tokenizer has no end-of-sequence token; answers could never end")
        if files is None and gguf_file is None:
            files = read_files(name, find_in(name))
        reset_backend(self._outer, where)
        vocabulary, added = self._outer.get_vocab(), self._outer.added_tokens_decoder
        if files is not None:
            require_agreement(files, vocabulary, {"eos": self._outer.eos_token, "bos": self._outer.bos_token})
        self.bos_id = self._outer.bos_token_id
        self.eos_id = eos_id
        self.vocab_size = rows_of(vocabulary, added)
        special = frozenset(
            [*self._outer.all_special_ids, *(number for number, token in added.items() if token.special)]
        )
        if not set(vocabulary.values()) - special:
            raise InputError(
                f"{where}: no vocabulary is there, only {len(vocabulary)} special tokens: files are missing; fetch "
                "all of the tokenizer's"
            )
        self.end_ids = _checked_ends(
            () if files is None else files.end_ids, where, special | added.keys(), self.vocab_size
        )
        make_special(
            self._outer.backend_tokenizer, [added[number].content for number in self.end_ids if number in added]
        )
        self.special_ids = special | frozenset(self.end_ids)
        saved_template = self._outer.chat_template
        self.chat_template = default_template(saved_template, where)
        if processors is not None:
            saved_template = self.chat_template = processors[1]
        elif files is not None and (by_files := files.chat_template()) is not None and self.chat_template is None:
            saved_template = self.chat_template = by_files
        model = json.loads(self._outer.backend_tokenizer.to_str())["model"]
        self.unk_id = model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token") or "")
        self._settle([vocabulary, model.get("merges", [])], saved_template)

    def _encode(self, text: str) -> list[int]:
        backend = self._outer.backend_tokenizer
        backend.encode_special_tokens = True  # "</s>" in a text stays five characters
        return backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        backend = self._outer.backend_tokenizer
        backend.encode_special_tokens = True
        return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _state(self) -> tuple[str, bytes]:
        return state_of(self._outer.backend_tokenizer)

    def encode_markup(self, text: str) -> list[int]:
        backend = self._outer.backend_tokenizer
        backend.encode_special_tokens = False
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        # Not cleaned up, whatever the tokenizer was saved with: "yes ." is not "yes.".
        return self._outer.decode(
            [int(one) for one in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def unknown_parts(self, text: str) -> list[str]:
        backend = self._outer.backend_tokenizer
        backend.encode_special_tokens = True
        found = backend.encode(text, add_special_tokens=False)
        return [
            text[first:last]
            for number, (first, last) in zip(found.ids, found.offsets, strict=True)
            if number == self.unk_id
        ]

    def special_names(self) -> dict[int, str]:
        added = self._outer.added_tokens_decoder
        return {number: added[number].content for number in self.special_ids if number in added}

    @property
    def backend(self) -> str:
        """The backend's own JSON."""
        return self._outer.backend_tokenizer.to_str()

    @property
    def dated_chat_template(self) -> str | None:
        """The chat template with a clock that stands still."""
        template = self.chat_template
        return template if template is None or "strftime_now" not in template else SAME_EVERY_DAY + template

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        if self.chat_template is None:
            return super().render_chat(messages)
        settings = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "chat_template": self.dated_chat_template,
        }
        try:
            # Templates of thinking models open a chain of thought unless told otherwise; others know no such word.
            return self._outer.apply_chat_template(list(messages), **settings, enable_thinking=False)
        except Exception as error:  # a template is a program, in Jinja's sandbox, and may fail in any way a program can
            raise InputError(
                f"the tokenizer's chat template refuses these turns: {str(error) or type(error).__name__}"
            ) from None


def _checked_ends(ids: tuple[int, ...], where: str, ends: frozenset[int], rows: int) -> tuple[int, ...]:
    """The ids by which generation_config.json ends answers. Raises InputError for one that is no special or added token
    here."""
    for number in ids:
        if number not in ends:
            found = "an ordinary token" if number < rows else f"beyond the vocabulary's {rows} rows"
            raise InputError(
                f"{where}: generation_config.json: eos_token_id {number} is {found} of this tokenizer: they are of "
                "different models"
            )
    return ids


def load_tokenizer(source: str, instruction: InstructionSource | None = None) -> Tokenizer:
    """Loads the tokenizer at `source`, in any notation of `vltrain.files.locate`, and with it a Q-Former's, where there
    is one.

    A `.model` file, or a folder with a `tokenizer.model` to which its other files add nothing, is read by
    sentencepiece; a `.gguf` file by transformers' GGUF reader; anything else by AutoTokenizer, and then all of its
    files must agree with what that has read.

    Raises:
        InputError: nothing loadable there, files that are missing, broken or contradict each other, tokens drawn at
            random, no end-of-sequence token, or no fast backend.
    """
    tokenizer = _load(locate(source))
    if instruction is not None:
        tokenizer.instruction = InstructionTokenizer(instruction)
        both = tokenizer.fingerprint + tokenizer.instruction.fingerprint
        tokenizer.fingerprint = hashlib.sha256(both.encode()).hexdigest()
    return tokenizer


def _load(place: str) -> Tokenizer:
    path = Path(place)
    if path.is_file() and path.suffix == ".gguf":
        return TransformersTokenizer(str(path.parent), gguf_file=path.name)
    if path.is_file() and path.suffix == ".model":
        files = read_files(str(path.parent), find_in(str(path.parent))) if path.name == MODEL else None
        model = _open_model(path)
        if files is not None and (more := files.says_more_than(model)):
            raise InputError(
                f"{path}: is one file of several: {', '.join(more)} beside it says more of this tokenizer; name the "
                f"folder, {path.parent}"
            )
        return SentencePieceTokenizer(path, model, files.end_ids if files is not None else ())
    if path.is_file():
        if path.name not in KNOWN_FILES:
            raise InputError(
                f"{path}: found a file, expected a tokenizer's folder, its {JSON}, a .model or a .gguf file"
            )
        path = path.parent
    if not path.is_dir():
        return TransformersTokenizer(place)
    files = read_files(str(path), find_in(str(path)))
    if files.model is not None and files.json is None:
        model = _open_model(files.model)
        if not files.says_more_than(model):
            return SentencePieceTokenizer(files.model, model, files.end_ids)
    return TransformersTokenizer(str(path), files=files)


def _open_model(path: Path) -> Any:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: not a sentencepiece model ({str(error).splitlines()[0]})") from None

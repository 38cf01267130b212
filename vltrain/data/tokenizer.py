"""One face for sentencepiece models, Hugging Face tokenizers and GGUF files.

A LLaMA `tokenizer.model` goes to sentencepiece directly: that is the vocabulary's own implementation, and it never turns text
into a control token. Everything else goes through transformers. What this gives up: tokenizers without a fast (Rust) backend.

The fingerprint covers the vocabulary, the merges and the ids of probe texts, so that shards packed with one tokenizer
are refused by a model that has another, wherever the two were loaded from.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import sentencepiece

from vltrain.data.instruction import InstructionSource, InstructionTokenizer
from vltrain.errors import InputError
from vltrain.locate import locate

# Spaces, line ends, digits, case, accents, CJK and an emoji: what normalisers and pre-tokenizers differ in.
_PROBES = ("Question: Which one?\nAnswer:", "  two  spaces", "a\tb\r\nc", "1234567 3.14", "it's", "Éa ﬁ ½", "你好 🙂", "<s></s>")
# Markup, questions and one-word answers come again and again: that many short texts (in characters) are remembered with their ids.
SHORT_TEXT = 64
MAX_KNOWN = 4096


class Tokenizer(ABC):
    """Text to token ids and back. Picklable, so that worker processes get the one that the main process loaded.

    bos_id         id put in front of a sequence, or None where the vocabulary has none
    eos_id         id that ends an answer
    vocab_size     ids are in [0, vocab_size)
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

    @abstractmethod
    def encode_markup(self, text: str) -> list[int]:
        """Ids of a chat template's own text, in which the spelling of a special token means that token."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out."""

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text for `messages` (role, content)."""
        raise InputError("this tokenizer has no chat template; use template 'mmt' or a tokenizer that brings one")

    def _settle(self, vocabulary: Any) -> None:
        """Derives `word_prefix` and `fingerprint` once encoding works; `vocabulary` is what JSON can hold."""
        self._known = {}
        self.word_prefix = "" if self.encode("x a") == self.encode("x") + self.encode("a") else " "
        probes = [self.encode(text) for text in _PROBES]
        facts = [vocabulary, self.bos_id, self.eos_id, self.chat_template, probes]
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` file, read by sentencepiece."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{path}: not a sentencepiece model ({str(error).splitlines()[0]})") from None
        model = self._model
        if model.eos_id() < 0:
            raise InputError(f"{path}: the vocabulary has no end-of-sequence token; answers could never end")
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.eos_id = model.eos_id()
        self.vocab_size = model.get_piece_size()
        every_id = list(range(self.vocab_size))
        controls = zip(every_id, model.is_control(every_id), model.is_unknown(every_id), strict=True)
        self.special_ids = frozenset(piece for piece, control, unknown in controls if control or unknown)
        self._settle([model.id_to_piece(every_id), model.get_score(every_id)])

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_markup(self, text: str) -> list[int]:
        raise InputError("a bare sentencepiece model has no chat template; use template 'mmt'")

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([int(one) for one in ids])


class TransformersTokenizer(Tokenizer):
    """Any fast tokenizer that transformers can load, GGUF files included."""

    def __init__(self, name: str, gguf_file: str | None = None) -> None:
        from transformers import AutoTokenizer  # takes a second to import and is not needed for sentencepiece

        try:
            self._outer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
        except Exception as error:  # on damaged files its readers raise whatever their parsing happens to run into
            name = f"{name}/{gguf_file}" if gguf_file else name
            detail = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{name}: no tokenizer could be loaded from there ({detail[0]})") from None
        if not self._outer.is_fast:
            raise InputError(f"{name}: this tokenizer has no fast (Rust) backend; convert it to tokenizer.json first")
        if self._outer.eos_token_id is None:
            raise InputError(f"{name}: the tokenizer has no end-of-sequence token; answers could never end")
        self.bos_id = self._outer.bos_token_id
        self.eos_id = self._outer.eos_token_id
        self.vocab_size = len(self._outer)
        added = self._outer.added_tokens_decoder.items()
        self.special_ids = frozenset([*self._outer.all_special_ids, *(number for number, token in added if token.special)])
        self.chat_template = self._outer.chat_template
        merges = json.loads(self._outer.backend_tokenizer.to_str())["model"].get("merges", [])
        self._settle([self._outer.get_vocab(), merges])

    def _encode(self, text: str) -> list[int]:
        backend = self._outer.backend_tokenizer
        backend.encode_special_tokens = True  # "</s>" in a text stays five characters
        return backend.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        backend = self._outer.backend_tokenizer
        backend.encode_special_tokens = False
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._outer.decode([int(one) for one in ids], skip_special_tokens=True)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        if self.chat_template is None:
            return super().render_chat(messages)
        try:
            return self._outer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a program, in Jinja's sandbox, and may fail in any way a program can
            raise InputError(f"the tokenizer's chat template refuses these turns: {str(error) or type(error).__name__}") from None


def load_tokenizer(source: str, instruction: InstructionSource | None = None) -> Tokenizer:
    """Loads the tokenizer at `source`, in any notation of `vltrain.locate`, and with it a Q-Former's, where there is one.

    A `.model` file, or a folder that has `tokenizer.model` and no `tokenizer.json`, is read by sentencepiece; a `.gguf` file by
    transformers' GGUF reader; anything else by AutoTokenizer.

    Raises:
        InputError: nothing loadable there, no end-of-sequence token, or no fast backend.
    """
    tokenizer = _load(locate(source))
    if instruction is not None:
        tokenizer.instruction = InstructionTokenizer(instruction)
        both = tokenizer.fingerprint + tokenizer.instruction.fingerprint
        tokenizer.fingerprint = hashlib.sha256(both.encode()).hexdigest()
    return tokenizer


def _load(place: str) -> Tokenizer:
    path = Path(place)
    if path.is_dir() and (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.is_file() and path.suffix == ".gguf":
        return TransformersTokenizer(str(path.parent), gguf_file=path.name)
    return TransformersTokenizer(str(path.parent) if path.is_file() else place)

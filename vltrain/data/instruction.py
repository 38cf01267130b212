"""The prompt as a Q-Former reads it: token ids of its own (BERT's) vocabulary.

InstructBLIP's Q-Former sees the instruction beside its queries, through a tokenizer that has nothing to do with the LLM's. The ids are
stored with the packs, so that no text is tokenised while training.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from vltrain.errors import InputError
from vltrain.locate import locate

SUBFOLDER = "qformer_tokenizer"  # where InstructBLIP's repositories have it
_PROBES = ("Question: Which one?\nAnswer:", "  two  spaces", "1234567 3.14", "it's", "Éa ﬁ ½", "你好 🙂")


@dataclass(frozen=True, kw_only=True)
class InstructionSource:
    """Where the tokenizer is (any notation of `vltrain.locate`), in which folder there, and how many tokens the Q-Former reads at most."""

    source: str
    subfolder: str = ""
    max_tokens: int


class InstructionTokenizer:
    """Text to the Q-Former's ids, between the tokens that its tokenizer puts around a text ([CLS] ... [SEP]). Picklable.

    vocab_size   ids are in [0, vocab_size)
    fingerprint  SHA-256 (hex) over the vocabulary as used, and `max_tokens`

    Raises: InputError if there is no fast tokenizer in that place.
    """

    def __init__(self, source: InstructionSource) -> None:
        from transformers import AutoTokenizer  # takes a second to import and only Q-Formers need it

        place = locate(source.source)
        try:
            self._outer = AutoTokenizer.from_pretrained(place, subfolder=source.subfolder)
        except Exception as error:  # on damaged files its readers raise whatever their parsing happens to run into
            where = f"{place}/{source.subfolder}" if source.subfolder else place
            detail = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"{where}: no tokenizer for the Q-Former could be loaded from there ({detail[0]}); see qformer_tokenizer") from None
        if not self._outer.is_fast:
            raise InputError(f"{place}: this tokenizer has no fast (Rust) backend; convert it to tokenizer.json first")
        self.vocab_size = len(self._outer)
        self._max_tokens = source.max_tokens
        facts = [self._outer.get_vocab(), source.max_tokens, [self._ids(text) for text in _PROBES]]
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        return self._outer.backend_tokenizer.encode(text).ids

    def encode(self, text: str) -> tuple[list[int], int]:
        """(ids, how many were cut off). What is too long loses tokens in front of its last one, which ends a text."""
        ids = self._ids(text)
        cut = max(0, len(ids) - self._max_tokens)
        return (ids[: self._max_tokens - 1] + ids[-1:] if cut else ids), cut

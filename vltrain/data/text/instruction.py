"""The prompt as a Q-Former reads it: token ids of its own (BERT's) vocabulary.

InstructBLIP's Q-Former sees the instruction beside its queries, through a tokenizer that has nothing to do with the
LLM's. The ids are stored with the packs, so that no text is tokenised while training.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from vltrain.data.text.backend import load_outer, reset_backend, rows_of, state_of
from vltrain.data.text.tokenizer_files import find_in, read_files, require_agreement
from vltrain.errors import InputError
from vltrain.files.locate import locate

_PROBES = ("Question: Which one?\nAnswer:", "  two  spaces", "1234567 3.14", "it's", "Éa ﬁ ½", "你好 🙂")


@dataclass(frozen=True, kw_only=True)
class InstructionSource:
    """Where the tokenizer is (any notation of `vltrain.files.locate`), in which folder there, and how many tokens the
    Q-Former reads at most."""

    source: str
    subfolder: str = ""
    max_tokens: int


class InstructionTokenizer:
    """Text to the Q-Former's ids, between the tokens that its tokenizer puts around a text ([CLS] ... [SEP]).
    Picklable.

    vocab_size   the largest id and one more
    fingerprint  SHA-256 (hex) over the vocabulary as used, and `max_tokens`

    Raises: InputError if there is no fast tokenizer in that place.
    """

    def __init__(self, source: InstructionSource) -> None:
        place = locate(source.source)
        where = f"{place}/{source.subfolder}" if source.subfolder else place
        try:
            self._outer = load_outer(place, subfolder=source.subfolder)
        except Exception as error:  # on damaged files its readers raise whatever their parsing happens to run into
            detail = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"{where}: no tokenizer for the Q-Former could be loaded from there ({detail[0]}); see "
                "qformer_tokenizer"
            ) from None
        if not self._outer.is_fast:
            raise InputError(f"{place}: this tokenizer has no fast (Rust) backend; convert it to tokenizer.json first")
        reset_backend(self._outer, where)
        vocabulary = self._outer.get_vocab()
        files = read_files(where, find_in(place, source.subfolder))
        require_agreement(files, vocabulary, {"eos": self._outer.eos_token, "bos": self._outer.bos_token})
        if not set(vocabulary.values()) - set(self._outer.all_special_ids):
            raise InputError(
                f"{where}: no vocabulary is there, only {len(vocabulary)} special tokens: files are missing; fetch "
                "all of the tokenizer's"
            )
        self.vocab_size = rows_of(vocabulary, self._outer.added_tokens_decoder)
        self._unk_id = self._outer.unk_token_id
        self._max_tokens = source.max_tokens
        facts = [vocabulary, source.max_tokens, [self._ids(text) for text in _PROBES]]
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        backend = self._outer.backend_tokenizer
        # "[SEP]" in a text stays five characters; those around it are put there all the same
        backend.encode_special_tokens = True
        return backend.encode(text).ids

    def state(self) -> tuple[str, bytes]:
        """See `vltrain.data.text.backend.state_of`."""
        return state_of(self._outer.backend_tokenizer)

    def num_unknown(self, ids: list[int]) -> int:
        """How many of `ids` stand for what the vocabulary cannot spell."""
        return 0 if self._unk_id is None else ids.count(self._unk_id)

    def encode(self, text: str) -> tuple[list[int], int]:
        """(ids, how many were cut off). What is too long loses tokens in front of its last one, which ends a text."""
        ids = self._ids(text)
        cut = max(0, len(ids) - self._max_tokens)
        return (ids[: self._max_tokens - 1] + ids[-1:] if cut else ids), cut

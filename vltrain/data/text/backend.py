"""A saved fast tokenizer's backend, brought to the one state in which it is used here: nothing cut, nothing padded,
nothing drawn.

`tokenizer.json` keeps more than a vocabulary: the truncation and padding of whoever saved it last, the dropout of a
BPE's merges. A plain `encode` obeys them all, so that samples would be cut, filled up or tokenised anew each time.
Normalizers, pre-tokenizers and the models' own switches (byte fallback, fused unknowns) belong to the vocabulary and
stay.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any, Protocol

import tokenizers

from vltrain.errors import InputError

logger = logging.getLogger(__name__)

# A template that writes the date would train on other tokens than it is evaluated with, tomorrow: its clock stands
# still, on the date that LLaMA-3's template takes where there is no clock.
_DATE = {
    "%-d": "26",
    "%d": "26",
    "%e": "26",
    "%b": "Jul",
    "%B": "July",
    "%-m": "7",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%a": "Fri",
    "%A": "Friday",
    "%H": "12",
    "%I": "12",
    "%M": "00",
    "%S": "00",
    "%p": "PM",
    "%j": "208",
    "%F": "2024-07-26",
    "%T": "12:00:00",
}
SAME_EVERY_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{code}', '{text}')" for code, text in _DATE.items())
    + " }}{%- endmacro -%}"
)


class OuterTokenizer(Protocol):
    """What is used of a tokenizer of transformers, whose own classes leave the types of these to whoever reads them."""

    is_fast: bool
    backend_tokenizer: tokenizers.Tokenizer
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, tokenizers.AddedToken]
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: str | dict[str, str] | None

    def get_vocab(self) -> dict[str, int]: ...
    def decode(self, token_ids: list[int], **settings: bool) -> str: ...
    def apply_chat_template(self, conversation: list[Any], **settings: str | bool | None) -> str: ...


def load_outer(place: str, **settings: str | None) -> OuterTokenizer:
    """AutoTokenizer's of that place. On damaged files its readers raise whatever their parsing happens to run into."""
    from transformers import AutoTokenizer  # takes a second to import and is not needed for sentencepiece

    read: Any = AutoTokenizer  # whose `from_pretrained` says nothing of what it gives
    return read.from_pretrained(place, **settings)


def reset_backend(outer: OuterTokenizer, where: str) -> None:
    """Takes truncation, padding and dropout out of the backend of transformers' tokenizer `outer`, in place, and tells
    what it took out.

    Raises: InputError for a Unigram that draws its pieces, and where a state cannot be taken out.
    """
    backend = outer.backend_tokenizer
    state = json.loads(backend.to_str())
    dropout = state["model"].get("dropout")
    found = [
        *([f"truncation to {state['truncation'].get('max_length')} tokens"] if state.get("truncation") else []),
        *(["padding"] if state.get("padding") else []),
        *([f"a dropout of {dropout} of its merges (random tokens)"] if dropout else []),
    ]
    backend.no_truncation()
    backend.no_padding()
    if dropout is not None:
        backend.model.dropout = None
    if getattr(backend.model, "alpha", None) or getattr(backend.model, "nbest_size", None):
        raise InputError(
            f"{where}: its Unigram model samples its pieces (alpha, nbest_size), so the same text has other tokens "
            "each time; save it without"
        )
    left = json.loads(backend.to_str())
    if left.get("truncation") or left.get("padding") or left["model"].get("dropout"):
        raise InputError(
            f"{where}: was saved with {' and '.join(found)}, which cannot be switched off; save it without"
        )
    if found:
        logger.warning(
            "%s: was saved with %s, which is left out: texts are tokenised whole, and the same each time",
            where,
            " and ".join(found),
        )


def state_of(backend: tokenizers.Tokenizer) -> tuple[str, bytes]:
    """(library and version, the backend as that writes it)."""
    return f"tokenizers {tokenizers.__version__}", backend.to_str().encode("utf-8", "surrogatepass")


def make_special(backend: tokenizers.Tokenizer, contents: Iterable[str]) -> None:
    """Marks added tokens as special, in place, so that a text that spells one need not become it; ids stay."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    plain = [added[content] for content in contents if content in added and not added[content].special]
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    backend.add_special_tokens(  # pyright: ignore[reportUnknownMemberType] its stub says a list, not of what
        [
            tokenizers.AddedToken(token.content, special=True, **{flag: getattr(token, flag) for flag in flags})
            for token in plain
        ]
    )


def rows_of(vocabulary: dict[str, int], added: Iterable[int] = ()) -> int:
    """Rows of a table that has one for each id: the largest id and one more, since ids may have gaps."""
    return max([*vocabulary.values(), *added], default=-1) + 1

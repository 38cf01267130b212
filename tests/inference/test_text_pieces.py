"""Text from tokens as they come: whole characters only, and the pieces join to the text of all tokens."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.blip import make_tokenizers
from tests.support.vocabularies import make_metaspace, make_sentencepiece, make_transformers
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.inference.answer import UNKNOWN, TextPieces

TEXTS = (
    "Ünïcödé 你好 🙂🏽 end",
    " two  spaces \n\n lines ",
    "a\tb",
    "🙂",
    "ﬁ ½ é",
    "",
    "   ",
    "no\u00a0break",
    f"a {UNKNOWN} b",
    f"{UNKNOWN}{UNKNOWN}",
    "x" * 50,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizers")
    names = make_tokenizers(place / "blip")
    return {
        "sentencepiece": load_tokenizer(make_sentencepiece(place / "sentencepiece")),
        "bytes": load_tokenizer(make_transformers(place / "bytes")),
        "metaspace": load_tokenizer(make_metaspace(place / "metaspace", None)),
        "words": load_tokenizer(names["t5"], InstructionSource(source=names["bert"], max_tokens=32)),
        "asset": load_tokenizer("asset://tiny_llama"),
    }


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    pieces = TextPieces(tokenizer.decode)
    return [*(pieces.add(one) for one in ids), pieces.finish()]


@pytest.mark.parametrize("name", ["sentencepiece", "bytes", "metaspace", "words", "asset"])
def test_pieces_are_whole_characters_and_join_to_the_text(name, tokenizers):
    tokenizer = tokenizers[name]
    draw = np.random.default_rng(0)
    answers = [tokenizer.encode(text) for text in TEXTS] + [
        draw.integers(0, tokenizer.vocab_size, draw.integers(0, 20)).tolist() for _ in range(200)
    ]
    for ids in answers:
        pieces, whole = pieces_of(tokenizer, ids), tokenizer.decode(ids).strip()
        assert "".join(pieces) == whole, ids
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if UNKNOWN not in tokenizer.decode(ids):
            assert not any(UNKNOWN in piece for piece in pieces_of(tokenizer, ids)), text


@pytest.mark.parametrize("name", ["sentencepiece", "bytes", "asset"])
def test_a_character_of_several_tokens_comes_once_it_is_whole(name, tokenizers):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode("a🙂b")
    assert len(ids) > 4, "each of its four bytes is a token"
    given = [piece for piece in pieces_of(tokenizer, ids) if piece]
    assert "".join(given) == "a🙂b" and any("🙂" in piece for piece in given) and len(given) > 1
    assert pieces_of(tokenizer, ids[:-2])[-1].startswith(UNKNOWN), "cut amid a character, its end says so"


def test_text_comes_as_early_as_it_can(tokenizers):
    tokenizer = tokenizers["words"]
    assert [piece for piece in pieces_of(tokenizer, tokenizer.encode("red circle star")) if piece] == [
        "red",
        " circle",
        " star",
    ]

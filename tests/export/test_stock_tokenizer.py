"""A bare SentencePiece model as transformers' tokenizer: the same ids by every version that setup.cfg allows."""

from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, normalizers
from transformers import AutoTokenizer

from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError
from vltrain.export.formats import stock_tokenizer
from vltrain.export.formats.stock_tokenizer import PROBES, open_stock, require_same_ids

SOURCE = "asset://tiny_llama"


@pytest.fixture
def converted_as_before(monkeypatch):
    """What transformers 5.15 to 5.22 make of a `tokenizer.model`: no space in front of a text."""
    load = AutoTokenizer.from_pretrained

    def load_old(*given, **named):
        stock = load(*given, **named)
        backend = stock.backend_tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        return stock

    monkeypatch.setattr(stock_tokenizer, "AutoTokenizer", SimpleNamespace(from_pretrained=load_old))


def assert_reads_as_we_do() -> tokenizers.Tokenizer:
    ours, stock = load_tokenizer(SOURCE), open_stock(SOURCE)
    read = lambda text: stock(text, add_special_tokens=False, split_special_tokens=True).input_ids
    require_same_ids(read, ours)
    assert [stock.decode(read(text)) for text in PROBES] == [ours.decode(ours.encode(text)) for text in PROBES]
    return stock.backend_tokenizer


def test_it_reads_and_writes_as_sentencepiece_does():
    assert_reads_as_we_do()


def test_where_transformers_leaves_the_first_space_out_it_is_put_in(converted_as_before, monkeypatch):
    assert_reads_as_we_do()
    monkeypatch.setattr(stock_tokenizer, "_prefix_texts", lambda *_: None)
    with pytest.raises(InputError, match="the exported folder would read other tokens"):
        assert_reads_as_we_do()

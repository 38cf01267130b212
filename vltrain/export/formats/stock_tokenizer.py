"""A run's tokenizer as transformers' own, for the folders that others load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from vltrain.data.text.backend import make_special, reset_backend
from vltrain.data.text.tokenizer import Tokenizer, TransformersTokenizer
from vltrain.data.text.tokenizer_files import JSON, MODEL
from vltrain.errors import InputError
from vltrain.files.locate import locate

SPACE = "▁"  # SentencePiece's
PROBES = ("Question: Which one is it?\nAnswer:", "  two  spaces", "1234567 3.14 it's </s>", "Éa 你好 🙂")


def open_stock(source: str, subfolder: str = "") -> Any:
    """transformers' tokenizer of what `vltrain.data.text.tokenizer.load_tokenizer` reads at `source`, its backend in
    the state in which it is used here.

    Raises: InputError where transformers loads none from there.
    """
    place = Path(locate(source))
    settings = {"gguf_file": place.name} if place.suffix == ".gguf" else {"subfolder": subfolder}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place.parent if place.is_file() else place), **settings)
    except Exception as error:  # on damaged files its readers raise whatever their parsing happens to run into
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{place}: transformers loads no tokenizer from there for the exported folder ({detail})"
        ) from None
    reset_backend(tokenizer, str(place))
    model = place if place.suffix == ".model" else place / subfolder / MODEL
    if model.is_file() and not (model.parent / JSON).is_file():
        _prefix_texts(tokenizer.backend_tokenizer, model)
    return tokenizer


def _prefix_texts(backend: tokenizers.Tokenizer, model: Path) -> None:
    """Puts the space in front of a text that a SentencePiece model asks for, in place, as transformers does from 5.24
    on: 5.22 and older leave it out where they convert a `tokenizer.model` without a class for it."""
    prefixed = (
        sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("x", out_type=str)[0].startswith(SPACE)
    )
    if not prefixed or backend.encode("x", add_special_tokens=False).tokens[0].startswith(SPACE):
        return
    twice = normalizers.Replace(
        tokenizers.Regex(rf"\A{SPACE}"), SPACE * 2
    )  # Metaspace leaves a text that begins with one
    backend.normalizer = normalizers.Sequence([backend.normalizer, twice])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False)
    strip = [decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), *strip])


def mark_ends(stock: Any, ours: Tokenizer) -> None:
    """Makes what ends an answer special in transformers' tokenizer, so that no text of a user's is read as it, in
    place."""
    if isinstance(ours, TransformersTokenizer):
        added = stock.added_tokens_decoder
        make_special(stock.backend_tokenizer, [added[number].content for number in ours.end_ids if number in added])


def require_same_ids(read: Callable[[str], list[int]], ours: Tokenizer) -> None:
    """Raises InputError if an exported folder reads some text as other ids than ours. `read`: a text's ids, without
    what stands around it."""
    for text in PROBES:
        if (found := read(text)) != ours.encode(text):
            raise InputError(
                f"the tokenizer: transformers reads {text!r} as {found}, we as {ours.encode(text)}: the "
                "exported folder would read other tokens than were tuned on"
            )

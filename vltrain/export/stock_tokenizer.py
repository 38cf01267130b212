"""A run's tokenizer as transformers' own, for the folders that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vltrain.data.backend import reset_backend
from vltrain.errors import InputError
from vltrain.locate import locate


def open_stock(source: str, subfolder: str = "") -> Any:
    """transformers' tokenizer of what `vltrain.data.tokenizer.load_tokenizer` reads at `source`, its backend in the state in which it is used here.

    Raises: InputError where transformers loads none from there.
    """
    place = Path(locate(source))
    settings = {"gguf_file": place.name} if place.suffix == ".gguf" else {"subfolder": subfolder}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place.parent if place.is_file() else place), **settings)
    except Exception as error:  # on damaged files its readers raise whatever their parsing happens to run into
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{place}: transformers loads no tokenizer from there for the exported folder ({detail})") from None
    reset_backend(tokenizer, str(place))
    return tokenizer

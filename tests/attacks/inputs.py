"""Small inputs that attacks spoil: conversations, samples, pictures and the command lines that read them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

TOKENIZER = "asset://tiny_llama"


def sample(
    number: Any = 1, *, question: Any = "Q?", answer: Any = "yes", images: Any = (), **changed: Any
) -> dict[str, Any]:
    """A line of a samples file; `changed` replaces or adds whole keys."""
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {
        "id": str(number),
        "images": list(images) if isinstance(images, tuple) else images,
        "turns": turns,
        "metadata": {},
        **changed,
    }


def chat(number: Any = 1, *, question: Any = "Q?", answer: Any = "yes", **changed: Any) -> dict[str, Any]:
    """A record of LLaVA's conversation JSON."""
    return {
        "id": number,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **changed,
    }


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """One JSON value per line; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records),
        encoding="utf-8",
        newline="",
    )
    return path


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def pack_words(samples: Path, output: Path, *more: Any, pack_length: int = 64) -> list[Any]:
    """The words of `vltrain pack` over a samples file, in this process alone."""
    return [
        "pack",
        "--samples",
        samples,
        "--tokenizer",
        TOKENIZER,
        "--visual-tokens",
        4,
        "--pack-length",
        pack_length,
        "--output",
        output,
        "--workers",
        1,
        *more,
    ]


def prepare_words(source: str, given: Path | None, output: Path, *options: str) -> list[Any]:
    """The words of `vltrain prepare`, in this process alone."""
    return [
        "prepare",
        "--source",
        source,
        *(("--input", given) if given is not None else ()),
        "--output",
        output,
        "--workers",
        1,
        *(("--options", *options) if options else ()),
    ]

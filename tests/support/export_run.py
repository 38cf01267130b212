"""Finished runs of random tiny models whose trained parts have moved, with evaluation samples of many kinds beside
them: what exports are tried with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.blip import blip_config, make_tokenizers
from tests.support.peft_folders import moved, save_run
from tests.support.processors import config_of, make_processor
from tests.support.tiny import IMAGE_SIZE, tiny_config
from tests.support.vocabularies import make_sentencepiece, make_transformers
from vltrain.config.recipe import build_config
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.models.build import build_model

SPARE = 5  # rows of the LLM beyond its tokenizer
QUESTIONS = (
    ("<image>\nred?",),
    ("is the circle red",),
    ("<image>\nwhich colour is the square?", "green", "and the circle?"),
    ("<image>\nfirst, then <image>\nQuestion: yes?",),
    ("system: be short", "<image>\nno circle?"),
    ("<image>\nwhat is <\\image> and <\\\\image>?",),
    ("see <image> here",),
    ("system: short", "red?"),
)


def mmt_run(folder: Path, *, template: str = "mmt", by: float = 0.3, **changes: Any) -> Path:
    """The folder of a run; `changes` are dotted keys with `__` for the dots."""
    make = make_transformers if template == "chat" else make_sentencepiece
    tokenizer = make(folder / "tokenizer")
    llm = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": load_tokenizer(tokenizer).vocab_size + SPARE,
        **changes.pop("llm_config", {}),
    }
    settings = {
        "model__llm__config": llm,
        "model__llm__tokenizer": tokenizer,
        "data__template": template,
        "data__root": str(folder / "data"),
        "data__pack_length": 512,
        "eval__max_new_tokens": 4,
        "output": str(folder / "run"),
        **changes,
    }
    config = tiny_config(**settings)
    write_samples(folder / "data" / "samples", IMAGE_SIZE)
    save_run(folder / "run", config, moved(build_model(config.model), by))
    return folder / "run"


def blip_run(folder: Path, kind: str, **changes: Any) -> Path:
    """The same of an InstructBLIP, `kind` llama or t5; `changes` as of `blip_config`."""
    places = make_tokenizers(folder / "tokenizers")
    data = {"data__root": str(folder / "data"), "eval__max_new_tokens": 4}
    config = blip_config(kind, places, **changes)
    config.data.root, config.eval.max_new_tokens = data["data__root"], data["eval__max_new_tokens"]
    write_samples(folder / "data" / "samples", 24)
    save_run(folder / "run", config, moved(build_model(config.model)))
    return folder / "run"


def write_samples(folder: Path, size: int) -> None:
    """test.jsonl and its images: colour, transparent, a JPEG many times the model's size, and 16-bit grey."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def noise(width: int, height: int, channels: int) -> np.ndarray:
        return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)

    Image.fromarray(noise(size + 9, size, 3)).save(folder / "0.png")
    Image.fromarray(noise(size, size + 3, 4)).save(folder / "1.png")
    Image.fromarray(noise(size, size, 3)).resize((size * 9, size * 8)).save(folder / "2.jpg")
    Image.fromarray(generator.integers(0, 65_536, (size, size), dtype=np.uint16)).save(folder / "3.png")
    names, lines = ("0.png", "1.png", "2.jpg", "3.png"), []
    for number, texts in enumerate(QUESTIONS):
        turns = (
            [{"role": "system", "text": texts[0].removeprefix("system: ")}] if texts[0].startswith("system: ") else []
        )
        rest = texts[len(turns) :]
        turns += [{"role": ("user", "assistant")[place % 2], "text": text} for place, text in enumerate(rest)]
        images = [names[(number + place) % 4] for place in range(sum(text.count("<image>") for text in rest))]
        lines.append(
            {
                "id": f"sample {number}",
                "images": images,
                "turns": [*turns, {"role": "assistant", "text": "yes"}],
                "metadata": {},
            }
        )
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def stock_run(folder: Path, name: str, *, by: float = 0.3, **changes: Any) -> Path:
    """The same of a stock model with a processor of `tests.support.processors`; `changes` as of `mmt_run`."""
    make_processor(name, folder / "processor")
    settings = {
        "model__architecture": "stock",
        "model__stock__config": config_of(name),
        "model__stock__processor": str(folder / "processor"),
        "model__adapter__dim": 4,
        "model__adapter__bias": False,
        "data__template": "processor",
        "data__root": str(folder / "data"),
        "data__pack_length": 2048,
        "eval__max_new_tokens": 4,
        "eval__scorer": "exact",
        "output": str(folder / "run"),
        **changes,
    }
    config = build_config({key.replace("__", "."): value for key, value in settings.items()})
    write_samples(folder / "data" / "samples", 40)
    save_run(folder / "run", config, moved(build_model(config.model), by))
    return folder / "run"

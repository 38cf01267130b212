"""Each recipe of launch/recipes, each row of its tables and each of its stages, of small random networks and on a few
samples: tuned as it says, read as it says, in the precision asked for."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.blip import WORDS, make_tokenizers
from tests.support.processors import config_of, make_processor
from tests.support.tiny import random_png
from vltrain.audit.recipe import question_of
from vltrain.config.command_line import load_settings
from vltrain.config.idle import idle_settings
from vltrain.config.model.base import ModelConfig
from vltrain.config.recipe import as_mapping, has_rows, read_stages, read_table
from vltrain.config.schema import Config, EvalConfig
from vltrain.config.strict_yaml import dump_text, load_yaml
from vltrain.memory.sizes import assume_sizes
from vltrain.schema import IMAGE_MARKER
from vltrain.shipped import RECIPES

NUM_TRAIN, NUM_TEST = 48, 16
PACK_LENGTH = {"stock": 384, "instructblip": 96, "mmt": 128}
LLAMA, BERT = "asset://tiny_llama", "asset://tiny_bert"
LLAMA_VOCABULARY, BERT_VOCABULARY = 768, 64


def all_recipes() -> Iterator[tuple[str, Config]]:
    """By their names, as they are."""
    parsed = functools.cache(load_yaml)  # a table of 36 rows would be parsed 36 times over
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vltrain.config.recipe.load_yaml", lambda path: copy.deepcopy(parsed(path)))
        for path in sorted(RECIPES.glob("*.yaml")):
            places = [path]
            if has_rows(path):
                places = [read_table(path).recipe_of(row) for row in read_table(path).rows]
            elif (stages := read_stages(path)) is not None:
                places = [stages.recipe_of(stage) for stage in stages.stages]
            for place in places:
                yield place.name.replace(".yaml", ""), load_settings(["--recipe", str(place)], program="test").config


def recipe_named(name: str) -> tuple[str, Config]:
    """One of them."""
    return name, load_settings(["--recipe", name], program="test").config


def small_recipes(folder: Path, precision: str, recipes: Iterable[tuple[str, Config]]) -> dict[str, Path]:
    """Writes the small ones, of those that come out the same one; by their names, the files. `folder`: new."""
    folder.mkdir()
    tokenizers = make_tokenizers(folder / "tokenizers")
    write_samples(folder / "samples")
    write_samples(folder / "pictured", all_pictured=True)  # what a Q-Former alone learns from
    found: dict[str, str] = {}
    models: dict[str, Any] = {}  # many rows of tables have the same
    for name, config in recipes:
        known = str(config.model)
        if known not in models:
            models[known] = _small_model(config.model, folder, tokenizers)
        found.setdefault(_text(_small(config, models[known], folder, precision)), name)
    (folder / "recipes").mkdir()
    files = {name: folder / "recipes" / f"{name.replace('#', '-')}.yaml" for name in found.values()}
    for text, name in found.items():
        files[name].write_text(text)
    return files


def _text(config: Config) -> str:
    """As a file says it, without what has no effect beside the rest."""
    whole = as_mapping(config)
    for key in idle_settings(config):
        *sections, last = key.split(".")
        place = whole
        for section in sections:
            place = place.get(section, {})
        place.pop(last, None)
    return dump_text(whole)


def write_samples(folder: Path, *, all_pictured: bool = False) -> None:
    """Every fourth without an image, every sixth with two; words that each of the tokenizers knows."""
    folder.mkdir()
    draw, words = np.random.default_rng(0), [word for word in WORDS.split() if word.isalpha()]
    for split, count in (("train", NUM_TRAIN), ("val", NUM_TEST), ("test", NUM_TEST)):
        lines = []
        for number in range(count):
            images = (
                []
                if number % 4 == 3 and not all_pictured
                else [f"{split}-{number}-{place}.png" for place in range(1 + (number % 6 == 1))]
            )
            for name in images:
                (folder / name).write_bytes(random_png(draw))
            asked = " ".join(draw.choice(words, 8))
            turns = [
                {"role": "user", "text": f"{IMAGE_MARKER}\n" * len(images) + f"question : {asked} ?"},
                {"role": "assistant", "text": " ".join(draw.choice(words, 3))},
            ]
            lines.append({"id": f"{split}/{number}", "images": images, "turns": turns, "metadata": {}})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _small(config: Config, model: Any, folder: Path, precision: str) -> Config:
    data = replace(
        config.data,
        source="samples",
        input=str(folder / ("pictured" if model.architecture == "instructblip" else "samples")),
        options={},
        mixture={},
        root=str(folder / "data"),
        pack_length=PACK_LENGTH[config.model.architecture],
        max_images=config.data.max_images and 4,
        fraction=1.0,
        train_split="train",
        eval_split="val",
        test_split="test",
        workers=0,
    )
    # Of so few samples, as many steps as a schedule wants.
    train = replace(config.train, precision=precision, epochs=1000.0, init_from=None, loggers=(),
                    packs_per_step=min(4, config.train.packs_per_step))  # fmt: skip
    return replace(config, model=model, data=data, train=train, eval=EvalConfig(), output=str(folder / "nowhere"))


def _small_model(model: ModelConfig, folder: Path, tokenizers: dict[str, str]) -> Any:
    """As the audit's small copy of it, with tokenizers, and processors, that are on this machine."""
    sized, _ = assume_sizes(_not_exported(model))
    question = question_of(sized)
    assert question is not None, model
    [small] = question.ways.values()
    made: Any = small
    if model.architecture == "mmt":
        sizes = _plain(made.llm.config) | {
            "vocab_size": LLAMA_VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        vision = replace(made.vision, config=_plain(made.vision.config))
        return replace(made, vision=vision, llm=replace(made.llm, config=sizes, tokenizer=LLAMA))
    if model.architecture == "instructblip":
        return replace(made, instructblip=_small_blip(made.instructblip, tokenizers))
    kind = made.stock.config["model_type"]
    processor = folder / "processors" / kind
    if not processor.is_dir():
        make_processor(kind, processor)
    stock = replace(made.stock, config=config_of(kind), processor=str(processor), processor_options={})
    return replace(made, stock=stock)


def _not_exported(model: Any) -> Any:
    """In the place of what another recipe's run exports, that recipe's sizes."""
    source = model.instructblip.source if model.architecture == "instructblip" else None
    if source is None or not source.startswith("runs/"):
        return model
    other: Any = recipe_named(source.split("/")[1])[1].model
    return replace(model, instructblip=replace(model.instructblip, source=None, config=other.instructblip.config))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """As a file may say it: without names of classes, which have numbers for keys."""
    kept = {name: one for name, one in config.items() if name not in ("id2label", "label2id")}
    return {name: _plain(one) if isinstance(one, dict) else one for name, one in kept.items()}


def _small_blip(section: Any, tokenizers: dict[str, str]) -> Any:
    config = _plain(section.config)
    config["text_config"]["vocab_size"] = config["qformer_config"]["vocab_size"] = BERT_VOCABULARY
    is_t5 = config["text_config"]["model_type"] == "t5"
    config["text_config"] |= (
        {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        if is_t5
        else {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    )
    config["qformer_config"]["pad_token_id"] = 0
    return replace(section, config=config, tokenizer=tokenizers["t5" if is_t5 else "llama"],
                   qformer_tokenizer=tokenizers["bert"])  # fmt: skip

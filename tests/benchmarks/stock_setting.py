"""What trainers of a stock vision-language model are compared on: photographs, questions, packs, a recipe, a
processor."""

from __future__ import annotations

import io
import json
import pickle
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from data_prep.pack import pack
from data_prep.tokens import PackSettings
from tests.benchmarks.ours import DTYPES
from tests.benchmarks.samples import SCIENCEQA_IMAGE_SHARE, SCIENCEQA_LABEL_SHARE, scienceqa_lengths
from tests.support.photos import COLOURS, picture
from tests.support.processors import config_of, make_processor
from vltrain.config.recipe import build_config
from vltrain.config.schema import Config
from vltrain.data.shards import PackedDataset
from vltrain.data.stock.processor import stock_processor
from vltrain.data.stock.source import StockSource
from vltrain.models.stock.published import MODELS
from vltrain.schema import Sample, Turn

TILE_TOKENS = 64  # of an image of 512 x 512 pixels
SIZES = ((640, 480), (480, 640), (1024, 768), (800, 200), (320, 320), (1280, 720), (250, 400))  # of photographs


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Samples, and the JPEGs that they name."""

    samples: list[Sample]
    files: dict[str, bytes]


def make_photos(count: int, longest: int | None = None) -> Photos:
    """Samples of random letters, each a token of the processor's, with ScienceQA's lengths; an image's tokens count."""
    draw = random.Random(0)
    samples, files = [], {}
    for number, length in enumerate(scienceqa_lengths(count).tolist()):
        names: tuple[str, ...] = ()
        if draw.random() < SCIENCEQA_IMAGE_SHARE:
            names = (f"{number}.jpg",)
            stream = io.BytesIO()
            picture(draw.choice(list(COLOURS)), "circle", draw.choice(SIZES), draw).save(stream, "JPEG", quality=85)
            files[names[0]] = stream.getvalue()
        letters = max(8, min(length, longest or length) - (TILE_TOKENS if names else 0))
        answer = max(2, round(SCIENCEQA_LABEL_SHARE * letters))
        asked, said = ("".join(draw.choices("abcdefghijklmno", k=one)) for one in (letters - answer, answer))
        turns = (Turn(role="user", text="<image>\n" * len(names) + asked), Turn(role="assistant", text=said))
        samples.append(Sample(id=str(number), turns=turns, images=names))
    return Photos(samples=samples, files=files)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What competitors in processes of their own have in common.

    folder: of photos, processor and packs, which `prepare` writes. size: of `MODELS`; None: the tests' tiny model.
    edge: pixels of an image's longer edge, in tiles of 512. workers: processes that decode images, of each competitor.
    cpu_seconds: what is told in seconds are those that a competitor's process computes, not those that go by.
    """

    folder: Path
    size: str | None
    precision: str
    pack_length: int
    workers: int
    edge: int = 512
    cpu_seconds: bool = False

    @property
    def now(self) -> Callable[[], float]:
        """The clock."""
        return time.process_time if self.cpu_seconds else time.perf_counter

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def photos(self) -> Photos:
        return pickle.loads((self.folder / "photos.pickle").read_bytes())

    @property
    def packs(self) -> PackedDataset:
        return PackedDataset(self.folder / "packs", verify=False)

    def config(self, name: str) -> Config:
        """The recipe of a competitor, which writes to a folder of that name."""
        config = config_of("smolvlm")
        if self.size is not None:
            config = {**MODELS[self.size].config, "image_token_id": config["image_token_id"]}
        return build_config(
            {
                "model.architecture": "stock",
                "model.stock.config": config,
                "model.stock.processor": str(self.folder / "processor"),
                "model.stock.llm.peft.kind": "lora",
                "model.adapter.vision": "none",
                "model.adapter.llm": "none",
                "data.root": str(self.folder / "data"),
                "data.template": "processor",
                "data.pack_length": self.pack_length,
                "data.workers": self.workers,
                "train.epochs": 1e6,
                "train.packs_per_step": 1,
                "train.save_every_steps": 10**9,
                "train.precision": self.precision,
                "optim.clip": 1.0,
                "output": str(self.folder / name),
            }
        )


def prepare(setting: Setting, count: int, longest: int | None = None) -> None:
    """Writes photos, processor and packs; of `count` samples, of at most `longest` tokens."""
    place, photos = setting.folder / "processor", make_photos(count, longest)
    tiles = {"size": {"longest_edge": setting.edge}, "max_image_size": {"longest_edge": 512}}
    make_processor("smolvlm", place, **(tiles if setting.size else {}))
    if setting.size:
        own = {"processor_class": "SmolVLMProcessor", "image_seq_len": TILE_TOKENS}
        (place / "processor_config.json").write_text(json.dumps(own))
    (setting.folder / "photos.pickle").write_bytes(pickle.dumps(photos))
    _write_packs(photos, setting.config("packing"), setting.folder)


def _write_packs(photos: Photos, config: Config, folder: Path) -> None:
    """As `vltrain pack` does."""
    raw = folder / "samples"
    (raw / "images").mkdir(parents=True)
    lines = []
    for sample in photos.samples:
        turns = [{"role": turn.role, "text": turn.text} for turn in sample.turns]
        images = [f"images/{name}" for name in sample.images]
        lines.append(json.dumps({"id": sample.id, "turns": turns, "images": images}))
    (raw / "train.jsonl").write_text("\n".join(lines) + "\n")
    for name, data in photos.files.items():
        (raw / "images" / name).write_bytes(data)
    settings = PackSettings(
        tokenizer=config.model.tokenizers.source,
        template="processor",
        visual_tokens=0,
        pack_length=config.data.pack_length,
        processor=config.model.processor,
    )
    pack(raw / "train.jsonl", folder / "packs", settings, workers=1)


def processor_of(config: Config) -> Any:
    """transformers' object."""
    places = config.model.processor
    assert places is not None, "a stock model's"
    return stock_processor(StockSource.of(places)).inner


def as_text(sample: Sample, processor: Any) -> tuple[str, str]:
    """(prompt, answer) as the processor's chat template writes them."""
    asked, said = (turn.text.removeprefix("<image>\n") for turn in sample.turns)
    question = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": asked}]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": [{"type": "text", "text": said}]}]
    prompt = ProcessorMixin.apply_chat_template(processor, talk[:1], add_generation_prompt=True)
    whole = ProcessorMixin.apply_chat_template(processor, talk)
    assert isinstance(prompt, str) and isinstance(whole, str) and whole.startswith(prompt)
    return prompt, whole.removeprefix(prompt)

"""Runs' folders with a checkpoint that says something: tiny models of each kind, with samples and images beside
them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.support.blip import blip_config, make_samples, make_tokenizers
from tests.support.vocabularies import make_transformers
from vltrain.config.model.mmt import LLMConfig, MmtConfig, VisionConfig
from vltrain.config.recipe import dump_config
from vltrain.config.schema import Config
from vltrain.models.build import build_model
from vltrain.schema import Sample, Turn
from vltrain.train.checkpoints.checkpoint import save_checkpoint
from vltrain.train.run.identity import MADE_OF
from vltrain.train.run.made_of import made_of

KINDS = ("mmt", "chat", "llama", "t5")
MMT = ("mmt", "chat")  # by template

TALK = Sample(
    id="talk",
    images=("one.png", "two.png"),
    turns=tuple(
        Turn(role=role, text=text)
        for role, text in (
            ("user", "<image>\nwhat color ?"),
            ("assistant", "red"),
            ("user", "and this ?\n<image>"),
            ("assistant", "blue"),
        )
    ),
)


@dataclass(frozen=True)
class AnsweringRun:
    """`folder`: the run's; `images`: the folder of the samples' images, and of samples/test.jsonl."""

    folder: Path
    config: Config
    samples: list[Sample]

    @property
    def images(self) -> Path:
        return Path(self.config.data.root) / "samples"

    def paths(self, sample: Sample) -> list[Path]:
        return [self.images / name for name in sample.images]


def answering_run(kind: str, place: Path, **changes: object) -> AnsweringRun:
    """Makes one of `KINDS` in a folder; `changes` are dotted keys with `__` for the dots, of mmt `adapter` is
    `model.adapter`."""
    config = (
        _mmt_config(kind, place, **changes)
        if kind in MMT
        else blip_config(
            kind,
            make_tokenizers(place / "tokenizers"),
            data__root=str(place / "data"),
            data__source=None,
            data__options={},
            qformer_tokens=32,
            qformer__mode="full",
            llm__mode="full",
            eval__method="generate",
            eval__scorer="exact",
            **changes,
        )
    )
    run = place / "run"
    config = replace(config, output=str(run))
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config))
    model, draw = build_model(config.model), torch.Generator().manual_seed(1)
    with torch.no_grad():  # random weights answer every prompt alike; larger ones do not
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * (0.3 if kind in MMT else 0.15))
    state = ((name, one.detach(), {"exp_avg": one * 0}) for name, one in model.named_parameters() if one.requires_grad)
    identity = {"model": json.loads(json.dumps(config.model.identity())), MADE_OF: made_of(config)}
    save_checkpoint(state, run / "checkpoints", step=3, belongs_to=identity, keep=1, is_writer=True)
    samples = [*make_samples(12), TALK] if kind in MMT else [one for one in make_samples(12) if one.images]
    samples = [replace(one, metadata={"answer": one.turns[-1].text}) for one in samples]
    made = AnsweringRun(run, config, samples)
    made.images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in sorted({name for one in samples for name in one.images}):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(made.images / name)
    (made.images / "test.jsonl").write_text("".join(json.dumps(one.to_json()) + "\n" for one in samples))
    return made


def _mmt_config(kind: str, place: Path, **changes: object) -> Config:
    config = Config(
        model=MmtConfig(
            vision=VisionConfig(
                config=dict(
                    image_size=16,
                    patch_size=8,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                ),
                tap_every=1,
            ),
            llm=LLMConfig(
                config=dict(
                    vocab_size=1024,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    initializer_range=0.3,
                    max_position_embeddings=128,
                ),
                tokenizer="asset://tiny_llama" if kind == "mmt" else make_transformers(place / "tokenizer"),
            ),
        )
    )
    config.data.root, config.data.template, config.train.precision = str(place / "data"), kind, "fp32"
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(config.model.adapter if section == "adapter" else getattr(config, section), key, value)
    return config


def asked(sample: Sample) -> list[Turn]:
    """The turns of a sample before its answer."""
    return list(sample.turns[:-1])

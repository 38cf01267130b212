"""Steps that leave nothing behind: weights, optimizer, counters, random generators and AdaLoRA's averages are what they
were afterwards, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from vltrain.train.safety import make_safety
from vltrain.train.trainer import Trainer
from vltrain.train.zero.snapshot import EngineSnapshot, Generators


@contextmanager
def trial(trainer: Trainer) -> Iterator[EngineSnapshot]:
    """A context in which the trainer's steps are only tried, in training mode, each loss taken as it comes. A rank that
    hangs in it is named. Where it raises, nothing is put back: the run ends."""
    safety, engine, allocator = trainer.safety, trainer.engine, trainer.allocator
    generators, snapshot = Generators.now(), EngineSnapshot(engine)
    averages = (allocator.state(), allocator.penalty) if allocator is not None else None
    was_training = engine.model.training
    trainer.safety = make_safety(
        replace(trainer.config.train, on_bad_loss="stop", spike_factor=None),
        trainer.folder,
        world=(trainer.rank, engine.world_size),
        device=engine.device,
        report=lambda reading: None,
        guard_state=None,
        preemption=trainer.preemption,
    )
    engine.model.train()
    try:
        with trainer.safety.watching():
            yield snapshot
    finally:
        trainer.safety = safety
        engine.model.train(was_training)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    snapshot.put_back()
    if allocator is not None and averages is not None:
        allocator.load(averages[0])
        allocator.penalty = averages[1]
    generators.put_back()

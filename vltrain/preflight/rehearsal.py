"""The rehearsal: the packs that are likeliest to fail go through forward, backward and the optimizer's step, by the
trainer itself; what their gradients reach is looked at on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vltrain.data.loader import LoadedStep
from vltrain.memory.measured import PeakMemory
from vltrain.preflight.census import Census
from vltrain.preflight.finding import Finding, judged
from vltrain.preflight.packs import Chosen, choose_packs, load, planned
from vltrain.train.optim import set_learning_rates
from vltrain.train.trainer import Trainer

GIB = 2**30


@dataclass(kw_only=True)
class Rehearsal:
    """findings: on images, memory and gradients; peak_bytes: of this rank, and of the device that it is of."""

    findings: list[Finding]
    peak_bytes: int = 0


def rehearse(trainer: Trainer, *, everything: bool) -> Rehearsal:
    """Inside a `trial`. A collective. Raises OutOfMemory where a pack does not fit.

    Args:
        everything: try all kinds of packs, twice: behind a step, adapters are no longer the identity.
    """
    index, world_size = trainer.loader.dataset.index, trainer.engine.world_size
    chosen = choose_packs(index, world_size, everything=everything)
    step = min(trainer.first_step, trainer.plan.num_steps - 1)
    loaded = load(trainer.loader, planned(trainer.plan, index, chosen.packs, step), trainer.rank)
    unequal = _unequal_images(loaded, chosen)
    if unequal.status != "ok":  # ranks would wait for each other
        return Rehearsal(findings=[unequal])
    census, rounds = Census(trainer=trainer), 2 if everything else 1
    lost: list[str] = []
    peak, began = PeakMemory(trainer.engine.device), time.perf_counter()
    with census.watching():
        for _ in range(rounds):
            result = trainer.accumulate(loaded)
            census.read()
            if everything:
                set_learning_rates(trainer.engine.optimizer, 1.0)
            trainer.update(result)
            if not result.applied:
                lost.append("the optimizer did not take the step: the gradient is NaN or Inf")
    if trainer.engine.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, most = time.perf_counter() - began, peak.read()
    tried = f"{_sizes(trainer, chosen)}: forward, backward and step in {seconds:.1f} s"
    took = judged("rehearsal", lost, f"{tried}; peak {most / GIB:.2f} GiB {peak.kind}")
    has_images = loaded.plan.has_images.tolist() * rounds
    return Rehearsal(findings=[unequal, took, *census.findings(has_images, twice=everything)], peak_bytes=most)


def _sizes(trainer: Trainer, chosen: Chosen) -> str:
    index, told = trainer.loader.dataset.index, []
    for name, packs in zip(chosen.names, chosen.packs[:, 0].tolist(), strict=True):
        size = f"{index.num_tokens[packs]} tokens, {index.num_images[packs]} image(s)"
        told.append(f"{name} (pack {packs}, {size})")
    return "; ".join(told)


def _unequal_images(loaded: LoadedStep, chosen: Chosen) -> Finding:
    """Whether in each micro-step all ranks read images or none: at ZeRO-3 ranks would gather different weights, and
    wait for each other without end; at others a gradient would be missing. A collective."""
    own = [len(batch.pixels) > 0 for batch in loaded.batches]
    everyone: list[list[bool]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    faults = []
    for name, shows in zip(chosen.names, zip(*everyone, strict=True), strict=True):
        if any(shows) and not all(shows):
            without = ", ".join(str(rank) for rank, has in enumerate(shows) if not has)
            faults.append(
                f"{name}: rank {without} reads no image where others do, not even a blank one: ranks would gather "
                "different weights, and wait for each other"
            )
    return judged("images by rank", faults, "in each micro-step all ranks run the ViT, or none")

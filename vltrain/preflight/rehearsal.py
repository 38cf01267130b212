"""The rehearsal: the packs that are likeliest to fail go through forward, backward and the optimizer's step, by the
trainer itself; what their gradients reach is looked at on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vltrain.data.loader import LoadedStep
from vltrain.data.plan import FILLER
from vltrain.data.report.finding import FAILED, Finding
from vltrain.memory.measured import PeakMemory
from vltrain.preflight.census import Census
from vltrain.preflight.packs import Chosen, choose_mix, choose_packs, load, planned
from vltrain.preflight.ranks import judged
from vltrain.train.optim import set_learning_rates
from vltrain.train.trainer import Trainer
from vltrain.train.zero.snapshot import EngineSnapshot

GIB = 2**30


@dataclass(kw_only=True)
class Rehearsal:
    """findings: on images, memory and gradients; loaded: what was tried; peak_bytes: of this rank."""

    findings: list[Finding]
    loaded: LoadedStep
    peak_bytes: int = 0


def rehearse(trainer: Trainer, snapshot: EngineSnapshot, *, everything: bool) -> Rehearsal:
    """Inside a `trial`. A collective. Raises OutOfMemory where a pack does not fit.

    First what all ranks do alike: a parameter that is not reached is found there, and not by ranks that wait for each
    other in a mix.

    Args:
        snapshot: of the trial.
        everything: try all kinds of packs, twice: behind a step, adapters are no longer the identity.
    """
    index, world_size = trainer.loader.dataset.index, trainer.engine.world_size
    alike, mix = choose_packs(index, world_size, everything=everything), choose_mix(index, world_size)
    second = alike if mix is None else alike.beside(mix) if everything else mix
    steps = [alike, second] if everything or mix is not None else [alike]
    loaded = [_loaded(trainer, one) for one in steps]
    images = [one for step, chosen in zip(loaded, steps, strict=True) for one in _without_images(step, chosen)]
    equal = judged("images by rank", images, "in each micro-step all ranks run the ViT, or none")
    if images:
        return Rehearsal(findings=[equal], loaded=loaded[-1])
    census, peak = Census(trainer=trainer, snapshot=snapshot), PeakMemory(trainer.engine.device)
    seen, lost, found, seconds = list[bool](), list[str](), list[Finding](), 0.0
    with census.watching():
        for number, step in enumerate(loaded):
            began = time.perf_counter()
            seen += step.plan.has_images.tolist()
            lost += _tried(trainer, step, census)
            seconds += time.perf_counter() - began
            if number == 0 and not lost:
                census.look_for_stuck()
            found = census.findings(seen, twice=everything and number > 0)
            if _all_say(any(one.status == FAILED for one in found)):
                break
    most = peak.read()
    tried = f"{_sizes(trainer, alike)}: forward, backward and step in {seconds:.1f} s"
    took = judged("rehearsal", lost, f"{tried}; peak {most / GIB:.2f} GiB {peak.kind}")
    findings = [equal, *found, took]
    return Rehearsal(findings=findings, loaded=loaded[-1], peak_bytes=most)


def _loaded(trainer: Trainer, chosen: Chosen) -> LoadedStep:
    step, index = min(trainer.first_step, trainer.plan.num_steps - 1), trainer.loader.dataset.index
    return load(trainer.loader, planned(trainer.plan, index, chosen, step), trainer.rank)


def _tried(trainer: Trainer, loaded: LoadedStep, census: Census) -> list[str]:
    """A step by the peak learning rate, whatever the warm-up has; in words what is wrong with it."""
    result = trainer.accumulate(loaded)
    census.read()
    set_learning_rates(trainer.engine.optimizer, 1.0)
    trainer.update(result)
    if trainer.engine.device.type == "cuda":
        torch.cuda.synchronize()
    return [] if result.applied else ["the optimizer did not take the step: the gradient is NaN or Inf"]


def _all_say(own: bool) -> bool:
    """Whether it is so on any rank. A collective."""
    everyone: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return any(everyone)


def _sizes(trainer: Trainer, chosen: Chosen) -> str:
    index, told = trainer.loader.dataset.index, []
    for name, packs in zip(chosen.names, chosen.packs[:, 0].tolist(), strict=True):
        if packs == FILLER:
            continue
        size = f"{index.num_tokens[packs]} tokens, {index.num_images[packs]} image(s)"
        told.append(f"{name} (pack {packs}, {size})")
    return "; ".join(told)


def _without_images(loaded: LoadedStep, chosen: Chosen) -> list[str]:
    """In words, in which micro-steps some ranks read images and others none: at ZeRO-3 they would gather different
    weights, and wait for each other without end; at others a gradient would be missing. A collective."""
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
    return faults

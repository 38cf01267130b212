"""Which packs are tried: those that are likeliest to fail, and a mix in which ranks differ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vltrain.data.loader import LoadedStep, StepLoader, filler, load_pack
from vltrain.data.plan import FILLER, Plan, StepPlan
from vltrain.data.shards import Index


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Micro-steps to try, each by what it is: int64 [W] pack numbers, `FILLER` where a rank has none."""

    names: tuple[str, ...]
    packs: np.ndarray
    """int64 [G, W]."""


def choose_packs(index: Index, world_size: int, *, everything: bool) -> Chosen:
    """The longest pack, the one with most images, where `everything` one without, and on several ranks a micro-step in
    which one has images and the others none. A pack is tried once, on all ranks."""
    images, tokens = index.num_images[:], index.num_tokens[:]
    longest = _first_of(tokens, index.num_label_tokens[:])
    most = _first_of(images, tokens)
    text = _first_of(-images.astype(np.int64), tokens)
    has_text = bool(images[text] == 0)
    found: dict[str, list[int]] = {"the longest pack": [longest] * world_size}
    if images[most]:
        found["the pack with most images"] = [most] * world_size
    if has_text and everything and images[most]:
        found["a pack without images"] = [text] * world_size
    if world_size > 1 and images[most]:
        others = [text if has_text else FILLER] * (world_size - 1)
        found["images on rank 0 alone"] = [most, *others]
    grids: dict[tuple[int, ...], str] = {}
    for name, packs in found.items():
        grids[tuple(packs)] = f"{grids[tuple(packs)]}, {name}" if tuple(packs) in grids else name
    return Chosen(names=tuple(grids.values()), packs=np.array(list(grids), np.int64))


def _first_of(values: np.ndarray, then: np.ndarray) -> int:
    """Of the largest values the one with the most of `then`."""
    most = np.flatnonzero(values == values.max())
    return int(most[then[most].argmax()])


def planned(plan: Plan, index: Index, packs: np.ndarray, step: int) -> StepPlan:
    """A step of these packs, int64 [G, W], as the plan would have it, with the number of one of its steps."""
    like, numbers = plan.step(step), packs[packs != FILLER]
    sizes = np.where(packs == FILLER, 0, index.num_samples[packs]).astype(np.int64).ravel()
    return replace(
        like,
        packs=packs,
        first_samples=(np.cumsum(sizes) - sizes).reshape(packs.shape),
        has_images=plan.reads_images(packs),
        num_label_tokens=int(index.num_label_tokens[numbers].sum()),
        num_tokens=int(index.num_tokens[numbers].sum()),
        num_samples=int(index.num_samples[numbers].sum()),
    )


def load(loader: StepLoader, step: StepPlan, rank: int) -> LoadedStep:
    """A rank's part of a step, decoded in this process."""
    batches = []
    for pack, has_images in zip(step.packs[:, rank].tolist(), step.has_images.tolist(), strict=True):
        if pack == FILLER:
            batches.append(filler(has_images, loader.reader, loader.kept))
        else:
            batches.append(load_pack(loader.dataset, pack, loader.reader, loader.kept, has_images=has_images))
    return LoadedStep(step=step.step, batches=batches, plan=step)

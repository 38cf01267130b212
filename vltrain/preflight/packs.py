"""Which packs are tried: those that are likeliest to fail, and a mix in which ranks differ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vltrain.data.flat.index import Index
from vltrain.data.loader import LoadedStep, StepLoader, filler, load_pack
from vltrain.data.plan import FILLER, Plan, StepPlan


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Micro-steps to try, each by what it is: int64 [G, W] pack numbers, `FILLER` where a rank has none.

    blank: of which micro-steps all ranks read an image, a blank one where a pack shows none.
    """

    names: tuple[str, ...]
    packs: np.ndarray
    blank: np.ndarray

    def beside(self, other: Chosen) -> Chosen:
        """These and others."""
        return Chosen(
            names=(*self.names, *other.names),
            packs=np.concatenate([self.packs, other.packs]),
            blank=np.concatenate([self.blank, other.blank]),
        )


def choose_packs(index: Index, world_size: int, *, everything: bool) -> Chosen:
    """What all ranks try alike: the longest pack, the one with most images, where `everything` one without, and on
    several ranks that one with a blank image, before ranks that lack one could wait for others. Each pack once."""
    longest, most, text = _kinds(index)
    found: dict[tuple[int, bool], str] = {(longest, False): "the longest pack"}
    if everything:  # a mean over packs is another one than that over tokens where packs differ in labels
        found.setdefault((int(index.num_label_tokens[:].argmin()), False), "the pack with fewest labels")
    if index.num_images[most]:
        before = found.get((most, False))
        found[most, False] = f"{before}, the pack with most images" if before else "the pack with most images"
        if everything and text != FILLER:
            found.setdefault((text, False), "a pack without images")
        if world_size > 1:
            found[text, True] = "a blank image"
    return Chosen(
        names=tuple(found.values()),
        packs=np.array([[pack] * world_size for pack, _ in found], np.int64),
        blank=np.array([blank for _, blank in found]),
    )


def choose_mix(index: Index, world_size: int) -> Chosen | None:
    """A micro-step in which rank 0 has images and the others none; None on one rank, and where no pack has any."""
    _, most, text = _kinds(index)
    if world_size == 1 or not index.num_images[most]:
        return None
    packs = np.array([[most, *[text] * (world_size - 1)]], np.int64)
    return Chosen(names=("images on rank 0 alone",), packs=packs, blank=np.array([False]))


def _kinds(index: Index) -> tuple[int, int, int]:
    """The longest pack, the one with most images, and one without, or `FILLER`."""
    images, tokens = index.num_images[:].astype(np.int64), index.num_tokens[:]
    text = _first_of(-images, tokens)
    return _first_of(tokens, index.num_label_tokens[:]), _first_of(images, tokens), FILLER if images[text] else text


def _first_of(values: np.ndarray, then: np.ndarray) -> int:
    """Of the largest values the one with the most of `then`."""
    most = np.flatnonzero(values == values.max())
    return int(most[then[most].argmax()])


def planned(plan: Plan, index: Index, chosen: Chosen, step: int) -> StepPlan:
    """A step of these packs as the plan would have it, with the number of one of its steps."""
    packs = chosen.packs
    like, numbers = plan.step(step), packs[packs != FILLER]
    sizes = np.where(packs == FILLER, 0, index.num_samples[packs]).astype(np.int64).ravel()
    return replace(
        like,
        packs=packs,
        first_samples=(np.cumsum(sizes) - sizes).reshape(packs.shape),
        has_images=plan.reads_images(packs) | chosen.blank,
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
            batches.append(load_pack(loader.dataset, pack, loader.reader, loader.kept, has_images))
    return LoadedStep(step=step.step, batches=batches, plan=step)

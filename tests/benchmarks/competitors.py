"""Whom our trainer is measured beside, each at its best: kinds, and the ways to set up each, of which the fastest
counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.benchmarks.measure import alternate, tell, timed, trim_heap
from tests.benchmarks.packed_peer import packing_trainer
from tests.benchmarks.peers import Held, padding_trainer, trl_trainer
from tests.benchmarks.samples import Samples
from vltrain.config.schema import Config

GROUPED, LONGEST, PADDED = "grouped by length", "padded to the longest", "padded to 512"
PACKED, TRL_PACKING, TRL_FREE = "packed, dense masks", "TRL packing", "TRL padding_free"
KINDS = (GROUPED, PACKED, LONGEST, PADDED, TRL_PACKING, TRL_FREE)
PADDED_LENGTH = 512
# Samples of a batch that are tried. Padded to the longest of any samples: what makes some 2,000 useful tokens; to 512:
# what the paper's code has on a GPU, and a machine of this kind can hold.
BATCHES = {"scienceqa": (1, 2, 4, 8), "text": (1, 2, 4, 8), "easyvqa": (16, 32, 64)}
LONGEST_BATCH = {"scienceqa": 8, "text": 8, "easyvqa": 64}
PADDED_BATCH = 4
TRIALS = 2  # steps of each way, after one that does not count
WANTED: dict[str, dict[str, float]] = {
    GROUPED: {"scienceqa": 1.4, "easyvqa": 1.1},
    PACKED: {"scienceqa": 1.2},
    LONGEST: {"scienceqa": 1.5},
    PADDED: {"scienceqa": 1.7, "easyvqa": 10.0},
    TRL_PACKING: {"text": 1.8},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all are given alike."""

    data: str
    samples: Samples
    config: Config
    dtype: torch.dtype
    folder: Path
    pack_length: int
    batches: Sequence[int] | None
    """Sizes to try; None: those of BATCHES."""
    quick: bool


def kinds_of(data: str) -> list[str]:
    """The kinds that can train on that data: TRL packs text only, and text has no image to encode for each sample."""
    text = (GROUPED, TRL_PACKING, TRL_FREE)
    return list(text if data == "text" else (GROUPED, PACKED, LONGEST, PADDED))


def ways(kind: str, setting: Setting) -> dict[str, Callable[[], Held]]:
    """By name, how that kind may be set up."""
    config, samples, dtype, folder = setting.config, setting.samples, setting.dtype, setting.folder

    def padding(batch_size: int, length: int | None = None, **more: bool | int) -> Callable[[], Held]:
        how = {"batch_size": batch_size, "length": length, **more}
        return lambda: padding_trainer(config, samples, dtype, folder=folder, **how)

    def trl(**how: int) -> Callable[[], Held]:
        return lambda: trl_trainer(config, samples, dtype, folder=folder, **how)

    batches: Sequence[int] = setting.batches or ((1, 2) if setting.quick else BATCHES[setting.data])
    # Some samples a step, however many a batch has: an update costs, and one batch of few says little.
    most = max(batches) if setting.quick else max(BATCHES[setting.data])
    accumulated = {size: max(1, most // 2 // size) for size in batches}
    if kind == GROUPED:
        found = {f"batches of {size}": padding(size, grouped=True, accumulate=accumulated[size]) for size in batches}
        if not torch.cuda.is_available():
            tell("Liger's kernels are Triton's and want a GPU: no competitor has them here")
            return found
        return found | {
            f"batches of {size}, Liger": padding(size, grouped=True, accumulate=accumulated[size], liger=True)
            for size in batches
        }
    if kind == TRL_FREE:
        return {
            f"batches of {size}": trl(batch_size=size, accumulate=accumulated[size]) for size in batches if size > 1
        }
    one: dict[str, Callable[[], Held]] = {
        PACKED: lambda: packing_trainer(config, samples, dtype, pack_length=setting.pack_length, folder=folder),
        LONGEST: padding(2 if setting.quick else LONGEST_BATCH[setting.data]),
        PADDED: padding(1 if setting.quick else PADDED_BATCH, PADDED_LENGTH),
        TRL_PACKING: trl(pack_length=setting.pack_length),
    }
    return {"": one[kind]}


def make_competitors(setting: Setting, only: Sequence[str] | None) -> dict[str, tuple[str, Held]]:
    """By name: its kind, and the fastest of its ways, ready for its next step. only: these kinds."""
    found: dict[str, tuple[str, Held]] = {}
    for kind in kinds_of(setting.data):
        if only is not None and kind not in only:
            continue
        name, held = fastest({way: make() for way, make in ways(kind, setting).items()})
        found[f"{kind}, {name}" if name else kind] = (kind, held)
    return found


def fastest(held: dict[str, Held]) -> tuple[str, Held]:
    """Of several, by useful tokens a second over a few steps by turns; the others are stopped."""
    if len(held) == 1:
        return next(iter(held.items()))
    found = alternate({name: _trimmed(timed(one.step)) for name, one in held.items()}, TRIALS)
    speeds = {name: sum(one[0] for one in runs) / sum(one[1] for one in runs) for name, runs in found.items()}
    best = max(speeds, key=speeds.__getitem__)
    tell(f"useful tokens/s: {', '.join(f'{name} {speed:.1f}' for name, speed in speeds.items())}; {best} goes on")
    for name, one in held.items():
        if name != best:
            one.stop()
    chosen = held[best]
    held.clear()
    trim_heap()
    return best, chosen


def _trimmed(run: Callable[[], tuple[int, float]]) -> Callable[[], tuple[int, float]]:
    def trimmed() -> tuple[int, float]:
        found = run()
        trim_heap()
        return found

    return trimmed

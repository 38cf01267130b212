"""What a pack costs in seconds, measured: `train.balance measured`.

A few packs that are as different as the set has them go forward and backward before the first step, on every rank the
same pack at once: so no rank waits for another, whatever the ZeRO stage gathers or reduces, and the seconds are the
pack's own. Seconds are then fitted by what the index knows of a pack. Only who takes which pack follows from it
(`vltrain.data.plan`), never the batch. Trade-off: two runs that measure may assign packs to ranks otherwise, and so sum
in another order; what was measured is kept in each checkpoint, and a run that goes on does not measure again.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vltrain.batch import Batch
from vltrain.config.schema import Config
from vltrain.data.flat.index import Index
from vltrain.data.kept.store import KeptImages
from vltrain.data.loader import load_pack
from vltrain.data.pictures import ImageReader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.distributed.broadcast import from_rank_0
from vltrain.memory.out_of_memory import oom_context
from vltrain.train.zero.engine import Engine

logger = logging.getLogger(__name__)

MEASURED = "measured_cost"  # of a checkpoint's run state: a `MeasuredCost` as plain JSON
NUM_PACKS = 12  # that are measured
ROUNDS = 2  # of which the faster one counts
CANDIDATES = 4096  # packs among which the measured ones are chosen
COEFFICIENTS = ("per_pack", "per_token", "per_pair", "per_image", "per_label")


@dataclass(frozen=True, kw_only=True)
class MeasuredCost:
    """Seconds of forward and backward, none of them negative.

    error, error_of_flops: mean relative error over the measured packs, of this and of the FLOPs that it replaces.
    """

    per_pack: float
    per_token: float
    per_pair: float
    per_image: float
    per_label: float
    error: float
    error_of_flops: float

    def cost(self, flops: PackCost) -> PackCost:
        """In place of the model's FLOPs, images counted as there."""
        return replace(
            flops,
            per_token=self.per_token,
            per_pair=self.per_pair,
            per_image=self.per_image,
            per_label=self.per_label,
        )


def features_of(index: Index, cost: PackCost, packs: np.ndarray) -> np.ndarray:
    """float64 [m, 5]: of each pack 1, its tokens, pairs, images and label tokens, see `COEFFICIENTS`."""
    columns = (
        np.ones(len(packs)),
        index.num_tokens[packs],
        index.sum_squares[packs],
        cost.sized_images(index, packs),
        index.num_label_tokens[packs],
    )
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def choose_packs(features: np.ndarray, count: int) -> np.ndarray:
    """Rows that are as different as can be, int64 [count or fewer]: the one with the most tokens and pairs, then each
    time the one that is furthest from all before (Gonzalez, 1985), columns scaled to [0, 1]; fewer where rows are
    equal."""
    low, high = features.min(axis=0), features.max(axis=0)
    scaled = (features - low) / np.maximum(high - low, 1e-12)
    chosen = [int(scaled.sum(axis=1).argmax())]
    distances = np.full(len(features), np.inf)
    while len(chosen) < count:
        distances = np.minimum(distances, np.square(scaled - scaled[chosen[-1]]).sum(axis=1))
        if distances.max() == 0:
            break
        chosen.append(int(distances.argmax()))
    return np.array(chosen, np.int64)


def fit_seconds(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The coefficients >= 0 with the least sum of squared relative errors, float64 [5]: of all subsets of columns the
    best whose least-squares solution has no negative number (there are 31)."""
    weighted = features / seconds[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    best, least = np.zeros(features.shape[1]), np.inf
    for size in range(1, features.shape[1] + 1):
        for columns in map(list, itertools.combinations(range(features.shape[1]), size)):
            found = np.linalg.lstsq(weighted[:, columns] / scale[columns], np.ones(len(seconds)), rcond=1e-9)[0]
            error = float(np.square(weighted[:, columns] / scale[columns] @ found - 1).sum())
            # A column that explains nothing more is noise.
            if found.min() >= 0 and error < least * 0.999:
                best, least = np.zeros(features.shape[1]), error
                best[columns] = found / scale[columns]
    return best


def balanced(
    config: Config,
    plan: Plan,
    flops: PackCost,
    engine: Engine,
    dataset: PackedDataset,
    reader: ImageReader,
    kept: KeptImages | None,
    run_state: dict[str, Any],
) -> tuple[Plan, MeasuredCost | None]:
    """The plan as `train.balance` wants it, and what was measured, by an earlier life of the run or now. A collective.

    Args:
        flops: what the plan's cost is, see `pack_cost`.
        reader, kept: of the loader, see `StepLoader`.
        run_state: of the checkpoint that the run goes on from.
    """
    if config.train.balance == "flops":
        return plan, None
    known = run_state.get(MEASURED)
    if known is None and dist.get_world_size() == 1:
        logger.info("train.balance measured: one rank takes every pack, so nothing is measured")
        return plan, None

    def load(number: int) -> Batch:
        return load_pack(dataset, number, reader, kept)

    measured = MeasuredCost(**known) if known else measure_cost(engine, dataset.index, flops, load)
    return plan.balanced_by(measured.cost(flops)), measured


def measure_cost(engine: Engine, index: Index, flops: PackCost, load: Callable[[int], Batch]) -> MeasuredCost:
    """Times forward and backward of some packs. Weights and optimizer stay as they are. A collective.

    Args:
        flops: the model's, see `pack_cost`.
        load: a pack's number -> its batch.
    """
    began = time.perf_counter()
    candidates = np.unique(np.linspace(0, len(index) - 1, min(len(index), CANDIDATES)).astype(np.int64))
    packs = candidates[choose_packs(features_of(index, flops, candidates), NUM_PACKS)]
    times = np.full((ROUNDS + 1, len(packs)), np.inf)  # the first round warms up
    engine.model.train()
    for round_times in times:
        for place, number in enumerate(packs.tolist()):
            round_times[place] = _seconds(engine, load(number).to(engine.device))
    there_and_back(engine, load(int(packs[-1])).to(engine.device), last_micro_step=True)
    engine.drop_step()
    total = torch.from_numpy(times[1:].min(axis=0)).to(engine.device)
    dist.all_reduce(total)
    measured = from_rank_0(fitted(index, flops, packs, (total / dist.get_world_size()).cpu().numpy()))
    if dist.get_rank() == 0:
        logger.info(
            "balance: forward and backward of %d packs measured in %.1f s; their seconds are predicted to %.1f%% "
            "on average, by FLOPs to %.1f%%",
            len(packs),
            time.perf_counter() - began,
            100 * measured.error,
            100 * measured.error_of_flops,
        )
    return measured


def fitted(index: Index, flops: PackCost, packs: np.ndarray, seconds: np.ndarray) -> MeasuredCost:
    """What explains the `seconds` of `packs`, float64 [m] and int64 [m]."""
    features = features_of(index, flops, packs)
    found = fit_seconds(features, seconds)
    by_flops = flops.of(index, packs)
    scale = float((by_flops / seconds).sum() / np.square(by_flops / seconds).sum())
    errors = {
        "error": float(np.abs(features @ found / seconds - 1).mean()),
        "error_of_flops": float(np.abs(scale * by_flops / seconds - 1).mean()),
    }
    return MeasuredCost(**dict(zip(COEFFICIENTS, found.tolist(), strict=True)), **errors)


def _seconds(engine: Engine, batch: Batch) -> float:
    """Of forward and backward, of the device's work too."""
    _finish(engine.device)
    dist.barrier()
    began = time.perf_counter()
    there_and_back(engine, batch, last_micro_step=False)
    _finish(engine.device)
    return time.perf_counter() - began


def there_and_back(engine: Engine, batch: Batch, *, last_micro_step: bool) -> None:
    """Forward and backward of one pack, whose gradients are added to those that are there."""
    with oom_context(batch, step=0, rank=dist.get_rank()):
        loss = engine.forward(batch).loss_sum / max(1, batch.num_label_tokens)
        engine.backward(loss, last_micro_step=last_micro_step)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

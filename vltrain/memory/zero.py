"""What DeepSpeed keeps of weights, gradients and optimizer states on each rank, in closed form, by ZeRO stage.

For the engine as it is here: trained weights fp32 at every stage, AdamW, DeepSpeed 0.19. What that means, found in its
code and measured on real processes (tests/memory/test_zero.py), P being the numbers trained and N the ranks:

stage 0  weights 4 P, gradients 4 P, states 8 P; gradients are copied into a bucket to be summed.
stage 1  weights 4 P (one flat tensor a group), a second copy of this rank's partition 4 P/N although both are fp32,
states 8 P/N, whole
         gradients 4 P, and in the step a flat copy of a group's partition.
stage 2  as 1, but gradients only of parameters that reach into this rank's partition; twice while micro-steps add up.
stage 3  partitions of everything, frozen weights too, and of trained ones two copies (its test for sharing them
compares a device with a
         name and never holds); small parameters also whole; and what is gathered for the blocks at work.

A bucket has the size that the JSON gives it, however few numbers are trained; where it says "auto", one of all that is
trained (`vltrain.train.zero.ds_config.fill_in`). Trade-off: what collectives' libraries allocate is not
counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vltrain.errors import InputError

FP32 = 4
STAGE_0_BUCKET = 500_000_000  # the engine's own, not the JSON's
ALIGNMENT = 2  # of a partition's start, in numbers
# Settings that change what is kept, in ways not worked out here.
UNPLANNED = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "mics_shard_size",
    "zenflow",
    "round_robin_gradients",
)


@dataclass(frozen=True)
class Parameter:
    """A parameter as ZeRO sees it: how many numbers, and bytes where it is whole."""

    numel: int
    num_bytes: int

    def share(self, world_size: int) -> int:
        """Bytes of one rank's part under ZeRO-3, which fills up the last part."""
        return -(-self.numel // world_size) * (self.num_bytes // self.numel)


@dataclass(frozen=True, kw_only=True)
class ZeroMemory:
    """Bytes on one rank by kind. `held`: all the time. `at_work`: during forward and backward. `in_step`: during the
    optimizer's step.
    `host`: in this rank's share of CPU memory (or NVMe)."""

    held: dict[str, int] = field(default_factory=dict)
    at_work: dict[str, int] = field(default_factory=dict)
    in_step: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)


def zero_memory(
    ds_config: dict[str, Any],
    world_size: int,
    *,
    groups: Sequence[Sequence[Parameter]],
    frozen: dict[str, list[Parameter]],
    largest_module: int = 0,
) -> ZeroMemory:
    """The memory of the rank that keeps most.

    Args:
        ds_config: DeepSpeed's JSON with its "auto"s filled in.
        groups: trained parameters by group of the optimizer.
        frozen: all others by how they are kept, {"bf16": [...]}.
        largest_module: numbers in the largest module that is gathered at once (stage 3).

    Raises: InputError for settings that are not planned for, or that would have no effect.
    """
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    for name in UNPLANNED:
        if zero.get(name) not in (None, False, 0, -1) and (name, zero[name]) != ("zero_hpz_partition_size", 1):
            raise InputError(
                f"DeepSpeed's 'zero_optimization.{name}' changes memory in a way that the plan does not model; "
                "leave it out"
            )
    if _offloads(zero, "offload_param") and stage < 3:
        raise InputError(
            f"DeepSpeed's 'zero_optimization.offload_param' has no effect at stage {stage}; it needs stage 3"
        )
    accumulates = ds_config.get("gradient_accumulation_steps", 1) > 1
    groups = [group for group in groups if group]
    frozen_held = {
        f"frozen weights, {kind}": sum(parameter.num_bytes for parameter in kept) for kind, kept in frozen.items()
    }
    if stage == 0:
        trained = sum(parameter.numel for group in groups for parameter in group)
        held = {"trained weights": FP32 * trained, "gradients": FP32 * trained, "optimizer states": 2 * FP32 * trained}
        return ZeroMemory(held=frozen_held | held, in_step={"gradient bucket": FP32 * min(trained, STAGE_0_BUCKET)})
    if stage < 3:
        return _stage_1_or_2(zero, stage, world_size, groups, frozen_held, accumulates)
    return _stage_3(zero, world_size, groups, frozen, largest_module)


def _offloads(zero: dict[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"


def _stage_1_or_2(
    zero: dict[str, Any],
    stage: int,
    world_size: int,
    groups: Sequence[Sequence[Parameter]],
    frozen: dict[str, int],
    accumulates: bool,
) -> ZeroMemory:
    numels = [[parameter.numel for parameter in group] for group in groups]
    aligned = [_round_up(sum(group), ALIGNMENT * world_size) for group in numels]
    partitions = [size // world_size for size in aligned]
    trained, partition = sum(map(sum, numels)), sum(partitions)
    reached = max(
        (sum(_reached(group, size, rank) for group, size in zip(numels, partitions)) for rank in range(world_size)),
        default=0,
    )
    largest = max((numel for group in numels for numel in group), default=0)
    bucket = zero.get("reduce_bucket_size", 500_000_000)
    num_buckets = 2 if zero.get("overlap_comm") else 1
    if not (zero.get("contiguous_gradients", True) or _offloads(zero, "offload_optimizer")):
        bucket, num_buckets = min(trained, bucket), 1  # made when it is full, by copying
    at_work = {"reduce buckets": FP32 * bucket * num_buckets}
    held = {**frozen, "trained weights": FP32 * sum(aligned)}
    gradients = FP32 * (trained if stage == 1 else reached * (2 if accumulates else 1))
    kept = {"master weights": FP32 * partition, "optimizer states": 2 * FP32 * partition}
    if not _offloads(zero, "offload_optimizer"):
        in_step = {"gradients for the step": FP32 * max(partitions, default=0)}
        return ZeroMemory(held={**held, "gradients": gradients, **kept}, at_work=at_work, in_step=in_step)
    host = {
        **kept,
        "gradients": FP32 * (partition + (reached if accumulates else 0)),
        "offload buffers": FP32 * (partition + largest),
    }
    held |= {"gradients": FP32 * trained if stage == 1 else 0, "offload buffers": FP32 * largest}
    return ZeroMemory(held=held, at_work=at_work, host=host)


def _reached(numels: Sequence[int], partition: int, rank: int) -> int:
    """Numbers of the parameters that reach into a rank's partition of a group, counted whole as DeepSpeed keeps their
    gradients."""
    first, last = partition * rank, partition * (rank + 1)
    reached = end = 0
    for numel in numels:
        start, end = end, end + numel
        reached += numel if start < last and end > first else 0
    return reached


def _stage_3(
    zero: dict[str, Any],
    world_size: int,
    groups: Sequence[Sequence[Parameter]],
    frozen: dict[str, list[Parameter]],
    largest_module: int,
) -> ZeroMemory:
    everything = [parameter for kept in (*groups, *frozen.values()) for parameter in kept]
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    persistent = sum(parameter.num_bytes for parameter in everything if parameter.numel <= threshold)
    gathered = _gathered(zero, [parameter for parameter in everything if parameter.numel > threshold], largest_module)
    partitions = [sum(parameter.share(world_size) for parameter in group) for group in groups]  # of 4 bytes a number
    partition = sum(partitions)
    weights = {
        f"frozen weights, {kind}": sum(parameter.share(world_size) for parameter in kept)
        for kind, kept in frozen.items()
    }
    weights["trained weights"] = partition
    kept = {"master weights": partition, "optimizer states": 2 * partition, "gradients": partition}
    largest = FP32 * zero.get("sub_group_size", 10**9)
    in_step = {"gradients for the step": min(max(partitions, default=0), largest)}
    host: dict[str, int] = {}
    if _offloads(zero, "offload_param"):
        host, weights = weights, {}
    held = {
        **weights,
        "small weights kept whole": persistent,
        "reduce buckets": FP32 * zero.get("reduce_bucket_size", 500_000_000),
    }
    if _offloads(zero, "offload_optimizer"):
        kept["gradients"] *= 2  # as they arrive, and for the step
        host, kept, in_step = {**host, **kept}, {}, {}
    return ZeroMemory(held={**held, **kept}, at_work={"gathered weights": gathered}, in_step=in_step, host=host)


def _gathered(zero: dict[str, Any], cut_up: Sequence[Parameter], largest_module: int) -> int:
    """Bytes of whole weights at once, at most: what the JSON allows to live, or the largest module where that is more.

    Prefetching stops at stage3_max_live_parameters, and weights needed again within stage3_max_reuse_distance are not
    let go, which around the turn from forward to backward holds half as many.
    """
    numel = sum(parameter.numel for parameter in cut_up)
    allowed = max(
        zero.get("stage3_max_live_parameters", 10**9), zero.get("stage3_max_reuse_distance", 10**9) // 2, largest_module
    )
    share = min(1.0, allowed / numel) if numel else 0.0
    return math.ceil(share * sum(parameter.num_bytes for parameter in cut_up))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

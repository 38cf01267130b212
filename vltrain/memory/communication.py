"""What DeepSpeed sends between ranks in an optimizer step, in closed form, by ZeRO stage.

P the numbers trained (fp32, 4 bytes), W the bytes of weights that are partitioned at stage 3 (frozen ones as they are
kept, trained ones 4 P; without the small ones that are kept whole), N the ranks, G the micro-steps of a step. Found in
DeepSpeed 0.19's own log of communication (tests/memory/test_communication.py):

stage 0  gradients are summed once a step: all-reduce of 4 P
stage 1  the same in buckets, and the updated weights are gathered: all-gather of 4 P
stage 2  gradients are summed in every micro-step: all-reduce of G 4 P; all-gather of 4 P
stage 3  weights are gathered for the forward of each micro-step and again for its backward, but for those that are
         needed again within stage3_max_reuse_distance: all-gather of G W to 2 G W; gradients: reduce-scatter of G 4 P.
         At most: what needs no backward (a tower in which nothing is trained) is gathered once

What a rank sends is what a ring sends: (N - 1) / N of an all-gather's or a reduce-scatter's bytes, twice that of an
all-reduce's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vltrain.memory.zero import FP32, Parameter

_RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes of the messages of one optimizer step, by collective; those of an all-gather as it gives them, of a
    reduce-scatter as it takes them."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def sent(self, world_size: int) -> int:
        """Bytes that each rank sends."""
        messages = sum(times * getattr(self, name) for name, times in _RING.items())
        return messages * (world_size - 1) // world_size


def communication(
    ds_config: Mapping[str, Any],
    world_size: int,
    *,
    micro_steps: int,
    num_trained: int,
    partitioned: Sequence[Parameter] = (),
) -> Communication:
    """What DeepSpeed sends in a step.

    Args:
        ds_config: its JSON.
        micro_steps: of a step, on each rank.
        num_trained: numbers that are trained.
        partitioned: all weights, of which stage 3 partitions those above its threshold.
    """
    if world_size == 1:
        return Communication()
    zero = ds_config.get("zero_optimization", {})
    stage, trained = zero.get("stage", 0), FP32 * num_trained
    if stage == 0:
        return Communication(all_reduce=trained)
    if stage < 3:
        return Communication(all_reduce=trained * (micro_steps if stage == 2 else 1), all_gather=trained)
    threshold = zero.get("stage3_param_persistence_threshold", 100_000)
    spread = [one for one in partitioned if one.numel > threshold]
    numel, whole = sum(one.numel for one in spread), sum(one.num_bytes for one in spread)
    kept = min(zero.get("stage3_max_reuse_distance", 10**9) // 2, zero.get("stage3_max_live_parameters", 10**9))
    again = 1 - min(1.0, kept / numel) if numel else 0.0
    gathered = round(micro_steps * whole * (1 + again))
    return Communication(all_gather=gathered, reduce_scatter=micro_steps * trained)

"""The schedule of AdaLoRA's pruning, of whichever architecture tunes by it."""

from __future__ import annotations

from dataclasses import dataclass

from vltrain.config.ranges import MOST_SIZE, MOST_STEPS, check_ranges, number
from vltrain.errors import require


@dataclass(kw_only=True)
class AdaLoraSchedule:
    """When and how far AdaLoRA prunes, both networks' layers together. Names and defaults are peft's; steps are the
    optimizer's."""

    init_rank: int = number(12, 1, MOST_SIZE)
    """Rank of every layer's update at the start."""
    target_rank: int = number(8, 1, MOST_SIZE)
    """Rank that layers have on average at the end."""
    tinit: int = number(0, 0, MOST_STEPS)
    """Steps before the first pruning."""
    tfinal: int = number(0, 0, MOST_STEPS)
    """Steps after the last one, in which nothing changes but weights."""
    delta_t: int = number(1, 1, MOST_STEPS)
    """Steps between prunings."""
    beta1: float = number(0.85, 0, 1, open_low=True, open_high=True)
    """Of the running mean of importance."""
    beta2: float = number(0.85, 0, 1, open_low=True, open_high=True)
    """Of the running mean of its deviation."""
    orth_reg_weight: float = number(0.5, 0, 1e6)
    """Weight of the term that keeps factors orthogonal: the mean of ||A A' - I|| and ||B' B - I|| (Frobenius norms)
    over all layers."""

    def __post_init__(self) -> None:
        key = "model.instructblip.adalora"
        check_ranges(self, key)
        above = self.init_rank > self.target_rank
        require(
            above,
            f"{key}.init_rank",
            self.init_rank,
            f"more than {key}.target_rank = {self.target_rank}, to have something to prune",
        )

"""How long a run takes: operations over the rate at which they are done.

    seconds of a step = (operations + those done again in recomputed blocks) / (GPUs at work x rate)
                        [+ bytes sent / bandwidth]

GPUs at work: packs of a step over its micro-steps; the others wait, or compute on fillers. A step of one pack takes as
long on eight GPUs as on one.

Operations are the mathematics' (`vltrain.models.flops`), so the rate at which a run does them is lower than that of one
large product: by `utilisation`, which the user states. Trade-off: communication is taken not to overlap with
arithmetic, and what hides neither (data, evaluation, checkpoints) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pace:
    """flops: FLOP/s of one GPU while it trains; bandwidth: bytes/s that a rank sends, None: sending costs nothing;
    origin: where the figures are from, in words."""

    flops: float
    bandwidth: float | None
    origin: str

    def step_seconds(self, flops_per_step: float, sent_bytes: float, at_work: float) -> float:
        """Of a step of all GPUs together, of which each sends so many bytes; `at_work`: see the module."""
        sending = 0.0 if self.bandwidth is None else sent_bytes / self.bandwidth
        return flops_per_step / (at_work * self.flops) + sending


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Of a whole run: `epochs` as far as `steps` go; `hours` by the clock."""

    steps: int
    epochs: float
    step_seconds: float
    num_gpus: int

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_gpus

"""The paper's optimizer: AdamW with two kinds of groups, and a schedule that is a pure function of the step.

Nothing of the schedule is state, so nothing of it needs a checkpoint: resuming at step k sets the rates of step k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from vltrain.config.schema import OptimConfig


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optim: OptimConfig, part_of
) -> list[dict]:
    """Sorts trainable parameters into groups by peak learning rate and weight decay.

    Weight decay is for matrices; biases and other 1-D parameters have none (as the paper's code).

    Args:
        named_parameters: names and parameters; frozen ones are skipped.
        optim: the recipe's section.
        part_of: maps a parameter's name to its part of the model ("adapter", "neck", "vision", "llm", ...).

    Returns:
        torch-style groups, each with `peak_lr` beside `lr`; in a fixed order.
    """
    between = dict.fromkeys(("projector", "neck", "bridge"), optim.projector_lr)
    own = {"vision": optim.vision_lr, "llm": optim.llm_lr, **between}
    peaks = {part: optim.lr if peak is None else peak for part, peak in own.items()}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        # Under ZeRO-3 `parameter` may be an empty shell that remembers its shape.
        num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        decay = optim.weight_decay if num_dimensions > 1 else 0.0
        groups.setdefault((peaks.get(part_of(name), optim.lr), decay), []).append(parameter)
    return [
        {"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        for (peak, decay), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def lr_factor(
    step: int,
    num_steps: int,
    warmup_steps: float,
    min_ratio: float,
    schedule: str = "cosine",
    steps_per_epoch: float = 1.0,
) -> float:
    """Share of the peak learning rate at `step` (0-based): a linear warm-up, then down to `min_ratio` at the end.

    The first step of a warm-up of w steps has 1 / (w + 1) of the peak, never zero.

    Args:
        schedule: `cosine` or `linear`, both by steps; `linear_epochs`: linear in the number of epochs (of
            `steps_per_epoch`) that are over, so constant within one.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "linear_epochs":
        over, num_epochs = math.floor(step / steps_per_epoch), math.ceil(num_steps / steps_per_epoch)
        return min_ratio + (1 - min_ratio) * (1 - over / num_epochs)
    progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_ratio + (1 - min_ratio) * left


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group to `factor` times its peak. Returns the largest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)

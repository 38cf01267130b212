"""Before anything is computed: no weight, and no state of the optimizer, is NaN or Inf. One that no pack of the
rehearsal reads, such as a row of the embedding, would meet the run later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vltrain.data.report.finding import Finding
from vltrain.preflight.ranks import judged
from vltrain.train.trainer import Trainer

NAMED = 3


@torch.no_grad()
def finite_weights(trainer: Trainer) -> Finding:
    """Of what this rank has of them: one pass over its memory."""
    named = [*_weights(trainer), *_states(trainer)]
    # A sum is NaN or Inf where an entry is, and is read at memory's own pace.
    sums = [tensor.sum(dtype=torch.float32).to(trainer.engine.device) for _, tensor in named]
    whole: list[bool] = torch.stack(sums).isfinite().tolist() if sums else []
    bad = [name for (name, tensor), ok in zip(named, whole, strict=True) if not ok and not tensor.isfinite().all()]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    faults = [f"{', '.join(bad[:NAMED])}{more}: holds NaN or Inf"] if bad else []
    return judged("weights", faults, f"none of {len(named):,} tensors holds NaN or Inf")


def _weights(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Packed ones are whole numbers, and are left out."""
    for name, parameter in trainer.engine.model.named_parameters():
        own: Any = getattr(parameter, "ds_tensor", parameter)
        if own.is_floating_point() and own.device.type != "meta" and own.numel():
            yield name, own.detach()


def _states(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Of the optimizer, which under ZeRO knows parts of parameters, one behind the other."""
    names = {id(parameter): name for name, parameter in trainer.engine.trainable.items()}
    for number, (parameter, state) in enumerate(trainer.engine.optimizer.state.items()):
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                yield f"the optimizer's {key} of {names.get(id(parameter), f'group {number}')}", value

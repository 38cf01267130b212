"""The scale of the loss: what all ranks report together is the sum of the losses over the step's label tokens, as one
process has it, and the gradient that the optimizer gets is that of this sum.

The gradient is put together a second time from what autograd hands over on each rank before the engine sees it, divided
by whatever the loss was multiplied with on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vltrain.audit.checks.compare import worst_named
from vltrain.data.loader import LoadedStep, load_pack
from vltrain.data.plan import FILLER
from vltrain.data.report.finding import Finding
from vltrain.preflight.ranks import judged
from vltrain.preflight.samples import without_dropout
from vltrain.train.guard import LossGuard, StepReading
from vltrain.train.trainer import Trainer

BOUNDS = {"fp32": 1e-4, "bf16": 2e-2}
MOST_PARAMETERS, MOST_NUMBERS = 8, 1 << 20  # that are put together a second time, and how large each may be
_PENALISED = (".lora_A.", ".lora_B.")  # by AdaLoRA's orthogonality, which is no loss of a token


def loss_scale(trainer: Trainer, loaded: LoadedStep) -> Finding:
    """Of a step that is dropped. Inside a `trial`. A collective."""
    engine, index = trainer.engine, trainer.loader.dataset.index
    packs = [pack for pack in loaded.plan.packs.ravel().tolist() if pack != FILLER]
    labels = sum(int(index.num_label_tokens[pack]) for pack in packs)
    bound, readings = BOUNDS[engine.precision], list[StepReading]()
    chosen = _some_parameters(trainer)
    with without_dropout(engine.model):
        with _collected(engine.model, chosen) as own:
            result = trainer.accumulate(loaded)
        whole = {name: one.detach().float().cpu().clone()
                 for name, one in engine.full_gradients(chosen) if one is not None}  # fmt: skip
        engine.drop_step()
        guard = LossGuard(readings.append)
        guard.push(result)
        guard.flush()
        alone = sum(_loss_of(trainer, pack) for pack in packs) / labels
    faults, reported = [], readings[0].loss
    if not abs(reported - alone) <= bound * abs(alone):
        faults.append(
            f"the ranks report {reported:.6g}, one process has {alone:.6g}, {reported / alone:.4g} of it: the sum of "
            f"the losses has to be divided by the step's {labels} label tokens once"
        )
    due = {name: _summed(own[name], engine.device) / labels for name in whole if name in own}
    size, where = worst_named(whole, due)
    if due and not size <= bound:
        factor = sum(float((whole[name] * one).sum()) for name, one in due.items()) / sum(
            float((one * one).sum()) for one in due.values()
        )
        faults.append(
            f"the gradient is {factor:.4g} times that of the summed loss over {labels} label tokens (largest in "
            f"{where}): it is scaled by the ranks or by the micro-steps"
        )
    proven = f"{reported:.4g} a label token on {engine.world_size} rank(s) as in one process, and so is its gradient"
    return judged("loss scale", faults, proven)


def _some_parameters(trainer: Trainer) -> set[str]:
    """Trained parameters, evenly spread, none too large."""
    fits = [
        name
        for name, one in trainer.engine.trainable.items()
        if one.requires_grad
        and getattr(one, "ds_numel", one.numel()) <= MOST_NUMBERS
        and (trainer.allocator is None or not any(part in name for part in _PENALISED))
    ]
    return set(fits[:: max(1, len(fits) // MOST_PARAMETERS)])


@contextmanager
def _collected(model: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """By parameter the sum of its gradients in the backwards inside the block, as of the models' own `loss_sum`."""
    found: dict[str, Tensor] = {}
    scales: list[Tensor] = []

    def watch(module: Any, arguments: Any, output: Any) -> None:
        if output.loss_sum.requires_grad:
            output.loss_sum.register_hook(scales.append)

    def keep(name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            one = (gradient.detach().float() / scales[-1].float()).cpu()
            found[name] = found[name] + one if name in found else one

        return add

    handles = [model.register_forward_hook(watch)]
    handles += [one.register_hook(keep(name)) for name, one in model.named_parameters() if name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _summed(own: Tensor, device: torch.device) -> Tensor:
    total = own.to(device)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.cpu()


@torch.no_grad()
def _loss_of(trainer: Trainer, pack: int) -> float:
    """Summed over the labels of a pack, in this process alone."""
    loader, engine = trainer.loader, trainer.engine
    batch = load_pack(loader.dataset, pack, loader.reader, loader.kept)
    with engine.autocast():
        return float(engine.model(batch.to(engine.device)).loss_sum)

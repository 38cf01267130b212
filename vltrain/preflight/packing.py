"""The proof of packing, on the user's model and samples: positions begin anew with each segment, a segment whose words
change moves no neighbour, and a pack has the losses and gradients of its segments alone, of a model that with its
dropout off draws no random numbers.

The first is exact. The second compares forwards of one shape, which should agree to the last bit but for kernels that
round by company (8-bit weights). For the third the same pack in another order, its embeddings off by half a unit of
their last place, says how much rounding alone makes of so few tokens: several times that passes, up to a cap that is
far below what a leak makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vltrain.audit.checks.compare import apart, worst_named
from vltrain.audit.trace import final_states, stacks_of, traced
from vltrain.data.report.finding import OK, Finding
from vltrain.preflight.ranks import judged
from vltrain.preflight.samples import SmallPack, without_dropout
from vltrain.schema import Segment
from vltrain.train.trainer import Trainer

SEED = 1
ALONE = "each pack looked at holds one sample: nothing stands beside it"
TIMES = 8.0  # what rounding alone makes


@dataclass(frozen=True)
class Bounds:
    """Of relative differences. moved: of a neighbour's states; loss, gradient: at least so much passes, and at most
    `most`."""

    moved: float
    loss: float
    gradient: float
    most: float

    @classmethod
    def of(cls, trainer: Trainer) -> Bounds:
        """For the run's precision."""
        if trainer.config.model.bits == 8:  # outliers are found over all tokens of a row
            return cls(moved=5e-2, loss=2e-2, gradient=1e-1, most=3e-1)
        if trainer.engine.precision == "fp32":
            return cls(moved=1e-5, loss=2e-5, gradient=5e-5, most=1e-3)
        return cls(moved=1e-3, loss=1e-2, gradient=5e-2, most=2e-1)


def packing_proof(trainer: Trainer, pack: SmallPack, *, everything: bool) -> list[Finding]:
    """Inside a `trial`, of the same samples on all ranks. A collective. `everything`: losses and gradients, too."""
    bounds = Bounds.of(trainer)
    found = [_positions(trainer, pack), _isolation(trainer, pack, bounds)]
    return found + (_packed_is_alone(trainer, pack, bounds) if everything else [])


def _positions(trainer: Trainer, pack: SmallPack) -> Finding:
    """Of whole packs as the loader gives them to the model."""
    found = pack.batch(pack.segments).position_ids
    rows = found.reshape(-1, found.shape[-1]).numpy()
    faults, start = [], 0
    for place, segment in enumerate(pack.segments):
        length = len(segment.input_ids)
        due = segment.position_ids if segment.position_ids.size else np.arange(length)[None]
        have = rows[:, start : start + length]
        if have.shape != due.shape or (have != due).any():
            token = int((have != due).any(axis=0).argmax()) if have.shape == due.shape else 0
            told = f"token {token + 1} stands at {have[0, token]} instead of {due[0, token]}"
            faults.append(f"{pack.name(place)}: {told}: positions have to begin anew with each segment")
        start += length
    return judged("positions", faults, f"begin anew with each of {len(pack.segments)} segments")


@torch.no_grad()
def _states(
    trainer: Trainer, pack: SmallPack, segments: Sequence[Segment], seed: int = SEED
) -> tuple[list[Tensor], list[float]]:
    engine = trainer.engine
    torch.manual_seed(seed)
    with traced(engine.model.llm, layers=False) as trace, engine.autocast():
        output = engine.model(pack.batch(segments).to(engine.device))
    return final_states(trace, segments), output.segment_losses.tolist()


def _isolation(trainer: Trainer, pack: SmallPack, bounds: Bounds) -> Finding:
    what, place = "isolation", len(pack.segments) // 2 if len(pack.segments) > 2 else 0
    if len(pack.segments) == 1:
        return Finding(status=OK, what=what, found=ALONE)
    (before, losses), (after, others) = (
        _states(trainer, pack, pack.segments),
        _states(trainer, pack, pack.changed(place)),
    )
    faults, largest = [], 0.0
    for number in range(len(pack.segments)):
        if number == place:
            continue
        moved = max(apart(after[number], before[number]), _relative(others[number], losses[number]))
        largest = max(largest, moved)
        if moved > bounds.moved:
            faults.append(
                f"{pack.name(number)} sees {pack.name(place)}: its states move by {moved:.1e} when that one's words "
                f"change (at most {bounds.moved:.0e}): the mask of packed attention leaks"
            )
    own = apart(after[place], before[place])
    told = f"words of a segment change, its states by {own:.1e}, its neighbours' by {largest:.1e}"
    return judged(what, faults, told)


def repeatable(trainer: Trainer, pack: SmallPack) -> Finding:
    """The same pack, with other random numbers to draw: as it is evaluated, and as it is trained without dropout. Of
    losses that chance moves, none can be set beside another. Inside a `trial`, of the same samples on all ranks."""
    model, bounds = trainer.engine.model, Bounds.of(trainer)
    faults, largest = list[str](), 0.0
    for mode, training in (("evaluated", False), ("trained with every dropout rate at 0", True)):
        model.train(training)
        with without_dropout(model) if training else nullcontext():
            (states, losses), (again, others) = (
                _states(trainer, pack, pack.segments, seed) for seed in (SEED, SEED + 1)
            )
        moved = max(
            *map(_relative, others, losses), *(apart(one, other) for one, other in zip(again, states, strict=True))
        )
        largest = max(largest, moved)
        if not moved <= bounds.moved:
            faults.append(
                f"{mode}, the same pack differs by {moved:.1e} from one time to the next (at most {bounds.moved:.0e}): "
                "a part drops or draws at random, whatever its mode and its rate say"
            )
    model.train()
    return judged("repeatable", faults, f"evaluated and trained without dropout, a pack is the same to {largest:.1e}")


def _packed_is_alone(trainer: Trainer, pack: SmallPack, bounds: Bounds) -> list[Finding]:
    segments = pack.segments
    with without_dropout(trainer.engine.model):
        packed, order = _losses_and_gradients(trainer, pack, [segments]), list(range(len(segments)))[::-1]
        with _rounded_otherwise(trainer):
            turned = _losses_and_gradients(trainer, pack, [[segments[place] for place in order]])
        alone = _losses_and_gradients(trainer, pack, [[segment] for segment in segments])
    rounding = max(_relative(turned[0][order[place]], packed[0][place]) for place in order)
    found = []
    sizes = [_relative(packed[0][place], alone[0][place]) for place in range(len(segments))]
    worst = max(range(len(sizes)), key=lambda place: sizes[place])
    for what, least, (size, noise, where) in (
        ("loss packed = alone", bounds.loss, (sizes[worst], rounding, pack.name(worst))),
        ("gradient packed = alone", bounds.gradient, _gradients_apart(packed[1], alone[1], turned[1])),
    ):
        bound = min(bounds.most, max(least, TIMES * noise))
        told = f"differ by {size:.1e}, at most {bound:.0e}"
        faults = [f"{where}: {told}: a segment is computed otherwise in a pack"] if not size <= bound else []
        found.append(judged(what, faults, told))
    return found


@contextmanager
def _rounded_otherwise(trainer: Trainer) -> Iterator[None]:
    """A context in which every other number that enters the LLM is half a unit in its last place larger, the rest
    smaller. Kernels often round a segment alike wherever it stands in a row, and otherwise in a shorter one."""
    step = torch.finfo(torch.float32 if trainer.engine.precision == "fp32" else torch.bfloat16).eps / 2

    def enters(module: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = named["inputs_embeds"]
        signs = torch.ones(embeds.shape[-1], device=embeds.device, dtype=torch.float64)
        signs[::2] = -1.0
        return arguments, {**named, "inputs_embeds": (embeds.double() * (1 + step * signs)).to(embeds.dtype)}

    handle = stacks_of(trainer.engine.model.llm)[0].whole.register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _gradients_apart(
    packed: Mapping[str, Tensor], alone: Mapping[str, Tensor], turned: Mapping[str, Tensor]
) -> tuple[float, float, str]:
    (size, where), (noise, _) = worst_named(packed, alone), worst_named(turned, packed)
    return size, noise, where


def _losses_and_gradients(
    trainer: Trainer, pack: SmallPack, rows: Sequence[Sequence[Segment]]
) -> tuple[list[float], dict[str, Tensor]]:
    """Summed losses by segment, and the gradient of their sum over the label tokens, of rows that are micro-steps of
    one step."""
    engine, losses = trainer.engine, []
    for number, segments in enumerate(rows):
        output = engine.forward(pack.batch(segments).to(engine.device))
        engine.backward(output.loss_sum / max(1, pack.num_labels), last_micro_step=number == len(rows) - 1)
        losses += output.segment_losses.tolist()
    gradients = {name: one.detach().float().cpu().clone() for name, one in engine.full_gradients() if one is not None}
    engine.drop_step()
    return losses, gradients


def _relative(found: float, expected: float) -> float:
    difference = abs(found - expected)
    return difference / max(abs(expected), 1e-6) if difference == difference else float("inf")

"""The census of gradients: each parameter that the recipe trains is reached in every micro-step that all ranks have to
share, each that it freezes stays, no gradient is NaN or Inf, and the parts' norms stand side by side.

Whether a parameter is reached is seen where autograd hands its gradient over, before ZeRO reduces it: an exact zero
counts as reached, since half of an adapter that begins as the identity has no other gradient in the first step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vltrain.data.report.finding import FAILED, OK, WARNING, Finding
from vltrain.models.architectures import architecture_of
from vltrain.preflight.ranks import judged
from vltrain.train.trainer import Trainer
from vltrain.train.zero.snapshot import EngineSnapshot

FAR_APART = 1000.0
NEXT_TO_NOTHING = 1e-5
"""Of the largest part's in the first step: what has no say yet, as what a router decides by while all that it weighs is
alike. Its gradient grows from there."""
MANY_IDLE = 0.25
"""Of a part's trained parameters: so many without effect on the loss are a network's own."""
CLEAR = 100.0  # times AdamW's epsilon: a gradient from which on a step is as long as the learning rate
_LEAVES_OUT = ".ranknum."  # of peft's AdaLoRA: it counts, and is trained by nobody
_PRUNED = ".lora_E."  # by AdaLoRA, behind the optimizer's step


@dataclass(kw_only=True)
class Census:
    """Of one trainer's model, over the micro-steps that it watches."""

    trainer: Trainer
    snapshot: EngineSnapshot
    """Of the state before the first step."""
    reached: list[set[str]] = field(default_factory=list)
    """By micro-step, the trained parameters that its backward reached on this rank."""
    norms: dict[str, float] = field(default_factory=dict)
    """By trained parameter, the norm of the last step's whole gradient."""
    began: dict[str, float] = field(default_factory=dict)
    """And of the first step's."""
    moved: set[str] = field(default_factory=set)
    """Trained parameters that had a gradient other than zero in some step."""
    stuck: set[str] = field(default_factory=set)
    """Those that the optimizer left as they are though they had one, on all ranks."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes which parameters each backward inside the block reaches."""
        model: Any = self.trainer.engine.model
        handles = [model.register_forward_pre_hook(lambda *_: self.reached.append(set()))]
        for name, parameter in self.trainer.engine.trainable.items():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(self._note(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str) -> Callable[[Tensor], None]:
        return lambda gradient: self.reached[-1].add(name)

    def read(self) -> None:
        """Looks at the whole gradient of a step, between its last backward and the optimizer. A collective."""
        names, norms = [], []
        for name, gradient in self.trainer.engine.full_gradients():
            names.append(name)
            norms.append(torch.zeros((), device=self.trainer.engine.device) if gradient is None
                         else torch.linalg.vector_norm(gradient.float()))  # fmt: skip
        self.norms = dict(zip(names, torch.stack(norms).tolist(), strict=True))
        self.began = self.began or self.norms
        self.moved |= {name for name, norm in self.norms.items() if norm}

    def look_for_stuck(self) -> None:
        """Behind the optimizer's first step, at the peak learning rate: what had a gradient has to have moved, if a
        step of that size is one at all in its precision. A collective."""
        optim = self.trainer.config.optim
        rates = (optim.lr, optim.vision_lr, optim.llm_lr, optim.projector_lr)
        rate = min(one for one in rates if one is not None)
        whole = sum(norm**2 for norm in self.norms.values()) ** 0.5
        kept = min(1.0, optim.clip / whole) if optim.clip and whole else 1.0
        own = set[str]()
        for name, norm in self.norms.items():
            parameter: Any = self.trainer.engine.trainable[name]
            entry = kept * norm / getattr(parameter, "ds_numel", parameter.numel()) ** 0.5
            if not entry > CLEAR * optim.eps or (self.trainer.allocator is not None and _PRUNED in name):
                continue
            largest = self.snapshot.still(name)
            if largest is not None and rate > 2 * torch.finfo(parameter.dtype).eps * largest:
                own.add(name)
        everyone: list[set[str]] = [set()] * self.trainer.engine.world_size
        dist.all_gather_object(everyone, own)
        self.stuck = set.intersection(*everyone)

    def findings(self, has_images: Sequence[bool], *, twice: bool) -> list[Finding]:
        """Args:
        has_images: by micro-step watched, whether ranks read images in it.
        twice: the optimizer took a step between two backwards, so that no adapter is the identity any more.
        """
        return [self._reach(has_images, twice), self._finite(), self._frozen_stay(), self._side_by_side()]

    def _reach(self, has_images: Sequence[bool], twice: bool) -> Finding:
        what, unmeant = "trained parameters", self._unmeant()
        trained = {name for name in self.trainer.engine.trainable if _LEAVES_OUT not in name and name not in unmeant}
        everywhere = set().union(*self.reached)
        shared = [reached for reached, images in zip(self.reached, has_images, strict=True) if images]
        if not shared and trained - everywhere:
            told = self._told(trained - everywhere, "get no gradient: no pack shows an image")
            return Finding(status=WARNING, what=what, found=told)
        if missing := set().union(*(trained - reached for reached in shared or [everywhere])):
            return judged(what, [self._told(missing, "get no gradient")], "")
        if shared_by := _tied(self.trainer.engine.model, trained):
            return judged(what, [f"{one} are one tensor: tied by mistake" for one in shared_by], "")
        if self.stuck:
            told = "have a gradient, and the optimizer leaves them as they are: they are in no group of it, or their "
            return judged(what, [self._told(self.stuck, f"{told}learning rate is 0")], "")
        still = trained - self.moved if twice else set()
        if not still:
            return judged(what, [], f"all {len(trained):,} get a gradient")
        told = self._told(still, "have a gradient of zero, before and after a step of the optimizer")
        part_of = self.trainer.engine.model.part_of
        counts = Counter(map(part_of, trained))
        share = max(count / counts[part] for part, count in Counter(map(part_of, still)).items())
        # Networks have layers whose results nobody reads, such as the text's MLP in a Q-Former's last block.
        status = FAILED if share == 1 else WARNING if share > MANY_IDLE else OK
        return Finding(status=status, what=what, found=f"all {len(trained):,} are reached; {told}")

    def _finite(self) -> Finding:
        bad = {name for name, norm in self.norms.items() if not norm < float("inf")}
        faults = [self._told(bad, "have a gradient that is NaN or Inf")] if bad else []
        return judged("gradients", faults, "none is NaN or Inf")

    def _frozen_stay(self) -> Finding:
        model, engine = self.trainer.engine.model, self.trainer.engine
        named, wrong = dict(model.named_parameters()), self._unmeant()
        faults = [self._told(wrong, "are trained, which the recipe freezes")] if wrong else []
        beside = {name for name, one in named.items() if name not in engine.trainable
                  and (one.requires_grad or one.grad is not None)}  # fmt: skip
        faults += [self._told(beside, "are frozen and get a gradient")] if beside else []
        changed = set(self.trainer.frozen.moved())
        faults += [self._told(changed, "are frozen and changed in a step")] if changed else []
        return judged(
            "frozen parameters", faults, f"all {len(self.trainer.frozen):,} stay as they are, without gradient"
        )

    def _unmeant(self) -> set[str]:
        """Trained parameters of parts that the recipe freezes; of an architecture that does not say which it trains,
        none."""
        model = self.trainer.engine.model
        meant = architecture_of(self.trainer.config.model).trained_parts(self.trainer.config.model)
        return {name for name in self.trainer.engine.trainable if meant and model.part_of(name) not in meant}

    def _side_by_side(self) -> Finding:
        parts, began = self._by_part(self.norms), self._by_part(self.began)
        told = ", ".join(f"{part} {norm:.3g}" for part, norm in parts.items())
        # AdaLoRA's factors are random numbers of 0.02 beside a diagonal of zeros, whose gradient has both in it.
        compared = [part for part in parts if part != "peft" or self.trainer.allocator is None]
        for part in compared:
            others = [name for name in compared if name != part and parts[name]]
            if not others or began[part] <= NEXT_TO_NOTHING * max(began.values()):
                continue
            if all(_is_far(norms[part], [norms[name] for name in others]) for norms in (parts, began)):
                times = parts[part] / median(parts[name] for name in others)
                far = f"{told}: {part}'s is {times:.1e} times the others'; look at its learning rate"
                return Finding(status=WARNING, what="gradient norms", found=far)
        return Finding(status=OK, what="gradient norms", found=told)

    def _by_part(self, norms: dict[str, float]) -> dict[str, float]:
        model = self.trainer.engine.model
        squares: dict[str, float] = defaultdict(float)
        for name, norm in norms.items():
            squares[model.part_of(name)] += norm**2
        return {part: squares[part] ** 0.5 for part in model.PARTS if part in squares}

    def _told(self, names: set[str], what: str) -> str:
        model = self.trainer.engine.model
        parts = sorted({model.part_of(name) for name in names}, key=model.PARTS.index)
        return f"{', '.join(parts)}: {len(names)} parameter(s) {what}, the first {min(names)}"


def _is_far(norm: float, others: list[float]) -> bool:
    middle = median(others)
    return not middle / FAR_APART <= norm <= middle * FAR_APART


def _tied(model: nn.Module, trained: set[str]) -> list[str]:
    """Trained parameters that stand under several names, by these; but for embeddings, which heads share by design."""
    names: dict[int, list[str]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            names[id(parameter)].append(f"{prefix}.{name}")
            if isinstance(module, nn.Embedding):
                names[id(parameter)].append("")
    tied = [one for one in names.values() if len(one) > 1 and "" not in one and not trained.isdisjoint(one)]
    return [" and ".join(sorted(one)[:2]) for one in tied]

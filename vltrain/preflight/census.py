"""The census of gradients: each parameter that the recipe trains is reached in every micro-step that all ranks have to
share, each that it freezes stays, no gradient is NaN or Inf, and the parts' norms stand side by side.

Whether a parameter is reached is seen where autograd hands its gradient over, before ZeRO reduces it: an exact zero
counts as reached, since half of an adapter that begins as the identity has no other gradient in the first step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vltrain.data.report.finding import FAILED, OK, WARNING, Finding
from vltrain.models.architectures import architecture_of
from vltrain.preflight.ranks import judged
from vltrain.train.trainer import Trainer

FAR_APART = 1000.0
NEXT_TO_NOTHING = 1e-5
"""Of the largest part's: what has no say yet, as what a router decides by while all that it weighs is alike."""
MANY_IDLE = 0.25
"""Of a part's trained parameters: fewer without effect on the loss are a network's own."""
_LEAVES_OUT = ".ranknum."  # of peft's AdaLoRA: it counts, and is trained by nobody


@dataclass(kw_only=True)
class Census:
    """Of one trainer's model, over the micro-steps that it watches."""

    trainer: Trainer
    reached: list[set[str]] = field(default_factory=list)
    """By micro-step, the trained parameters that its backward reached on this rank."""
    norms: dict[str, float] = field(default_factory=dict)
    """By trained parameter, the norm of the last step's whole gradient."""
    moved: set[str] = field(default_factory=set)
    """Trained parameters that had a gradient other than zero in some step."""

    def __post_init__(self) -> None:
        self._frozen = self._sums()

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
        self.moved |= {name for name, norm in self.norms.items() if norm}

    def findings(self, has_images: Sequence[bool], *, twice: bool) -> list[Finding]:
        """Args:
        has_images: by micro-step watched, whether ranks read images in it.
        twice: the optimizer took a step between two backwards, so that no adapter is the identity any more.
        """
        return [self._reach(has_images, twice), self._finite(), self._frozen_stay(), self._side_by_side()]

    def _reach(self, has_images: Sequence[bool], twice: bool) -> Finding:
        what, trained = "trained parameters", set(self.trainer.engine.trainable)
        trained = {name for name in trained if _LEAVES_OUT not in name}
        everywhere = set().union(*self.reached)
        shared = [reached for reached, images in zip(self.reached, has_images, strict=True) if images]
        if not shared and trained - everywhere:
            told = self._told(trained - everywhere, "get no gradient: no pack shows an image")
            return Finding(status=WARNING, what=what, found=told)
        if missing := set().union(*(trained - reached for reached in shared or [everywhere])):
            return judged(what, [self._told(missing, "get no gradient")], "")
        still = trained - self.moved if twice else set()
        if not still:
            return judged(what, [], f"all {len(trained):,} get a gradient")
        told = self._told(still, "have a gradient of zero, before and after a step of the optimizer")
        part_of = self.trainer.engine.model.part_of
        counts = Counter(map(part_of, trained))
        share = max(count / counts[part] for part, count in Counter(map(part_of, still)).items())
        # Networks have layers whose results nobody reads, such as the text's MLP in a Q-Former's last block.
        status = FAILED if share == 1 else WARNING if share >= MANY_IDLE else OK
        return Finding(status=status, what=what, found=f"all {len(trained):,} are reached; {told}")

    def _finite(self) -> Finding:
        bad = {name for name, norm in self.norms.items() if not norm < float("inf")}
        faults = [self._told(bad, "have a gradient that is NaN or Inf")] if bad else []
        return judged("gradients", faults, "none is NaN or Inf")

    def _frozen_stay(self) -> Finding:
        model, engine = self.trainer.engine.model, self.trainer.engine
        meant = architecture_of(self.trainer.config.model).trained_parts(self.trainer.config.model)
        named = dict(model.named_parameters())
        # One that does not say which parts a recipe trains is asked nothing.
        wrong = {name for name in engine.trainable if meant and model.part_of(name) not in meant}
        faults = [self._told(wrong, "are trained, which the recipe freezes")] if wrong else []
        beside = {name for name, one in named.items() if name not in engine.trainable
                  and (one.requires_grad or one.grad is not None)}  # fmt: skip
        faults += [self._told(beside, "are frozen and get a gradient")] if beside else []
        now = self._sums()
        changed = {name for name, before in self._frozen.items() if now[name] != before}
        faults += [self._told(changed, "are frozen and changed in a step")] if changed else []
        return judged("frozen parameters", faults, f"all {len(self._frozen):,} stay as they are, without gradient")

    def _side_by_side(self) -> Finding:
        model = self.trainer.engine.model
        squares: dict[str, float] = {}
        for name, norm in self.norms.items():
            part = model.part_of(name)
            squares[part] = squares.get(part, 0.0) + norm**2
        parts = {part: squares[part] ** 0.5 for part in model.PARTS if part in squares}
        told = ", ".join(f"{part} {norm:.3g}" for part, norm in parts.items())
        for part, norm in parts.items():
            others = [other for name, other in parts.items() if name != part and other]
            if not others or norm <= NEXT_TO_NOTHING * max(others):
                continue
            if not 1 / FAR_APART <= norm / median(others) <= FAR_APART:
                far = f"{told}: {part}'s is {norm / median(others):.1e} times the others'; look at its learning rate"
                return Finding(status=WARNING, what="gradient norms", found=far)
        return Finding(status=OK, what="gradient norms", found=told)

    def _told(self, names: set[str], what: str) -> str:
        model = self.trainer.engine.model
        parts = sorted({model.part_of(name) for name in names}, key=model.PARTS.index)
        return f"{', '.join(parts)}: {len(names)} parameter(s) {what}, the first {min(names)}"

    @torch.no_grad()
    def _sums(self) -> dict[str, int]:
        """Of each frozen parameter the sum of its bits, of what this rank has of it."""
        names, sums = [], []
        for name, parameter in self.trainer.engine.model.named_parameters():
            if name in self.trainer.engine.trainable:
                continue
            own = getattr(parameter, "ds_tensor", parameter).detach()
            if own.device.type == "meta":
                continue
            bits = own.contiguous().view(-1).view(torch.uint8)
            words = bits.view(torch.int32) if bits.numel() % 4 == 0 else bits
            names.append(name)
            sums.append(words.sum(dtype=torch.int64).to(self.trainer.engine.device))
        return dict(zip(names, torch.stack(sums).tolist(), strict=True)) if sums else {}

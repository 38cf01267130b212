"""AdaLoRA's budget: which directions of the low-rank updates are kept, decided alike under every ZeRO stage and number
of ranks.

Paper: Zhang et al. 2023, https://arxiv.org/abs/2303.10512. An update is B (E * A) with A [r, in], E [r, 1], B [out, r];
direction i of a layer is the i-th row of A, entry of E and column of B. For each weight w with gradient g, over the
optimizer's steps t,

    I = |w g|;   mean = beta1 mean + (1 - beta1) I;   deviation = beta2 deviation + (1 - beta2) |I - mean|    (Eq. 8-10)
    s = mean * deviation                                                                                       (Eq. 11)
    score of a direction = s of its entry of E + mean of s over its row of A + mean of s over its column of B   (Eq. 7)

and of all directions of all layers only the b(t) with the highest scores keep their entry of E; b falls from all to
target_rank per layer by a cubic (Eq. 12). Defaults and the order of things are peft's, but for what goes wrong there
outside of one plain process:

- Gradients are the whole step's: all ranks', all micro-steps', in fp32, before clipping. A step that the optimizer did
  not take leaves no trace.
- Importance is measured before the optimizer's step, on the weights that the gradient belongs to; entries are zeroed
  after it, in each copy that ZeRO keeps of them.
- Exactly b directions are kept. peft drops everything that is not above a threshold: all of it after the first step,
  where all scores are zero.
- Rank 0 decides, so that ranks cannot differ. Averages and decision are in the checkpoint.

Trade-off: every rank holds the averages whole (two fp32 copies of the updates), and each step gathers the
updates' gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vltrain.config.model.adalora import AdaLoraSchedule
from vltrain.distributed.broadcast import from_rank_0
from vltrain.errors import InputError
from vltrain.models.peft.low_rank import sublayer_of
from vltrain.train.zero.engine import Engine

_A, _E, _B = "lora_A", "lora_E", "lora_B"


class RankAllocator:
    """Prunes the AdaLoRA layers of an engine's model in the course of a run.

    Args:
        num_steps: of the run; the budget's schedule is as long.

    Raises: InputError if the schedule does not fit into the run.
    """

    def __init__(self, engine: Engine, schedule: AdaLoraSchedule, num_steps: int) -> None:
        self._engine, self._schedule = engine, schedule
        self.last_pruning = num_steps - schedule.tfinal
        if self.last_pruning <= max(schedule.tinit, 1):
            raise InputError(
                f"model.instructblip.adalora: tinit {schedule.tinit} and tfinal {schedule.tfinal} leave none of "
                f"the run's {num_steps} steps to prune "
                "in (the first step has no importance yet); shorten them or train longer"
            )
        self.layers = [name.partition(f".{_E}.")[0] for name in engine.trainable if f".{_E}." in name]
        self._names = {layer: tuple(f"{layer}.{factor}.default" for factor in (_A, _E, _B)) for layer in self.layers}
        self._updates = {name for names in self._names.values() for name in names}
        self._mean: dict[str, Tensor] = {}
        self._deviation: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        """Layer -> bool [r] on the CPU, which of its directions the last pruning kept; empty before the first."""
        self.penalty = torch.zeros(())

    @property
    def num_directions(self) -> int:
        """Of all layers, before pruning."""
        return len(self.layers) * self._schedule.init_rank

    def budget(self, steps_done: int) -> int:
        """Directions that are kept after so many steps of the run (Eq. 12)."""
        schedule, target = self._schedule, len(self.layers) * self._schedule.target_rank
        if steps_done <= schedule.tinit:
            return self.num_directions
        if steps_done >= self.last_pruning:
            return target
        left = 1 - (steps_done - schedule.tinit) / (self.last_pruning - schedule.tinit)
        return int((self.num_directions - target) * left**3 + target)

    def regularised(self, loss: Tensor, penalty: Tensor) -> Tensor:
        """A rank's share of the step's loss with its share of the orthogonality term, which a step has once: all ranks
        add theirs."""
        self.penalty = penalty.detach()
        return loss + self._schedule.orth_reg_weight * penalty / self._engine.world_size

    def measure(self) -> dict[str, Tensor]:
        """|w g| of every factor, fp32, between the last backward and the step. A collective."""
        weights = self._engine.full_weights(self._updates)
        gradients = self._engine.full_gradients(self._updates)
        return {
            name: torch.zeros_like(weight) if gradient is None else (weight * gradient.view_as(weight)).abs()
            for (name, weight), (_, gradient) in zip(weights, gradients, strict=True)
        }

    def update(self, importance: dict[str, Tensor], steps_done: int) -> None:
        """Takes `measure`'s result of a step that the optimizer has taken, and prunes where the schedule says so. A
        collective."""
        if steps_done <= self.last_pruning:
            self._average(importance)
        forced = steps_done >= self.last_pruning and self._kept_total() != self.budget(
            steps_done
        )  # the step for it may have been skipped
        regular = self._schedule.tinit < steps_done < self.last_pruning and steps_done % self._schedule.delta_t == 0
        if steps_done > 1 and (forced or regular or steps_done == self.last_pruning):
            self.kept = self._chosen(self.budget(steps_done))
        elif steps_done < self.last_pruning or not self.kept:
            return  # between prunings entries may come back, as the paper has it; after the last one they may not
        for layer in self.layers:
            self._engine.keep_entries(self._names[layer][1], self.kept[layer])

    def _average(self, importance: dict[str, Tensor]) -> None:
        beta1, beta2 = self._schedule.beta1, self._schedule.beta2
        for name, value in importance.items():
            if name not in self._mean:
                self._mean[name], self._deviation[name] = torch.zeros_like(value), torch.zeros_like(value)
            mean = self._mean[name].mul_(beta1).add_(value, alpha=1 - beta1)
            self._deviation[name].mul_(beta2).add_((value - mean).abs(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """fp32 [layers, r] on the CPU."""
        per_layer = []
        for layer in self.layers:
            first, entry, second = (self._mean[name] * self._deviation[name] for name in self._names[layer])
            per_layer.append(entry.view(-1) + first.mean(dim=1) + second.mean(dim=0))
        return torch.stack(per_layer).cpu()

    def _chosen(self, budget: int) -> dict[str, Tensor]:
        scores = self.scores()
        kept = torch.zeros(scores.numel(), dtype=torch.bool)
        # A stable sort: of equal scores the first are kept, and always as many.
        kept[scores.view(-1).sort(descending=True, stable=True).indices[:budget]] = True
        return dict(zip(self.layers, from_rank_0(kept.view_as(scores)), strict=True))

    def _kept_total(self) -> int:
        return sum(int(mask.sum()) for mask in self.kept.values()) if self.kept else self.num_directions

    def figures(self) -> dict[str, float]:
        """For TensorBoard: directions kept in all, their mean per layer of each kind, the orthogonality term. Waits for
        the device."""
        by_kind: dict[str, list[int]] = {}
        for layer in self.layers:
            count = int(self.kept[layer].sum()) if self.kept else self._schedule.init_rank
            by_kind.setdefault("/".join(sublayer_of(layer)), []).append(count)
        ranks = {f"adalora/rank/{kind}": sum(counts) / len(counts) for kind, counts in by_kind.items()}
        return {"adalora/directions": float(self._kept_total()), "adalora/orthogonality": float(self.penalty), **ranks}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, copied to the CPU."""
        averages = {"mean": self._mean, "deviation": self._deviation, "kept": self.kept}
        return {
            f"adalora/{kind}/{name}": value.detach().to("cpu", copy=True)
            for kind, values in averages.items()
            for name, value in values.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Puts `state` back, in the place of what there is."""
        self._mean, self._deviation, self.kept = {}, {}, {}
        for key, value in state.items():
            _, kind, name = key.split("/", 2)
            if kind == "kept":
                self.kept[name] = value
            else:
                (self._mean if kind == "mean" else self._deviation)[name] = value.to(self._engine.device)

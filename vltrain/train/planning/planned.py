"""One way to train a recipe, planned: memory of a rank, operations of a step and what ranks send each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vltrain.config.schema import Config
from vltrain.data.shards import PackedDataset
from vltrain.memory.communication import Communication, communication
from vltrain.memory.plan import MemoryPlan, plan_memory, step_flops
from vltrain.memory.rehearse import Activations, PackSize
from vltrain.memory.weights import WeightPlan
from vltrain.models.build import build_model, count_trained
from vltrain.models.flops import Flops
from vltrain.models.interface import VisionLanguageModel
from vltrain.train.optim import parameter_groups
from vltrain.train.run.fits import run_flops
from vltrain.train.zero.ds_config import micro_steps_per_step, resolve_ds_config


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a recipe would be trained.

    config   with sizes that a model can be built from (`vltrain.memory.sizes.assume_sizes`)
    ds_json  as the user wrote it
    dtype    of matrix products
    pack     the largest
    packs    those there are, for a step's mean; None: steps of full packs
    share    of one of `packs` that a pack of this way holds
    """

    config: Config
    ds_json: dict[str, Any]
    num_gpus: int
    dtype: torch.dtype
    pack: PackSize
    packs: PackedDataset | None
    share: float = 1.0

    @property
    def micro_steps(self) -> int:
        """Of a step, on each GPU."""
        return micro_steps_per_step(self.config.train.packs_per_step, self.num_gpus)

    @property
    def gpus_at_work(self) -> float:
        """GPUs that have a pack, in the mean of a step's micro-steps."""
        return self.config.train.packs_per_step / self.micro_steps


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a way needs. `flops`: of a step, over all ranks; `recomputed`: those that activation checkpointing adds."""

    memory: MemoryPlan
    flops: float
    recomputed: float
    communication: Communication


def plan(way: Way, activations: Mapping[str, Activations] | None = None) -> Planned:
    """Plans a way to train. `activations`: of another plan with the same model and pack.

    Raises: InputError for what contradicts itself, as a run would.
    """
    config = way.config
    model = build_model(config.model, device="meta")
    resolved = resolve_ds_config(way.ds_json, config, way.num_gpus, count_trained(model), model.llm_block_classes)
    memory = plan_memory(
        config, resolved, way.num_gpus, groups=_groups(config), pack=way.pack, bits=config.model.bits,
        dtype=way.dtype, activations=activations,
    )  # fmt: skip
    weights = WeightPlan(model, config.model.bits, way.dtype)
    flops, again = run_flops(config, model), config.train.activation_checkpointing
    return Planned(
        memory=memory,
        flops=_of_step(way, flops),
        recomputed=_of_step(way, _done_again(config, flops)) if again else 0.0,
        communication=communication(
            resolved,
            way.num_gpus,
            micro_steps=way.micro_steps,
            num_trained=count_trained(model),
            partitioned=[weights.as_kept(one) for one in model.parameters()],
        ),
    )


def _of_step(way: Way, flops: Flops) -> float:
    whole = step_flops(way.config, flops, way.pack, way.packs)
    return whole if way.packs is None else whole * way.share


def _groups(config: Config) -> Callable[[VisionLanguageModel], list[list[nn.Parameter]]]:
    """(outline) -> the optimizer's groups of its trained parameters."""
    return lambda outline: [
        group["params"] for group in parameter_groups(outline.named_parameters(), config.optim, outline.part_of)
    ]


def _done_again(config: Config, flops: Flops) -> Flops:
    """The forward of the blocks that have a backward: of the LLM, and of the tower where something is trained in it.
    The head's is not done again."""
    model = build_model(config.model, device="meta")
    model.requires_grad_(False)
    forward = model.flops()
    has_backward = flops.per_image > forward.per_image
    return replace(forward, per_label=0.0, per_image=forward.per_image if has_backward else 0.0)

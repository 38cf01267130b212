"""Trains tiny vision-language models of transformers on hand-made rows, in this rank's process, under DeepSpeed.

A scenario is {"family", "changes", "ds", "output"}, with "checkpointing", "optim" (settings other than `OPTIM`) or
"precision" (of products; fp32 where it is left out). Each step has the rows of `rows_of_step`, dealt out to the ranks
in turn; where a rank has none left it computes a filler, and where it has no picture while another has one, a blank
one. Rank 0 writes losses, the gradients of one step and the final weights to `OUTPUT.safetensors`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.support.stock import Piece, row_of, section
from tests.train.worker import GRADIENT_STEP
from tests.train.worker import main as run_scenarios
from vltrain.batch import Batch
from vltrain.config.schema import Config, OptimConfig
from vltrain.distributed.hardware import choose_dtype, device
from vltrain.models.build import build_model, count_trained
from vltrain.train.determinism import set_determinism
from vltrain.train.optim import parameter_groups
from vltrain.train.zero.ds_config import resolve_ds_config
from vltrain.train.zero.engine import Engine, partitioner

STEPS = 12
OPTIM = OptimConfig(lr=5e-3)
SAMPLES = (
    (Piece((1,), 3, 5), Piece((), 2, 6)),
    (Piece((), 4, 7),),
    (Piece((2, 1), 2, 4), Piece((2,), 5, 3)),
)


def rows_of_step(family: str, core: Any, step: int) -> list[Batch]:
    """Rows with images, of text alone, and with several images; in every fourth step text alone."""
    samples = SAMPLES[1:2] * 3 if step % 4 == 3 else SAMPLES
    return [row_of(family, core, pieces, seed=10 * place) for place, pieces in enumerate(samples)]


def run(scenario: dict[str, Any], rank: int, world_size: int) -> None:
    model_config = section(scenario["family"], scenario["changes"])
    optim = dataclasses.replace(OPTIM, **scenario.get("optim", {}))
    config = Config(model=model_config, optim=optim)
    set_determinism(config.train.deterministic)
    ds = resolve_ds_config(scenario["ds"], config, world_size)
    dtype = choose_dtype(scenario.get("precision", "fp32"))
    model = build_model(
        model_config,
        dtype=dtype,
        activation_checkpointing=scenario.get("checkpointing", False),
        runs_on=device(),
        place=partitioner(ds),
    )
    ds = resolve_ds_config(scenario["ds"], config, world_size, count_trained(model), model.llm_block_classes)
    groups = parameter_groups(model.named_parameters(), optim, model.part_of)
    core = model.parts.core
    engine = Engine(model, groups, ds, betas=optim.betas, eps=optim.eps, autocast_dtype=dtype)
    assert engine.stage < 3 or all(block._z3_leaf for block in model.llm_blocks), "blocks are not gathered whole"
    losses, result = [], {}
    for step in range(STEPS):
        rows = rows_of_step(scenario["family"], core, step)
        labels = sum(row.num_label_tokens for row in rows)
        micro_steps = -(-len(rows) // world_size)
        total = torch.zeros((), device=engine.device)
        for micro in range(micro_steps):
            mine = rows[micro * world_size : (micro + 1) * world_size]
            anyone_sees = any(len(row.pixels) for row in mine)
            if rank < len(mine):
                row = mine[rank]
                if anyone_sees and not len(row.pixels):
                    blank = row_of(scenario["family"], core, [Piece((), 1, 1)], blank=True)
                    row = dataclasses.replace(row, pixels=blank.pixels)
            else:
                row = row_of(scenario["family"], core, [Piece((), 1, 1)], blank=anyone_sees)
                row = dataclasses.replace(row, is_filler=True)
            loss = engine.forward(row.to(engine.device)).loss_sum / labels
            total += loss.detach()
            engine.backward(loss, last_micro_step=micro + 1 == micro_steps)
        if step == GRADIENT_STEP:
            caught = {
                name: torch.zeros_like(weight) if gradient is None else gradient
                for (name, gradient), weight in zip(engine.full_gradients(), engine.trainable.values())
            }
            result.update({f"gradient/{name}": value.cpu().clone() for name, value in caught.items()})
        engine.step()
        dist.all_reduce(total)
        losses.append(total.item())
    for name, weight, _ in engine.full_state():
        result[f"weight/{name}"] = weight.clone()
    if rank == 0:
        result["losses"] = torch.tensor(losses, dtype=torch.float64)
        Path(scenario["output"]).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in result.items()}, f"{scenario['output']}.safetensors")


def main(scenarios: str) -> None:
    run_scenarios(scenarios, run)

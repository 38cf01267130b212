"""Runs the training scenarios of a JSON file in this rank's process.

A scenario is {"name", "packs", "output", "ds": DeepSpeed JSON, "changes": {dotted key: value}, "resume": bool}, and
"blip": llama or t5 for an InstructBLIP, or "recipe": a file of settings, of any model. Rank r writes AdaLoRA's
decisions to `OUTPUT/masks.r.safetensors`; rank 0 writes, per scenario, `OUTPUT/result.safetensors` with the losses,
gradient norms, the gradients of one step and the final weights. With "listens" signals are heard, and rank r keeps the
number of steps that it has done in `OUTPUT/progress.r`. With "keeps_scalars" rank 0 keeps what loggers are given in
`OUTPUT/scalars.jsonl`.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed import get_rank

from tests.support.blip import blip_config
from tests.support.tiny import tiny_config
from vltrain.config.command_line import load_settings
from vltrain.data.remote.cache import CacheSettings
from vltrain.data.stream.mixed import open_packed
from vltrain.distributed.hardware import choose_dtype, device
from vltrain.metrics.loggers import Loggers
from vltrain.models.build import build_model
from vltrain.train.adalora import RankAllocator
from vltrain.train.checkpoints.checkpoint import newest_checkpoint
from vltrain.train.determinism import set_determinism
from vltrain.train.make_trainer import RunStart, make_trainer
from vltrain.train.run.origin import find_origin
from vltrain.train.trainer import Trainer
from vltrain.train.zero.ds_config import resolve_ds_config
from vltrain.train.zero.engine import Engine, init_distributed, partitioner, shutdown_distributed

GRADIENT_STEP = 4  # late enough that adapters have left the identity, where half of their gradients are zero


def make(scenario: dict, world_size: int, evaluate: Callable[[int], float | None] = lambda steps_done: None) -> Trainer:
    """The trainer of a scenario. A collective."""
    folder = Path(scenario["output"])
    changes = {"output": str(folder), **scenario["changes"]}
    if "recipe" in scenario:
        words = [word for key, value in changes.items() for word in (f"--{key.replace('__', '.')}", str(value))]
        config = load_settings(["--recipe", scenario["recipe"], *words], program="worker").config
    else:
        config = blip_config(scenario["blip"], **changes) if "blip" in scenario else tiny_config(**changes)
    set_determinism(config.train.deterministic)
    dataset = open_packed(scenario["packs"], cache=CacheSettings.of(config.data))
    checkpoint = newest_checkpoint(folder / "checkpoints") if scenario.get("resume") else None
    dtype = choose_dtype(config.train.precision, config.model.bits)
    place = partitioner(resolve_ds_config(scenario["ds"], config, world_size))
    checkpointing = config.train.activation_checkpointing
    model = build_model(
        config.model, dtype=dtype, activation_checkpointing=checkpointing, runs_on=device(), place=place
    )
    return make_trainer(
        config,
        scenario["ds"],
        model=model,
        dataset=dataset,
        start=RunStart(dtype=dtype, checkpoint=checkpoint, origin=find_origin(config, checkpoint)),
        evaluate=evaluate,
        loggers=Loggers({"kept": KeptScalars(folder)} if scenario.get("keeps_scalars") and get_rank() == 0 else {}),
    )


def run(
    scenario: dict,
    rank: int,
    world_size: int,
    evaluate: Callable[[int], float | None] = lambda steps_done: None,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    folder, trainer = Path(scenario["output"]), make(scenario, world_size, evaluate)
    prepare(trainer)
    result = catch_gradients(trainer.engine, at_step=GRADIENT_STEP)
    masks = catch_masks(trainer.allocator) if trainer.allocator is not None else {}
    if scenario.get("listens"):
        tell_progress(trainer.engine, folder / f"progress.{rank}", trainer.first_step)
        with trainer.preemption.listening():
            trainer.train()
    else:
        trainer.train()
    trainer.monitor.close()
    for name, weight, states in trainer.engine.full_state():
        result[f"weight/{name}"] = weight.clone()
        result.update({f"{key}/{name}": value.clone() for key, value in states.items()})
    save_file(masks, folder / f"masks.{rank}.safetensors")
    if rank == 0:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        result["losses"] = torch.tensor([float(line["loss"]) for line in log], dtype=torch.float64)
        result["grad_norms"] = torch.tensor([float(line["grad_norm"]) for line in log], dtype=torch.float64)
        save_file({name: value.contiguous() for name, value in result.items()}, folder / "result.safetensors")


class KeptScalars:
    """A logger that keeps scalars as lines [step, name, value] of FOLDER/scalars.jsonl."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "scalars.jsonl"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        with self._file.open("a") as file:
            file.writelines(json.dumps([step, name, value]) + "\n" for name, value in values.items())

    def text(self, tag: str, text: str, step: int) -> None: ...

    def images(self, tag: str, images: Sequence[Any], step: int) -> None: ...

    def figure(self, tag: str, figure: Any, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def catch_gradients(engine: Engine, at_step: int) -> dict[str, torch.Tensor]:
    """Keeps every parameter's whole gradient of the `at_step`-th step that this process does."""
    caught: dict[str, torch.Tensor] = {}
    step, num_steps = engine.step, itertools.count()

    def catching_step() -> None:
        if next(num_steps) == at_step:
            for name, gradient in engine.full_gradients():
                caught[f"gradient/{name}"] = gradient.detach().cpu().clone()
        step()

    engine.step = catching_step
    return caught


def catch_masks(allocator: RankAllocator) -> dict[str, torch.Tensor]:
    """Keeps what each pruning of this process decided, as STEPS_DONE/LAYER."""
    caught: dict[str, torch.Tensor] = {}
    update = allocator.update

    def catching_update(importance: dict[str, torch.Tensor], steps_done: int) -> None:
        before = allocator.kept
        update(importance, steps_done)
        if allocator.kept is not before:
            caught.update({f"{steps_done:03d}/{layer}": kept.clone() for layer, kept in allocator.kept.items()})

    allocator.update = catching_update
    return caught


def tell_progress(engine: Engine, file: Path, steps_done: int) -> None:
    """Writes the number of steps done to `file` now and after each further step."""
    step, numbers = engine.step, itertools.count(steps_done + 1)
    beside = file.with_suffix(f"{file.suffix}.partial")

    def tell(number: int) -> None:
        beside.write_text(str(number))
        beside.rename(file)

    def telling_step() -> None:
        step()
        tell(next(numbers))

    file.parent.mkdir(parents=True, exist_ok=True)
    tell(steps_done)
    engine.step = telling_step


def main(scenarios: str, run_one: Callable[[dict, int, int], None] = run) -> None:
    """Joins the process group and gives each scenario of the file to `run_one`, with rank and world size."""
    torch.set_num_threads(1)
    rank, world_size = init_distributed()
    for scenario in json.loads(Path(scenarios).read_text()):
        run_one(scenario, rank, world_size)
    shutdown_distributed()


def main_counting(scenarios: str, calls: Counter[str]) -> None:
    """`main`, with what each scenario adds to `calls` in its `OUTPUT/calls.json`."""

    def run_counting(scenario: dict, rank: int, world_size: int) -> None:
        calls.clear()
        run(scenario, rank, world_size)
        (Path(scenario["output"]) / "calls.json").write_text(json.dumps(calls))

    main(scenarios, run_counting)

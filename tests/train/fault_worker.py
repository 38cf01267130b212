"""Runs with faults on order, from a JSON file of scenarios.

A scenario is one of `tests.train.worker`, with any of
    "poison": {step: factor}   the loss of the step's first micro-step on the last rank is multiplied by it
    "dies_at": step            the life ends before that step
    "leaves_at": step          a signal comes before that step, on rank 0
    "hangs_at": [rank, step]   the rank sleeps there without end
    "slow": [rank, seconds]    the rank's forwards take so much longer
    "memory": [rank, step]     the rank's allocator fails there
    "moves": {"step", "name"}  before that step, one number of that frozen parameter changes on the last rank
"""

import json
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.train import worker
from vltrain.distributed.preemption import Preempted
from vltrain.errors import InputError
from vltrain.train.trainer import Trainer
from vltrain.train.zero.engine import init_distributed, shutdown_distributed


class Died(BaseException):
    pass


def order_faults(trainer: Trainer, scenario: dict, rank: int, world_size: int) -> None:
    step, forward = trainer.step, trainer.engine.forward
    at = {"step": -1, "micro": 0}

    def faulty_step(loaded):
        at.update(step=loaded.step, micro=0)
        if loaded.step == scenario.get("dies_at"):
            raise Died
        if loaded.step == scenario.get("leaves_at") and rank == 0:
            trainer.preemption._heard(signal.SIGUSR1)
        moves = scenario.get("moves", {})
        if loaded.step == moves.get("step") and rank == world_size - 1:
            parameter = dict(trainer.engine.model.named_parameters())[moves["name"]]
            getattr(parameter, "ds_tensor", parameter).data.view(-1)[7] += 0.5
        return step(loaded)

    def faulty_forward(batch):
        if [rank, at["step"]] == scenario.get("hangs_at"):
            time.sleep(600)
        if rank == scenario.get("slow", [None])[0]:
            time.sleep(scenario["slow"][1])
        if [rank, at["step"]] == scenario.get("memory"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        output = forward(batch)
        factor = scenario.get("poison", {}).get(str(at["step"]))
        if factor is not None and at["micro"] == 0 and rank == world_size - 1:
            output = output._replace(
                loss_sum=output.loss_sum * float(factor), segment_losses=output.segment_losses * float(factor)
            )
        at["micro"] += 1
        return output

    trainer.step, trainer.engine.forward = faulty_step, faulty_forward


def run_all(scenarios: Path) -> None:
    rank, world_size = init_distributed()
    for scenario in json.loads(scenarios.read_text()):
        try:
            worker.run(
                scenario, rank, world_size, prepare=lambda trainer: order_faults(trainer, scenario, rank, world_size)
            )
        except (Died, Preempted):
            pass
        except InputError as error:
            if not scenario.get("may_fail"):
                raise
            Path(f"{scenario['output']}.error.{rank}").write_text(str(error))
        dist.barrier()  # the next life reads what rank 0 has only now finished writing
    shutdown_distributed()


def main(scenarios: str) -> int:
    try:
        run_all(Path(scenarios))
    except InputError as error:
        print(f"error: {error}", flush=True)
        return 2
    return 0

"""`tests.train.worker` with the check before the first step: a scenario's "check" is quick, full or nothing. Each rank
writes what was found to `OUTPUT/findings.RANK.json`. With "fault" one is planted, and nothing is trained."""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.preflight.faults import plant
from tests.train import worker
from vltrain.memory.out_of_memory import OutOfMemory
from vltrain.preflight.check import check
from vltrain.train.trainer import Trainer


def checked(trainer: Trainer, scenario: dict, rank: int) -> None:
    try:
        found = [asdict(one) for one in check(trainer, everything=scenario["check"] == "full")]
    except OutOfMemory as error:
        found = [{"status": "FAILED", "what": "memory", "found": str(error)}]
    Path(scenario["output"], f"findings.{rank}.json").write_text(json.dumps(found))


def run_one(scenario: dict, rank: int, world_size: int) -> None:
    Path(scenario["output"]).mkdir(parents=True, exist_ok=True)
    if "fault" not in scenario:
        prepare = (lambda trainer: checked(trainer, scenario, rank)) if scenario["check"] else (lambda trainer: None)
        worker.run(scenario, rank, world_size, prepare=prepare)
        return
    with ExitStack() as held:
        patch = held.enter_context(pytest.MonkeyPatch.context())
        trainer = plant(patch, scenario["fault"], lambda: worker.make(scenario, world_size))
        checked(trainer, scenario, rank)
        trainer.close()


def main(scenarios: str) -> None:
    worker.main(scenarios, run_one)

"""`tests.train.worker` with the check before the first step: a scenario's "check" is quick, full or nothing. Each rank
writes what was found to `OUTPUT/findings.RANK.json`."""

import json
from dataclasses import asdict
from pathlib import Path

from tests.train import worker
from vltrain.preflight.check import check
from vltrain.train.trainer import Trainer


def run_one(scenario: dict, rank: int, world_size: int) -> None:
    def prepare(trainer: Trainer) -> None:
        if scenario["check"]:
            found = check(trainer, everything=scenario["check"] == "full")
            file = Path(scenario["output"], f"findings.{rank}.json")
            file.write_text(json.dumps([asdict(one) for one in found]))

    worker.run(scenario, rank, world_size, prepare=prepare)


def main(scenarios: str) -> None:
    worker.main(scenarios, run_one)

"""Runs with evaluations that say what they are told to, from a JSON file of scenarios, in one process.

A scenario is one of `tests.train.worker`, with "figures": {steps done: figure of the evaluation}; the life ends in the
evaluation of step "dies_in". Writes to `OUTPUT/evaluated.jsonl` which steps were evaluated.
"""

import json
from pathlib import Path

from tests.train import worker
from vltrain.train.zero.engine import init_distributed, shutdown_distributed


class Died(BaseException):
    pass


def main(place: str) -> None:
    rank, world_size = init_distributed()
    for scenario in json.loads(Path(place).read_text()):
        output = Path(scenario["output"])

        def evaluate(steps_done: int) -> float | None:
            with (output / "evaluated.jsonl").open("a") as file:
                file.write(f"{steps_done}\n")
            if steps_done == scenario.get("dies_in"):
                raise Died
            return scenario["figures"][str(steps_done)]

        try:
            worker.run(scenario, rank, world_size, evaluate)
        except Died:
            assert not (output / "result.safetensors").exists()
    shutdown_distributed()

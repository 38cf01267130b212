"""Runs the training scenarios of a JSON file as `tests.train.worker` does, counting the calls of the fused adapter with a norm and without.

Writes `OUTPUT/calls.json`: {"norm": calls, "no norm": calls}.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.train import worker
from vltrain.models.adapters import bottleneck
from vltrain.train.engine import init_distributed, shutdown_distributed

CALLS: Counter[str] = Counter()
_fused_adapter = bottleneck.fused_adapter


def counted(*given: Any, **named: Any) -> Any:
    CALLS["no norm" if named.get("norm_weight") is None else "norm"] += 1
    return _fused_adapter(*given, **named)


def main(scenarios: str) -> None:
    torch.set_num_threads(1)
    bottleneck.fused_adapter = counted
    rank, world_size = init_distributed()
    for scenario in json.loads(Path(scenarios).read_text()):
        CALLS.clear()
        worker.run(scenario, rank, world_size)
        (Path(scenario["output"]) / "calls.json").write_text(json.dumps(CALLS))
    shutdown_distributed()

"""Runs the scenarios of `tests.train.zero.stock_worker`, and writes how often the fused adapter was called with a norm
and without: `calls.json` beside each output, {"norm": calls, "no norm": calls}."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.train.worker import main as run_scenarios
from tests.train.zero import stock_worker
from vltrain.models.adapters import bottleneck

CALLS: Counter[str] = Counter()
_fused_adapter = bottleneck.fused_adapter


def counted(*given: Any, **named: Any) -> Any:
    CALLS["no norm" if named.get("norm_weight") is None else "norm"] += 1
    return _fused_adapter(*given, **named)


def run(scenario: dict[str, Any], rank: int, world_size: int) -> None:
    CALLS.clear()
    stock_worker.run(scenario, rank, world_size)
    if rank == 0:
        (Path(scenario["output"]).parent / "calls.json").write_text(json.dumps(CALLS))


def main(scenarios: str) -> None:
    bottleneck.fused_adapter = counted
    run_scenarios(scenarios, run)

"""Runs the training scenarios of a JSON file as `tests.train.worker` does, counting the calls of Liger's kernels and of the plain rotary embedding.

Writes `OUTPUT/calls.json`: by name, the calls of one step's forwards and recomputations.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

from tests.support.interpreter import mend_interpreter
from tests.train import worker
from vltrain.ops import liger
from vltrain.ops.fused import interpreted
from vltrain.train.engine import init_distributed, shutdown_distributed

CALLS: Counter[str] = Counter()


def counted(name: str, function: Any) -> Any:
    def call(*given: Any) -> Any:
        CALLS[name] += 1
        return function(*given)

    return call


def main(scenarios: str) -> None:
    torch.set_num_threads(1)
    if interpreted():
        mend_interpreter()
    for function in (LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction):
        function.forward = staticmethod(counted(function.__name__, function.forward))
    liger._plain_rotary = counted("plain", liger._plain_rotary)
    rank, world_size = init_distributed()
    for scenario in json.loads(Path(scenarios).read_text()):
        CALLS.clear()
        worker.run(scenario, rank, world_size)
        (Path(scenario["output"]) / "calls.json").write_text(json.dumps(CALLS))
    shutdown_distributed()

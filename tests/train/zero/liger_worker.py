"""Runs the training scenarios of a JSON file as `tests.train.worker` does, counting the calls of Liger's kernels and of
the plain rotary embedding.

Writes `OUTPUT/calls.json`: by name, the calls of one step's forwards and recomputations.
"""

from collections import Counter
from typing import Any

from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction

from tests.support.interpreter import mend_interpreter
from tests.train.worker import main_counting
from vltrain.ops import liger
from vltrain.ops.fused import interpreted

CALLS: Counter[str] = Counter()


def counted(name: str, function: Any) -> Any:
    def call(*given: Any) -> Any:
        CALLS[name] += 1
        return function(*given)

    return call


def main(scenarios: str) -> None:
    if interpreted():
        mend_interpreter()
    for function in (LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction):
        function.forward = staticmethod(counted(function.__name__, function.forward))
    liger._plain_rotary = counted("plain", liger._plain_rotary)
    main_counting(scenarios, CALLS)

"""Runs the training scenarios of a JSON file as `tests.train.worker` does, counting the calls of the fused adapter with
a norm and without.

Writes `OUTPUT/calls.json`: {"norm": calls, "no norm": calls}.
"""

from collections import Counter
from typing import Any

from tests.train.worker import main_counting
from vltrain.models.adapters import bottleneck

CALLS: Counter[str] = Counter()
_fused_adapter = bottleneck.fused_adapter


def counted(*given: Any, **named: Any) -> Any:
    CALLS["no norm" if named.get("norm_weight") is None else "norm"] += 1
    return _fused_adapter(*given, **named)


def main(scenarios: str) -> None:
    bottleneck.fused_adapter = counted
    main_counting(scenarios, CALLS)

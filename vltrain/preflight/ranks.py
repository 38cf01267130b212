"""What the ranks make of a check together: a line each, the same on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from vltrain.data.report.finding import FAILED, OK, WARNING, Finding


def judged(what: str, faults: Sequence[str], proven: str) -> Finding:
    """One that fails with the first fault, where there is one, and else says what is proven."""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Finding(status=FAILED if faults else OK, what=what, found=f"{faults[0]}{more}" if faults else proven)


def agreed(own: Sequence[Finding]) -> list[Finding]:
    """What all ranks found, on every rank: of what is not ok on some ranks that of the first of them. A collective.
    All ranks come with findings on the same things in the same order."""
    everyone: list[list[Finding]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, list(own))
    merged = []
    for same in zip(*everyone, strict=True):
        worst = max(range(len(same)), key=lambda rank: (OK, WARNING, FAILED).index(same[rank].status))
        one = same[worst]
        if one.status != OK and same[0] != one:
            one = replace(one, found=f"rank {worst}: {one.found}")
        merged.append(one)
    return merged

"""What the check before a run found: a line each, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

OK, WARNING, FAILED = "ok", "WARNING", "FAILED"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line.

    status  ok, WARNING (look at it), FAILED (the run would be wrong, or not survive)
    what    the thing looked at
    found   the figures; where something is to be done, what
    """

    status: str
    what: str
    found: str

    def __post_init__(self) -> None:
        assert self.status in (OK, WARNING, FAILED), self.status
        assert "\n" not in f"{self.what}{self.found}", "a finding is one line"

    def line(self) -> str:
        """As it is shown."""
        return f"{self.status:8}{self.what}: {self.found}"


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
            one = Finding(status=one.status, what=one.what, found=f"rank {worst}: {one.found}")
        merged.append(one)
    return merged

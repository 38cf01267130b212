"""What a plan (`vltrain plan`) says of a recipe that is tried: the memory it expects, and what to change where packs do
not fit into this machine."""

from __future__ import annotations

import os

import torch

from vltrain.data.report.finding import OK, WARNING, Finding
from vltrain.distributed.machine import local_world_size
from vltrain.errors import InputError
from vltrain.memory.plan import GIB, TIGHT_SHARE
from vltrain.train.planning.changes import cheapest_changes
from vltrain.train.planning.planned import Way, plan

WHAT = "to make it fit"


def planned_memory(way: Way) -> Finding:
    """The plan's figure for what the rehearsal has measured."""
    try:
        memory = plan(way).memory
    except InputError as error:
        return Finding(status=WARNING, what="planned memory", found=f"cannot be planned: {error}")
    beside = "" if torch.cuda.is_available() else ", without the interpreter and its libraries"
    return Finding(
        status=OK, what="planned memory", found=f"{memory.peak / GIB:.2f} GiB a rank at the largest pack{beside}"
    )


def ways_out(way: Way, memory_bytes: int | None = None) -> list[Finding]:
    """A line for each of the cheapest changes, after one with the plan's figure.

    Args:
        way: what did not fit.
        memory_bytes: of a rank; None: this machine's.
    """
    memory = _memory_of_rank() if memory_bytes is None else memory_bytes
    try:
        planned = plan(way)
        # It did not fit, whatever the plan says: less than planned is wanted at least.
        enough = min(memory, int(planned.memory.peak / TIGHT_SHARE) - 1)
        found = cheapest_changes(way, enough, now=planned)
    except InputError as error:
        return [Finding(status=WARNING, what=WHAT, found=f"cannot be planned: {error}")]
    told = f"planned were {planned.memory.peak / GIB:.2f} GiB, {memory / GIB:.2f} are there; "
    told += "cheapest in time first:" if found else "nothing that was tried fits: take a larger GPU, or a smaller model"
    return [Finding(status=WARNING, what=WHAT, found=one) for one in (told, *(change.line() for change in found))]


def _memory_of_rank() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size()

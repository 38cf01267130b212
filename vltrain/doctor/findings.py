"""What a check found, checks that can neither crash nor hang the program, and the findings of many ranks as one list.

Measured numbers are kept apart from the text that shows them (`found` names them in braces), so that ranks which differ
in nothing but what they measured share a line, with the smallest and the largest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vltrain.errors import InputError

OK, ABSENT, WARNING, PROBLEM = "ok", "not here", "warning", "problem"
STATUSES = (OK, ABSENT, WARNING, PROBLEM)  # from good to bad


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    status: of STATUSES. `not here` is an optional part that is missing.
    what: the thing examined.
    found, needed, do: for humans; `do` is empty where nothing needs to be done.
    numbers: measured ones by name, units in the name; `found` shows them as {name}.
    of_host: about what the ranks of a machine share, and found by the first of them.
    """

    status: str
    what: str
    found: str
    needed: str = ""
    do: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    of_host: bool = False

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert "\n" not in f"{self.what}{self.found}{self.needed}{self.do}", "a finding is one line"


@dataclass(kw_only=True)
class Merged:
    """A finding that some ranks share; `numbers` has each one's, in the order of `ranks`."""

    finding: Finding
    ranks: list[int]
    numbers: dict[str, list[float]]


class Examination:
    """Collects findings. `hung` tells whether a check that ran out of time still runs on a thread, so that the process
    cannot end by itself."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.hung = False

    def run(self, what: str, check: Callable[[], Finding | Sequence[Finding]], timeout_seconds: float = 60.0) -> None:
        """Runs a check. Whatever it raises, and that it does not end in time, is a finding with the status
        `problem`."""
        outcome: list[Finding] = []

        def examine() -> None:
            try:
                found = check()
                outcome.extend([found] if isinstance(found, Finding) else found)
            except BaseException as error:  # whatever is broken here is what we are looking for
                outcome[:] = [Finding(status=PROBLEM, what=what, found=one_line(error))]

        thread = threading.Thread(target=examine, name=what, daemon=True)
        thread.start()
        thread.join(timeout_seconds)
        if thread.is_alive():
            self.hung = True
            outcome = [Finding(status=PROBLEM, what=what, found=f"did not end within {timeout_seconds:g} s")]
        self.findings += outcome


def one_line(error: BaseException) -> str:
    """An exception's type and text on a line of bounded length; the whole text of one that says what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    return f"{type(error).__name__}: {text}"[:400] if text else type(error).__name__


def merge(findings: Sequence[Sequence[Finding]]) -> list[Merged]:
    """The distinct findings of all ranks, in the order in which the first rank came upon them."""
    merged: dict[tuple[str, ...], Merged] = {}
    for rank, own in enumerate(findings):
        for one in own:
            key = (one.status, one.what, one.found, one.needed, one.do)
            entry = merged.setdefault(key, Merged(finding=one, ranks=[], numbers={name: [] for name in one.numbers}))
            if rank in entry.ranks:
                continue
            entry.ranks.append(rank)
            for name, value in one.numbers.items():
                entry.numbers[name].append(value)
    order = list(dict.fromkeys(entry.finding.what for entry in merged.values()))
    return sorted(merged.values(), key=lambda entry: order.index(entry.finding.what))


def to_json(merged: Sequence[Merged], hosts: Sequence[str]) -> dict[str, Any]:
    """The report as data: the worst status, each rank's host, and the findings."""
    worst = max((entry.finding.status for entry in merged), key=STATUSES.index, default=OK)
    return {
        "status": worst,
        "ranks": len(hosts),
        "hosts": list(hosts),
        "findings": [
            {
                "status": entry.finding.status,
                "what": entry.finding.what,
                "found": _shown(entry),
                "needed": entry.finding.needed,
                "do": entry.finding.do,
                "numbers": entry.numbers,
                "ranks": entry.ranks,
            }
            for entry in merged
        ],
    }


def to_text(merged: Sequence[Merged], hosts: Sequence[str]) -> str:
    """A line for each finding and one that counts them."""
    width = max((len(entry.finding.what) for entry in merged), default=0)
    lines = []
    for entry in merged:
        finding = entry.finding
        line = f"{finding.status:9} {finding.what:{width}}  {_shown(entry)}"
        line += f"; needed: {finding.needed}" if finding.needed else ""
        line += f"; to do: {finding.do}" if finding.do else ""
        lines.append(line + _whose(entry, hosts))
    counts = [(status, sum(entry.finding.status == status for entry in merged)) for status in STATUSES]
    said = ", ".join(f"{count} {status}" for status, count in counts if count)
    return "\n".join([*lines, f"{len(hosts)} rank(s) on {len(set(hosts))} host(s): {said}"])


def _shown(entry: Merged) -> str:
    text = entry.finding.found
    for name, values in entry.numbers.items():
        smallest, largest = _number(min(values)), _number(max(values))
        text = text.replace(f"{{{name}}}", smallest if smallest == largest else f"{smallest} to {largest}")
    return text


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _whose(entry: Merged, hosts: Sequence[str]) -> str:
    """Which ranks or machines a line is about, unless it is about all."""
    ranks, own_hosts = entry.ranks, list(dict.fromkeys(hosts[rank] for rank in entry.ranks))
    if len(ranks) == len(hosts) or (entry.finding.of_host and len(own_hosts) == len(set(hosts))):
        return ""
    if entry.finding.of_host:
        return f" [{', '.join(own_hosts)}]"
    parts = []
    for host in own_hosts:
        own = [rank for rank in ranks if hosts[rank] == host]
        every = own == [rank for rank in range(len(hosts)) if hosts[rank] == host]
        parts.append(host if every and len(set(hosts)) > 1 else f"rank {','.join(map(str, own))} on {host}")
    return f" [{'; '.join(parts)}]"

"""What an audit found: a line a check, passed or not, with the size of the difference and where it arises."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

BOUND = 1e-5
"""The largest relative difference of two ways to compute one thing in fp32."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check.

    what        that is compared, of which the audit says that it is one thing
    difference  relative, of norms; None: it is yes or no
    bound       the largest that passes; None: it is told, and neither passes nor fails
    passed      None where it is told only
    where       that which differs, and why, in words; "" where nothing does
    """

    what: str
    passed: bool | None
    difference: float | None = None
    bound: float | None = BOUND
    where: str = ""

    def __post_init__(self) -> None:
        assert "\n" not in f"{self.what}{self.where}", "a finding is one line"


def compared(what: str, difference: float, where: str) -> Finding:
    """A finding that passes up to BOUND; `where`: where it arises, which a check that passes leaves out."""
    passed = difference <= BOUND
    return Finding(what=what, passed=passed, difference=difference, where="" if passed else where)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings about a model. `model`: its source; `kind`: its model_type; `small`: parameters of the copy that was
    audited; `seconds`: how long it took."""

    model: str
    kind: str
    small: int
    seconds: float
    findings: list[Finding] = field(default_factory=list)

    @property
    def failures(self) -> list[Finding]:
        """Those that did not pass, in order."""
        return [one for one in self.findings if one.passed is False]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def num_passed(self) -> int:
        """How many checks passed."""
        return sum(one.passed is True for one in self.findings)

    def refusal(self) -> str:
        """Why the model is refused, on one line: the first failure."""
        first = self.failures[0]
        size = "" if first.difference is None else f" (difference {first.difference:.1e}, at most {first.bound:.0e})"
        more = f"; {len(self.failures) - 1} more checks fail" if len(self.failures) > 1 else ""
        return f"{self.kind}: {first.what} does not hold{size}: {first.where}{more}"

    def to_json(self) -> dict[str, Any]:
        """As data."""
        return {"passed": self.passed, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """Of what `to_json` made."""
        values = {name: value for name, value in data.items() if name != "passed"}
        return cls(**{**values, "findings": [Finding(**one) for one in values["findings"]]})

    def to_text(self) -> str:
        """A line for each finding and one that counts them."""
        width = max((len(one.what) for one in self.findings), default=0)
        lines = [_line(one, width) for one in self.findings]
        judged = sum(one.passed is not None for one in self.findings)
        closing = (
            f"{self.model} ({self.kind}): {self.num_passed} of {judged} checks passed, on a copy of {self.small:,} "
            f"random parameters, in {self.seconds:.1f} s"
        )
        return "\n".join([*lines, closing])


def _line(finding: Finding, width: int) -> str:
    word = {True: "pass", False: "FAIL", None: "told"}[finding.passed]
    size = "" if finding.difference is None else f"{finding.difference:.1e}"
    where = f"  {finding.where}" if finding.where else ""
    return f"{word}  {finding.what:{width}}  {size:7}{where}".rstrip()

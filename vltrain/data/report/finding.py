"""A line of the report on a recipe's data, and how figures are written in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

OK, WARNING, FAILED = "ok", "WARNING", "FAILED"
MOST_EXAMPLES = 3
_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 60  # characters of a text


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line.

    status    ok, WARNING (look at it), FAILED (what is trained or measured would be wrong)
    what      the thing looked at
    found     the figures; where something is to be done, what
    examples  up to three, by sample id
    """

    status: str
    what: str
    found: str
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.status in (OK, WARNING, FAILED), self.status
        assert "\n" not in f"{self.what}{self.found}{''.join(self.examples)}", "a finding is one line"

    def line(self) -> str:
        """As it is shown."""
        examples = f" (e.g. {'; '.join(self.examples)})" if self.examples else ""
        return f"{self.status:8}{self.what}: {self.found}{examples}"


def some(examples: Iterable[str]) -> tuple[str, ...]:
    """The first few."""
    return tuple(islice(examples, MOST_EXAMPLES))


def share(part: float, whole: float) -> str:
    """In percent, to read."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.1f}%" if percent >= 0.1 or not part else "<0.1%"


def quoted(text: str) -> str:
    """A text on one line, cut where it is long."""
    plain = " ".join(text.split())
    return f"'{plain}'" if len(plain) <= _SHOWN else f"'{plain[: _SHOWN - 1]}…'"


def spread(values: np.ndarray | Sequence[int]) -> str:
    """Quantiles and a small histogram of whole numbers, which must not be empty."""
    values = np.asarray(values)
    least, low, middle, high, most = (round(float(one)) for one in np.quantile(values, (0, 0.05, 0.5, 0.95, 1)))
    told = f"{least} / {low} / {middle} / {high} / {most} (least, 5%, median, 95%, most)"
    if least == most:
        return f"all {least}"
    counts, _ = np.histogram(values, bins=16, range=(least, most))
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return f"{told} {''.join(_BARS[height] for height in heights)}"

"""Figures that were published, and one's own below them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vltrain.config.tables import Published
from vltrain.evaluate.report import measure_of
from vltrain.programs.studies.table import DONE, Outcome

AVERAGE = "Average"


def published_lines(
    published: Published,
    outcomes: Mapping[str, Outcome],
    states: Mapping[str, str],
    planned: Mapping[str, Mapping[str, Any]],
) -> list[list[str]]:
    """Two lines for each row, the header first: what was published, and what is known here.

    Args:
        outcomes: by row; means where a row has several seeds.
        states: of rows that are not done, in words.
        planned: by row, see `vltrain.programs.studies.planned`.
    """
    columns = published.columns
    lines = [["row", "figures", *columns]]
    for row, figures in published.figures.items():
        told = [f"{figures[column]:.2f}" if column in figures else "–" for column in columns]
        lines.append([row, "published", *told])
        outcome = outcomes[row]
        if outcome.state == DONE:
            lines.append(["", "own", *(_share(own_figure(outcome, column)) for column in columns)])
            continue
        plan = f"; {plan_in_words(planned[row])}" if row in planned else ""
        lines.append(["", f"own: {states[row]}{plan}", *[""] * len(columns)])
    return lines


def own_figure(outcome: Outcome, column: str) -> float | None:
    """The share in a column of a row that is done; None where it has none."""
    measure = measure_of(outcome.metrics)
    if column == AVERAGE:
        return outcome.metrics[measure]
    return outcome.metrics["columns"].get(column, {}).get(measure)


def plan_in_words(plan: Mapping[str, Any]) -> str:
    """`planned 16.1 GiB, 23.4 h on 8 GPUs`."""
    hours = "" if plan["hours"] is None else f", {plan['hours']:.1f} h"
    return f"planned {plan['peak_gib']:.1f} GiB{hours} on {plan['gpus']} GPU{'s' * (plan['gpus'] > 1)}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"

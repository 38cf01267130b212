"""What differs between runs before any step is compared: recipe, environment, data, and figures of evaluations.

A difference is a row: a dotted name and what each run says, None where it says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vltrain.config.strict_yaml import is_mapping
from vltrain.errors import InputError
from vltrain.evaluate.report import measure_of
from vltrain.programs.compare.record import RunRecord

Row = tuple[str, list[Any]]
ENVIRONMENT = ("commit", "python", "packages", "device", "ranks", "threads_per_rank", "tokenizer_fingerprint")
DIGITS = 12  # of a digest or a commit, that are shown
CHARACTERS = 48  # of a value


def recipe_differences(runs: Sequence[RunRecord]) -> list[Row]:
    """Settings that differ. Folders of output are no difference, nor are settings of an architecture that no run
    has."""
    return _differing([{key: value for key, value in run.settings.items() if key != "output"} for run in runs])


def environment_differences(runs: Sequence[RunRecord]) -> list[Row]:
    """Code, packages, machine and ranks of the runs' newest lives, DeepSpeed's JSON, kernels, and the weights that they
    are made of, by digest."""
    return _differing([dict(_environment(run)) for run in runs])


def _environment(run: RunRecord) -> Iterator[tuple[str, Any]]:
    yield from _flat({name: run.facts[name] for name in ENVIRONMENT if name in run.facts})
    yield from _flat({"deepspeed": run.deepspeed, "kernels": run.kernels})
    if run.receipt is not None and run.receipt.header.frozen is not None:
        yield from _flat({"frozen at the start": run.receipt.header.frozen})
    parameters = run.facts.get("parameters")
    if is_mapping(parameters):
        yield "trained parameters", sum(part["trainable"] for part in parameters.values())
    identity = run.facts.get("identity")
    if is_mapping(identity):
        yield from _flat({"weights": identity.get("made_of", {}), "begins with": identity.get("origin", {})})


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if is_mapping(value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _differing(columns: Sequence[Mapping[str, Any]]) -> list[Row]:
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [_plain(column.get(key)) for column in columns]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values[1:])]


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return list(value) if isinstance(value, tuple) else value


def different_data(runs: Sequence[RunRecord]) -> str | None:
    """Which two runs were trained on different packs, and on which; None where all were on the same, or it is not
    known."""
    known = [(run, run.data) for run in runs if run.data is not None]
    for run, data in known[1:]:
        first, before = known[0]
        assert data is not None and before is not None
        if data[0] != before[0]:
            return (
                f"{first.folder} and {run.folder} were trained on different data: {before[1]} "
                f"({before[0][:DIGITS]}...) and {data[1]} ({data[0][:DIGITS]}...)"
            )
    return None


def require_same_data(runs: Sequence[RunRecord]) -> None:
    """Raises InputError for runs of different data, whose steps have nothing in common."""
    found = different_data(runs)
    if found is not None:
        raise InputError(
            f"{found}, so that no step of theirs can be compared; compare runs of one data set, or add "
            "--different-data to compare all but the steps"
        )


def evaluation_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Figures of evaluations side by side, those that are equal too: by split the steps behind the model, questions,
    the measure, and its columns. A split of other samples is a row of its own kind, which says so."""
    rows: list[Row] = []
    for split in dict.fromkeys(split for run in runs for split in run.evaluations):
        found = [run.evaluations.get(split, {}) for run in runs]
        measures = dict.fromkeys(measure_of(one) for one in found if one)
        rows += [(f"{split}: {name}", [one.get(key) for one in found]) for name, key in _COUNTS.items()]
        digests = [one.get("samples") for one in found]
        if len({digest for digest in digests if digest is not None}) > 1:
            rows.append((f"{split}: samples (different)", digests))
        for measure in measures:
            rows.append((f"{split}: {measure}", [one.get(measure) for one in found]))
            columns = dict.fromkeys(name for one in found for name in one.get("columns", {}) if name != "Average")
            for name in columns:
                values = [one.get("columns", {}).get(name, {}).get(measure) for one in found]
                if any(value is not None for value in values):
                    rows.append((f"{split}: {measure} of {name}", values))
    return rows


_COUNTS = {"after step": "step", "questions": "total"}


def shown(value: Any) -> str:
    """A value in a cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    if len(text) in (32, 40, 64) and all(letter in "0123456789abcdef" for letter in text):
        return f"{text[:DIGITS]}..."
    return text if len(text) <= CHARACTERS else f"{text[: CHARACTERS - 3]}..."


def table(title: str, names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The lines of a table: names to the left, a column for each run."""
    cells = [[title, *names], *([key, *map(shown, values)] for key, values in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]

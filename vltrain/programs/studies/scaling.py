"""`vltrain scaling TABLE [TABLE ...] --output FOLDER`: accuracy over the trained share, of tables that ablate has made.

    vltrain scaling runs/scaling_t5_xl runs/scaling_vicuna_7b --output runs/scaling

TABLE is a table's output folder. All its rows stand in one table, those that are planned or not run yet, too
(`vltrain ablate TABLE --plan`). Of each table and each share of the data (`data.fraction`) a line is fitted by least
squares, accuracy over log10 of the share of parameters that is trained (of an InstructBLIP: of its Q-Former's), with a
95% interval of its slope by Student's t over seeds. Written into the new folder:

    scaling.md     all rows, and the lines
    scaling.json   the same
    scaling.png    means with their 95% intervals over seeds, and the lines
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vltrain.config.command_line import COMMAND_LINE, FLAGS, split_arguments
from vltrain.console import start_logging
from vltrain.data.folder import new_folder
from vltrain.errors import InputError, exits_cleanly
from vltrain.evaluate.report import measure_of
from vltrain.files.atomic import write_json
from vltrain.files.strict_json import read_object
from vltrain.programs.studies.fits import Fit, fit_line
from vltrain.programs.studies.significance import spread_of
from vltrain.programs.studies.table import DONE, aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTION = "data.fraction"
Group = tuple[str, float]  # a table, and the share of the data


@dataclass(frozen=True, kw_only=True)
class Row:
    """`values`: by seed, shares; `trained_share`: None where neither a run nor a plan tells it."""

    table: str
    row: str
    fraction: float
    state: str
    trained: int | None
    trained_share: float | None
    values: dict[int, float]
    planned: dict[str, Any] | None


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain scaling") -> int:
    """Writes what the command line names. Returns the exit code."""
    arguments = split_arguments(argv, flags=FLAGS)
    if ("help", None) in arguments.options:
        print(__doc__)
        return 0
    start_logging()
    arguments.require_known(("output",))
    output = arguments.last("output")
    if not arguments.positionals or output is None:
        raise InputError(f"{COMMAND_LINE}: expected {program} TABLE [TABLE ...] --output FOLDER")
    folders = [Path(word) for word in arguments.positionals]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(
            f"{COMMAND_LINE}: found tables of one name ({', '.join(names)}), expected folders of other names"
        )
    rows = [row for folder, name in zip(folders, names) for row in read_rows(folder, name)]
    fits = fit_groups(rows)
    text = to_markdown(rows, fits)
    with new_folder(Path(output)) as folder:
        (folder / "scaling.md").write_text(text + "\n", encoding="utf-8")
        lines = [{"table": table, "fraction": share, **asdict(fit)} for (table, share), fit in fits.items()]
        write_json(folder / "scaling.json", {"rows": [asdict(row) for row in rows], "fits": lines})
        draw(rows, fits).savefig(folder / "scaling.png", dpi=120)
    print(text)
    return 0


def read_rows(folder: Path, name: str) -> list[Row]:
    """The rows of the table in `folder`. Raises InputError where it has none, or damaged ones."""
    path = folder / "table.json"
    if not path.exists():
        raise InputError(f"{path}: no such file, expected the output folder of a table that vltrain ablate has begun")
    try:
        return [_row(name, record) for record in read_object(path, "a table")["rows"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: not a table of vltrain ablate ({error!r}); run it again") from None


def _row(table: str, record: Mapping[str, Any]) -> Row:
    runs = record.get("seeds") or {"0": record}
    done = {int(seed): run for seed, run in runs.items() if run["state"] == DONE}
    values = {seed: float(run["metrics"][measure_of(run["metrics"])]) for seed, run in done.items()}
    planned = record.get("planned")
    trained, share = (planned["trained"], planned["trained_share"]) if planned else (None, None)
    if done and record["trained"] is not None:
        trained, share = record["trained"], record["trained"] / (record["full_qformer"] or record["parameters"])
    return Row(
        table=table,
        row=record["row"],
        fraction=float(record["settings"].get(FRACTION, 1.0)),
        state=record["state"],
        trained=trained,
        trained_share=share,
        values=values,
        planned=planned,
    )


def grouped(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """By table and share of the data: the rows that are done and train something."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        if row.values and row.trained_share:
            groups.setdefault((row.table, row.fraction), []).append(row)
    return dict(sorted(groups.items()))


def fit_groups(rows: Sequence[Row]) -> dict[Group, Fit]:
    """The line of each group that has one."""
    fits: dict[Group, Fit] = {}
    for group, members in grouped(rows).items():
        points = [
            (share, seed, value)
            for row in members
            if (share := row.trained_share) is not None
            for seed, value in row.values.items()
        ]
        if (fit := fit_line(points)) is not None:
            fits[group] = fit
    return fits


def to_markdown(rows: Sequence[Row], fits: Mapping[Group, Fit]) -> str:
    """All rows, and below them the lines."""
    lines = [["table", "row", "data %", "trained", "% trained", "accuracy", "± 95%", "seeds", "planned GiB", "hours"]]
    for row in rows:
        trained = ["", ""] if row.trained is None else [f"{row.trained:,}", f"{100 * (row.trained_share or 0):.3f}"]
        figures = [row.state, "", ""]
        if row.values:
            spread = spread_of(list(row.values.values()))
            half = "–" if spread.half_width is None else f"{100 * spread.half_width:.2f}"
            figures = [f"{100 * spread.mean:.2f}", half, str(spread.count)]
        plan = ["", ""]
        if row.planned is not None:
            hours = row.planned["hours"]
            plan = [f"{row.planned['peak_gib']:.1f}", "–" if hours is None else f"{hours:.1f}"]
        lines.append([row.table, row.row, f"{100 * row.fraction:g}", *trained, *figures, *plan])
    text = aligned(lines, 2)
    if not fits:
        return f"{text}\n\nNo line: that takes two trained shares of one table and one share of the data."
    told = [["table", "data %", "points for ten times the parameters", "95%", "rms", "runs", "seeds"]]
    for (table, fraction), fit in fits.items():
        interval = "–" if fit.slope_interval is None else " to ".join(f"{100 * end:+.2f}" for end in fit.slope_interval)
        shares = [f"{100 * fit.slope:+.2f}", interval, f"{100 * fit.rms:.2f}", str(fit.points), str(fit.seeds)]
        told.append([table, f"{100 * fraction:g}", *shares])
    title = "Accuracy over log10 of the trained share, by least squares; intervals by Student's t over seeds:"
    return f"{text}\n\n{title}\n\n{aligned(told, 1)}"


def draw(rows: Sequence[Row], fits: Mapping[Group, Fit]) -> Figure:
    """A panel for each table: means with their intervals, and the lines, a colour for each share of the data."""
    from matplotlib.figure import Figure

    groups = grouped(rows)
    tables = list(dict.fromkeys(table for table, _ in groups)) or list(dict.fromkeys(row.table for row in rows))
    figure = Figure(figsize=(1.5 + 4.5 * len(tables), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, table in zip(panels, tables):
        axes.set_title(table, fontsize=10)
        axes.set_xscale("log")
        axes.set_xlabel("% of parameters trained", fontsize=9)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        known = sorted(
            {100 * (row.trained_share or 0) for (name, _), rows in groups.items() if name == table for row in rows}
        )
        axes.set_xticks(known, [f"{share:.3g}" for share in known])
        axes.set_xticks([], minor=True)
        for place, ((name, fraction), members) in enumerate(groups.items()):
            if name != table:
                continue
            spreads = [spread_of(list(row.values.values())) for row in members]
            shares = [100 * (row.trained_share or 0) for row in members]
            heights = [100 * spread.mean for spread in spreads]
            bars = [100 * (spread.half_width or 0) for spread in spreads]
            colour, label = f"C{place % 10}", f"{100 * fraction:g}% of the data"
            axes.errorbar(shares, heights, bars, fmt="o", markersize=4, capsize=3, color=colour, label=label)
            if (fit := fits.get((name, fraction))) is not None:
                ends = [min(shares), max(shares)]
                axes.plot(ends, [100 * fit.at(end / 100) for end in ends], color=colour, linewidth=1)
        if any(name == table for name, _ in groups):
            axes.legend(fontsize=8)
    panels[0].set_ylabel("accuracy %; bars: 95% over seeds", fontsize=9)
    return figure

"""One JSON and one Markdown page of what the parts found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_page(folder: Path, parts: Sequence[str]) -> None:
    """Puts FOLDER/PART.json together, in the order of `parts`, as FOLDER/gpu.json and FOLDER/gpu.md. Parts that never
    ran are left out."""
    found = {name: json.loads(path.read_text()) for name in parts if (path := folder / f"{name}.json").exists()}
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "# What `bash tests/gpu.sh` found",
        "",
        "A part a section, each on the machine that it names; figures are measured unless a column says otherwise.",
        "",
    ]
    for name, part in found.items():
        lines += [f"## {name}", "", _where(part), ""]
        lines += [f"- FAILED: {failure}" for failure in part["failures"]] + ([""] if part["failures"] else [])
        for title, rows in part["tables"].items():
            lines += [f"**{title}**", "", *_table(rows), ""]
    (folder / "gpu.md").write_text("\n".join(lines))


def _where(part: Mapping[str, Any]) -> str:
    machine = part["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items())
    where = f"{machine['device']}, {machine['finished']}, {packages}" if machine else "no machine was told"
    return (
        f"{'Emulated on a CPU: ' if part['emulated'] else ''}{where}; {part['seconds']:.0f} s, "
        f"{'FAILED' if part['failures'] else 'passed'}."
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

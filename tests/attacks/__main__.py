"""`python -m tests.attacks [NAME ...] [--page FILE]`: tries the attacks (all of them: slow ones too), prints what
became of each, and writes the page."""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.attacks import load_attacks
from tests.attacks.attack import ATTACKS, Attack, AttackFailed
from tests.support.processes import ROOT

_CELL = 220  # characters of a line that the page shows


def main() -> int:
    parser = argparse.ArgumentParser(description="Try the attacks.")
    parser.add_argument("names", nargs="*", help="names, or beginnings of names; none: all")
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    given = parser.parse_args()
    load_attacks()
    chosen = [one for one in ATTACKS.values() if not given.names or one.name.startswith(tuple(given.names))]
    started = time.monotonic()
    ended = [(one, *_try(one)) for one in chosen]
    counts = Counter(outcome for _, outcome, _ in ended)
    failed = [one for one in ended if one[1] not in ("refused", "told", "right")]
    total = f"{len(ended)} attacks of {len({one.kind for one in chosen})} kinds: " + ", ".join(
        f"{counts[how]} {how}"
        for how in ("refused", "told", "right", "silent", "traceback", "wait", "unclear", "half written", "failed")
    )
    print(f"{total}; {time.monotonic() - started:.0f} s")
    if given.page is not None:
        given.page.write_text(_page(ended, total), encoding="utf-8")
    return int(bool(failed) or not ended)


def _try(one: Attack) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            shown = one.run(Path(folder))
            outcome, line = shown.outcome, _without_places(shown.line, folder)
        except AttackFailed as error:
            outcome, line = error.how, str(error)
        except Exception as error:
            outcome, line = "failed", f"{type(error).__name__}: {error}"
    print(f"{outcome:12} {one.name}: {line}", flush=True)
    return outcome, line


def _without_places(line: str, folder: str) -> str:
    """A line that is the same wherever the attack was tried."""
    line = line.replace(folder, "FOLDER").replace(str(ROOT), "CHECKOUT")
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/[\w.-]+", "FOLDER", line)


def _page(ended: list[tuple[Attack, str, str]], total: str) -> str:
    lines = [
        "# Attacks",
        "",
        "Broken and hostile inputs, each tried: `python -m tests.attacks --page tests/attacks.md` (all), `bash "
        "tests/run.sh tests/attacks` (all but the slow).",
        "An attack is refused (exit code 2, one line that says what was found and what to do, nothing half "
        "written), or told in a line while the run goes on, or simply done right.",
        "",
        "```",
        total,
        "```",
        "",
    ]
    kinds = sorted({one.kind for one, _, _ in ended})
    for kind in kinds:
        lines += [f"## {kind[0].upper()}{kind[1:]}", "", "| attack | ends | with |", "|---|---|---|"]
        for one, outcome, line in ended:
            if one.kind == kind:
                lines.append(f"| {_cell(one.what)} | {outcome} | {_cell(line)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    flat = "".join(
        character if character.isprintable() else f"\\x{ord(character):02x}" for character in " ".join(text.split(" "))
    )
    flat = flat.replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= _CELL else f"{flat[: _CELL - 3]}..."


if __name__ == "__main__":
    raise SystemExit(main())

"""What stands on a page: its fenced blocks, commands, links, headings, tables and inline code."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.support.processes import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Command:
    """A line of a `bash` block, without its comment."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return words_of(self.text)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Page:
    """`name`: its path from the root."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The text without its fenced blocks."""
        return FENCE.sub("", self.text)

    def blocks(self, language: str) -> list[tuple[int, str]]:
        """(line of its first line, text) of every fenced block in `language`; "" for those in none."""
        return [
            (self.text.count("\n", 0, found.start(2)) + 1, found[2])
            for found in FENCE.finditer(self.text)
            if found[1] == language
        ]

    def languages(self) -> set[str]:
        return {found[1] for found in FENCE.finditer(self.text)}

    def commands(self) -> list[Command]:
        """Every line of the `bash` blocks that is a command, in order."""
        return [
            Command(self.name, first + number, line)
            for first, block in self.blocks("bash")
            for number, line in enumerate(block.splitlines())
            if words_of(line)
        ]

    def links(self) -> list[str]:
        return LINK.findall(self.prose)

    def anchors(self) -> set[str]:
        """Of its headings, as GitHub makes them."""
        return {
            re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
            for heading in HEADING.findall(self.prose)
        }

    def inline(self) -> list[str]:
        """What stands between single backticks."""
        return INLINE.findall(self.prose)

    def table(self, *head: str) -> list[list[str]]:
        """The rows of the table whose head begins with these cells. An empty first cell repeats the one above."""
        lines = iter(self.text.splitlines())
        for line in lines:
            if cells(line)[: len(head)] == list(head):
                break
        else:
            raise AssertionError(f"{self.name}: no table with the head {head}")
        next(lines)
        rows: list[list[str]] = []
        for line in lines:
            if not line.startswith("|"):
                break
            row = cells(line)
            rows.append([row[0] or rows[-1][0], *row[1:]])
        return rows


def words_of(line: str) -> list[str]:
    """As a shell splits it: `#` begins a comment only where a word begins (FILE#ROW has none)."""
    return shlex.split(re.sub(r"(^|\s)#.*", "", line))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


def codes(cell: str) -> list[str]:
    """What stands in backticks in a cell."""
    return INLINE.findall(cell)


README, LAUNCH, TABLES, MIXTURES, REMOTE, CHECK, WATCH, BLAME, TROUBLE, DATA, DATASETS, INSIDE = (
    Page(f"{name}.md")
    for name in (
        "README", "launch/README", "launch/TABLES", "launch/MIXTURES", "launch/REMOTE", "launch/CHECK",
        "launch/WATCHING", "launch/BLAME", "launch/TROUBLESHOOTING", "data_prep/README", "data_prep/DATASETS",
        "vltrain/README",
    )
)  # fmt: skip
PAGES = (README, LAUNCH, TABLES, MIXTURES, REMOTE, CHECK, WATCH, BLAME, TROUBLE, DATA, DATASETS, INSIDE)
"""The pages that users read."""

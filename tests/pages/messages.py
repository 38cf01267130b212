"""The messages of the code, as the texts that they are put together from."""

from __future__ import annotations

import ast
import functools
import re

from tests.support.processes import ROOT

GAP = "..."  # on a page: what differs from case to case
HOLE = "\0"  # in a text of the code: what is put in


@functools.cache
def messages() -> tuple[str, ...]:
    """Every text of the programs that is more than a word, with `HOLE` where values are put in; without docstrings."""
    found = set()
    for folder in ("vltrain", "data_prep"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                text = text_of(node) if id(node) not in docstrings else None
                if text and " " in text:
                    found.add(text)
    return tuple(found)


def text_of(node: ast.AST) -> str | None:
    """The text that a constant or an f-string makes; of a text for logging, %s and the like are holes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.\d]*[sdgfr]", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or HOLE if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return None


def is_said(quoted: str) -> bool:
    """Whether a message has the pieces between the gaps of `quoted`, in this order."""
    pieces = [piece.strip() for piece in quoted.split(GAP) if piece.strip(" :;,.()'")]
    return any(_fits(pieces, message) for message in messages())


def _fits(pieces: list[str], message: str) -> bool:
    place = 0
    for piece in pieces:
        place = message.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True

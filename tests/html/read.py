"""Reads a page as a browser does, and fails where anything in it could run or load."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

EMPTY = {"meta", "img", "br", "hr", "rect", "line", "polyline"}
HARMLESS = EMPTY | set(
    """
    html head title style body main h1 h2 h3 p section header div span figure figcaption a table thead tbody tr th td
    b code details summary svg g text circle
    """.split()
)


class Page(HTMLParser):
    """text: all that is shown; elements: (tag, attributes) in order. Raises AssertionError for what is not harmless."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text, self.styles, self._open = "", "", []
        self.feed(source)
        self.close()
        assert self._open == [], "an element was not closed"
        assert self.policy() == (
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
        )
        assert source.encode() and "url(" not in self.styles and "@import" not in self.styles
        for tag, attributes in self.elements:
            assert tag in HARMLESS, tag
            for name, value in attributes.items():
                assert not name.startswith("on") and name not in ("style", "srcdoc", "action"), (tag, name)
                assert name != "src" or value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
                assert name != "href" or value.startswith("#"), value

    def policy(self) -> str:
        [found] = [one["content"] for tag, one in self.elements if one.get("http-equiv") == "Content-Security-Policy"]
        head = [tag for tag, _ in self.elements]
        assert head.index("style") > head.index("meta"), "the policy stands before all that it judges"
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.styles += data
        else:
            self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def of(self, tag: str, css: str | None = None) -> list[dict[str, Any]]:
        """Attributes of the elements of that name (and of one of the classes `css`)."""
        wanted = set((css or "").split())
        return [
            one
            for name, one in self.elements
            if name == tag and (not wanted or wanted & set(one.get("class", "").split()))
        ]

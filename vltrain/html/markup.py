"""HTML that cannot be made to say more than it was asked to: text is escaped unless it is markup that was made here.

    page("pack 3", tag("p", "a < b", Class="note")) -> the document, complete with its policy

Whatever comes from samples passes `visible` and is escaped; a page has no script and its policy forbids any, and every
address but `data:` images. Trade-off: no interaction beyond links inside the page and `<details>`.
"""

from __future__ import annotations

import html
import re

from vltrain.html.style import STYLE

CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_EMPTY = frozenset({"img", "meta", "br", "hr", "line", "rect", "polyline"})


class Markup(str):
    """Text that is HTML already, of `tag` and `text`."""

    __slots__ = ()


def visible(text: str) -> str:
    """A text with everything written out that a browser obeys or hides: control characters, marks that turn the
    direction of writing, halves of characters. Spaces and line feeds stay."""
    if text.isprintable():
        return text
    return "".join(
        one
        if one.isprintable() or one in "\n\u200d\ufe0f"  # the last two join emoji
        else one.encode("unicode_escape", "surrogatepass").decode()
        for one in text
    )


def text(value: str) -> Markup:
    """What a page shows for a text: escaped, see `visible`."""
    return value if isinstance(value, Markup) else Markup(html.escape(visible(value)))


def joined(*parts: str) -> Markup:
    """Texts and markup one after another."""
    return Markup("".join(text(part) for part in parts))


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """An element.

    Args:
        children: markup as it is, any other text escaped.
        attributes: `Class` and `For` are written in lower case, `_` in a name as `-`; None: left out.
    """
    assert _NAME.fullmatch(name), name
    written = ""
    for key, value in attributes.items():
        key = key if key == "viewBox" else key.lower().replace("_", "-")
        assert key == "viewBox" or (_NAME.fullmatch(key) and not key.startswith("on")), key
        if value is not None:
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            escaped = html.escape(visible(shown), quote=False).replace('"', "&quot;")
            written += f' {key}="{escaped}"'
    if name in _EMPTY:
        assert not children
        return Markup(f"<{name}{written}>" if name in ("img", "meta", "br", "hr") else f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{joined(*children)}</{name}>")


def page(title: str, *body: str) -> str:
    """A whole document, which can be written as UTF-8. Its heading is `title`."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Markup(CONTENT_POLICY)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    whole = tag("html", head, tag("body", tag("main", tag("h1", title), *body)), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"

"""Small line charts as SVG inside a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vltrain.html.markup import Markup, tag

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 20, 20
INK, LINE, MARK = "#57606a", "#0b57d0", "#b42318"


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    mark: float | None = None,
    span: tuple[float, float] | None = None,
    size: tuple[int, int] = (490, 150),
) -> Markup:
    """A curve, with its extremes named at the axes.

    Args:
        points: (x, y) in order of x; where y is not finite, a cross at the top.
        mark: an x that is marked.
        span: of the x axis; None: that of the points.
        size: width and height, in pixels.
    """
    width, height = size
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    first, last = span or (min((x for x, _ in points), default=0.0), max((x for x, _ in points), default=1.0))
    low, high = 0.0, max((y for _, y in finite), default=0.0) or 1.0
    low = min([low, *(y for _, y in finite)])

    def across(x: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * ((x - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * (y - low) / (high - low)

    parts = [tag("text", title, x=LEFT, y=12)]
    for y in (low, high):
        parts.append(tag("line", x1=LEFT, x2=width - RIGHT, y1=up(y), y2=up(y), stroke="#d8dee4"))
        parts.append(tag("text", f"{y:.3g}", x=LEFT - 6, y=up(y) + 4, text_anchor="end"))
    for x, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        parts.append(tag("text", f"{x:g}", x=across(x), y=height - 5, text_anchor=anchor))
    if mark is not None:
        parts.append(tag("line", x1=across(mark), x2=across(mark), y1=TOP - 4, y2=height - BOTTOM, stroke=MARK))
        share = (mark - first) / (last - first) if last > first else 0.5
        if 0.12 < share < 0.88:  # else it would stand on an end's
            parts.append(tag("text", f"{mark:g}", x=across(mark), y=height - 5, text_anchor="middle", fill=MARK))
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in finite)
    parts.append(tag("polyline", points=path, fill="none", stroke=LINE, stroke_width=1.5))
    dots = finite if len(finite) <= 24 else [one for one in finite if one[0] == mark]
    parts += [
        tag("circle", tag("title", f"{x:g}: {y:.4g}"), cx=across(x), cy=up(y), r=3, fill=MARK if x == mark else LINE)
        for x, y in dots
    ]
    parts += [
        tag("text", f"× {y}", x=across(x), y=TOP + 4, text_anchor="middle", fill=MARK)
        for x, y in points
        if not math.isfinite(y)
    ]
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img")

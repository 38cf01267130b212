"""The page of `vltrain blame`: a table of samples, then each one's image, conversation, tokens by loss, figures, losses
over time and neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vltrain.html.charts import line_chart
from vltrain.html.markup import Markup, joined, tag
from vltrain.html.packs import DrawnPack, PackPage, loss_class
from vltrain.programs.blame.measuring import Measured
from vltrain.programs.blame.ranking import Place, Seen

AROUND_STEPS = 50  # that the log is drawn of, before a step and after it
MOST_CARDS, MOST_TOKENS = 100, 100_000  # samples that are drawn, and tokens of them; the table has all
MOST_NEIGHBOURS = 60  # that are named


@dataclass(frozen=True, kw_only=True)
class Story:
    """What is known of a sample. suspicion: see `vltrain.programs.blame.ranking`; measured: None without weights."""

    place: Place
    name: str
    seen: Sequence[Seen]
    measured: Measured | None = None
    recorded: float | None = None
    suspicion: float | None = None


class Cards:
    """Draws samples of a run.

    Args:
        page: its packs.
        stories: the samples to draw, of which the first get a card, as long as a browser copes with them.
        steps: the first and the last step of its history.
        step: the one that is blamed; None: there is none.
    """

    def __init__(
        self, page: PackPage, stories: Sequence[Story], steps: tuple[int, int], step: int | None = None
    ) -> None:
        self._page, self._steps, self._step = page, steps, step
        self._packs: dict[int, DrawnPack] = {}
        self._shown, tokens = list[Story](), 0
        for story in stories[:MOST_CARDS]:
            tokens += int(page.dataset.row(story.place.pack).segment_lengths[story.place.segment])
            if self._shown and tokens > MOST_TOKENS:
                break
            self._shown.append(story)
        self._linked = {story.place for story in self._shown}

    def draw(self) -> list[Markup]:
        """The cards."""
        return [self._card(story) for story in self._shown]

    def table(self, stories: Sequence[Story], columns: Mapping[str, Sequence[str]]) -> Markup:
        """A table of samples, whether they have a card or not. `columns`: by title, what stands there for each."""
        rows = []
        for place, story in enumerate(stories):
            values = [tag("td", column[place], Class="n") for column in columns.values()]
            rows.append(tag("tr", tag("td", self._link(story.place, story.name)), *values))
        table = tag("div", _table(["sample", *columns], rows, left=1), Class="scroll")
        drawn = sum(story.place in self._linked for story in stories)
        if drawn == len(stories):
            return table
        return joined(table, tag("p", f"{drawn} of {len(stories)} are drawn below.", Class="note"))

    def _link(self, place: Place, name: str) -> Markup:
        return tag("a", name, href=f"#{anchor(place)}") if place in self._linked else joined(name)

    def _card(self, story: Story) -> Markup:
        number, segment = story.place
        if number not in self._packs:
            self._packs[number] = self._page.pack(number)
        pack = self._packs[number]
        losses = story.measured.tokens if story.measured is not None else None
        texts = tag(
            "div",
            *[tag("p", tag("b", who), " ", words, Class="said") for who, words in pack.said(segment)],
            pack.tokens(segment, losses),
            _token_table(pack, segment, story.measured),
            Class="texts",
        )
        head = tag("header", tag("h3", story.name), tag("p", f"pack {number}, {pack.span(segment)}", Class="note"))
        body = tag("div", pack.images(segment), texts, Class="columns")
        foot = tag("div", self._facts(story), self._over_time(story), Class="charts")
        return tag("section", head, body, foot, self._neighbours(pack, segment), Class="card", id=anchor(story.place))

    def _facts(self, story: Story) -> Markup:
        rows: list[tuple[str, str]] = []
        measured = story.measured
        if story.recorded is not None:
            rows.append(("loss that the run recorded", number(story.recorded)))
        if measured is not None and measured.after is None:
            rows.append(("loss by the checkpoint", number(measured.loss)))
            rows.append(("gradient norm of this loss", number(measured.gradient_norm)))
        elif measured is not None:
            rows.append(("loss before the step", number(measured.loss)))
            rows.append(("loss after it", change(measured)))
            rows.append(("gradient norm of its part", number(measured.gradient_norm)))
        if story.suspicion is not None:
            rows.append(("above its steps' median, mean", number(story.suspicion)))
        rows.append(("seen", f"{len(story.seen)} time(s)"))
        return tag(
            "table",
            tag("tbody", *[tag("tr", tag("td", name), tag("td", value, Class="n")) for name, value in rows]),
            Class="facts",
        )

    def _over_time(self, story: Story) -> Markup:
        if not story.seen:
            return Markup("")
        points = [(float(one.step), one.loss) for one in story.seen]
        span = (float(self._steps[0]), float(self._steps[1]))
        return line_chart(points, title="its loss, by step", mark=self._step, span=span, size=(420, 120))

    def _neighbours(self, pack: DrawnPack, segment: int) -> Markup:
        others = [other for other in range(len(pack.row.sample_ids)) if other != segment]
        names = [self._link(Place(pack.number, other), pack.row.sample_ids[other]) for other in others]
        shown = [part for name in names[:MOST_NEIGHBOURS] for part in (name, ", ")][:-1]
        more = f" and {len(names) - MOST_NEIGHBOURS} more" if len(names) > MOST_NEIGHBOURS else ""
        strip = pack.strip(lambda one: f"#{anchor(Place(pack.number, one))}")
        told = tag("summary", f"pack neighbours: {len(names)}")
        return tag("details", told, strip, tag("p", *(shown or ["none"]), more))


def _token_table(pack: DrawnPack, segment: int, measured: Measured | None) -> Markup:
    """Each label token's loss, before and after the step."""
    if measured is None or not measured.tokens:
        return Markup("")
    labels = [piece for piece in pack.segments[segment] if piece.has_loss]
    after = measured.after
    titles = ["token", "position", "loss" if after is None else "loss before", *([] if after is None else ["after"])]
    rows = []
    for at, (piece, loss) in enumerate(zip(labels, measured.tokens, strict=True)):
        cells = [tag("td", tag("code", piece.text or "·")), tag("td", pack.position(piece.first), Class="n")]
        for value in (loss,) if after is None else (loss, after[at]):
            cells.append(tag("td", tag("span", number(value), Class=f"swatch {loss_class(value)}"), Class="n"))
        rows.append(tag("tr", *cells))
    told = f"{len(labels)} label token(s)"
    return tag("details", tag("summary", told), tag("div", _table(titles, rows, left=1), Class="scroll"))


def anchor(place: Place) -> str:
    """The id of a sample's card."""
    return f"p{place.pack}-{place.segment}"


def number(value: float) -> str:
    """A figure in a table."""
    return f"{value:.4g}" if math.isfinite(value) else {math.inf: "Inf", -math.inf: "-Inf"}.get(value, "NaN")


def change(measured: Measured) -> Markup:
    """The loss after a step: green where it fell, red where it rose, by more than rounding."""
    before, after = measured.loss, measured.loss_after
    assert after is not None
    fell, rose = after < before * 0.999, not after <= before * 1.001
    return tag("span", number(after), Class="good" if fell else "bad" if rose else None)


def _table(titles: Sequence[str], rows: Sequence[Markup], left: int) -> Markup:
    """A table whose columns but the first `left` are numbers."""
    heads = [tag("th", title, Class=None if place < left else "n") for place, title in enumerate(titles)]
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))


def step_columns(stories: Sequence[Story]) -> dict[str, list[str]]:
    """The columns of a step's samples."""
    measured = [story.measured for story in stories]
    assert all(one is not None for one in measured)
    known = [one for one in measured if one is not None]
    return {
        "recorded": ["-" if story.recorded is None else number(story.recorded) for story in stories],
        "before": [number(one.loss) for one in known],
        "after": [change(one) if one.tokens else "NaN" for one in known],
        "gradient norm": [number(one.gradient_norm) for one in known],
        "seen": [str(len(story.seen)) for story in stories],
        "pack": [str(story.place.pack) for story in stories],
    }


def log_charts(log: Mapping[int, Mapping[str, float]], step: int) -> Markup:
    """Loss and gradient norm around a step."""
    steps = [one for one in sorted(log) if abs(one - step) <= AROUND_STEPS]
    charts = [
        line_chart([(float(one), log[one].get(key, math.nan)) for one in steps], title=title, mark=float(step))
        for key, title in (("loss", "loss, by step"), ("grad_norm", "gradient norm, by step"))
    ]
    return tag("div", *charts, Class="card charts")


def by_loss(story: Story) -> tuple[bool, float]:
    """Sorts samples: not finite ones first, then the largest loss."""
    loss = story.measured.loss if story.measured is not None and story.measured.tokens else -math.inf
    return math.isfinite(loss) or loss == -math.inf, -loss if math.isfinite(loss) else math.inf if loss < 0 else 0.0

"""Packs drawn for a page: segments, tokens coloured by label or by loss, images and positions. What `vltrain peek
--html` and `vltrain blame` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vltrain.data.shards import PackedDataset
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.html.markup import Markup, joined, tag
from vltrain.html.pieces import Piece, positions_of, segments_of
from vltrain.html.thumbnails import Thumbnails
from vltrain.schema import PackedRow

BOUNDS = (0.1, 0.5, 1.5, 3.0, 6.0)
"""Losses in nats between which a label token's colour changes: probabilities of 90%, 61%, 22%, 5% and 0.2%."""
STRIP_WIDTH = 1000


@dataclass
class PackPage:
    """What is drawn of one set of packs."""

    dataset: PackedDataset
    tokenizer: Tokenizer
    max_image_pixels: int
    thumbnails: Thumbnails = field(init=False)

    def __post_init__(self) -> None:
        self.thumbnails = Thumbnails(self.dataset.image, self.max_image_pixels)

    def pack(self, number: int) -> DrawnPack:
        """Pack `number`, ready to be drawn."""
        row = self.dataset.row(number)
        return DrawnPack(
            number=number,
            row=row,
            segments=segments_of(row, self.dataset.manifest, self.tokenizer),
            positions=positions_of(row),
            starts=(np.cumsum(row.segment_lengths) - row.segment_lengths).tolist(),
            thumbnails=self.thumbnails,
        )


@dataclass(frozen=True, kw_only=True)
class DrawnPack:
    """A pack of S segments and T tokens. segments: the pieces of each; positions: int [R, T]; starts: of segments."""

    number: int
    row: PackedRow
    segments: list[list[Piece]]
    positions: np.ndarray
    starts: list[int]
    thumbnails: Thumbnails

    def images(self, segment: int) -> Markup:
        """The images of a segment, in their order; those of the pack where a stock model's image token is not known."""
        shown = [piece.image for piece in self.segments[segment] if piece.image is not None]
        known = any(piece.image is not None for pieces in self.segments for piece in pieces)
        places = list(dict.fromkeys(shown)) if known else list(range(len(self.row.image_ids)))
        figures = [self.thumbnails.draw(int(self.row.image_ids[place])) for place in places]
        note = "" if known or not figures else "images of the pack"
        return tag("div", note, *figures, Class="images") if figures else Markup("")

    def tokens(self, segment: int, losses: Sequence[float] | None = None) -> Markup:
        """A segment's tokens.

        Args:
            losses: of its label tokens, in nats, in order; None: they are coloured by label alone.
        """
        known, spans = iter(losses or ()), []
        for piece in self.segments[segment]:
            loss = next(known) if piece.has_loss and losses is not None else None
            spans.append(tag("span", _shown(piece), Class=_colour(piece, loss), title=self._title(piece, loss)))
        return tag("div", *spans, Class="tokens")

    def _title(self, piece: Piece, loss: float | None) -> str:
        last = piece.first + piece.count - 1
        ids = self.row.input_ids[piece.first : last + 1].tolist()
        words = [f"token {piece.first}" + (f" to {last}" if piece.count > 1 else "")]
        words.append(f"id {ids[0]}" if len(set(ids)) == 1 else "")
        words.append(
            "position " + self.position(piece.first) + (f" to {self.position(last)}" if last > piece.first else "")
        )
        words.append("label" if piece.has_loss and loss is None else "")
        words.append("" if loss is None else f"loss {loss:.4g}, probability {_probability(loss)}")
        return ", ".join(word for word in words if word)

    def position(self, place: int) -> str:
        """The position of a token; of several rows with slashes between."""
        return "/".join(str(row[place]) for row in self.positions)

    def span(self, segment: int) -> str:
        """Where a segment stands, in words."""
        start, length = self.starts[segment], int(self.row.segment_lengths[segment])
        labels = self.num_labels(segment)
        places = f"tokens {start} to {start + length - 1}"
        return f"{places}, positions {self.position(start)} to {self.position(start + length - 1)}, {labels} with loss"

    def num_labels(self, segment: int) -> int:
        """Label tokens of a segment."""
        start, length = self.starts[segment], int(self.row.segment_lengths[segment])
        return int(self.row.loss_mask[start : start + length].sum())

    def said(self, segment: int) -> list[tuple[str, str]]:
        """A segment as a conversation: (`given` or `label`, text), special and visual tokens left out."""
        turns: list[tuple[str, str]] = []
        for piece in self.segments[segment]:
            if piece.kind != "text":
                continue
            who = "label" if piece.has_loss else "given"
            if turns and turns[-1][0] == who:
                turns[-1] = (who, turns[-1][1] + piece.text)
            else:
                turns.append((who, piece.text))
        return [(who, words.strip()) for who, words in turns if words.strip()]

    def strip(self, links: Callable[[int], str]) -> Markup:
        """The pack as a bar: a box for each segment, label tokens dark. `links`: a segment's address in the page."""
        total, boxes = len(self.row.input_ids), []
        scale = STRIP_WIDTH / total
        labels = np.flatnonzero(self.row.loss_mask)
        for segment, name in enumerate(self.row.sample_ids):
            start, length = self.starts[segment], int(self.row.segment_lengths[segment])
            own = labels[(labels >= start) & (labels < start + length)]
            fill = "#dbe7fb" if segment % 2 else "#eaf1fd"
            box = tag("rect", x=start * scale, y=0, width=length * scale, height=26, fill=fill)
            marks = [
                tag("rect", x=first * scale, y=13, width=max(count * scale, 0.8), height=13, fill="#1a7f37")
                for first, count in _runs(own)
            ]
            told = tag("title", f"{name}: {self.span(segment)}")
            boxes.append(tag("a", tag("g", told, box, *marks), href=links(segment)))
        return tag("svg", *boxes, viewBox=f"0 0 {STRIP_WIDTH} 26", width="100%", role="img")


def _runs(places: np.ndarray) -> list[tuple[int, int]]:
    """(first, length) of each run of consecutive numbers."""
    if not len(places):
        return []
    parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [(int(part[0]), len(part)) for part in parts]


def _shown(piece: Piece) -> str:
    if piece.kind == "image":
        return f"{piece.text} × {piece.count}"
    if piece.kind == "special":
        return piece.text + (f" × {piece.count}" if piece.count > 1 else "")
    return piece.text.replace("\n", "⏎\n") or "·"  # · has no text of its own


def _colour(piece: Piece, loss: float | None) -> str | None:
    if loss is not None:
        return loss_class(loss)
    if piece.has_loss:
        return "y"
    return {"image": "v", "special": "x", "text": None}[piece.kind]


def loss_class(loss: float) -> str:
    """The class of a token with that loss in nats, see `BOUNDS`; one that is not finite is the worst."""
    return f"l{sum(not loss < bound for bound in BOUNDS)}"


def _probability(loss: float) -> str:
    return f"{100 * math.exp(-loss):.3g}%" if math.isfinite(loss) else "unknown"


def legend(*, by_loss: bool) -> Markup:
    """What the colours of tokens mean. `by_loss`: of label tokens their loss."""
    parts: list[Markup] = []
    if by_loss:
        edges = [
            f"below {BOUNDS[0]:g}",
            *(f"{low:g} to {high:g}" for low, high in zip(BOUNDS, BOUNDS[1:], strict=False)),
        ]
        edges.append(f"{BOUNDS[-1]:g} or more")
        parts += [tag("span", edge, Class=f"swatch l{number}") for number, edge in enumerate(edges)]
        parts.append(joined("loss of a label token, in nats "))
    else:
        parts += [tag("span", "label", Class="swatch y"), joined("carries loss ")]
    parts += [tag("span", "text", Class="swatch q"), joined("is given "), tag("span", "image", Class="swatch v")]
    return tag("p", *parts, joined("visual tokens. Hover over a token for its id and position."), Class="legend")

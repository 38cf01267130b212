"""The page's gallery: what the run answered to a split, right and wrong."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nicegui import run, ui

from vltrain.errors import InputError
from vltrain.serve.page.answers import Card, Gallery

PER_PAGE = 24
TOGGLE = "no-caps dense unelevated color=white text-color=grey-8 padding='4px 14px'"
Ask = Callable[[bytes | None, str], Awaitable[None]]


def show_gallery(gallery: Gallery, ask: Ask) -> None:
    """Puts it where NiceGUI stands; `ask` is called with an image's file and a question to go on with."""
    with ui.column().classes("w-full max-w-7xl mx-auto gap-4 p-6"):
        if not gallery.splits:
            with ui.column().classes("w-full items-center text-gray-400 pt-24 gap-1"):
                ui.icon("grid_view", size="48px")
                ui.label("This run has answered no split yet: vltrain evaluate RUN")
            return
        _Shown(gallery, ask)


def _counts(cards: list[Card], which: str) -> str:
    if which != "All" or not cards:
        return f"{len(cards):,} {'' if which == 'All' else which.lower()}".strip()
    num_right = sum(card.is_right for card in cards)
    return f"{num_right:,} of {len(cards):,} right ({num_right / len(cards):.1%})"


class _Shown:
    """One visitor's view."""

    def __init__(self, gallery: Gallery, ask: Ask) -> None:
        self._gallery, self._ask = gallery, ask
        splits = gallery.splits
        with ui.row().classes("w-full items-center gap-4"):
            first = "test" if "test" in splits else splits[0]
            self._split = ui.toggle(splits, value=first, on_change=self._again).props(TOGGLE)
            self._which = ui.toggle(["All", "Right", "Wrong"], value="All", on_change=self._again).props(TOGGLE)
            self._words = (
                ui.input(placeholder="Search", on_change=self._again)
                .props("dense outlined clearable debounce=300 bg-color=white")
                .classes("w-64")
            )
            ui.space()
            self._counts = ui.label().classes("text-sm text-gray-500")
        self._grid = (
            ui.element("div")
            .classes("w-full grid gap-4")
            .style("grid-template-columns: repeat(auto-fill, minmax(210px, 1fr))")
        )
        with ui.row().classes("w-full justify-center"):
            self._page = ui.pagination(1, 1, direction_links=True, on_change=self._show).props(
                "max-pages=9 boundary-numbers"
            )
        self._chosen: list[Card] = []
        ui.timer(0, self._again, once=True)

    async def _again(self) -> None:
        """Filters anew and goes to the first page."""
        try:
            cards = await run.io_bound(self._gallery.cards, self._split.value)
        except InputError as error:
            self._grid.clear()
            self._counts.set_text("")
            ui.notify(str(error), type="negative", multi_line=True)
            return
        words = (self._words.value or "").lower()
        self._chosen = [
            card for card in cards
            if self._which.value == "All" or card.is_right == (self._which.value == "Right")
            if not words or words in f"{card.id}\n{card.question}\n{card.prediction}\n{card.answer}".lower()
        ]  # fmt: skip
        self._counts.set_text(_counts(self._chosen, self._which.value))
        self._page.max = max(1, -(-len(self._chosen) // PER_PAGE))
        self._page.value = 1
        self._show()

    def _show(self) -> None:
        start = ((self._page.value or 1) - 1) * PER_PAGE
        self._grid.clear()
        with self._grid:
            for card in self._chosen[start : start + PER_PAGE]:
                self._show_card(card)

    def _show_card(self, card: Card) -> None:
        split = self._split.value
        with ui.column().classes("bg-white rounded-xl border border-gray-200 overflow-hidden gap-0"):
            if card.images:
                with ui.row(wrap=False).classes("w-full gap-0 bg-gray-50"):
                    for place in range(min(len(card.images), 4)):
                        ui.image(f"/gallery/{split}/{card.number}/{place}").classes("grow h-44").props(
                            "fit=contain no-spinner"
                        )
            with ui.column().classes("p-3 gap-1 w-full grow"):
                ui.label(card.question).classes("text-sm answer line-clamp-4 text-gray-800")
                with ui.row(wrap=False).classes("items-start gap-1 w-full"):
                    ui.icon(
                        "check_circle" if card.is_right else "cancel",
                        color="positive" if card.is_right else "negative",
                        size="18px",
                    ).classes("mt-0.5")
                    ui.label(card.prediction.strip() or "(nothing)").classes("text-sm font-medium answer line-clamp-4")
                if not card.is_right:
                    ui.label(f"expected: {card.answer}").classes("text-sm text-gray-500 answer line-clamp-3")
                ui.space()
                with ui.row(wrap=False).classes("w-full items-center justify-between"):
                    ui.label(card.id).classes("text-xs text-gray-400 truncate")
                    ask = ui.button(icon="chat", on_click=lambda card=card: self._ask_about(split, card)).tooltip(
                        "Ask about it"
                    )
                    ask.props('flat round dense size=sm aria-label="Ask about it"')

    async def _ask_about(self, split: str, card: Card) -> None:
        data = None
        if card.images:
            try:
                data = await run.io_bound(self._gallery.image, split, card.number, 0)
            except InputError as error:
                ui.notify(str(error), type="negative", multi_line=True)
                return
        await self._ask(data, card.question)

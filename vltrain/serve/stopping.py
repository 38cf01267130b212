"""Texts that end an answer, looked for in pieces as they come."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Gives an answer's text up to the first stop text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.has_stopped = False

    def add(self, piece: str) -> str:
        """What of the text is certain with this piece. Once `has_stopped`, nothing is."""
        if self.has_stopped:
            return ""
        text = self._held + piece
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.has_stopped, self._held = True, ""
            return text[: min(places)]
        held = max(
            (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

"""The run's answers to a split, with the images that they are about, for people to look through."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vltrain.data.images import open_rgb, read_image
from vltrain.errors import InputError
from vltrain.evaluate.samples import read_samples
from vltrain.files.strict_json import read_lines
from vltrain.schema import IMAGE_MARKER, Sample

SHOWN_EDGE = 448  # pixels of the longer edge of what is sent to a browser
RIGHT_FROM = 0.5  # of a judgement that is a share


@dataclass(frozen=True, kw_only=True)
class Card:
    """One answered question. `number`: its place among the split's; `images`: of its sample."""

    number: int
    id: str
    question: str
    prediction: str
    answer: str
    is_right: bool
    images: tuple[str, ...]


class Gallery:
    """Args: `splits` are the run's file of predictions and the samples' file by split; `max_pixels` of an image. For
    several threads."""

    def __init__(self, splits: dict[str, tuple[Path, Path]], max_pixels: int) -> None:
        self._splits, self._max_pixels = splits, max_pixels
        self._lock = threading.Lock()
        self._read: dict[str, tuple[tuple[int, int], list[Card]]] = {}

    @property
    def splits(self) -> list[str]:
        return list(self._splits)

    def cards(self, split: str) -> list[Card]:
        """The answered questions of a split, in the file's order; read anew when an evaluation has written it anew.
        Raises InputError."""
        predictions, samples = self._splits[split]
        try:
            status = os.stat(predictions)
        except OSError as error:
            raise InputError(f"{predictions}: cannot be read ({error.strerror})") from None
        version = (status.st_mtime_ns, status.st_size)
        with self._lock:
            if split not in self._read or self._read[split][0] != version:
                self._read[split] = (
                    version,
                    _cards(predictions, {sample.id: sample for sample in read_samples(samples)}),
                )
            return self._read[split][1]

    def image(self, split: str, number: int, place: int) -> bytes:
        """One image of a card as the bytes of its file. Raises InputError, also where there is none."""
        if (
            split not in self._splits
            or not 0 <= number < len(cards := self.cards(split))
            or not 0 <= place < len(cards[number].images)
        ):
            raise InputError("no such image")
        folder = self._splits[split][1].parent
        path = folder / cards[number].images[place]
        return read_image(path, self._max_pixels, str(path), inside=folder)

    def shown(self, data: bytes, where: str = "image") -> bytes:
        """An image file as a PNG that any browser shows, of at most `SHOWN_EDGE` pixels. Raises InputError for what is
        no image."""
        image = open_rgb(data, self._max_pixels, where)
        image.thumbnail((SHOWN_EDGE, SHOWN_EDGE))
        scale = SHOWN_EDGE // max(image.size)
        if scale > 1:  # a browser would blur what the model sees
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()

    def example(self) -> str | None:
        """A question that the run was evaluated on, as the model read it; None where there is none."""
        for predictions, _ in self._splits.values():
            with contextlib.suppress(InputError):
                for _, record in read_lines(predictions):
                    return (
                        str(record["prompt"]).replace(IMAGE_MARKER, "").strip()
                        if isinstance(record, dict) and "prompt" in record
                        else None
                    )
        return None


def _cards(predictions: Path, samples: dict[str, Sample]) -> list[Card]:
    cards: list[Card] = []
    for where, record in read_lines(predictions, "a run's predictions"):
        try:
            text = {name: str(record[name]) for name in ("id", "prompt", "prediction", "answer")}
            is_right = float(record["correct"]) >= RIGHT_FROM
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{where}: not a prediction as `vltrain evaluate` writes them") from None
        sample = samples.get(text["id"])
        cards.append(
            Card(
                number=len(cards),
                id=text["id"],
                question=text["prompt"].replace(IMAGE_MARKER, "").strip(),
                prediction=text["prediction"],
                answer=text["answer"],
                is_right=is_right,
                images=() if sample is None else sample.images,
            )
        )
    return cards

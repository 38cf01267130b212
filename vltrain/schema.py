"""The contract between data and model: what a sample, a packed row and a batch are.

    raw files --data_prep--> Sample (JSONL) --tokenise--> Segment --pack--> PackedRow (Arrow) --loader--> Batch --> model

A `Segment` is one tokenised sample; a `PackedRow` is several segments one after another; a `vltrain.batch.Batch` is one
packed row as tensors. One micro-step of one rank trains on exactly one `Batch`: its length in tokens is what fills the memory, so there
is no second batch dimension and no padding.

Token ids below zero are placeholders that the model replaces by vectors of its own; real ids are 0 and up.
Shapes: T tokens of the row, S segments, N distinct images, K image runs (places where an image stands), V visual tokens
per image.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vltrain.errors import InputError

IMAGE_TOKEN = -1  # one visual token; an image is a run of V of them
TEXT_MODALITY_TOKEN = -2  # u_m of Eq. 4 for a sample without image
IMAGE_MODALITY_TOKEN = -3  # u_m of Eq. 4 for a sample with image
IGNORE_INDEX = -100  # a label that carries no loss
IMAGE_MARKER = "<image>"  # in a turn's text: here stands the next image
ROLES = ("user", "assistant")


_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode  # one for all: making one takes longer than a sample does


@functools.lru_cache(maxsize=4096)  # questions about an image stand together
def path_fault(path: str) -> str | None:
    """What is wrong with an image's path in a data file, which may lead nowhere but below its folder; None if nothing is."""
    parts = path.split("/")
    if "\0" in path or all(part.strip() in ("", ".") for part in parts):
        return "is no path"
    return "leads out of its folder" if path.startswith("/") or ".." in parts else None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message. `role` is "user" or "assistant"; only assistant turns carry loss."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One validated instruction sample, a line of a JSONL file.

    `images` are paths relative to the folder of that file, in the order of the `<image>` markers in the turns' text.
    `metadata` is what scoring needs (answer, choices, subject, ...) and is never shown to the model.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InputError for a sample that nothing could be learned from or whose markers and images differ."""
        if not self.turns or self.turns[-1].role != "assistant" or not self.turns[-1].text.strip():
            raise InputError(f"sample '{self.id}': no answer (its last turn must be a non-empty assistant turn)")
        num_markers = 0
        for number, turn in enumerate(self.turns):
            num_markers += turn.text.count(IMAGE_MARKER)
            if turn.role != ROLES[number % 2]:
                raise InputError(
                    f"sample '{self.id}': turn {number} is by '{turn.role}', expected '{ROLES[number % 2]}' (user and assistant alternate, user first)"
                )
            if turn.role == "assistant" and IMAGE_MARKER in turn.text:
                raise InputError(f"sample '{self.id}': {IMAGE_MARKER} in an assistant turn; images belong into user turns")
        for image in self.images:
            fault = path_fault(image)
            if fault is not None:
                raise InputError(f"sample '{self.id}': image path {image!r} {fault}; paths are relative to the samples' folder")
        self._require_text()
        if num_markers != len(self.images):
            raise InputError(
                f"sample '{self.id}': {num_markers} {IMAGE_MARKER} marker(s) in the text but {len(self.images)} image(s) listed; they must be equal"
            )

    def _require_text(self) -> None:
        """JSON can spell halves of characters (lone surrogates), which no file and no tokenizer takes."""
        try:
            "".join((self.id, *self.images, *[turn.text for turn in self.turns])).encode()
            _as_json(self.metadata).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise InputError(f"sample {self.id!a}: holds what is no text ({type(error).__name__}: {error})") from None

    def to_json(self) -> dict[str, Any]:
        turns = [{"role": turn.role, "text": turn.text} for turn in self.turns]
        return {"id": self.id, "images": list(self.images), "turns": turns, "metadata": self.metadata}

    @classmethod
    def from_json(cls, record: Any, where: str) -> Sample:
        """`where` (file and line) is named in the InputError that a malformed record raises."""
        try:
            turns = tuple(Turn(role=str(turn["role"]), text=str(turn["text"])) for turn in record["turns"])
            images, metadata = tuple(map(str, record.get("images", ()))), dict(record.get("metadata", {}))
            identity = str(record["id"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: not a sample ({type(error).__name__}: {error}); expected id, images, turns[role, text], metadata") from None
        try:
            return cls(id=identity, turns=turns, images=images, metadata=metadata)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One tokenised sample. `input_ids` int32 [L]; `loss_mask` bool [L], true on tokens that are to be predicted.

    `instruction_ids` int32 [I]: the prompt as a Q-Former reads it, without its last `instruction_cut` tokens; empty where there is none.
    """

    sample_id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[str, ...]
    instruction_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    instruction_cut: int = 0


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """Several segments one after another, as stored in a shard.

    input_ids       int32 [T]   placeholders below zero, see above
    loss_mask       bool  [T]
    segment_lengths int32 [S]   sums to T
    image_ids       int64 [N]   rows of the shard set's image table, each distinct image once
    image_slots     int32 [K]   for the k-th image run of the row: which of `image_ids` stands there
    sample_ids      S strings
    instruction_ids     int32 [sum of the next], what a Q-Former reads, segment after segment; empty where there is none
    instruction_lengths int32 [S], or [0] where there is none
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    segment_lengths: np.ndarray
    image_ids: np.ndarray
    image_slots: np.ndarray
    sample_ids: tuple[str, ...]
    instruction_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    instruction_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

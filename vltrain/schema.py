"""The contract between data and model: what a sample, a packed row and a batch are.

    raw files --data_prep--> Sample (JSONL) --tokenise--> Segment --pack--> PackedRow (Arrow) --loader--> Batch --> model

A `Segment` is one tokenised sample; a `PackedRow` is several segments one after another; a `Batch` is one packed row as
tensors. One micro-step of one rank trains on exactly one `Batch`: its length in tokens is what fills the memory, so there
is no second batch dimension and no padding.

Token ids below zero are placeholders that the model replaces by vectors of its own; real ids are 0 and up.
Shapes: T tokens of the row, S segments, N distinct images, K image runs (places where an image stands), V visual tokens
per image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from vltrain.errors import InputError

IMAGE_TOKEN = -1  # one visual token; an image is a run of V of them
TEXT_MODALITY_TOKEN = -2  # u_m of Eq. 4 for a sample without image
IMAGE_MODALITY_TOKEN = -3  # u_m of Eq. 4 for a sample with image
IGNORE_INDEX = -100  # a label that carries no loss
IMAGE_MARKER = "<image>"  # in a turn's text: here stands the next image
ROLES = ("user", "assistant")


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
        for number, turn in enumerate(self.turns):
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
        num_markers = sum(turn.text.count(IMAGE_MARKER) for turn in self.turns)
        if num_markers != len(self.images):
            raise InputError(
                f"sample '{self.id}': {num_markers} {IMAGE_MARKER} marker(s) in the text but {len(self.images)} image(s) listed; they must be equal"
            )

    def _require_text(self) -> None:
        """JSON can spell halves of characters (lone surrogates), which no file and no tokenizer takes."""
        try:
            for text in (self.id, *self.images, *(turn.text for turn in self.turns)):
                text.encode()
            json.dumps(self.metadata, ensure_ascii=False, default=str).encode()
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


@dataclass(kw_only=True)
class Batch:
    """One packed row as tensors, ready for the model. A filler (weight zero) stands in where a rank has no pack.

    input_ids       int64 [T]          placeholders below zero
    labels          int64 [T]          already shifted: labels[t] is the token that position t predicts, or IGNORE_INDEX;
                                       never across a segment's end
    position_ids    int64 [T]          restarts at 0 with every segment
    segment_lengths int64 [S]          on the CPU
    label_lengths   int64 [S]          on the CPU: labels that carry loss, by segment; an encoder-decoder asks for it
    pixels          uint8 [N, 3, H, W] resized, not normalised (the model does that on its device)
    image_slots     int64 [K]
    instruction_ids int64 [S, I]       what a Q-Former reads, -1 where padded; I is 0 where there is none
    sample_ids      S strings
    num_label_tokens                   labels that carry loss
    is_filler                          its loss is multiplied by zero; its forward and backward only match collectives
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segment_lengths: torch.Tensor
    pixels: torch.Tensor
    image_slots: torch.Tensor
    sample_ids: tuple[str, ...]
    num_label_tokens: int
    label_lengths: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    instruction_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    is_filler: bool = False

    _MOVED: ClassVar = ("input_ids", "labels", "position_ids", "pixels", "image_slots", "instruction_ids")

    def to(self, device: torch.device | str) -> Batch:
        """Moves what the model computes on; lengths stay on the CPU."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in self._MOVED})

    def segment_labels(self) -> torch.Tensor:
        """int64 [S] on the CPU: label tokens of each segment. Of a batch that is still on the CPU."""
        owner = torch.repeat_interleave(torch.arange(len(self.segment_lengths)), self.segment_lengths)
        return torch.zeros(len(self.segment_lengths), dtype=torch.int64).index_add_(0, owner, (self.labels != IGNORE_INDEX).long())

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when it pins."""
        for name in self._MOVED:
            setattr(self, name, getattr(self, name).pin_memory())
        return self

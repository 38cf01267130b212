"""The contract between data and model: what a sample, a packed row and a batch are.

    raw files --data_prep--> Sample (JSONL) --tokenise--> Segment --pack--> PackedRow (Arrow) --loader--> Batch -->
    model

A `Segment` is one tokenised sample; a `PackedRow` is several segments one after another; a `vltrain.batch.Batch` is one
packed row as tensors. One micro-step of one rank trains on exactly one `Batch`: its length in tokens is what fills the
memory, so there is no second batch dimension and no padding.

Token ids below zero are placeholders that the model replaces by vectors of its own; real ids are 0 and up.
Shapes: T tokens of the row, S segments, N distinct images, K image runs (places where an image stands), V visual tokens
per image.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vltrain.errors import InputError, nearest
from vltrain.files.strict_json import shown

IMAGE_TOKEN = -1  # one visual token; an image is a run of V of them
TEXT_MODALITY_TOKEN = -2  # u_m of Eq. 4 for a sample without image
IMAGE_MODALITY_TOKEN = -3  # u_m of Eq. 4 for a sample with image
IGNORE_INDEX = -100  # a label that carries no loss
IMAGE_MARKER = "<image>"  # in a turn's text: here stands the next image
ROLES = ("user", "assistant")  # behind a system turn, where there is one
SYSTEM = "system"
_TYPED_MARKER = re.compile(r"<(\\*)image>")
_ESCAPED_MARKER = re.compile(r"<\\(\\*)image>")


@dataclass(frozen=True)
class Framing:
    """How an image of any size becomes the square that a ViT reads.

    shorter_edge: pixels that its shorter edge is resized to, after which the middle is cut out; None: resized straight
    to the square.
    resample: Pillow's number of the filter; 3: bicubic.
    """

    shorter_edge: int | None = None
    resample: int = 3


SQUARE = Framing()


def escape_markers(text: str) -> str:
    """A text as a turn writes it: `<image>` becomes `<\\image>`, which is no marker, and `<\\image>` one backslash
    more; all else stays."""
    return _TYPED_MARKER.sub(r"<\\\1image>", text) if "image>" in text else text


def unescape_markers(text: str) -> str:
    """What a turn's text says, the inverse of `escape_markers`. Markers must have been taken out."""
    return _ESCAPED_MARKER.sub(r"<\1image>", text) if "<\\" in text else text


@functools.lru_cache(maxsize=4096)  # questions about an image stand together
def path_fault(path: str) -> str | None:
    """What is wrong with an image's path in a data file, which may lead nowhere but below its folder; None if nothing
    is."""
    parts = path.split("/")
    if "\0" in path or all(part.strip() in ("", ".") for part in parts):
        return "is no path"
    return "leads out of its folder" if path.startswith("/") or ".." in parts else None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message. `role` is "user" or "assistant", of a first one also "system"; only assistant turns carry loss.

    `<image>` in a user's text is the next image; `<\\image>` in any is the text "<image>", see `escape_markers`.
    """

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
        turns = self.turns
        first = 1 if turns and turns[0].role == SYSTEM else 0
        if len(turns) <= first or turns[-1].role != "assistant":
            raise InputError(f"sample '{self.id}': no answer (its last turn must be a non-empty assistant turn)")
        num_markers = 0
        for number, turn in enumerate(turns):
            text, role = turn.text, SYSTEM if number < first else ROLES[(number - first) % 2]
            if turn.role != role:
                raise InputError(
                    f"sample '{self.id}': turn {number} is by '{turn.role}', expected '{role}' (user and "
                    "assistant alternate, user first; a system turn before)"
                )
            if not text or text.isspace():
                raise InputError(f"sample '{self.id}': {_blank_turn(turn, number)}")
            if IMAGE_MARKER in text:
                if role != "user":
                    article = "an" if role == "assistant" else "a"
                    raise InputError(
                        f"sample '{self.id}': {IMAGE_MARKER} in {article} {role} turn; images belong in user turns; "
                        "the text itself is written <\\image>"
                    )
                num_markers += text.count(IMAGE_MARKER)
        for image in self.images:
            fault = path_fault(image)
            if fault is not None:
                raise InputError(
                    f"sample '{self.id}': image path {image!r} {fault}; paths are relative to the samples' folder"
                )
        try:  # a command line can hold halves of characters (lone surrogates), which no file and no tokenizer takes
            "".join((self.id, *self.images, *[turn.text for turn in turns])).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"sample {self.id!a}: is not valid text ({error})") from None
        if num_markers != len(self.images):
            raise InputError(
                f"sample '{self.id}': {num_markers} {IMAGE_MARKER} marker(s) in the text but {len(self.images)} "
                "image(s) listed; they must be equal"
                " (the text itself is written <\\image>)"
            )

    def to_json(self) -> dict[str, Any]:
        turns = [{"role": turn.role, "text": turn.text} for turn in self.turns]
        return {"id": self.id, "images": list(self.images), "turns": turns, "metadata": self.metadata}

    @classmethod
    def from_json(cls, record: Any, where: str) -> Sample:
        """A line of a samples file. `where` (file and line) is named in the InputError that a malformed record raises,
        and the fault's path in it."""
        turns = []
        try:
            identity, listed, images, metadata = (
                record["id"],
                record["turns"],
                record.get("images", []),
                record.get("metadata", {}),
            )
            is_sound = (
                type(identity) is str and type(listed) is type(images) is list and type(metadata) is dict
                and len(record) == 2 + ("images" in record) + ("metadata" in record)
            )  # fmt: skip
            for turn in listed:
                role, text = turn["role"], turn["text"]
                is_sound = is_sound and type(role) is type(text) is str and len(turn) == 2
                turns.append(Turn(role=role, text=text))
            for image in images:
                is_sound = is_sound and type(image) is str
        except (KeyError, TypeError, AttributeError):
            is_sound = False
        if not is_sound or not identity or identity.isspace():
            raise InputError(f"{where}: not a sample: {_first_fault(record)}")
        try:
            return cls(id=identity, turns=tuple(turns), images=tuple(images), metadata=metadata)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def question_and_answer(record: Any) -> tuple[str, str] | None:
    """Both texts of a record that is, beyond doubt, a sample of one question and one answer. None for any other, which
    may be a sample or none: `Sample.from_json` says which, and takes what is taken here. No object is made."""
    try:
        identity, images, metadata = record["id"], record["images"], record["metadata"]
        user, assistant = record["turns"]
        asked, said = user["text"], assistant["text"]
        if (
            type(identity) is type(asked) is type(said) is str
            and type(images) is list and type(metadata) is dict
            and len(record) == 4 and len(user) == len(assistant) == 2
            and user["role"] == ROLES[0] and assistant["role"] == ROLES[1]
            and identity.strip() and asked.strip() and said.strip()
            and IMAGE_MARKER not in said and asked.count(IMAGE_MARKER) == len(images)
            and all(type(image) is str and path_fault(image) is None for image in images)
            and "".join((identity, *images, asked, said)).encode()  # a lone surrogate is an error
        ):  # fmt: skip
            return asked, said
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    return None


def _blank_turn(turn: Turn, number: int) -> str:
    if turn.role == "assistant":
        return (
            f"turn {number} is an empty answer, which would teach the model to say nothing; leave the question out, "
            "or answer it"
        )
    return f"turn {number} is an empty {turn.role} turn, expected a text or {IMAGE_MARKER}"


def _first_fault(record: Any) -> str:
    """What is wrong with a record that is no sample, by its path."""
    kinds = {
        "id": (str, "a text that is not empty"),
        "images": (list, "a list of texts"),
        "turns": (list, "a list of turns"),
        "metadata": (dict, "an object"),
    }
    if type(record) is not dict:
        return f"found {shown(record)}, expected an object with id, images, turns[role, text], metadata"
    for key in record:
        if key in ("video", "videos"):
            return f"found the key {key!r}; videos are not read here: list frames of one as images"
        if key not in kinds:
            return f"found the key {key!r:.60}; {nearest(key, kinds)}; what is not for the model belongs into metadata"
    for key, (kind, expected) in kinds.items():
        if key not in record and key in ("id", "turns"):
            return f"{key}: found nothing, expected {expected}"
        if key in record and (type(record[key]) is not kind or (key == "id" and not record[key].strip())):
            return f"{key}: found {shown(record[key])}, expected {expected}"
    for number, image in enumerate(record.get("images", [])):
        if type(image) is not str:
            return f"images[{number}]: found {shown(image)}, expected a text"
    for number, turn in enumerate(record["turns"]):
        if type(turn) is not dict:
            return f"turns[{number}]: found {shown(turn)}, expected an object with role and text"
        for key in turn:
            if key not in ("role", "text"):
                return f"turns[{number}]: found the key {key!r:.60}, expected role and text only"
        for key in ("role", "text"):
            if type(turn.get(key)) is not str:
                return f"turns[{number}].{key}: found {shown(turn[key]) if key in turn else 'nothing'}, expected a text"
    raise AssertionError(f"no fault in {shown(record)}")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One tokenised sample. `input_ids` int32 [L]; `loss_mask` bool [L], true on tokens that are to be predicted.

    `instruction_ids` int32 [I]: the prompt as a Q-Former reads it, without its last `instruction_cut` tokens; empty
    where there is none.
    Of a stock model: `position_ids` int32 [R, L], [0, 0] where they count from 0; `blocks` int32 [L], see
    `vltrain.batch.Batch`, [0] where all tokens are causal; `image_tokens` int32 [K], placeholders of each image.
    """

    sample_id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[str, ...]
    instruction_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    instruction_cut: int = 0
    position_ids: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int32))
    blocks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    image_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


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

    Of a stock model, whose `input_ids` are its own (>= 0):

    position_ids    int32 [R, T], or [0, 0] where each segment's count from 0
    blocks          int32 [T], see `vltrain.batch.Batch`, or [0] where all tokens are causal
    image_tokens    int32 [N], placeholders of each distinct image
    image_counts    int32 [N], images of the samples that show it; an image that depends on that is there once for each
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    segment_lengths: np.ndarray
    image_ids: np.ndarray
    image_slots: np.ndarray
    sample_ids: tuple[str, ...]
    instruction_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    instruction_lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    position_ids: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int32))
    blocks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    image_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    image_counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """The image in which others are counted.

    tokens     visual tokens of it; 0: all images are alike
    quadratic  share of its cost that grows with the square of its tokens: of a tower whose patches all see each other
    """

    tokens: int = 0
    quadratic: float = 0.0

    def images(self, num_images: np.ndarray, tokens: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """How many images of this size cost as much as the images of some packs.

        Args: number of images, their tokens and the squares of their tokens, int64 [m], each summed over a pack.

        Returns: float64 [m].
        """
        if not self.tokens:
            return num_images.astype(np.float64)
        return (1 - self.quadratic) * tokens / self.tokens + self.quadratic * squares / self.tokens**2

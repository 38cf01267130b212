"""LLaVA's conversation JSON, the field's common layout for own data, as its files are: a JSON list, or JSON Lines.

    {"id": ..., "image": "a.jpg" or ["a.jpg", ...], "conversations": [{"from": "human", "value": "<image>\\n..."},
    {"from": "gpt", "value": ...}]} {"messages": [{"role": "system", "content": "..."}, {"role": "user", "content":
    [{"type": "image"}, {"type": "text", "text": "..."}]}, ...], "images": [...]}

Images are found beside the file, or in the folder that the option `images` names. What real files have is read so, and
told once with a count:

- An id that comes again, or is missing, is numbered (`ID#2`; `record-7`); a numeric one becomes a text.
- Turns of the assistant before the first question, and questions behind the last answer, are left out: nothing could be
  learned from them.
- `<image>` in an answer or a system turn is the text "<image>". In a question it is an image; the text is written
  `<\\image>`.
- Content parts are joined as they stand. Where a record has image parts, they alone are images, and `<image>` in a text
  is text.
- A system turn stays one (see `vltrain.data.text.conversation`). Keys that are not read are named.

A record of which nothing can be made stops the reading, or with `unusable=drop` is left out and told; so does one that
has images and nowhere `<image>`, or with `unmarked=front` its images stand in front of the first question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.options import choose, resolve_options
from data_prep.sources.raw import RawSample
from data_prep.sources.splits import FRACTIONS, drawn
from vltrain.errors import InputError, nearest
from vltrain.files.strict_json import id_text, is_list, is_object, read_records, shown
from vltrain.schema import IMAGE_MARKER, SYSTEM, Sample, Turn, escape_markers, unescape_markers

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": SYSTEM}
TURN_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
IMAGE_KEYS = ("image", "images")
IMAGE_PARTS = ("image", "image_url")
UNLEARNED = ("weight", "loss", "loss_weight", "train")  # with which other trainers leave a turn out of the loss
MAX_TOLD = 8


def read(input: Path | None, options: Mapping[str, Any]) -> Iterator[RawSample]:
    """Reads one file.

    Args:
        input: the file.
        options: `val_fraction` (0.02) and `test_fraction` (0), the shares of samples held out as `val` and `test`, by
            image (see `data_prep.sources.splits`), each in [0, 1), together less than 1; `images`, a folder;
            `unusable`: `error`, or `drop` to leave out records that are no samples, the first ones named; `unmarked`:
            `error`, or `front`, see the module.

    Raises:
        InputError: not such a file, a text that is none, an unknown speaker, an empty turn, speakers who do not
            alternate, a path that leads out of the image folder; markers and images that differ: named with file, line
            and path in the record. Fractions as `data_prep.sources.splits.drawn`.
    """
    defaults = {"val_fraction": 0.02, "test_fraction": 0.0, "images": None, "unusable": "error", "unmarked": "error"}
    resolved = resolve_options("llava_json", options, defaults, FRACTIONS)
    choose("llava_json", "unusable", resolved["unusable"], ("error", "drop"))
    choose("llava_json", "unmarked", resolved["unmarked"], ("error", "front"))
    if input is None:
        raise InputError("source 'llava_json' needs --input, the JSON or JSONL file")
    told: set[str] = set()
    yield from drawn("llava_json", lambda: _samples(input, resolved, told), resolved, options)


def _samples(input: Path, resolved: Mapping[str, Any], told: set[str]) -> Iterator[RawSample]:
    """All samples of the file, in one split. `told`: lines that were printed already, by a reading before."""
    folder = Path(resolved["images"]) if resolved["images"] else input.parent
    reader = _Reader(input, told, resolved["unmarked"] == "front")
    for number, (where, record) in enumerate(
        read_records(input, "a JSON list of conversations, or JSON Lines of them")
    ):
        try:
            sample = reader.sample(record, number, f"{where}, record {number}")
        except InputError as error:
            if resolved["unusable"] == "error":
                raise InputError(f"{error} (--options unusable=drop leaves such records out)") from None
            reader.leave_out(error)
            continue
        yield RawSample(split="train", sample=sample, image_sources=tuple(folder / image for image in sample.images))
    reader.log_counts()


class _Reader:
    """Makes samples of records, and counts what was done to them."""

    def __init__(self, input: Path, told: set[str], marks_images: bool) -> None:
        self._input, self._told, self._marks_images = input, told, marks_images
        self._ids: dict[str, int] = {}  # each id given so far, and how often it came
        self._counts: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._left_out = 0

    def leave_out(self, error: InputError) -> None:
        self._left_out += 1
        if self._left_out <= MAX_TOLD:
            self._print(f"left out: {error}")

    def log_counts(self) -> None:
        """Prints what was counted, a line for each thing."""
        for what, count in self._counts.items():
            self._print(f"{self._input}: {count} {what}")
        if self._left_out:
            self._print(
                f"{self._input}: {self._left_out} record(s) left out, of which nothing can be learned (unusable=drop)"
            )
        if self._unread:
            named = ", ".join(f"{key} ({count})" for key, count in self._unread.most_common(MAX_TOLD))
            self._print(
                f"{self._input}: keys that are not read: {named}{', ...' if len(self._unread) > MAX_TOLD else ''}"
            )

    def _print(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            print(line)

    def sample(self, record: Any, number: int, where: str) -> Sample:
        """The sample of one record. Raises InputError naming `where` and the path in the record."""
        if not is_object(record):
            raise InputError(f"{where}: found {shown(record)}, expected an object with conversations or messages")
        key = _only_key(record, ("conversations", "messages"), where)
        if key is None or not is_list(record[key]):
            found = f"found neither {' nor '.join(TURN_KEYS)}" if key is None else f"{key}: found {shown(record[key])}"
            raise InputError(f"{where}: {found}; expected id, image, conversations[from: human|gpt, value]")
        images = _images(record, where)
        own_images: list[str] = []
        turns = _plain_turns(record[key])
        if turns is None:
            has_parts = _has_image_parts(record[key])
            turns = self._trimmed(
                [
                    self._turn(turn, f"{where}: {key}[{place}]", has_parts, own_images)
                    for place, turn in enumerate(record[key])
                ]
            )
        if own_images and images:
            raise InputError(
                f"{where}: images both in content parts and under {' or '.join(IMAGE_KEYS)}, expected one of the two"
            )
        if images and not any(IMAGE_MARKER in turn.text for turn in turns):
            turns = self._marked(turns, len(images), where)
        for name in record:
            if name not in ("id", key, *IMAGE_KEYS):
                self._unread[name] += 1
        answer = unescape_markers(turns[-1].text) if turns else ""
        try:
            return Sample(
                id=self._id(record, number, where),
                turns=tuple(turns),
                images=tuple(images or own_images),
                metadata={"answer": answer},
            )
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def _id(self, record: dict[str, Any], number: int, where: str) -> str:
        """The record's own id, made unique."""
        given = record.get("id")
        if given is None:
            self._counts["record(s) without an id are numbered (record-N)"] += 1
            given = f"record-{number}"
        elif type(given) is int:
            self._counts["numeric id(s) taken as texts"] += 1
        name = given = id_text(given, f"{where}: id")
        while name in self._ids:
            self._ids[given] += 1
            name = f"{given}#{self._ids[given]}"
        self._ids[name] = 1
        if name != given:
            self._counts["id(s) that came before are numbered (ID#2, ID#3, ...)"] += 1
        return name

    def _turn(self, turn: Any, where: str, has_parts: bool, own_images: list[str]) -> Turn:
        """One turn; paths that its image parts name are added to `own_images`."""
        if not is_object(turn):
            raise InputError(
                f"{where}: found {shown(turn)}, expected an object with from and value, or role and content"
            )
        speaker, content = next((names for names in TURN_KEYS.values() if names[0] in turn), TURN_KEYS["conversations"])
        if {"from", "role"} <= turn.keys() and (
            ROLES.get(str(turn["from"])) != ROLES.get(str(turn["role"]))
            or turn.get("value") != turn.get("content", turn.get("value"))
        ):
            raise InputError(
                f"{where}: from and value say something else than role and content: {shown(turn)}; leave one of "
                "them out"
            )
        said: Any = turn.get(speaker)
        role = ROLES.get(said) if type(said) is str else None
        if role is None:
            hint = (
                nearest(turn[speaker], ROLES)
                if type(turn.get(speaker)) is str
                else f"expected one of {', '.join(ROLES)}"
            )
            raise InputError(
                f"{where}.{speaker}: found {shown(turn[speaker]) if speaker in turn else 'nothing'}, {hint}"
            )
        for name in turn.keys() - {speaker, content}:
            if name in UNLEARNED and turn[name] in (0, False):
                raise InputError(
                    f"{where}.{name}: found {shown(turn[name])}: every answer is learned here; leave the turn "
                    "out of the file, or the key"
                )
            self._unread[f"turns' {name}"] += 1
        value = turn.get(content)
        if is_list(value):
            texts = [
                self._part(part, f"{where}.{content}[{place}]", role, has_parts, own_images)
                for place, part in enumerate(value)
            ]
            return Turn(role=role, text="".join(texts))
        if type(value) is not str:
            parts = " or a list of parts" if content == "content" else ""
            raise InputError(
                f"{where}.{content}: found {shown(value) if content in turn else 'nothing'}, expected a text{parts}"
            )
        return Turn(role=role, text=self._as_text(value) if has_parts or role != "user" else value)

    def _part(self, part: Any, where: str, role: str, has_parts: bool, own_images: list[str]) -> str:
        """What a content part adds to its turn's text."""
        if not is_object(part) or type(part.get("type")) is not str:
            raise InputError(f"{where}: found {shown(part)}, expected an object with type: text or image")
        kind = part["type"]
        if kind == "text":
            if type(part.get("text")) is not str:
                raise InputError(f"{where}.text: found {shown(part.get('text'))}, expected a text")
            return self._as_text(part["text"]) if has_parts or role != "user" else part["text"]
        if kind not in IMAGE_PARTS:
            raise InputError(f"{where}.type: found {shown(kind)}, expected text or image")
        if role != "user":
            raise InputError(f"{where}: an image in a turn of the {role}, expected images in the user's turns")
        path = _path_of(part, where)
        if path is not None:
            own_images.append(path)
        return IMAGE_MARKER

    def _as_text(self, text: str) -> str:
        """A text in which `<image>` is no image."""
        if IMAGE_MARKER in text:
            self._counts[
                f"text(s) with {IMAGE_MARKER} in an answer, a system turn or beside image parts: taken as text"
            ] += 1
            return text.replace(IMAGE_MARKER, escape_markers(IMAGE_MARKER))
        return text

    def _marked(self, turns: list[Turn], num_images: int, where: str) -> list[Turn]:
        """Turns without a marker, with the images in front of the first question. Raises InputError unless that is
        asked for."""
        first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if not self._marks_images or first is None:
            raise InputError(
                f"{where}: {num_images} image(s) and no {IMAGE_MARKER} in its turns; write where they stand, or "
                "--options unmarked=front"
            )
        self._counts[
            f"record(s) with images and no {IMAGE_MARKER}: they stand in front of the first question (unmarked=front)"
        ] += 1
        text = f"{IMAGE_MARKER}\n" * num_images + turns[first].text
        return [*turns[:first], Turn(role="user", text=text), *turns[first + 1 :]]

    def _trimmed(self, turns: list[Turn]) -> list[Turn]:
        """From the first question (behind a system turn) to the last answer."""
        if turns and turns[0].role == SYSTEM and not turns[0].text.strip():
            self._counts["empty system turn(s) are left out"] += 1
            turns = turns[1:]
        first = 1 if turns and turns[0].role == SYSTEM else 0
        begin, end = first, len(turns)
        while begin < end and turns[begin].role == "assistant":
            begin += 1
        while end > begin and turns[end - 1].role == "user":
            end -= 1
        if begin == end:
            return turns  # nothing to learn, which Sample says
        if begin > first:
            self._counts[
                "conversation(s) begin with the assistant: its turns before the first question are left out"
            ] += 1
        if end < len(turns):
            self._counts["conversation(s) end with a question: it is left out"] += 1
        return turns[:first] + turns[begin:end]


def _plain_turns(listed: list[Any]) -> list[Turn] | None:
    """Turns of which nothing is to be said, which most are; None for others."""
    turns: list[Turn] = []
    for turn in listed:
        if not is_object(turn) or len(turn) != 2:
            return None
        speaker, text = turn.get("from"), turn.get("value")
        if type(speaker) is not str or type(text) is not str:
            return None
        role = ROLES.get(speaker)
        if role is None or (role != "user" and IMAGE_MARKER in text):
            return None
        turns.append(Turn(role=role, text=text))
    return turns if turns and turns[0].role == "user" and turns[-1].role == "assistant" else None


def _only_key(record: dict[str, Any], keys: tuple[str, str], where: str) -> str | None:
    """Which of two `keys` the record has, null being none. Raises InputError if it has both."""
    first, second = keys
    if record.get(second) is None:
        return None if record.get(first) is None else first
    if record.get(first) is not None:
        raise InputError(f"{where}: has both {first} and {second}, expected one of them")
    return second


def _images(record: dict[str, Any], where: str) -> list[str]:
    """The record's image paths, in order."""
    key = _only_key(record, IMAGE_KEYS, where)
    if key is None or record[key] in ("", []):
        return []
    listed: list[Any] = record[key] if is_list(record[key]) else [record[key]]
    for number, one in enumerate(listed):
        _require_path(one, f"{where}: {key}[{number}]" if listed is record[key] else f"{where}: {key}")
    return list(listed)


def _has_image_parts(turns: list[Any]) -> bool:
    contents = [turn.get("content", turn.get("value")) for turn in turns if is_object(turn)]
    return any(
        is_object(part) and part.get("type") in IMAGE_PARTS
        for content in contents
        if is_list(content)
        for part in content
    )


def _path_of(part: dict[str, Any], where: str) -> str | None:
    """The file that an image part names itself, or None where the record's list does."""
    key = next((key for key in ("image_url", "image", "path", "url") if part.get(key) is not None), None)
    if key is None:
        return None
    value = part[key]
    if key == "image_url" and is_object(value):
        key, value = "image_url.url", value.get("url")
    _require_path(value, f"{where}.{key}")
    return value


def _require_path(value: Any, where: str) -> None:
    if type(value) is not str:
        raise InputError(f"{where}: found {shown(value)}, expected a file's name or a list of them")
    if "://" in value[:10] or value.startswith("data:"):
        raise InputError(f"{where}: found {shown(value)}, expected the path of a file; download it first")

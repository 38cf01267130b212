"""Conversations as data sets write them, LLaVA's `from` and `value` or OpenAI's `role` and `content`, made into turns:
what `llava_json` says in its head, for every source that has such records."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vltrain.errors import InputError, nearest
from vltrain.files.strict_json import id_text, is_list, is_object, shown
from vltrain.schema import IMAGE_MARKER, SYSTEM, Sample, Turn, escape_markers, unescape_markers

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": SYSTEM}
TURN_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
IMAGE_KEYS = ("image", "images")
IMAGE_PARTS = ("image", "image_url")
UNLEARNED = ("weight", "loss", "loss_weight", "train")  # with which other trainers leave a turn out of the loss
MAX_TOLD = 8


class ConversationReader:
    """Makes samples of records, and counts what was done to them."""

    def __init__(self, place: object, told: set[str], marks_images: bool) -> None:
        self._place, self._told, self._marks_images = place, told, marks_images
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
            self._print(f"{self._place}: {count} {what}")
        if self._left_out:
            self._print(
                f"{self._place}: {self._left_out} record(s) left out, of which nothing can be learned (unusable=drop)"
            )
        if self._unread:
            named = ", ".join(f"{key} ({count})" for key, count in self._unread.most_common(MAX_TOLD))
            self._print(
                f"{self._place}: keys that are not read: {named}{', ...' if len(self._unread) > MAX_TOLD else ''}"
            )

    def _print(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            print(line)

    def count(self, what: str) -> None:
        """Counts one more of what `log_counts` prints."""
        self._counts[what] += 1

    def sample(self, record: Any, number: int, where: str, name: str | None = None) -> Sample:
        """The sample of one record. `name`: its id, where the record's own is not to be read. Raises InputError naming
        `where` and the path in the record."""
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
        for other in record:
            if other not in ("id", key, *IMAGE_KEYS):
                self._unread[other] += 1
        answer = unescape_markers(turns[-1].text) if turns else ""
        try:
            return Sample(
                id=self._id(record, number, where) if name is None else name,
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

"""Which column of a table is what, and the sample that a row becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.sources.chats.conversations import TURN_KEYS, ConversationReader
from data_prep.sources.prompts import LETTERS, MAX_CHOICES, check_template, lettered, plain
from data_prep.sources.raw import ImageSource, RawSample
from data_prep.sources.streamed.cells import EXPECTED, Cells
from vltrain.errors import InputError, nearest
from vltrain.files.strict_json import id_text, is_list, is_object, shown
from vltrain.schema import IMAGE_MARKER, Sample, Turn, escape_markers

TEXTS = ("question", "answer", "choices", "hint", "category", "id")
"""Options that name one column each; of `chat` and `image` are other rules."""
_FOUND = {
    "question": ("question",),
    "answer": ("answer",),
    "chat": ("messages", "conversations"),
    "image": ("image", "images"),
}
"""What a column is called that is found without an option."""
_PLACES = {"hint": "hint", "question": "question", "choices": "options"}  # option -> place in the prompt


@dataclass(frozen=True)
class Column:
    """A column, or a field in one (`json.question`). `labels`: the names of a column of class labels."""

    name: str
    path: tuple[str, ...]
    labels: tuple[str, ...] = ()

    def of(self, row: Mapping[str, Any], where: str) -> Any:
        """A row's value. Raises InputError where a field is looked for in what has none."""
        value: Any = row.get(self.path[0])
        for key in self.path[1:]:
            if value is None:
                return None
            if not is_object(value):
                raise InputError(f"{where}, column '{self.name}': found {shown(value)}, expected an object with {key}")
            value = value.get(key)
        if self.labels and type(value) is int:
            if not 0 <= value < len(self.labels):
                raise InputError(f"{where}, column '{self.name}': found {value}, expected 0 to {len(self.labels) - 1}")
            return self.labels[value]
        return value


@dataclass(frozen=True)
class Columns:
    """The columns of a data set by what they are; `unread`: the others."""

    of: Mapping[str, Column]
    images: tuple[Column, ...]
    unread: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The columns that are read, each once."""
        return list(dict.fromkeys(column.path[0] for column in (*self.of.values(), *self.images)))

    def told(self) -> str:
        """One line of what is read as what, and what is not."""
        read = [f"{what} = {column.name}" for what, column in self.of.items()]
        read += [f"image = {column.name}" for column in self.images]
        return ", ".join(read) + (f"; not read: {', '.join(self.unread)}" if self.unread else "")


def find_columns(there: Mapping[str, Any], options: Mapping[str, Any], where: str) -> Columns:
    """The columns that options name, or that are called so, by the features that are there.

    Raises: InputError for a column that is not there, with the nearest and all that are; for an image column that can't
    be one; where neither questions and answers nor conversations are.
    """
    found = {
        what: _column(there, str(options[what]), what, where) for what in (*TEXTS, "chat") if options[what] is not None
    }
    for what in ("question", "answer", "chat"):
        name = next((name for name in _FOUND[what] if name in there), None)
        clashes = "chat" in found if what != "chat" else "question" in found or "answer" in found
        if what not in found and name is not None and not clashes:
            found[what] = _column(there, name, what, where)
    images = tuple(_column(there, name, "image", where) for name in (options["image"] or "").split(",") if name)
    if not images:
        images = tuple(_column(there, name, "image", where) for name in _FOUND["image"] if name in there)[:1]
    for column in images:
        _require_image_feature(there, column, where)
    if "chat" in found:
        if extra := [what for what in ("question", "answer", "choices", "hint") if what in found]:
            raise InputError(f"{where}: {', '.join(extra)}= and chat={found['chat'].name}: expected one or the other")
    elif missing := [what for what in ("question", "answer") if what not in found]:
        raise InputError(
            f"{where}: found no column of its own for {' and '.join(missing)}; there are "
            f"{_listed(there)}; say which is which (question=, answer=, or chat=)"
        )
    unread = [name for name in there if name not in {column.path[0] for column in (*found.values(), *images)}]
    return Columns(found, images, tuple(unread))


def _column(there: Mapping[str, Any], name: str, option: str, where: str) -> Column:
    head = name if name in there else name.partition(".")[0]
    if head not in there:
        near = nearest(name, there)
        hint = "" if near.startswith("known") else f", {near}"
        raise InputError(f"{where}: has no column '{name}' ({option}=){hint}; there are {_listed(there)}")
    path = (head, *name[len(head) + 1 :].split(".")) if name != head else (head,)
    feature: Any = there[head]
    for key in path[1:]:
        if is_object(feature):
            if key not in feature:
                raise InputError(
                    f"{where}: column '{head}' has no field '{key}' ({option}=); there are {_listed(feature)}"
                )
            feature = feature[key]
    labels: Sequence[str] = getattr(feature, "names", None) or ()
    return Column(name, path, tuple(labels))


def _listed(there: Mapping[str, Any]) -> str:
    return ", ".join(there) or "none"


def _require_image_feature(there: Mapping[str, Any], column: Column, where: str) -> None:
    feature: Any = there[column.path[0]]
    for key in column.path[1:]:
        feature = feature.get(key) if is_object(feature) else None
    while (inner := feature[0] if is_list(feature) else getattr(feature, "feature", None)) is not None:
        feature = inner
    kind = getattr(feature, "dtype", None)
    if feature is None or kind is None or (is_object(feature) and {"bytes", "path"} & feature.keys()):
        return  # unknown: cells tell
    if type(feature).__name__ not in ("Image", "Json") and kind not in (
        "string",
        "large_string",
        "binary",
        "large_binary",
        "null",
    ):
        raise InputError(f"{where}: column '{column.name}' (image=) holds {kind}, expected {EXPECTED}")


def check_prompt(source: str, template: str | None, columns: Columns) -> str:
    """The prompt's template; without one what is mapped of hint, question and choices, a line each. Raises InputError
    for one that does not name each of them."""
    places = [place for what, place in _PLACES.items() if what in columns.of]
    if template is None:
        return "\n".join(f"{{{place}}}" for place in places)
    if "chat" in columns.of:
        raise InputError(f"source '{source}', option 'prompt': has no effect on conversations (chat=); leave it out")
    check_template(source, "prompt", template, places)
    return template


@dataclass
class Rows:
    """Makes samples of rows.

    reader   of conversations, which also counts what was done
    """

    columns: Columns
    cells: Cells
    prompt: str
    reader: ConversationReader

    def sample(self, row: Mapping[str, Any], own_id: str, number: int, where: str) -> RawSample:
        """The sample of a row. `own_id`: of a row without a column of ids. Raises InputError naming `where` and the
        column."""
        given = self.columns.of
        name = own_id
        if "id" in given:
            name = id_text(given["id"].of(row, where), f"{where}, column '{given['id'].name}'")
        shown_images = [
            one
            for column in self.columns.images
            for one in self.cells.named(column.of(row, where), f"{where}, column '{column.name}'")
        ]
        sources = dict(shown_images)
        names = [image for image, _ in shown_images]
        if "chat" in given:
            sample = self._conversation(row, name, names, sources, number, where)
        else:
            sample = self._question(row, name, names, where)
        if "category" in given:
            text = self._text(given["category"], row, where)
            sample = replace(sample, metadata={**sample.metadata, "category": text})
        return RawSample(split="train", sample=sample, image_sources=tuple(sources[image] for image in sample.images))

    def _question(self, row: Mapping[str, Any], name: str, names: list[str], where: str) -> Sample:
        given = self.columns.of
        said = {"question": self._text(given["question"], row, where)}
        if "hint" in given:
            hint = given["hint"].of(row, where)
            said["hint"] = "" if hint is None or hint == "" else self._text(given["hint"], row, where)
        choices = self._choices(row, where) if "choices" in given else []
        candidates = lettered(choices)
        said["options"] = " ".join(candidates)
        answer, metadata = self._answer(row, choices, candidates, where)
        prompt = self.prompt.format(**{place: escape_markers(text) for place, text in said.items()}).strip()
        marks = f"{IMAGE_MARKER}\n" * len(names)
        turns = (Turn(role="user", text=marks + prompt), Turn(role="assistant", text=escape_markers(answer)))
        try:
            return Sample(id=name, turns=turns, images=tuple(names), metadata=metadata)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def _answer(
        self, row: Mapping[str, Any], choices: list[str], candidates: list[str], where: str
    ) -> tuple[str, dict[str, Any]]:
        """(what is learned, the metadata)."""
        column = self.columns.of["answer"]
        value, place = column.of(row, where), f"{where}, column '{column.name}'"
        if candidates:
            right = _right(value, choices, place)
            return candidates[right], {"choices": choices, "answer": right, "candidates": candidates}
        if is_list(value):
            answers = [self._as_text(one, f"{place}[{number}]") for number, one in enumerate(value)]
            if not answers:
                raise InputError(f"{place}: found an empty list, expected an answer at least")
            most = Counter(answers).most_common(1)[0][0]  # of equals the first
            return most, {"answer": most, "answers": answers}
        answer = self._as_text(value, place)
        return answer, {"answer": answer}

    def _choices(self, row: Mapping[str, Any], where: str) -> list[str]:
        """Those of a question; none of one that has none."""
        column = self.columns.of["choices"]
        value, place = column.of(row, where), f"{where}, column '{column.name}'"
        if value is None or value == []:
            return []
        if not is_list(value) or not 2 <= len(value) <= MAX_CHOICES:
            raise InputError(f"{place}: found {shown(value)}, expected a list of 2 to {MAX_CHOICES} texts, or none")
        return [self._as_text(one, f"{place}[{number}]") for number, one in enumerate(value)]

    def _text(self, column: Column, row: Mapping[str, Any], where: str) -> str:
        return self._as_text(column.of(row, where), f"{where}, column '{column.name}'")

    def _as_text(self, value: Any, place: str) -> str:
        """Raises InputError for what is no text or whole number, and for a blank one."""
        if type(value) is int:
            self.reader.count("whole number(s) taken as texts")
            return str(value)
        if type(value) is not str or not value.strip():
            raise InputError(f"{place}: found {shown(value)}, expected a text that is not empty")
        return plain(value)

    def _conversation(
        self,
        row: Mapping[str, Any],
        name: str,
        names: list[str],
        sources: dict[str, ImageSource],
        number: int,
        where: str,
    ) -> Sample:
        column = self.columns.of["chat"]
        place = f"{where}, column '{column.name}'"
        turns = _turns_of(column.of(row, where), place)
        inside = dict[str, ImageSource]()
        turns = [self._with_names(turn, inside, f"{place}[{count}]") for count, turn in enumerate(turns)]
        sources.update(inside)
        key = "conversations" if any("from" in turn for turn in turns) else "messages"
        record = {key: turns, **({"images": names} if names else {})}
        return self.reader.sample(record, number, where, name)

    def _with_names(self, turn: dict[str, Any], inside: dict[str, ImageSource], where: str) -> dict[str, Any]:
        """A turn of which content parts name their images, as a file of conversations does."""
        for key in (content for _, content in TURN_KEYS.values() if is_list(turn.get(content))):
            turn = {
                **turn,
                key: [
                    self._named_part(part, inside, f"{where}.{key}[{number}]") for number, part in enumerate(turn[key])
                ],
            }
        return turn

    def _named_part(self, part: Any, inside: dict[str, ImageSource], where: str) -> Any:
        if not is_object(part):
            return part
        part = _filled(part)
        for key in ("image", "image_url", "path", "url"):
            value: Any = part.get(key)
            if key == "image_url" and is_object(value):
                value = value.get("url")
            if value is None or part.get("type") == "text":
                continue
            found = self.cells.named(value, f"{where}.{key}")
            if len(found) != 1:
                raise InputError(f"{where}.{key}: found {len(found)} images, expected one a part")
            inside.update(found)
            return {"type": "image", "image": found[0][0]}
        return part


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that a table gives a record because others have them."""
    return {key: value for key, value in record.items() if value is not None}


def _turns_of(value: Any, where: str) -> list[dict[str, Any]]:
    """The turns in a cell: a list of objects, or an object of lists, which older tables have."""
    if is_object(value) and value and all(is_list(one) for one in value.values()):
        lengths = {len(one) for one in value.values()}
        if len(lengths) == 1:
            value = [{key: one[number] for key, one in value.items()} for number in range(lengths.pop())]
    if not is_list(value) or not value:
        raise InputError(f"{where}: found {shown(value)}, expected a list of turns")
    for number, turn in enumerate(value):
        if not is_object(turn):
            raise InputError(
                f"{where}[{number}]: found {shown(turn)}, expected an object with from and value, or role and content"
            )
    return [_filled(turn) for turn in value]


def _right(value: Any, choices: list[str], place: str) -> int:
    """The number of the right choice, said by its number from 0, its text or its letter."""
    if type(value) is int and 0 <= value < len(choices):
        return value
    if type(value) is str:
        text = plain(value)
        if choices.count(text) == 1:
            return choices.index(text)
        letter = text.strip("().").lower()
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return LETTERS.index(letter)
    raise InputError(
        f"{place}: found {shown(value)}, expected one of the choices: its text, its letter, or 0 to {len(choices) - 1}"
    )


def rows_of(
    stream: Iterator[tuple[str, dict[str, Any]]], rows: Rows, split: str, *, drops: bool
) -> Iterator[RawSample]:
    """The samples of a split's rows. `drops`: rows of which no sample can be made are left out and told."""
    for number, (where, row) in enumerate(stream):
        try:
            yield rows.sample(row, f"{split}-{number}", number, where)
        except InputError as error:
            if not drops:
                raise InputError(f"{error} (--options unusable=drop leaves such rows out)") from None
            rows.reader.leave_out(error)

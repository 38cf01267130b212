"""The one reader of JSON and JSONL, for data sets, samples, answers, settings and our own files: what one command
takes, every command takes.

Read: UTF-8, with or without a byte order mark in front; JSON Lines end in `\\n` only (U+2028 and the like are text),
blank ones are skipped.
Refused, naming file:line:column: a key that stands twice in an object, NaN and Infinity, numbers beyond a double's
range or of more than `MAX_DIGITS` digits, halves of characters (lone surrogates), nesting deeper than `MAX_DEPTH`,
anything behind the end, a mark in the middle, what is no plain file. Values are never converted: a text is a JSON
string, `true` is no number.

Parsing is the C scanner's; a fault is looked for by a slow second reading that knows places.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from json.scanner import make_scanner
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from vltrain.errors import InputError

MAX_DEPTH = 100
MAX_DIGITS = 100
BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"
_BLANK_BYTES = b" \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
_as_text = json.JSONEncoder(ensure_ascii=False).encode


class _Fault(ValueError):
    """Something refused, whose place is not known yet."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Fault
    return found


def _refuse(constant: str) -> NoReturn:
    raise _Fault


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Fault
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Fault
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_whole, parse_float=_finite)
_scan = make_scanner(_decoder)  # pyright: ignore[reportArgumentType] its stub says a scanner, not a decoder


def read_json(path: Path, expected: str = "a JSON file", *, max_bytes: int | None = None) -> Any:
    """The value that a JSON file holds. Raises InputError naming file, line and column; for a missing file, what was
    `expected`."""
    return parse_json(_read(path, expected, max_bytes), str(path))


def read_object(path: Path, expected: str = "a JSON file", *, max_bytes: int | None = None) -> dict[str, Any]:
    """The object that a JSON file holds. Raises InputError as `read_json`, and for any other value."""
    content = read_json(path, expected, max_bytes=max_bytes)
    if not is_object(content):
        raise InputError(f"{path}: found {shown(content)}, expected an object")
    return content


def parse_json(data: bytes, file: str) -> Any:
    """The value in a JSON file's bytes. Raises InputError naming `file`, line and column."""
    return _parse(_decode(data.removeprefix(BOM), file, 1), file, 1)


def read_lines(path: Path, expected: str = "a JSONL file") -> Iterator[tuple[str, Any]]:
    """(file:line, value) of each line of a JSONL file that is not blank. Raises InputError as `read_json`."""
    require_plain_file(path, expected)
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not is_blank(line, number):
                    yield f"{path}:{number}", parse_line(line, str(path), number)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None


def is_blank(line: bytes, number: int) -> bool:
    """Whether the line of that number (from 1) of a JSONL file holds nothing."""
    return not (line.removeprefix(BOM) if number == 1 else line).strip(_BLANK_BYTES)


def parse_line(line: bytes, file: str, number: int) -> Any:
    """The value in line `number` (from 1) of a JSONL file. Raises InputError naming file, line and column."""
    line = line.rstrip(_BLANK_BYTES)
    return _parse(_decode(line.removeprefix(BOM) if number == 1 else line, file, number), file, number)


def read_records(path: Path, expected: str = "a JSON list or JSON Lines") -> Iterator[tuple[str, Any]]:
    """(file:line, value) of each element of a file that is one JSON list, or JSON Lines; which one, its first character
    says.

    Elements of a list are parsed one by one, so that a large file's are never all in memory beside its text.
    """
    require_plain_file(path, expected)
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 16).removeprefix(BOM).lstrip(_BLANK_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None
    if head.startswith(b"{"):
        return _lines_of(path, expected)
    return _elements(_decode(_read(path, expected, None).removeprefix(BOM), str(path), 1), str(path), expected)


def _lines_of(path: Path, expected: str) -> Iterator[tuple[str, Any]]:
    """`read_lines`; where the first line is none, a file that is one object is what was given."""
    lines = read_lines(path, expected)
    try:
        first = next(lines)
    except InputError as error:
        raise InputError(f"{error}; expected {expected}") from None
    yield first
    yield from lines


def require_plain_file(path: Path, expected: str) -> None:
    """InputError for what is missing, or no file: reading a pipe or a device may never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: cannot be read (no such file); expected {expected}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); expected {expected}"
        ) from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: cannot be read (it is a folder); expected {expected}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file, expected {expected}")


def read_text(path: Path, expected: str = "a text file") -> str:
    """The text of a UTF-8 file, without a byte order mark in front. Raises InputError naming file, line and column."""
    return _decode(_read(path, expected, None).removeprefix(BOM), str(path), 1)


def _read(path: Path, expected: str, max_bytes: int | None) -> bytes:
    require_plain_file(path, expected)
    try:
        with path.open("rb") as stream:
            data = stream.read(-1 if max_bytes is None else max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from None
    if max_bytes is not None and len(data) > max_bytes:
        raise InputError(f"{path}: larger than {max_bytes} bytes; expected {expected}")
    return data


def _decode(data: bytes, file: str, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        hint = "; is it UTF-16?" if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4] else ""
        raise InputError(
            f"{file}:{line}:{column}: not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8{hint}"
        ) from None


def _parse(text: str, file: str, first_line: int) -> Any:
    value, end = _value_at(text, _skip(text, 0), file, first_line)
    if len(text) != end and (end := _skip(text, end)) != len(text):
        raise _error(
            text,
            end,
            f"found {text[end : end + 20]!r} behind the end of the JSON value, expected nothing",
            file,
            first_line,
        )
    return value


def _elements(text: str, file: str, expected: str) -> Iterator[tuple[str, Any]]:
    """The elements of a text that is one JSON list, each with the line where it begins."""
    place = _skip(text, 0)
    if place == len(text):
        raise InputError(f"{file}: found nothing in it, expected {expected}")
    if text[place : place + 1] != "[":
        value, _ = _value_at(text, place, file, 1)  # what is no JSON at all is told as such
        raise InputError(f"{file}: found {shown(value)}, expected {expected}")
    place = _skip(text, place + 1)
    line, counted = 1, 0
    is_first = True
    while not (is_first and text[place : place + 1] == "]"):
        is_first = False
        line, counted = line + text.count("\n", counted, place), place
        value, place = _value_at(text, place, file, 1)
        yield f"{file}:{line}", value
        place = _skip(text, place)
        mark = text[place : place + 1]
        if mark == "]":
            break
        if mark != ",":
            raise _error(
                text,
                place,
                f"found {text[place : place + 20]!r}, expected ',' or ']'"
                if mark
                else "ends in the middle of the list",
                file,
                1,
            )
        place = _skip(text, place + 1)
    if (end := _skip(text, place + 1)) != len(text):
        raise _error(text, end, f"found {text[end : end + 20]!r} behind the end of the list, expected nothing", file, 1)


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None, "it matches nothing, too"
    return found.end()


def _value_at(text: str, start: int, file: str, first_line: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends."""
    try:
        value, end = _scan(text, start)
    except StopIteration as stop:
        place = stop.value
        found = f"found {text[place : place + 20]!r}" if place < len(text) else "found nothing"
        raise _error(text, place, f"not JSON ({found}, expected a value)", file, first_line) from None
    except json.JSONDecodeError as error:
        raise _error(text, error.pos, f"not JSON ({error.msg})", file, first_line) from None
    except (_Fault, RecursionError):
        raise _explained(text, start, file, first_line) from None
    if text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH and _is_deep(value):
        raise _explained(text, start, file, first_line)
    if (text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0) and _holds_halves(value):
        raise _explained(text, start, file, first_line)
    return value, end


def _is_deep(value: Any) -> bool:
    """Level by level, so that it needs no stack."""
    level = [value] if type(value) in (dict, list) else []
    for _ in range(MAX_DEPTH):
        level = [
            item for one in level for item in (one.values() if type(one) is dict else one) if type(item) in (dict, list)
        ]
        if not level:
            return False
    return True


def _holds_halves(value: Any) -> bool:
    try:
        _as_text(value).encode()
    except UnicodeEncodeError:
        return True
    return False


def _explained(text: str, start: int, file: str, first_line: int) -> InputError:
    """What is refused in the value at `start`, which parses or would but for that, and where."""

    def fault(place: int, what: str) -> InputError:
        return _error(text, place, what, file, first_line)

    keys: list[set[str] | None] = []  # of the objects around, None for lists
    awaits_key = False
    for token in _TOKEN.finditer(text, start):
        place, word = token.start(), token[0]
        if word in "[{":
            keys.append(set() if word == "{" else None)
            awaits_key = word == "{"
            if len(keys) > MAX_DEPTH:
                return fault(place, f"nested too deeply, expected {MAX_DEPTH} levels at most")
        elif word in "]}":
            if keys:
                keys.pop()
            awaits_key = False
        elif word == ",":
            awaits_key = bool(keys) and keys[-1] is not None
        elif word[0] == '"':
            content = json.loads(word, strict=False) if "\\" in word else word[1:-1]
            if "\\" in word and _holds_halves(content):
                return fault(place, f"found half of a character (a lone surrogate) in {word:.60}, expected text")
            if awaits_key and keys[-1] is not None:
                if content in keys[-1]:
                    return fault(place, f"found the key {content!r:.80} a second time in its object, expected it once")
                keys[-1].add(content)
                awaits_key = False
        elif "NaN" in word or "Infinity" in word:
            return fault(place, f"found {word:.20}, which JSON does not have, expected a number")
        elif word not in (":", "true", "false", "null"):
            if len(word) > MAX_DIGITS and word.lstrip("-").isdigit():
                return fault(place, f"found a number of {len(word)} digits, expected {MAX_DIGITS} at most")
            if math.isinf(float(word)):
                return fault(place, f"found {word:.20}, which is too large, expected a number below 1.8e308")
    return fault(start, "not JSON that can be read")


def _error(text: str, place: int, what: str, file: str, first_line: int) -> InputError:
    line = first_line + text.count("\n", 0, place)
    return InputError(f"{file}:{line}:{place - text.rfind(chr(10), 0, place)}: {what}")


_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def shown(value: Any) -> str:
    """A JSON value for an error: as JSON spells it, cut short."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a JSON value is an object."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a JSON value is a list."""
    return isinstance(value, list)


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list, or the tuple that it became."""
    return isinstance(value, (list, tuple))


def expect(value: Any, kind: type, where: str) -> Any:
    """`value`, if it is of that JSON type: exactly, but that a whole number is a number too. Raises InputError naming
    `where`, its whole path."""
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise InputError(f"{where}: found {shown(value)}, expected {_KINDS[kind]}")


def field(record: Any, key: str, kind: type, where: str) -> Any:
    """`record[key]`, a text that is not blank where `kind` is str. Raises InputError naming `where` (file and item) and
    the key."""
    if not is_object(record):
        raise InputError(f"{where}: found {shown(record)}, expected an object")
    value: Any = record.get(key)
    if type(value) is kind and (kind is not str or not value.isspace() and value):
        return value
    found = shown(value) if key in record else "nothing"
    raise InputError(
        f"{where}: {key}: found {found}, expected {_KINDS[kind]}{' that is not empty' if kind is str else ''}"
    )


def id_text(value: Any, where: str) -> str:
    """An id as a text: files of others write whole numbers, too. Raises InputError for anything else, and for a blank
    text."""
    if type(value) is int:
        return str(value)
    if type(value) is not str or not value.strip():
        raise InputError(f"{where}: found {shown(value)}, expected an id: a text that is not empty, or a whole number")
    return value


def texts(record: Any, key: str, where: str) -> list[str]:
    """`record[key]`, a list of texts, which may be empty. Raises InputError naming `where`, the key and the element."""
    listed = field(record, key, list, where)
    for number, one in enumerate(listed):
        if type(one) is not str:
            raise InputError(f"{where}: {key}[{number}]: found {shown(one)}, expected a text")
    return listed

"""The strict JSON reader: beside `json.loads` on what is plain, and each refusal with its place, in all of its
doors."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vltrain.errors import InputError
from vltrain.files.strict_json import (
    MAX_DEPTH,
    MAX_DIGITS,
    expect,
    field,
    parse_json,
    parse_line,
    read_json,
    read_lines,
    read_object,
    read_records,
    texts,
)

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), inner, max_size=4)
    ),
)


def doors(folder, content: bytes):
    """The value that each reader takes from the same bytes, one line of them."""
    path = folder / "x"
    path.write_bytes(content)
    return [
        lambda: parse_json(content, "x"),
        lambda: parse_line(content, "x", 1),
        lambda: read_json(path),
        lambda: next(iter(read_lines(path)))[1],
    ]


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(value=PLAIN, ascii=st.booleans(), mark=st.booleans())
def test_what_is_plain_is_read_as_json_reads_it(value, ascii, mark, tmp_path_factory):
    content = json.dumps(value, ensure_ascii=ascii).encode()
    for read in doors(tmp_path_factory.mktemp("plain"), (b"\xef\xbb\xbf" if mark else b"") + content + b"\r\n"):
        found = read()
        assert found == value and json.dumps(found) == json.dumps(value)


REFUSED = {
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', 24, "the key 'c' a second time"),
    "a key twice, once escaped": ('{"a": 1, "\\u0061": 2}', 10, "the key 'a' a second time"),
    "NaN": ('{"a": [1, NaN]}', 11, "NaN"),
    "infinity": ('{"a": -Infinity}', 7, "-Infinity"),
    "a number that becomes infinite": ('{"a": 1e999}', 7, "1e999, which is too large"),
    "thousands of digits": (f'{{"a": {"7" * 5000}}}', 7, "a number of 5000 digits"),
    "a few more digits than may be": (f"[{'7' * (MAX_DIGITS + 1)}]", 2, f"a number of {MAX_DIGITS + 1} digits"),
    "half of a character": ('{"a": "x\\ud800"}', 7, "half of a character"),
    "half of a character as a key": ('{"\\uDC00": 1}', 2, "half of a character"),
    "halves in the wrong order": ('["\\ude00\\ud83d"]', 2, "half of a character"),
    "deep lists": ("[" * 100_000, MAX_DEPTH + 1, "nested too deeply"),
    "lists a level too deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), MAX_DEPTH + 1, "nested too deeply"),
    "deep objects": ('{"a":' * 50_000, MAX_DEPTH * 5 + 1, "nested too deeply"),
    "trailing data": ('{"a": 1} {"b": 2}', 10, "behind the end"),
    "a mark in the middle": ("[1, \ufeff2]", 5, "'\\ufeff2]'"),
    "two marks": ("\ufeff\ufeff[1]", 1, "expected a value"),
    "a line separator between values": ("[1,\u20282]", 4, "expected a value"),
    "single quotes": ("{'a': 1}", 2, "double quotes"),
    "a comma too many": ("[1,]", 4, ""),
    "a raw control character": ('["a\tb"]', 4, "control character"),
    "cut short": ('{"a": [1, 2', 12, ""),
    "no value": ("nonsense", 1, "found 'nonsense', expected a value"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_every_door_with_its_place(name, tmp_path):
    text, column, words = REFUSED[name]
    for read in doors(tmp_path, text.encode()):
        with pytest.raises(InputError, match=rf"x:1:{column}: ") as caught:
            read()
        assert words.lower() in str(caught.value).lower() and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": "\xff"}', "1:8: not UTF-8"),
        ("[1]".encode("utf-16"), "is it UTF-16?"),
        (b'["\xed\xa0\x80"]', "1:3: not UTF-8"),
    ],
)
def test_bytes_that_are_no_utf8(content, words, tmp_path):
    for read in doors(tmp_path, content):
        with pytest.raises(InputError, match=words.replace("?", r"\?")):
            read()


def test_as_deep_as_may_be_is_read(tmp_path):
    for read in doors(tmp_path, b"[" * MAX_DEPTH + b"]" * MAX_DEPTH):
        assert json.dumps(read()) == "[" * MAX_DEPTH + "]" * MAX_DEPTH
    (tmp_path / "flat").write_text(json.dumps([[["[[["], {}]] * 1000))
    assert len(read_json(tmp_path / "flat")) == 1000


def test_lines_end_in_a_line_feed_only(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(
        "".join(f'{{"a": "{text}"}}\r\n \t\n' for text in ("a\u2028b", "a\u2029b", "a\x85b", "a\\u000cb")).encode()
    )
    found = list(read_lines(tmp_path / "x.jsonl"))
    assert [value["a"] for _, value in found] == ["a\u2028b", "a\u2029b", "a\x85b", "a\x0cb"]
    assert [where.rpartition(":")[2] for where, _ in found] == ["1", "3", "5", "7"]
    (tmp_path / "cr.jsonl").write_bytes(b"1\r2\r")
    with pytest.raises(InputError, match="cr.jsonl:1:3: found '2"):
        list(read_lines(tmp_path / "cr.jsonl"))


def test_lines_name_their_number_and_column(tmp_path):
    (tmp_path / "x.jsonl").write_text('\n{"a": 1}\n{"a": 1, "a": 1}\n')
    with pytest.raises(InputError, match="x.jsonl:3:10: "):
        list(read_lines(tmp_path / "x.jsonl"))
    (tmp_path / "x.json").write_text('[\n {"a": 1},\n {"a": 1,\n  "a": 1}]\n')
    for read in (read_json, lambda path: list(read_records(path))):
        with pytest.raises(InputError, match="x.json:4:3: found the key"):
            read(tmp_path / "x.json")


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(values=st.lists(PLAIN, max_size=5), indent=st.sampled_from([None, 1]), mark=st.booleans())
def test_records_of_a_list_and_of_lines_are_the_same(values, indent, mark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    front = "\ufeff" if mark else ""
    (folder / "list").write_text(
        front + json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8", newline=""
    )
    assert [value for _, value in read_records(folder / "list")] == values
    objects = [{"v": value} for value in values]
    if objects:
        (folder / "lines").write_text(front + "".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")
        assert [value for _, value in read_records(folder / "lines")] == objects


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1 2]", "1:4: found '2]', expected"),
        ("[1,", "1:4: "),
        ("[1", "1:3: ends in the middle"),
        ("[1]]", "1:4: found ']' behind"),
        ("[1,]", "1:4: not JSON"),
        ('"a"', 'found "a", expected a JSON list'),
        ("", "found nothing in it, expected a JSON list"),
        ("  \n ", "found nothing in it"),
        ('{"a": 1}\nx', "2:1: not JSON"),
        (
            '{\n "a": 1}',
            "1:2: not JSON (Expecting property name enclosed in double quotes); expected a JSON list or JSON Lines",
        ),
        ("3", "found 3"),
    ],
)
def test_records_that_are_none(text, words, tmp_path):
    (tmp_path / "x").write_text(text)
    with pytest.raises(InputError) as caught:
        list(read_records(tmp_path / "x"))
    assert words in str(caught.value)


def test_what_is_no_plain_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        (".", "a folder"),
        ("absent", "no such file"),
        ("loop", "cannot be read"),
    ):
        for read in (
            read_json,
            read_object,
            lambda path: list(read_lines(path)),
            lambda path: list(read_records(path)),
        ):
            with pytest.raises(InputError, match=words):
                read(tmp_path / name)
    (tmp_path / "big").write_text(json.dumps("x" * 100))
    with pytest.raises(InputError, match="larger than 50 bytes"):
        read_json(tmp_path / "big", max_bytes=50)


def test_types_are_required_and_never_converted():
    record = {"t": "text", "blank": " \u2003", "n": 1, "f": 1.5, "b": True, "none": None, "l": ["a", 1], "s": ["a"]}
    assert field(record, "t", str, "w") == "text" and texts(record, "s", "w") == ["a"] and expect(1, float, "w") == 1
    for key, kind in (
        ("n", str),
        ("none", str),
        ("l", str),
        ("blank", str),
        ("absent", str),
        ("b", int),
        ("f", int),
        ("t", list),
        ("s", dict),
        ("n", bool),
    ):
        with pytest.raises(InputError, match=f"^w: {key}: found .*expected"):
            field(record, key, kind, "w")
    with pytest.raises(InputError, match=r"^w: l\[1\]: found 1, expected a text"):
        texts(record, "l", "w")
    for value, kind in ((True, int), (True, float), ("1", float), (None, str), (1.0, int)):
        with pytest.raises(InputError, match='found (true|"1"|null|1.0), expected'):
            expect(value, kind, "w")

"""What a file's questions have in common, found from lines spread over it."""

from __future__ import annotations

import json

import pytest

from vltrain.data.text.asked import Asked, how_asked


def write(path, texts, images=True, more=()):
    front = "<image>\n" if images else ""
    lines = [
        {
            "id": str(number),
            "images": ["a.png"] if images else [],
            "turns": [{"role": "user", "text": front + text}, {"role": "assistant", "text": "a"}, *more],
        }
        for number, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


NOUNS = [f"{colour} {shape}" for colour in ("red", "blue", "grey", "black") for shape in ("star", "square", "heart")]


@pytest.mark.parametrize(
    ("form", "begin", "end"),
    [
        ("Question: where is the {}?\nAnswer:", "Question: ", "\nAnswer:"),
        ("where is the {}?\nAnswer in one word.", "", "\nAnswer in one word."),
        ("Where is the {}?", "", ""),
        ("Question: where is the {}? Short answer:", "Question: ", " Short answer:"),
        ("Context: N/A\nQuestion: where is the {}?", "Context: N/A\nQuestion: ", ""),
    ],
)
def test_labels_and_lines_are_common_and_words_are_not(form, begin, end, tmp_path):
    found = how_asked(write(tmp_path / "a.jsonl", [form.format(noun) for noun in NOUNS]))
    assert found == Asked(begin=begin, end=end, multi_turn=False, images=True)
    bare = f"where is the {NOUNS[0]}?"
    if begin.endswith("Question: ") or not begin:
        assert (
            found.phrase(bare).startswith(begin)
            and found.phrase(bare).endswith(end)
            and found.phrase(found.phrase(bare)) == found.phrase(bare)
        )


def test_one_that_differs_leaves_nothing_in_common(tmp_path):
    texts = [f"Question: where is the {noun}?\nAnswer:" for noun in NOUNS]
    assert how_asked(write(tmp_path / "a.jsonl", [*texts, "Describe it."], images=False)) == Asked(
        multi_turn=False, images=False
    )
    assert how_asked(write(tmp_path / "b.jsonl", texts[:1] * 40)).begin == "", "one question is no form of many"


def test_conversations_are_seen_and_long_files_looked_at_all_over(tmp_path):
    more = [{"role": "user", "text": "and?"}, {"role": "assistant", "text": "b"}]
    assert how_asked(write(tmp_path / "a.jsonl", NOUNS, more=more)).multi_turn
    texts = [f"Q: {number}\nA:" for number in range(5000)]
    assert how_asked(write(tmp_path / "b.jsonl", texts)) == Asked(
        begin="Q: ", end="\nA:", multi_turn=False, images=True
    )
    assert (
        how_asked(write(tmp_path / "c.jsonl", [*texts[:3000], *[f"{number}?" for number in range(2000)]])).begin == ""
    )


def test_what_cannot_be_read_says_nothing(tmp_path):
    assert how_asked(tmp_path / "none.jsonl") is None
    (tmp_path / "a.jsonl").write_text("not json\n")
    assert how_asked(tmp_path / "a.jsonl") is None
    (tmp_path / "b.jsonl").write_text("")
    assert how_asked(tmp_path / "b.jsonl") is None


def test_a_record_is_read_back_or_not_at_all():
    asked = Asked(begin="Q: ", end="\nA:", multi_turn=False, images=True)
    assert Asked.from_json(json.loads(json.dumps(vars(asked)))) == asked
    for broken in (None, [], {}, {**vars(asked), "begin": 3}, {"begin": "", "end": ""}):
        assert Asked.from_json(broken) is None

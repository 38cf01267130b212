"""VLMEvalKit's data sets in, its result files out: read as VLMEvalKit reads them (pandas), with the answers that
`vltrain.load(RUN)` gives one by one."""

import base64
import csv
import io
import json

import numpy as np
import pandas
import pytest
from PIL import Image

from tests.attacks.attack import run_vltrain
from tests.support.finished_run import finished_run
from vltrain.errors import InputError
from vltrain.harness.vlmevalkit import open_questions, require_prompt, write_results
from vltrain.inference import load

COLOURS = {"7": (200, 0, 0), "8": (0, 200, 0), "11": (0, 0, 200)}


def encoded(colour):
    stream = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    image.paste(colour, (8, 8, 48, 48))
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def dataset(path, rows, **dialect):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="", **dialect)
        writer.writeheader()
        writer.writerows(rows)
    return path


def questions():
    rows = [
        {
            "index": index,
            "question": f'What is\n"it", {index}?',
            "image": encoded(colour),
            "answer": "A",
            "A": "red",
            "B": "blue",
        }
        for index, colour in COLOURS.items()
    ]
    return [
        *rows,
        {"index": "9", "question": "And here <image>?", "image": "8", "hint": "Look.", "answer": "B"},
        {"index": "10", "question": "None?", "image": ""},
    ]


@pytest.mark.parametrize("form", ["tsv", "json", "xlsx"])
def test_the_result_file_is_read_as_vlmevalkit_reads_it(form, tmp_path):
    if form == "xlsx":
        pytest.importorskip("xlsxwriter")
        pytest.importorskip("openpyxl")
    places = finished_run(tmp_path)
    file = dataset(tmp_path / "Mine.tsv", questions(), quoting=csv.QUOTE_ALL)
    words = [
        "answer",
        places.run,
        "--questions",
        file,
        "--output",
        tmp_path / "out",
        "--name",
        "ours",
        "--format",
        form,
        "--max-new-tokens",
        "3",
        "--batch-size",
        "2",
    ]
    code, output = run_vltrain(words)
    assert code == 0, output
    path = tmp_path / "out" / f"ours_Mine.{form}"
    readers = {
        "tsv": lambda path: pandas.read_csv(path, sep="\t"),
        "json": lambda path: pandas.DataFrame(json.loads(path.read_text())),
        "xlsx": pandas.read_excel,
    }
    found = readers[form](path)
    assert list(found["index"]) == [7, 8, 11, 9], (
        "numbers, as VLMEvalKit's own indices are; a row without an image is left out"
    )
    assert (
        "image" not in found
        and list(found["question"])[0] == 'What is\n"it", 7?'
        and list(found["A"])[:3] == ["red"] * 3
    )
    model = load(places.run)
    said = [model.chat(*row.asked(None), max_new_tokens=3).text for row in open_questions(file, None)]
    assert [str(text) if isinstance(text, str) else "" for text in found["prediction"]] == said
    code, output = run_vltrain(words)
    assert code == 2 and "is there already" in output


def test_questions_are_asked_as_vlmevalkit_asks_them(tmp_path):
    rows = list(open_questions(dataset(tmp_path / "a.tsv", questions()), None))
    (choice,), images = rows[0].asked(None)
    assert (
        choice.text
        == '<image>\nQuestion: What is\n"it", 7?\nOptions:\nA. red\nB. blue\nPlease select the correct answer from '
        "the options above. \n"
    )
    assert images == (base64.b64decode(questions()[0]["image"]),)
    (plain,), shared = rows[3].asked(None)
    assert plain.text == "<image>\nAnd here <\\image>?", "typed, it stands for no image"
    assert shared == rows[1].images, "an image may be another row's"
    (own,), _ = rows[3].asked("{hint} Question: {question} Answer:")
    assert own.text == "<image>\nLook. Question: And here <\\image>? Answer:"


def test_images_lie_in_files(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    file = dataset(
        tmp_path / "a.tsv",
        [
            {"index": "x", "question": "Q", "image_path": "['a.png', 'b.png']"},
            {"index": "y", "question": "Q", "image_path": "a.png"},
        ],
    )
    rows = list(open_questions(file, tmp_path))
    assert [row.images for row in rows] == [(tmp_path / "a.png", tmp_path / "b.png"), (tmp_path / "a.png",)]
    assert rows[0].asked(None)[0][0].text == "<image>\n<image>\nQ"
    with pytest.raises(InputError, match="--images FOLDER"):
        list(open_questions(file, None))


@pytest.mark.parametrize(
    "rows, told",
    [
        ([{"index": "1", "image": "x"}], "'question'"),
        ([{"index": "1", "question": "Q", "image": "2"}], "neither an image in base64 nor the index"),
        ([{"index": "1", "question": "Q", "image": "?" * 100}], "not base64"),
        ([{"index": "1", "question": "Q"}, {"index": "1", "question": "Q"}], "comes twice"),
        ([{"index": "1", "question": ""}], "has no question"),
        ([{"index": "1", "question": "Q", "image": "[1, 2]"}], "not a list of strings"),
    ],
)  # fmt: skip
def test_mistakes_in_a_data_set(rows, told, tmp_path):
    with pytest.raises(InputError, match=told):
        list(open_questions(dataset(tmp_path / "a.tsv", rows), None))


def test_a_file_that_is_no_table(tmp_path):
    for content in (b"", b"index\tquestion\n1\n", b"\xff\xfe\x00", b"index\tquestion\tindex\n"):
        (tmp_path / "a.tsv").write_bytes(content)
        with pytest.raises(InputError):
            list(open_questions(tmp_path / "a.tsv", None))


@pytest.mark.parametrize("prompt", ["Look", "{answer} {question}", "{question", "{question.__class__}{0}"])
def test_prompts_that_do_not_ask(prompt):
    with pytest.raises(InputError, match="--prompt"):
        require_prompt(prompt)


def test_indices_that_are_no_numbers_stay_texts(tmp_path):
    rows = list(
        open_questions(
            dataset(tmp_path / "a.tsv", [{"index": "1"} | {"question": "Q"}, {"index": "b", "question": "Q"}]), None
        )
    )
    write_results(tmp_path / "r.json", rows, ["yes", "no"])
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"index": "1", "question": "Q", "prediction": "yes"},
        {"index": "b", "question": "Q", "prediction": "no"},
    ]

"""Recipes that stand on others, and tables of rows: what is read, what wins, and every mistake named by file and
row."""

from __future__ import annotations

from pathlib import Path

import pytest

from vltrain.config.command_line import load_settings
from vltrain.config.recipe import read_recipe, read_table
from vltrain.config.tables import Ablation
from vltrain.errors import InputError

BASE = (
    "output: runs/base\nmodel: {adapter: {dim: 8, groups: 4}}\ndata: {options: {prompt_format: QCM-ALE, "
    "missing_images: drop}}\n"
)
TABLE = "base: base.yaml\noutput: runs/table\noptim: {lr: 0.5}\nrows:\n  a: {model: {adapter: {dim: 4}}}\n  b: {}\n"


def write(folder: Path, **files: str) -> Path:
    """Writes NAME.yaml for each; returns the last one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{list(files)[-1]}.yaml"


def test_a_recipe_says_what_differs_from_its_base_and_a_mappings_keys_join(tmp_path):
    own = "base: base.yaml\noutput: runs/own\nmodel: {adapter: {dim: 16}}\ndata: {options: {prompt_format: QCM-A}}\n"
    assert read_recipe(write(tmp_path, base=BASE, own=own)) == {
        "output": "runs/own", "model.adapter.dim": 16, "model.adapter.groups": 4,
        "data.options": {"prompt_format": "QCM-A", "missing_images": "drop"},
    }  # fmt: skip


def test_bases_have_bases_and_are_found_from_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    write(tmp_path, base=BASE, middle="base: base.yaml\noutput: m\nmodel: {adapter: {dim: 16, groups: 2}}\n")
    top = write(tmp_path / "deep", top="base: ../middle.yaml\noutput: t\nmodel: {adapter: {dim: 32}}\n")
    monkeypatch.chdir("/")
    settings = load_settings(["--recipe", str(top), "--optim.clip", "1"], program="test")
    assert (settings.config.model.adapter.dim, settings.config.model.adapter.groups, settings.config.output) == (
        32,
        2,
        "t",
    )
    assert settings.config.optim.clip == 1 and settings.overrides == {"optim.clip"}


def test_a_row_stands_on_its_table_and_is_named_wherever_a_recipe_is(tmp_path):
    table = write(tmp_path, base=BASE, table=TABLE)
    config = load_settings(["--recipe", f"{table}#a"], program="test").config
    assert (config.model.adapter.dim, config.model.adapter.groups, config.optim.lr, config.output) == (
        4,
        4,
        0.5,
        "runs/table/a",
    )
    assert read_recipe(write(tmp_path, other="base: table.yaml#a\noutput: o\n"))["model.adapter.dim"] == 4
    assert read_table(table).rows == {"a": {"model.adapter.dim": 4}, "b": {}}
    assert read_table(table).ablation == Ablation()


def test_a_file_may_have_the_mark_in_its_name(tmp_path):
    path = write(tmp_path, **{"odd#name": "train: {seed: 3}\n"})
    assert read_recipe(path) == {"train.seed": 3}


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        ("base: own.yaml\noutput: o", ["own.yaml: base", "own.yaml -> own.yaml"]),
        ("base: other.yaml\noutput: o", ["other.yaml: base", "own.yaml -> other.yaml -> own.yaml"]),
        ("base: base.yaml", ["own.yaml: output", "this recipe's own folder"]),
        ("base: gone.yaml\noutput: o", ["gone.yaml", "no such file"]),
        ("base: null\noutput: o", ["base: found null"]),
        ("base: [base.yaml]\noutput: o", ["base: found ['base.yaml']"]),
        ("base: bad.yaml\noutput: o", ["bad.yaml: unknown key 'optim.epochs'"]),
        ("base: base.yaml#a\noutput: o", ["base.yaml has no 'rows'"]),
        ("base: table.yaml\noutput: o", ["table.yaml: found a table", "table.yaml#ROW", "a, b"]),
        ("base: table.yaml#c\noutput: o", ["no row 'c'", "known: a, b"]),
        ("bas: base.yaml", ["unknown key 'bas'"]),
        ("ablation: {split: val}", ["unknown key 'ablation'"]),
    ],
)
def test_a_mistake_about_bases_names_the_file(tmp_path, own, parts):
    path = write(tmp_path, base=BASE, table=TABLE, bad="optim: {epochs: 3}", other="base: own.yaml\noutput: x", own=own)
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BASE, ["no 'rows'", "expected a table"]),
        ("output: o\nrows: null", ["rows: found null"]),
        ("output: o\nrows: [a]", ["rows: found ['a']"]),
        ("output: o\nrows: {a/b: {}}", ["found the name 'a/b'"]),
        ("output: o\nrows: {1: {}}", ["found the name 1"]),
        ("output: o\nrows: {a: null}", ["row 'a'", "found null, expected a section"]),
        (
            "output: o\nrows: {a: {model: {adapter: {dimm: 3}}}}",
            ["row 'a': unknown key 'model.adapter.dimm'", "did you mean"],
        ),
        ("output: o\nrows: {a: {model: {adapter: {dim: x}}}}", ["row 'a': model.adapter.dim: found 'x'"]),
        ("output: o\nrows: {a: {output: b}}", ["row 'a': output", "o/a"]),
        ("base: base.yaml\noutput: o\nrows: {a: {base: base.yaml}}", ["row 'a': base", "the table has one"]),
        ("output: o\nrows: {a: {base: 3}}", ["row 'a': base: found 3"]),
        ("output: o\nrows: {a: {base: gone.yaml}}", ["gone.yaml", "no such file"]),
        ("output: o\nrows: {a: {base: t.yaml#a}}", ["leads back to itself"]),
        ("output: o\nrows: {a: {}}\npublished: {source: x, rows: {b: {A: 1}}}", ["published.rows: no row 'b'"]),
        ("output: o\nrows: {a: {}}\npublished: {rows: {a: {A: 1}}}", ["published.source: found None"]),
        ("output: o\nrows: {a: {}}\npublished: {source: x, rows: {a: {A: 101}}}", ["rows.a.A: found 101", "per cent"]),
        ("output: o\nrows: {a: {}}\npublished: {source: x, rows: {a: {A: high}}}", ["rows.a.A: found 'high'"]),
        ("output: o\nrows: {a: {}}\npublished: {source: x, rows: {}}", ["published.rows: found {}"]),
        ("output: o\nrows: {a: {}}\npublished: {sorce: x}", ["unknown key 'published.sorce'", "'source'"]),
        ("output: o\nrows: {a: {}}\npredictions: {files: {b: f}}", ["predictions.data: found None"]),
        ("output: o\nrows: {a: {}}\npredictions: {data: d, files: {a: f}}", ["files.a", "is trained"]),
        ("output: o\nrows: {a: {}}\npredictions: {data: d, files: {b: 3}}", ["files.b: found 3"]),
        ("output: o\nrows: {a: {}}\npredictions: {data: d, letters: 1, files: {b: f}}", ["letters: found 1"]),
        ("output: o\nrows: {a: {}, a: {}}", ["'a' a second time"]),
        ("rows: {a: {}}", ["output: found nothing"]),
        ("base: base.yaml\nrows: {a: {}}", ["output: found nothing"]),
        ("base: t.yaml\noutput: o\nrows: {a: {}}", ["leads back to itself"]),
        ("base: t.yaml#a\noutput: o\nrows: {a: {}}", ["leads back to itself"]),
        (
            "output: o\nrows: {a: {}}\nablation: {untuned: [b]}",
            ["untuned: no row 'b' with a model", "known: a"],
        ),
        ("output: o\nrows: {a: {}}\nablation: {untuned: a}", ["ablation.untuned: found 'a'"]),
        (
            "output: o\nrows: {a: {}}\nablation: {progam: x}",
            ["unknown key 'ablation.progam'", "did you mean 'program'"],
        ),
        ("output: o\nrows: {a: {}}\nablation: {max_samples: 0}", ["ablation.max_samples: found 0"]),
        (
            "output: o\nrows: {a: {}}\nablation: {split: 3}",
            ["ablation.split: found 3, expected a text that is not empty or null"],
        ),
        ("output: o\nrows: {a: {}}\nablation: x", ["ablation: found 'x'"]),
    ],
)
def test_a_mistake_in_a_table_names_file_and_row(tmp_path, text, parts):
    path = write(tmp_path, base=BASE, t=text)
    with pytest.raises(InputError) as caught:
        read_table(path)
        read_recipe(Path(f"{path}#a"))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert ".yaml" in str(caught.value)


def test_a_row_may_stand_on_a_recipe_of_its_own_and_rows_may_be_answers(tmp_path):
    text = "output: runs/t\noptim: {lr: 0.5}\nrows:\n  a: {base: base.yaml, model: {adapter: {dim: 4}}}\n  b: {}\n"
    text += "published: {source: A page, rows: {human: {Average: 88.4}, a: {Average: 90, G1-6: 91.5}}}\n"
    text += "predictions: {data: data/Q, letters: true, files: {other: o.json, human: h.json}}\n"
    path = write(tmp_path, base=BASE, t=text)
    table = read_table(path)
    assert (list(table.rows), table.bases, table.lines) == (
        ["a", "b"],
        {"a": "base.yaml"},
        ("human", "a", "other", "b"),
    )
    assert table.published.figures == {"human": {"Average": 88.4}, "a": {"Average": 90.0, "G1-6": 91.5}}
    assert table.published.columns == ("Average", "G1-6") and table.predictions.letters
    whole = {"output": "runs/t/a", "model.adapter.dim": 4, "model.adapter.groups": 4, "optim.lr": 0.5}
    assert read_recipe(Path(f"{path}#a")) == {**read_recipe(tmp_path / "base.yaml"), **whole}
    assert read_recipe(Path(f"{path}#b")) == {"output": "runs/t/b", "optim.lr": 0.5}
    with pytest.raises(InputError, match="row 'human' is a file of answers, which no recipe trains"):
        read_recipe(Path(f"{path}#human"))


def test_rows_may_be_a_file_of_their_own_that_tables_share(tmp_path):
    write(tmp_path, base=BASE, rows="rows:\n  a: {model: {adapter: {dim: 4}}}\n  b: {optim: {lr: 0.25}}\n")
    tables = [
        write(tmp_path, **{name: f"base: base.yaml\noutput: runs/{name}\noptim: {{lr: 0.5}}\nrows: rows.yaml\n"})
        for name in ("one", "two")
    ]
    assert [list(read_table(table).rows) for table in tables] == [["a", "b"]] * 2
    row = read_recipe(Path(f"{tables[1]}#b"))
    assert (row["optim.lr"], row["output"], row["model.adapter.dim"]) == (0.25, "runs/two/b", 8)
    for text, said in (
        ("rows: {a: {modle: {}}}\n", r"rows\.yaml: row 'a'.*modle"),
        ("rows: {}\noutput: x\n", r"rows\.yaml: found keys rows, output"),
        ("[]\n", "nothing else"),
    ):
        write(tmp_path, rows=text)
        with pytest.raises(InputError, match=said):
            read_table(tables[0])
    (tmp_path / "rows.yaml").unlink()
    with pytest.raises(InputError, match=r"rows\.yaml"):
        read_table(tables[0])

"""The data programs' command lines: each mistake is one line and exit code 2, and the program is called what the user
typed."""

import importlib
import subprocess
import sys

import pytest

from data_prep.pack import main as pack_main
from tests.support.processes import ROOT
from vltrain.cli import main as vltrain

GIVEN = ["--samples", "s.jsonl", "--tokenizer", "t", "--visual-tokens", "4", "--pack-length", "64", "--output", "out"]


def mistake(capsys, words: list[str]) -> str:
    assert vltrain(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "usage" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["pack", *GIVEN, "--pack-lenght", "64"], "unknown option '--pack-lenght', did you mean '--pack-length'?"),
        (["pack", *GIVEN, "--pack-lenght=64"], "did you mean '--pack-length'?"),
        (["pack", *GIVEN, "--over", "drop"], "unknown option '--over'"),
        (["prepare", "--sauce", "easyvqa"], "did you mean '--source'?"),
        (["peek", "folder", "--rwo", "3"], "did you mean '--row'?"),
        (["pack", *GIVEN[2:]], "required: --samples"),
        (["pack", *GIVEN, "--seed", "one"], "--seed: found 'one', expected a whole number"),
        (["pack", *GIVEN, "--seed"], "--seed: expected one argument"),
        (["pack", *GIVEN, "stray"], "unrecognized arguments: stray"),
        (["pack", *GIVEN, "--over-long", "cut"], "over-long: found 'cut', expected 'error' or 'drop'"),
        (["pack", *GIVEN, "--template", "mtt"], "did you mean 'mmt'?"),
        (["pack", *GIVEN, "--pack-length", "0"], "--pack-length: found 0, expected a number in [8, 16777216]"),
        (["prepare", "--source", "easyvqa", "--output", "out", "--options", "split"], "expected key=value"),
        (["pack", *GIVEN[:-1], "s3://b/packs"], "--output: found 's3://b/packs', expected a folder of this machine"),
        (["prepare", "--source", "easyvqa", "--output=gs://b/x"], "found 'gs://b/x', expected a folder of this"),
        (["peek", "nowhere"], "nowhere: not a folder of packed shards"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    assert named in mistake(capsys, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["prepare", "pack", "peek"])
def test_help_is_of_what_was_typed(capsys, monkeypatch, name):
    with pytest.raises(SystemExit) as ended:
        vltrain([name, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: vltrain {name} ")
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"data_prep.{name}").main()
    assert capsys.readouterr().out.startswith(f"usage: python -m data_prep.{name} ")


def test_as_a_module_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.pack", "--sample", "x"], cwd=ROOT, capture_output=True, text=True
    )
    expected = "error: python -m data_prep.pack: unknown option '--sample', did you mean '--samples'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize("module", ["data_prep.tokenizer", "data_prep.pretrain.__main__"])
def test_the_programs_that_are_no_commands_of_vltrain(capsys, monkeypatch, module):
    monkeypatch.setattr(sys, "argv", ["main.py", "--outptu", "x"])
    assert importlib.import_module(module).main() == 2
    name = module.removesuffix(".__main__")
    assert capsys.readouterr().err == f"error: python -m {name}: unknown option '--outptu', did you mean '--output'?\n"


def test_values_may_look_like_anything(capsys, tmp_path):
    """A value after `=` is no option, and a file that is not there is the only thing wrong here."""
    assert (
        pack_main(
            [
                *GIVEN[2:],
                f"--samples={tmp_path}/--odd.jsonl",
                "--tokenizer=asset://tiny_llama",
                f"--output={tmp_path}/out",
            ]
        )
        == 2
    )
    assert "--odd.jsonl: cannot be read" in capsys.readouterr().err

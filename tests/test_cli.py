"""The console script: finding a program, and ending well without one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vltrain import cli


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], []])
def test_help_lists_every_command_with_a_line(capsys, words):
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, summary) in cli.COMMANDS.items():
        assert any(line.split()[:1] == [name] and line.endswith(summary) for line in lines)


@pytest.mark.parametrize(
    ("word", "hint"), [("evalute", "did you mean 'evaluate'"), ("trian", "did you mean 'train'"), ("zzz", "known: ")]
)
def test_an_unknown_command_ends_with_code_2_and_the_nearest(capsys, word, hint):
    assert cli.main([word]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and hint in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_is_a_module_that_exists(name):
    assert importlib.util.find_spec(cli.COMMANDS[name][0]) is not None


def test_the_rest_of_the_words_and_the_exit_code_are_the_programs(monkeypatch):
    seen = []
    program = SimpleNamespace(main=lambda words: seen.append(words) or 3)
    monkeypatch.setattr(cli.importlib, "import_module", lambda module: program)
    assert cli.main(["train", "--model.adapter.dim", "8"]) == 3
    assert seen == [["--model.adapter.dim", "8"]]


def test_help_costs_no_import_of_torch():
    code = "import sys; from vltrain.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_console_script_is_this_function():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="vltrain")
    assert [script.load() for script in scripts] == [cli.main]


def test_python_m_vltrain_is_the_console_script():
    done = subprocess.run([sys.executable, "-m", "vltrain", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"vltrain {importlib.metadata.version('vltrain')}\n")
    assert subprocess.run([sys.executable, "-m", "vltrain", "trian"], capture_output=True).returncode == 2


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch, capsys):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    expected = importlib.metadata.version("vltrain")
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vltrain {expected}\n"

"""Shell completion, by the real shells: commands, options, recipe keys and their choices, recipes by name, files."""

import shutil
import subprocess

import pytest

from vltrain.cli import COMMANDS
from vltrain.config.keys import known_keys
from vltrain.programs.help import completion
from vltrain.programs.help.completion import SHELLS, choices_in, options_in

shtab = pytest.importorskip("shtab")

BASH = r"""
source "$1"
line="$2"; words=($line); [[ "$line" == *" " ]] && words+=("")
COMP_LINE="$line" COMP_POINT=${#line} COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
function=$(complete -p vltrain | sed 's/.*-F \([^ ]*\).*/\1/')
$function vltrain "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""
ASKED = {
    "vltrain tr": {"train"},
    "vltrain train --model.tu": {"--model.tune"},
    "vltrain train --model.tune ": {"adapters", "neck", "full"},
    "vltrain train --ds zero2 --model.adapter.kind loha": {"loha_weighted", "loha_router", "loha_silu"},
    "vltrain plan smollm2_e": {"smollm2_easyvqa"},
    "vltrain train --recipe table2#ba_8": {"table2#ba_8_2"},
    "vltrain train --ds zero3": {"zero3", "zero3_offload"},
    "vltrain check re": {"resume", "replay"},
    "vltrain evaluate RUN --eval.scorer c": {"caption"},
    "vltrain prepare --source ea": {"easyvqa"},
    "vltrain export RUN --format ad": {"adapters"},
    "vltrain completion ": set(SHELLS),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder, parser = tmp_path_factory.mktemp("completion"), completion.whole_parser(COMMANDS)
    for shell in SHELLS:
        (folder / shell).write_text(shtab.complete(parser, shell, preamble=completion._preamble()))
    return folder


def completed(shell: str, script, line: str, folder) -> set[str]:
    commands = {
        "bash": ["bash", "-c", BASH, "bash", str(script), line],
        "fish": ["fish", "--no-config", "-c", f"source {script}; complete -C '{line}'"],
    }
    done = subprocess.run(commands[shell], capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {line.split("\t")[0].strip() for line in done.stdout.splitlines() if line.strip()}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes(scripts, tmp_path, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for line, expected in ASKED.items():
        assert completed(shell, scripts / shell, line, tmp_path) == expected, line
    (tmp_path / "my-recipe.yaml").touch()
    for line in ("vltrain train --recipe my", "vltrain evaluate my", "vltrain plan --json my"):
        assert completed(shell, scripts / shell, line, tmp_path) == {"my-recipe.yaml"}, line


def test_every_shell_reads_its_script(scripts):
    for shell in SHELLS:
        if shutil.which(shell) is not None:
            done = subprocess.run([shell, "-n", str(scripts / shell)], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_script_knows_every_command_and_every_key(scripts):
    for shell in SHELLS:
        text = (scripts / shell).read_text()
        dashes = "-l " if shell == "fish" else "--"
        assert not [name for name in COMMANDS if name not in text] and not [
            key for key in known_keys() if f"{dashes}{key}" not in text
        ]


def test_options_are_read_off_a_help():
    text = """
      --recipe FILE  [quickstart]
      --rebuild
          make anew; --json writes the figures, as `--quiet` says nothing
      --bits 4|8|16|32     of the weights
      --temperature T, --top-p P, --port 8000   left out: none
      --checkpoint {FOLDER,best,
          none}   which
      --model.llm.config {KEY: VALUE, ...}  [{}]
      --model.llm.peft.targets [{q_proj,k_proj},...]
      usage: vltrain check resume RUN [--packs FOLDER] [--dry-run]
    """
    found = options_in(text)
    assert {name: value for name, value in found.items() if value is None} == dict.fromkeys(
        ("rebuild", "json", "quiet", "dry-run")
    )
    assert (
        found["recipe"] == "FILE"
        and found["packs"] == "FOLDER"
        and found["temperature"] == "T"
        and found["port"] == "8000"
    )
    assert choices_in(found["bits"]) == ["4", "8", "16", "32"] and choices_in(found["checkpoint"]) == [
        "FOLDER",
        "best",
        "none",
    ]
    assert (
        choices_in(found["model.llm.config"])
        == choices_in(found["model.llm.peft.targets"])
        == choices_in("FILE|-")
        == []
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bsh"], "found 'bsh', did you mean 'bash'?"),
        ([], "expected one of bash, zsh, fish"),
        (["bash", "--x", "y"], "unknown option '--x'"),
    ],
)
def test_a_mistake_is_one_line(words, told, capsys):
    assert completion.main(words, commands=COMMANDS) == 2
    assert told in capsys.readouterr().err


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert completion.main(["bash"], commands=COMMANDS) == 2
    assert (
        capsys.readouterr().err
        == "error: vltrain completion needs the package shtab; pip install 'vltrain[completion]'\n"
    )

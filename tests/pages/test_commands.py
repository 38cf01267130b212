"""Every command and program on a page does what the page says, over a folder that has what the page names.

Commands run in this process as they stand, with these exceptions. A training or a submission, which takes processes or
gigabytes of weights, is shown to resolve to a whole recipe (`--print_config`); the slow test trains what can be trained
here. An export is written without its proof, which the slow test makes. What needs a cluster, another package or
minutes is run by a test of its own (`ELSEWHERE`), and its options are looked up.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vltrain
from data_prep import tokenizer
from tests.attacks.attack import run_vltrain
from tests.pages.page import DATA, INSIDE, PAGES, Page
from tests.pages.world import SITE, environment, make_world
from tests.support.processes import ROOT
from vltrain.cli import COMMANDS
from vltrain.programs.studies import ablate

# Run by a test of its own: the beginning of the command, that test, and what stands there.
ELSEWHERE = {
    "bash launch/quickstart.sh": ("tests/programs/test_quickstart.py", "launch/quickstart.sh"),
    "bash launch/setup_env.sh": ("tests/programs/test_setup_env.py", "setup_env.sh"),
    "bash tests/gpu.sh": ("tests/gpu/test_gpu_script.py", "gpu"),
    "bash tests/lmms_eval.sh": ("tests/harness/test_lmms_eval.py", "pytest.mark.lmms_eval"),
    "python -m lmms_eval": ("tests/harness/test_lmms_eval.py", "lmms_eval"),
    "python -m tests.golden": ("tests/golden/test_golden.py", "golden"),
    "aws s3 cp": ("tests/programs/test_s3_packs.py", "system.put("),
    "vltrain check data s3://": ("tests/programs/test_s3_packs.py", '"check", "data", ADDRESS'),
    "vltrain check recipe": ("tests/programs/test_check_recipe.py", '"recipe",'),
    "vltrain serve": ("tests/serve/test_program.py", 'startswith("vltrain serve ")'),
    "vltrain importance": ("tests/programs/test_qformer_train.py", "importance"),
    "vltrain plan easyvqa_shapes": ("tests/mixtures/test_programs.py", 'program("plan", place.recipe'),
    "vltrain evaluate runs/easyvqa_shapes": ("tests/mixtures/test_programs.py", '"evaluate", str(place.run)'),
    "vltrain doctor": ("tests/programs/test_doctor.py", "doctor"),
    "vltrain audit": ("tests/audit/test_program.py", "vltrain audit"),
}
SCRIPTS = ("tests/run.sh", "tests/lowest.sh", "tests/fake_cuda.sh")  # which run the tests themselves
PROGRAMS = {"train_mmt": "quickstart", "train_qformer": "qformer_shapes"}  # of launch/, with their default recipes
LARGE = ("llama2_7b", "qformer_t5", "qformer_vicuna", "smollm2", "--bits 4", "s3://")  # weights, packs not here
COMMANDS_ON_PAGES = [command for page in PAGES for command in page.commands()]


@pytest.fixture(scope="module")
def world_of(tmp_path_factory) -> Callable[[str], Path]:
    """A folder for each page, whose commands come in order."""
    made: dict[str, Path] = {}

    def find(page: str) -> Path:
        if page not in made:
            made[page] = make_world(tmp_path_factory.mktemp("world"))
        return made[page]

    return find


@pytest.fixture
def here(world_of, request, monkeypatch) -> Path:
    """The world of the page that the test is of, as the current folder."""
    world = world_of(request.getfixturevalue("page_name"))
    enter(world, monkeypatch)
    return world


def enter(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(world / SITE)
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)  # the installed one, if a test before has loaded it


@pytest.fixture
def page_name(request) -> str:
    return request.node.callspec.params["command"].page


@pytest.mark.parametrize("command", COMMANDS_ON_PAGES, ids=str)
def test_a_command_works(command, here, monkeypatch):
    text, words = command.text, command.words
    for start, (test, mention) in ELSEWHERE.items():
        if text.startswith(start):
            assert mention in (ROOT / test).read_text(), f"{test} does not run it"
            return check_options(text, words)
    match words[0]:
        case "vltrain":
            run_here(words[1:], monkeypatch)
        case "deepspeed":
            name = Path(words[1]).stem
            assert Path(words[1]) == Path("launch") / f"{name}.py" and Path(words[1]).is_file()
            run_here(["train", *([] if "--recipe" in words else ["--recipe", PROGRAMS[name]]), *words[2:]], monkeypatch)
        case "bash":
            assert words[1] in SCRIPTS and subprocess.run(["bash", "-n", words[1]]).returncode == 0
        case "sbatch":
            array_task(words)
        case "eval":
            code, output = run_vltrain(text.split("vltrain ", 1)[1].split(")")[0].split())
            assert code == 0 and subprocess.run(["bash", "-n"], input=output.strip(), text=True).returncode == 0
        case "pip":
            extras = configparser.ConfigParser()
            extras.read(ROOT / "setup.cfg")
            assert set(re.findall(r"\[(\w+)\]", text)) <= set(extras["options.extras_require"])
        case "source":
            assert "venv .venv" in (ROOT / "launch" / "setup_env.sh").read_text()
        case "tensorboard":
            assert list(Path(words[words.index("--logdir") + 1]).glob("events*")) and shutil.which(
                "tensorboard", path=Path(sys.executable).parent
            )
        case "python" if words[2] == "data_prep.tokenizer":
            assert tokenizer.main(words[3:]) == 0
        case "python":
            assert (ROOT / words[2].replace(".", "/") / "__main__.py").is_file() or (
                ROOT / f"{words[2].replace('.', '/')}.py"
            ).is_file()
        case other:
            raise AssertionError(f"{command}: no one knows how to run {other!r}")


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`vltrain WORDS`, with the exceptions that the module names."""
    if words[0] in ("train", "submit"):
        words = [*without(words, "--ranks"), "--print_config"]
    elif words[0] == "evaluate":
        words = without(words, "--ranks")
    elif words[0] == "export":
        words = [*words, "--proof", "none"]
    elif words[0] == "ablate":  # what it would run is resolved, row by row
        monkeypatch.setattr(ablate, "run", lambda plan: 0 if plan.chosen else 1)
    elif words[:2] == ["check", "export"]:
        return
    elif words[0] == "scaling":  # of tables that nobody has trained here: tests/programs/test_scaling.py runs it
        code, output = run_vltrain(words)
        assert code == 2 and "no such file, expected the output folder of a table" in output
        return
    if words[0] == "ask" and not any(" " in word for word in words):
        monkeypatch.setattr(sys, "stdin", open(os.devnull))
    code, output = run_vltrain(words)
    assert code == 0, output[-3000:]
    if words[0] == "plan" and "llama2_7b_diht_scienceqa" in words:
        assert any(
            block.strip() in output for page in PAGES for _, block in page.blocks("text") if block.startswith("peak")
        ), "the page's figure is another"


def without(words: list[str], option: str) -> list[str]:
    place = words.index(option) if option in words else len(words)
    return words[:place] + words[place + 2 :]


def array_task(words: list[str]) -> None:
    """What Slurm would do with a task of the array."""
    script = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    assert all(word.startswith("--array=1-8") for word in words[1:script])
    done = subprocess.run(
        ["bash", *words[script:]],
        env={**environment(Path.cwd()), "SLURM_ARRAY_TASK_ID": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def check_options(text: str, words: list[str]) -> None:
    """The options of a command that is run elsewhere are its program's."""
    options = [word for word in words if word.startswith("--")]
    if words[0] == "vltrain":
        code, said = run_vltrain([words[1], "--help"])
    elif words[0] == "bash":
        said = Path(words[1]).read_text()
    else:
        return
    assert all(option in said for option in options), text


def test_inline_commands_and_their_options_exist():
    """Those that stand within the text, which are named and not shown in full."""
    helps: dict[str, str] = {}
    for page in PAGES:
        for text in page.inline():
            words = text.split()
            if words[0] == "vltrain" and len(words) > 1 and words[1][0] != "-":
                assert words[1] in COMMANDS, f"{page.name}: {text}"
                helps.setdefault(words[1], run_vltrain([words[1], "--help"])[1])
                for word in words[2:]:
                    assert not word.startswith("--") or word == "--help" or word.split("=")[0] in helps[words[1]], (
                        f"{page.name}: {text}"
                    )
            if words[0] in ("bash", "deepspeed") and len(words) > 1 and "/" in words[1]:
                assert (ROOT / words[1]).is_file(), f"{page.name}: {text}"


def programs(page: Page) -> list[str]:
    return [text for _, text in page.blocks("python")]


def test_every_program_on_a_page_is_run():
    """One here, the one that asks the server in tests/serve, the one that asks an export in test_newcomer.py."""
    assert {page.name: len(programs(page)) for page in PAGES if programs(page)} == {INSIDE.name: 2, DATA.name: 1}
    assert (
        "INSIDE.blocks" in (ROOT / "tests/serve/test_program.py").read_text()
        and "DATA.blocks" in (ROOT / "tests/programs/test_newcomer.py").read_text()
    )
    assert set().union(*(page.languages() for page in PAGES)) == {"bash", "python", "json", "yaml", "text"}


@pytest.fixture
def inside(world_of, monkeypatch) -> Path:
    world = world_of(INSIDE.name)
    enter(world, monkeypatch)
    return world


def test_the_python_program_works(inside, monkeypatch, capsys):
    """Its training is resolved, not run: tests/test_api.py trains."""
    monkeypatch.setattr("vltrain.api._on_ranks", lambda words, ranks: None)
    exec(programs(INSIDE)[0], {"vltrain": vltrain})
    answer, losses = capsys.readouterr().out.splitlines()[-2:]
    assert answer and losses.startswith("[")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [one for one in COMMANDS_ON_PAGES if re.match(r"vltrain train|deepspeed launch/train", one.text)],
    ids=str,
)
def test_a_training_trains(command, world_of):
    """As on the page, into a folder of its own; a large model is planned, which builds it without weights."""
    world, words = world_of(command.page), command.words
    if any(name in command.text for name in LARGE):
        recipe = words[words.index("--recipe") + 1]
        words = ["vltrain", "plan", recipe, *(["--bits", "4"] if "--bits" in words else [])]
    elif "--print_config" not in words:
        words += ["--output", f"trained/{command.line}", "--train.max_steps", "2"] + (
            ["--model.llm.source", "asset://tiny_llama"] if "table2_smollm2" in command.text else []
        )
    runner = [sys.executable, "-m"] if words[0] == "vltrain" else []
    done = subprocess.run(
        [*runner, *words], cwd=world, env=environment(world), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [one for one in COMMANDS_ON_PAGES if re.match(r"vltrain export|vltrain check export", one.text)], ids=str
)
def test_an_export_is_proven(command, world_of):
    world = world_of(command.page)
    words = command.words
    if words[1] == "export":
        shutil.rmtree(world / words[words.index("--output") + 1], ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=world, env=environment(world), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

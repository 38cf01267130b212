"""Style, lint and types: what runs before the tests and before a commit is the same, and looks at all there is."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
COMMANDS = [line for line in (ROOT / "tests" / "lint.sh").read_text().splitlines() if line.startswith(".venv/bin/")]


def test_hooks_run_the_commands_of_ci():
    """In the same order, over the whole tree, and with nothing to download."""
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == COMMANDS
    assert len(COMMANDS) == 3
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False


@pytest.mark.parametrize(("lint", "tests", "words", "code"), [
    (0, 0, [], 0), (1, 0, [], 1), (0, 3, [], 3), (1, 3, [], 3), (1, 0, ["tests/ops"], 0), (0, 4, ["-m", "slow"], 4),
])  # fmt: skip
def test_all_tests_go_with_them_and_either_fails_the_run(tmp_path, lint, tests, words, code):
    """tests/run.sh itself, in a checkout where what it starts only says so."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests")
    for name, exit_code in (("launch/setup_env.sh", 0), ("tests/lint.sh", lint), (".venv/bin/python", tests)):
        script = tmp_path / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(f'#!/usr/bin/env bash\necho "{name} $*" | tee -a "$PWD/started"\nexit {exit_code}\n')
        script.chmod(0o755)
    ran = subprocess.run(["bash", "tests/run.sh", *words], cwd=tmp_path, capture_output=True, text=True)
    started = (tmp_path / "started").read_text().splitlines()
    assert ran.returncode == code, ran.stderr
    assert started[0] == "launch/setup_env.sh --with test"
    assert any(line.startswith(".venv/bin/python -m pytest") and line.endswith(" ".join(words)) for line in started)
    assert ("tests/lint.sh " in started) == ("tests/lint.sh " in ran.stdout) == (not words)
    assert "bash tests/run.sh" in (ROOT / ".ci" / "run").read_text()


def test_ruff_reads_every_file():
    """A folder's name in `exclude` hides every folder of that name: vltrain/data, for one that was meant for ./data."""
    ruff = Path(sys.executable).with_name("ruff")
    shown = subprocess.run([ruff, "check", "--show-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    read = {Path(line).resolve().relative_to(ROOT.resolve()) for line in shown.splitlines()}
    for folder in ("vltrain", "data_prep", "launch", "tests"):
        assert {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")} <= read


def test_types_are_checked_everywhere():
    folders = SETTINGS["basedpyright"]["include"]
    assert set(folders) == {"vltrain", "data_prep", "launch"}
    assert not {"exclude", "ignore"} & SETTINGS["basedpyright"].keys()


@pytest.mark.parametrize("room", SETTINGS["basedpyright"]["strict"])
def test_strict_rooms_have_no_baseline(room):
    files = {
        str(path.relative_to(ROOT))
        for found in ROOT.glob(room)
        for path in (found.rglob("*.py") if found.is_dir() else [found])
    }
    assert files, "a name of nothing"
    known = json.loads((ROOT / ".basedpyright" / "baseline.json").read_text())["files"]
    assert not files & {path.removeprefix("./") for path in known}

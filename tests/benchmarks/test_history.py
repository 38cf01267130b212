"""The log of speed says what was measured, and two commits are compared by turns; nothing is asserted on time."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tests.benchmarks import compare, history
from tests.benchmarks.train import lines

MACHINE = {"device": "a CPU", "cores": 2, "threads": 1, "load_average": [0.5, 0.4, 0.3]}
OURS = """
import os, time
DTYPES = {"fp32": None, "bf16": None}
def benchmark_config(quick, **changes): return changes
def sizes(config, quick): return 10, 1
def our_trainer(config, dataset, dtype, *, ds): return config
class OurSteps:
    def __init__(self, config):
        from types import SimpleNamespace
        self.trainer = SimpleNamespace(monitor=SimpleNamespace(close=lambda: None))
    def step(self):
        print("a line that is no answer")
        return TOKENS
"""
STUBS = {
    "vltrain/__init__.py": "",
    "vltrain/train/zero/engine.py": "def init_distributed(): pass\ndef shutdown_distributed(): pass\n",
    "torch.py": "class cuda:\n    is_available = staticmethod(lambda: False)\ndef get_num_threads(): return 3\n",
    "tests/benchmarks/samples.py": "def scienceqa_like(count, **how): ...\ndef pack_samples(*how): return how\n",
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A checkout of three commits: two whose steps are of 7 and 9 tokens, and `broken`, which cannot train."""
    root = tmp_path / "toy"
    for name, text in {**STUBS, "tests/benchmarks/ours.py": OURS.replace("TOKENS", "7")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    commit(root, "init", "--quiet")
    save(root, "seven")
    (root / "tests/benchmarks/ours.py").write_text(OURS.replace("TOKENS", "9"))
    save(root, "nine")
    (root / "tests/benchmarks/ours.py").write_text("raise ValueError('no trainer in this one')")
    save(root, "broken")
    return root


def commit(root: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=root, check=True, capture_output=True)


def save(root: Path, tag: str) -> None:
    commit(root, "add", "--all")
    commit(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", tag)
    commit(root, "tag", tag)


def refused(capsys: pytest.CaptureFixture[str], call, *arguments) -> str:
    """The one line that ends the program with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == 2
    [told] = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    return told


def test_two_commits_take_turns_each_with_its_own_files(toy, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    compare.main(["seven", "nine", "--runs", "3", "--log", str(log)], toy)
    found = capsys.readouterr()
    turns = [one.split(":", 3)[-1].split(",")[0].strip() for one in found.err.splitlines() if " run " in one]
    assert turns == ["a", "b"] * 3
    assert "[7, 7, 7], [9, 9, 9]" in found.err and "second over first" in found.out
    first, second = (json.loads(one) for one in log.read_text().splitlines())
    assert [first["commit"], second["commit"]] == compare.resolved(["seven", "nine"], toy)
    assert (first["reference"], second["reference"]) == (second["commit"], first["commit"])
    assert first["threads"] == 3 and first["runs"] == 3 and first["ratio"] == pytest.approx(1 / second["ratio"])
    assert len(history.git("worktree", "list", root=toy).splitlines()) == 1
    assert history.git("status", "--porcelain", root=toy) == ""


def test_bad_input_to_a_comparison_is_one_line(toy, tmp_path, capsys):
    assert "'eight', expected a commit" in refused(capsys, compare.main, ["seven", "eight"], toy)
    assert "found 2, expected at least 3" in refused(capsys, compare.main, ["seven", "nine", "--runs", "2"], toy)
    assert "not a git checkout" in refused(capsys, compare.main, ["seven", "nine"], tmp_path)
    wanted = ["seven", "broken", "--runs", "3"]
    assert "does not train here: ValueError: no trainer in this one" in refused(capsys, compare.main, wanted, toy)
    assert "--cpu: threads that wait" in refused(capsys, compare.main, ["seven", "nine", "--cpu"], toy)
    nowhere = ["seven", "nine", "--log", str(tmp_path / "nowhere" / "log")]
    assert "does not exist" in refused(capsys, compare.main, nowhere, toy)
    assert len(history.git("worktree", "list", root=toy).splitlines()) == 1


def test_changes_of_no_commit_are_told_and_are_in_no_log(toy, tmp_path, capsys):
    (toy / "vltrain/__init__.py").write_text("raise ValueError('not committed')")
    compare.main(["seven", "nine", "--runs", "3"], toy)
    assert "not measured, for it is of no commit: changes in 1 files (vltrain/__init__.py" in capsys.readouterr().err
    assert "commit them first" in refused(capsys, history.measured_commit, tmp_path / "log", False, toy)
    commit(toy, "checkout", "--", ".")
    assert [history.measured_commit(tmp_path / "log", False, toy)] == compare.resolved(["broken"], toy)


def test_a_smoke_test_stays_out_of_the_log(capsys):
    assert "name another file" in refused(capsys, history.check_log, history.HISTORY, True)


def test_a_line_has_the_spread_and_the_ratio_of_rounds(tmp_path):
    speeds = {"ours": [4.0, 9.0, 8.0], "theirs": [2.0, 3.0, 8.0]}
    alone = history.line(commit="c", machine=MACHINE, precision="fp32", what="w", unit="u", values=[1.0])
    history.append([alone], tmp_path / "log")
    history.append(lines("c", "text", "bf16", speeds, False, False), tmp_path / "log")
    alone, beside = (json.loads(each) for each in (tmp_path / "log").read_text().splitlines())
    assert alone["ratio"] is None and alone["reference"] is None
    assert [beside[name] for name in ("median", "least", "most")] == [8.0, 4.0, 9.0]
    assert [beside[name] for name in ("reference", "ratio", "ratio_least", "ratio_most")] == ["theirs", 2.0, 1.0, 3.0]


def test_the_kept_log_is_whole():
    names = [one.name for one in fields(history.Line)]
    for one in history.HISTORY.read_text().splitlines():
        kept = json.loads(one)
        assert list(kept) == names and not kept["quick"] and kept["least"] <= kept["median"] <= kept["most"]


@pytest.mark.slow
@pytest.mark.skipif(history.git("rev-parse", "HEAD") is None, reason="this is no git checkout")
def test_a_commit_beside_itself():
    command = [sys.executable, "-m", "tests.benchmarks.compare", "HEAD", "HEAD", "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(history.ROOT)}
    done = subprocess.run(command, cwd=history.ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "second over first" in done.stdout and "differently" not in done.stderr

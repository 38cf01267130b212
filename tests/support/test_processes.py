"""A forked process is one of its own: what it is told, what it leaves, and how it ends."""

import signal
import time
from pathlib import Path

import torch

from tests.support.processes import ROOT, Forked, on_ranks, rank_environment, start, stop_ranks

SCRIPT = """
import os, pathlib, signal, sys
print(os.environ["RANK"], os.environ["WORLD_SIZE"], os.getcwd(), os.getsid(0) == os.getpid(), sys.argv[1:], __name__)
print("torch" in sys.modules, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, file=sys.stderr)
if sys.argv[-1] == "wait":
    pathlib.Path(sys.argv[1]).touch()
    signal.pause()
sys.exit(int(sys.argv[-1]))
"""


def test_it_is_told_all_and_its_words_and_code_come_back(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ranks = on_ranks(str(tmp_path / "script.py"), "a b", "0")
    assert [done.returncode for done in ranks] == [0, 0]
    for rank, done in enumerate(ranks):
        assert done.stdout == f"{rank} 2 {ROOT} True ['a b', '0'] __main__\n"
        assert done.stderr.split() == [str(not torch.cuda.is_available()), "True"]
    assert on_ranks(str(tmp_path / "script.py"), "7", num_ranks=1)[0].returncode == 7


def test_it_can_be_signalled_and_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for how in (signal.SIGTERM, signal.SIGKILL):
        environment, there = rank_environment(0, 1, 1), tmp_path / how.name
        words = [str(there), "wait"]
        process = start(str(tmp_path / "script.py"), words, environment, tmp_path / "out", folder=tmp_path)
        while not there.exists():
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.01)
        assert isinstance(process, Forked) == (not torch.cuda.is_available())
        stop_ranks([process], how)
        assert process.poll() == process.wait() == -how

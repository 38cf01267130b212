"""How a program ends: one line, the last, and an exit code that says the same."""

import errno
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from tests.support.processes import ROOT
from vltrain.errors import InputError, RunLost, exits_cleanly

DENIED = PermissionError(errno.EACCES, "Permission denied", "/data/samples.jsonl")


def ends(error: BaseException | None, capsys) -> tuple[int, str]:
    @exits_cleanly
    def main() -> int:
        if error is not None:
            raise error
        return 0

    code = main()
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (InputError("no samples"), 2, "error: no samples\n"),
        (InputError("quotes\na line\r\nend"), 2, "error: quotes a line  end\n"),
        (RunLost("rank 3 has gone"), 1, "error: rank 3 has gone\n"),
        (
            DENIED,
            2,
            "error: /data/samples.jsonl: Permission denied; give this user permission, or name another place\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.json"),
            2,
            "error: x.json: No such file or directory\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: No space left on device; free some space, or name another place\n",
        ),
        (MemoryError("Unable to allocate 9 GiB"), 2, "error: out of memory (Unable to allocate 9 GiB); use fewer"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_is_not_ours_is_one_line(capsys, monkeypatch, error, code, line):
    monkeypatch.delenv("RANK", raising=False)
    found, told = ends(error, capsys)
    assert found == code and told.startswith(line) and told.count("\n") == (error is not None)


@pytest.mark.parametrize(
    "error",
    [KeyError("ours"), AssertionError(), OSError("of a library"), ConnectionRefusedError(errno.ECONNREFUSED, "no")],
)
def test_what_may_be_ours_keeps_its_traceback(capsys, error):
    with pytest.raises(type(error)):
        ends(error, capsys)


def test_other_ranks_say_which_they_are_and_leave_ctrl_c_to_rank_0(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert ends(InputError("no"), capsys) == (2, "error (rank 3): no\n")
    assert ends(KeyboardInterrupt(), capsys) == (130, "")


@pytest.mark.parametrize("leave", [True, False])
def test_an_error_stands_on_a_line_of_its_own_below_progress_bars(capsys, leave):
    bars = [tqdm(total=3, file=sys.stderr, desc=name, leave=leave, mininterval=0) for name in ("outer", "inner")]
    for bar in bars:
        bar.update()
    _, told = ends(DENIED, capsys)
    assert told.split("\n")[-2].startswith("error: /data") and not list(tqdm._instances)


@pytest.mark.parametrize(
    ("output", "code", "told"), [("/dev/full", 2, "error: No space left on device"), ("closed", 141, "")]
)
@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"]])
def test_output_that_nobody_takes(words, output, code, told):
    command = [sys.executable, "-c", "import sys; from vltrain.cli import main; sys.exit(main())", *words]
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") if output == "/dev/full" else open(write, "w") as place:
        done = subprocess.run(command, cwd=ROOT, stdout=place, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == code and done.stderr.startswith(told) and done.stderr.count("\n") == bool(told)

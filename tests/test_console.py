"""What programs say: to a terminal, to a file, with --quiet, and in a run's log."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import warnings

import pytest

from tests.support.processes import ROOT
from vltrain import console, errors
from vltrain.console import Progress, Terminal, last_line, prints_are_logged, run_log, start_logging, watched
from vltrain.errors import InputError


@pytest.fixture
def told(monkeypatch):
    """Logging as a program of ours sets it up, on a stderr that is a file."""
    root, stream = logging.getLogger(), io.StringIO()
    before, level, showwarning = list(root.handlers), root.level, warnings.showwarning
    monkeypatch.setattr(sys, "stderr", stream)
    root.handlers[:] = [
        Terminal(stream)
    ]  # pytest adds its own to each part of a test, and start_logging leaves alone what others have set up
    root.setLevel(logging.INFO)
    yield stream
    logging.captureWarnings(False)
    warnings.showwarning = showwarning
    root.handlers[:], root.level = before, level


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


def test_progress_in_a_file_is_lines_by_time_with_an_eta(told, monkeypatch):
    clock = Clock(monkeypatch)
    start_logging()
    with Progress(total=2000, title="train", unit="step") as progress:
        for step in range(2000):
            clock.now += 1
            progress.update(1, f"loss {step}.5, 1,000 tokens/s")
    lines = told.getvalue().split("\n")
    assert "\r" not in told.getvalue() and lines.pop() == ""
    assert (
        lines[0]
        == "INFO vltrain.console: train: step 10 of 2,000 (0%), loss 9.5, 1,000 tokens/s, 00:10 so far, ETA 33:10"
    )
    steps = [int(re.search(r"step ([\d,]+) of", line).group(1).replace(",", "")) for line in lines]
    assert steps[:7] == [10, 20, 30, 40, 50, 60, 90] and steps[-1] == 2000 and len(steps) < 45
    assert max(after - before for before, after in zip(steps, steps[1:])) <= 120


def test_progress_that_goes_on_reckons_with_its_own_steps_alone(told):
    progress = Progress(total=100, initial=50, title="train", unit="step")
    progress.done = 75
    assert progress.line(25.0).endswith("step 75 of 100 (75%), 00:25 so far, ETA 00:25")
    assert Progress(total=None, title="images", unit="image").line(3.0) == "images: image 0, 00:03 so far"
    in_bytes = Progress(total=4_000_000, title="samples", unit="byte", in_bytes=True)
    in_bytes.done = 1_000_000
    assert in_bytes.line(1.0) == "samples: 1.00MB of 4.00MB (25%), 00:01 so far, ETA 00:03"


def test_what_is_soon_done_says_nothing(told):
    start_logging()
    assert list(watched(range(5), title="packs", unit="pack")) == [0, 1, 2, 3, 4] and told.getvalue() == ""


def test_quiet_shows_errors_and_the_last_line_alone(told, monkeypatch):
    clock = Clock(monkeypatch)
    start_logging(quiet=True)
    log = logging.getLogger("vltrain.some")
    with Progress(total=2, title="train", unit="step") as progress:
        clock.now += 500
        progress.update()
    log.info("no")
    log.warning("no")
    log.error("row failed")
    last_line("accuracy=0.5")
    assert told.getvalue() == "ERROR vltrain.some: row failed\naccuracy=0.5\n"
    start_logging()
    log.info("again")
    assert told.getvalue().endswith("INFO vltrain.some: again\n")


def test_other_ranks_show_errors_alone(told):
    start_logging(rank=1)
    logging.getLogger("vltrain.some").warning("no")
    last_line("no")
    logging.getLogger("vltrain.some").error("yes")
    assert told.getvalue() == "ERROR vltrain.some: yes\n"


def test_what_libraries_say_goes_to_the_runs_log_also_before_there_is_one(told, tmp_path):
    library = logging.getLogger("DeepSpeedLike")
    library.propagate = False
    library.addHandler(logging.StreamHandler(sys.stderr))
    start_logging(keeps_log=True)
    library.warning("config is odd")
    warnings.warn("is deprecated", FutureWarning)
    logging.getLogger("vltrain.some").warning("of ours")
    with run_log(tmp_path / "run.log"), prints_are_logged("DeepSpeedLike"):
        print("Setting ds_accelerator to cpu")
        print("Loading extension", file=sys.stderr)
        library.error("a library's error")
    assert told.getvalue() == "WARNING vltrain.some: of ours\nERROR DeepSpeedLike: a library's error\n"
    lines = (tmp_path / "run.log").read_text().split("\n")
    assert all(
        re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) ", line)
        for line in lines
        if line and not line.startswith(" ")
    )
    for said in (
        "DeepSpeedLike: config is odd",
        "FutureWarning: is deprecated",
        "some: of ours",
        "DeepSpeedLike: Setting ds_acc",
        "DeepSpeedLike: Loading",
    ):
        assert sum(said in line for line in lines) == 1, said


def test_a_library_that_sets_up_its_logging_meanwhile_is_routed_too(told, tmp_path):
    start_logging(keeps_log=True)
    library = logging.getLogger("LateLike")
    with run_log(tmp_path / "run.log"):
        with prints_are_logged("LateLike"):
            library.propagate = False
            library.addHandler(logging.StreamHandler(sys.stdout))
        library.info("says it once")
        library.error("and is heard")
    assert (
        told.getvalue() == "ERROR LateLike: and is heard\n"
        and (tmp_path / "run.log").read_text().count("says it once") == 1
    )


def test_without_a_log_a_librarys_warning_is_shown(told):
    start_logging()
    logging.getLogger("transformers").propagate = True
    logging.getLogger("library").warning("matters")
    logging.getLogger("library").info("does not")
    assert told.getvalue() == "WARNING library: matters\n"


@pytest.mark.parametrize(
    ("error", "kept", "has_traceback"),
    [
        (InputError("no\nsuch file"), "ERROR vltrain.console: no such file", False),
        (AssertionError("ours"), "AssertionError: ours", True),
    ],
)
def test_a_log_is_appended_to_and_ends_with_the_error(told, tmp_path, error, kept, has_traceback):
    start_logging(keeps_log=True)
    (tmp_path / "run.log").write_text("an earlier life\n")
    with pytest.raises(type(error)), run_log(tmp_path / "run.log"):
        assert errors.last_words_also_to is not None
        raise error
    text = (tmp_path / "run.log").read_text()
    assert (
        text.startswith("an earlier life\n")
        and text.rstrip().split("\n")[-1].endswith(kept)
        and ("Traceback" in text) == has_traceback
    )
    assert errors.last_words_also_to is None


@pytest.mark.parametrize("place", ["folder", "/dev/full"])
def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(told, tmp_path, place):
    start_logging(keeps_log=True)
    with run_log(tmp_path if place == "folder" else tmp_path.__class__(place)):
        for _ in range(3):
            logging.getLogger("vltrain.some").info("goes on")
    assert told.getvalue().count("goes on\n") == 3 and told.getvalue().count("the run continues without it") == 1
    assert "Traceback" not in told.getvalue()


def test_another_rank_writes_no_log(told, tmp_path):
    start_logging(rank=1, keeps_log=True)
    with run_log(tmp_path / "run.log", active=False):
        logging.getLogger("vltrain.some").info("of rank 1")
    assert not (tmp_path / "run.log").exists()


def test_what_an_embedding_program_has_set_up_stays():
    before = list(logging.getLogger().handlers)
    assert before, "pytest's own"
    start_logging(quiet=True, keeps_log=True)
    assert logging.getLogger().handlers == before


ON_A_TERMINAL = """
import logging, sys, time
from vltrain.console import Progress, start_logging, last_line
from vltrain.errors import InputError, exits_cleanly
start_logging(quiet="--quiet" in sys.argv)
@exits_cleanly
def main():
    with Progress(total=40, title="train", unit="step") as progress:
        for step in range(30):
            time.sleep(0.03)
            progress.update(1, f"loss {step}, 99 tokens/s")
            if step == 20:
                logging.getLogger("vltrain.some").warning("a line")
        if "fail" in sys.argv:
            raise InputError("it fails")
    last_line("done")
main()
"""


def on_a_terminal(*words: str) -> str:
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 120))
    with subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL, *words], cwd=ROOT, stdout=other, stderr=other) as child:
        os.close(other)
        text = b""
        while True:
            try:
                block = os.read(main, 4096)
            except OSError:
                break
            if not block:
                break
            text += block
        child.wait(60)
    os.close(main)
    return text.decode()


def test_on_a_terminal_there_is_a_bar_and_lines_stand_alone():
    text = on_a_terminal("fail")
    assert re.search(r"train:\s+\d+%\|.*\d+/40 \[\d\d:\d\d<\d\d:\d\d.*loss \d+, 99 tokens/s\]", text)
    shown = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]
    assert "WARNING vltrain.some: a line" in shown and shown[-2] == "error: it fails", shown


def test_on_a_terminal_quiet_shows_no_bar():
    assert on_a_terminal("--quiet") == "done\r\n"

"""Attacks on how programs live beside each other and end: two writers, signals, waits, launchers, what killed processes
leave behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.attacks.attack import AttackFailed, Shown, attack, refused, refuses, right, run_vltrain
from tests.attacks.inputs import pack_words, prepare_words, sample, write_json, write_jsonl
from tests.support.processes import ROOT
from vltrain.distributed.ranks import adopt_ranks
from vltrain.files import lock as locks
from vltrain.files.lock import lock_beside, lock_inside, one_writer
from vltrain.files.mode import umask_mode
from vltrain.prepared import made_once

TWO_WRITERS = "two writers of one folder"
LEFT_BEHIND = "what a killed process left behind"
ALONE = "one of several ranks that would train alone"
CONTRADICTS = "ranks that contradict themselves"
CTRL_C = "Ctrl-C"
WAITS = "a wait without bound"
LAST_LINE = "exit code and last line"


@contextlib.contextmanager
def held(lock: Path, folder: Path) -> Iterator[None]:
    """Another writer: a thread, which a lock tells from this one as it does a process."""
    ready, over = threading.Event(), threading.Event()

    def write() -> None:
        with one_writer(lock, folder):
            ready.set()
            over.wait(60)

    thread = threading.Thread(target=write)
    thread.start()
    assert ready.wait(30)
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def signed(lock: Path, **facts: Any) -> None:
    """A lock file that names a writer and that nobody holds."""
    record = {
        "host": "node7",
        "place": "another boot",
        "pid": 4711,
        "start": "1",
        "since": 1.7e9,
        "command": "vltrain train",
        "token": "t",
    }
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({**record, **facts}))


def samples_of(folder: Path) -> Path:
    return write_jsonl(folder / "s.jsonl", [sample(number) for number in range(4)])


def scienceqa_of(folder: Path) -> Path:
    problem = {
        "question": "Q?",
        "choices": ["x", "y"],
        "answer": 1,
        "hint": "H",
        "image": None,
        "grade": "grade2",
        "subject": "s",
        "lecture": "L",
        "solution": "E",
    }
    write_json(folder / "problems.json", {"7": problem})
    write_json(folder / "pid_splits.json", {"train": ["7"]})
    return folder


def me(*more: str) -> tuple[str, ...]:
    return (f"pid {os.getpid()}", f"host {os.uname().nodename}", "since 20", *more)


@attack(TWO_WRITERS)
def two_trainings(folder: Path) -> Shown:
    """A training into a folder in which another trains."""
    with held(lock_inside(folder / "run"), folder / "run"):
        return refused(
            ["train", "--output", folder / "run", "--data.root", folder / "data"],
            *me("writes there", "another --output"),
        )


@attack(TWO_WRITERS)
def two_preparations(folder: Path) -> Shown:
    """Samples prepared to where another process prepares some."""
    raw = scienceqa_of(folder / "raw")
    with held(lock_beside(folder / "out"), folder / "out"):
        return refused(prepare_words("scienceqa", raw, folder / "out"), *me("name another output"), untouched=raw)


@attack(TWO_WRITERS)
def two_packings(folder: Path) -> Shown:
    """Packs written to where another process writes some."""
    samples = samples_of(folder)
    with held(lock_beside(folder / "packs"), folder / "packs"):
        return refused(pack_words(samples, folder / "packs"), *me())


@attack(TWO_WRITERS)
def packs_by_another_path(folder: Path) -> Shown:
    """The same folder, named through a link."""
    samples = samples_of(folder)
    (folder / "real").mkdir()
    (folder / "link").symlink_to(folder / "real")
    with held(lock_beside(folder / "real" / "packs"), folder / "real" / "packs"):
        return refused(pack_words(samples, folder / "link" / "packs"), *me())


@attack(TWO_WRITERS)
def a_lock_without_a_name(folder: Path) -> Shown:
    """The lock is held by a program that has written no name into it, as an older vltrain does."""
    samples = samples_of(folder)
    with lock_beside(folder / "packs").open("w") as lock, changed(locks, SIGN_SECONDS=0.1):
        fcntl.flock(lock, fcntl.LOCK_EX)
        return refused(pack_words(samples, folder / "packs"), "another program", "writes there")


@attack(TWO_WRITERS)
def another_machine_whose_lock_does_not_reach_us(folder: Path) -> Shown:
    """A file system without locks between machines: the other's signs of life are all there is."""
    samples, stop = samples_of(folder), threading.Event()
    lock = lock_beside(folder / "packs")
    signed(lock)

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with changed(locks, POLL_SECONDS=0.05):
            return refused(pack_words(samples, folder / "packs"), "host node7", "pid 4711")
    finally:
        stop.set()
        thread.join()


@attack(LEFT_BEHIND)
def the_lock_of_a_killed_writer(folder: Path) -> Shown:
    """A process was killed while it packed: its lock's file and its temporary folder are there."""
    samples, dead = samples_of(folder), dead_pid()
    signed(lock_beside(folder / "packs"), place=locks._place(), pid=dead)
    (folder / f".packs.{dead}.tmp").mkdir()
    (folder / f".packs.{dead}.tmp" / "tokens.spool").write_text("x")
    code, output = run_vltrain(pack_words(samples, folder / "packs"))
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    if code or left or not (folder / "packs").is_dir():
        raise AttackFailed("unclear", f"exit code {code}, left {left}: {output}")
    return right("taken over, and cleaned up")


@attack(LEFT_BEHIND)
def the_folder_of_a_living_process(folder: Path) -> Shown:
    """A temporary folder beside the output belongs to a process that lives: it is not ours to remove."""
    samples = samples_of(folder)
    theirs = folder / f".packs.{os.getppid()}.tmp"
    theirs.mkdir()
    code, output = run_vltrain(pack_words(samples, folder / "packs"))
    if code or not theirs.is_dir():
        raise AttackFailed("silent", f"exit code {code}, removed: {not theirs.is_dir()}: {output}")
    return right("kept")


@attack(LEFT_BEHIND)
def the_probe_of_a_killed_process(folder: Path) -> Shown:
    """What asks for the umask's mode was killed between two lines, in a container where each start has the same process
    id."""
    left = [folder / f".mode.{pid}.tmp" for pid in (os.getpid(), 2**22 - 1)]
    for path in left:
        path.touch()
    mode = umask_mode(folder)
    assert mode == umask_mode(folder) and not any(map(os.path.lexists, left)), sorted(
        path.name for path in folder.iterdir()
    )
    return right("removed, and the mode is told")


@attack(LEFT_BEHIND)
def a_name_that_is_a_pattern(folder: Path) -> Shown:
    """An output whose name is a pattern of the shell removes nobody else's files."""
    samples, dead = samples_of(folder), dead_pid()
    other = folder / f".packs.{dead}.tmp"
    other.mkdir()
    code, output = run_vltrain(pack_words(samples, folder / "pack[s]"))
    if code or not other.is_dir():
        raise AttackFailed("silent", f"exit code {code}: {output}")
    return right("another output's leftovers stay")


def _alone(kind: str, name: str, what: str, environment: dict[str, str], *needles: str) -> None:
    """An attack on `adopt_ranks`: must be refused."""

    def run(folder: Path) -> Shown:
        return refuses(lambda: adopt_ranks(dict(environment), 0), *needles)

    run.__name__, run.__doc__, run.__module__ = name, what, __name__
    attack(kind)(run)


_alone(
    ALONE,
    "open_mpi_on_two_hosts",
    "mpirun over two nodes; nobody says where the ranks can meet.",
    {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    },
    "Open MPI",
    "MASTER_ADDR",
    "mpirun -x",
)
_alone(
    ALONE,
    "open_mpi_without_local_size",
    "Open MPI's rank and size alone.",
    {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
    "Open MPI",
    "rank 0 of 2",
)
_alone(
    ALONE,
    "mvapich",
    "mpirun_rsh over two nodes.",
    {
        "MV2_COMM_WORLD_RANK": "0",
        "MV2_COMM_WORLD_SIZE": "4",
        "MV2_COMM_WORLD_LOCAL_RANK": "0",
        "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "MVAPICH2",
    "MASTER_ADDR",
)
_alone(
    ALONE,
    "hydra",
    "mpiexec of MPICH or Intel MPI over two nodes.",
    {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
    "Intel MPI",
    "MASTER_ADDR",
    "-genv",
)
_alone(
    ALONE,
    "pmix_of_unknown_size",
    "A PMIx launcher, which does not say among how many.",
    {"PMIX_RANK": "3", "PMIX_NAMESPACE": "prterun-7@1"},
    "PMIX_RANK=3",
    "among how many",
)
_alone(ALONE, "a_world_without_rank", "WORLD_SIZE without RANK.", {"WORLD_SIZE": "4"}, "WORLD_SIZE=4", "no RANK")
_alone(ALONE, "a_local_rank_without_rank", "LOCAL_RANK without RANK.", {"LOCAL_RANK": "1"}, "LOCAL_RANK=1", "no RANK")
_alone(
    ALONE,
    "nobody_says_where",
    "RANK and WORLD_SIZE without a place to meet.",
    {"RANK": "0", "WORLD_SIZE": "2"},
    "MASTER_ADDR=unset",
)
_alone(
    CONTRADICTS,
    "rank_beyond_the_world",
    "RANK >= WORLD_SIZE.",
    {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
    "RANK=2 and WORLD_SIZE=2",
)
_alone(CONTRADICTS, "rank_without_world", "RANK without WORLD_SIZE.", {"RANK": "0"}, "RANK=0 and WORLD_SIZE=unset")
_alone(
    CONTRADICTS, "rank_is_no_number", "RANK that is no number.", {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: found '-1'"
)
_alone(
    CONTRADICTS,
    "arabic_digits",
    "A world size in digits of another script.",
    {"RANK": "0", "WORLD_SIZE": "\u0662"},
    "WORLD_SIZE: found",
)
_alone(
    CONTRADICTS,
    "local_rank_beyond_the_machine",
    "LOCAL_RANK >= LOCAL_WORLD_SIZE.",
    {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    },
    "LOCAL_RANK=2",
)
_alone(
    CONTRADICTS,
    "mpi_and_torch_disagree",
    "RANK of an outer launcher beside mpirun's.",
    {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "RANK=0 and WORLD_SIZE=1",
    "Open MPI says that this is rank 1 of 2",
)
_alone(
    CONTRADICTS,
    "mpi_rank_beyond_its_world",
    "mpirun's variables of two jobs.",
    {"PMI_RANK": "5", "PMI_SIZE": "2"},
    "contradicts itself",
    "PMI_RANK",
)


@attack(ALONE)
def mpi_on_one_host(folder: Path) -> Shown:
    """mpirun on one host, inside a job of Slurm's whose srun started mpirun's own process: its ranks are adopted, and
    meet at one port."""
    found = []
    for rank in range(2):
        local = {
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            "PMIX_NAMESPACE": "prterun-7@1",
        }
        slurm = {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0",
            "SLURM_NTASKS": "1",
            "SLURM_JOB_ID": "9",
        }
        environment = {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2", **local, **slurm}
        adopt_ranks(environment, 0)
        found.append(
            tuple(
                environment[name]
                for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            )
        )
    port = found[0][-1]
    if found != [(str(rank), "2", str(rank), "2", "127.0.0.1", port) for rank in range(2)]:
        raise AttackFailed("silent", f"{found}")
    return right(f"rank and size as mpirun says, both at port {port}")


def shows_interrupted(code: int, output: str, folder: Path) -> Shown:
    lines = [line for line in output.splitlines() if line.strip()]
    if "Traceback" in output or code != 130 or lines[-1:] != ["interrupted"]:
        raise AttackFailed("traceback" if "Traceback" in output else "unclear", f"exit code {code}: {output[-500:]}")
    if any(path.name.endswith((".tmp", ".lock")) for path in folder.rglob("*")):
        raise AttackFailed("half written", f"{sorted(folder.rglob('*'))}")
    return right("interrupted, 130, nothing left")


@attack(CTRL_C)
def ctrl_c_while_packing(folder: Path) -> Shown:
    """Ctrl-C while a pack's samples are read: its temporary folder and its lock go, too."""
    samples_of(folder)
    script = "import os, signal, threading, sys\nfrom vltrain.cli import main\n"
    strike = (
        "import contextlib, data_prep.pack as m\nreal = m.write_shards\n@contextlib.contextmanager\ndef "
        "late(*words, **named):\n"
        "    with real(*words, **named) as writer:\n        os.kill(os.getpid(), signal.SIGINT)\n        yield "
        "writer\nm.write_shards = late\n"
    )
    words = [str(word) for word in pack_words(folder / "s.jsonl", folder / "packs")]
    command = [sys.executable, "-c", f"{script}{strike}sys.exit(main({words!r}))"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    return shows_interrupted(done.returncode, f"{done.stdout}\n{done.stderr}", folder)


@attack(CTRL_C)
def ctrl_c_during_imports(folder: Path) -> Shown:
    """Ctrl-C while the program is imported, by a module that swallows exceptions."""
    (folder / "slow_program.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(5)\nexcept "
        "BaseException:\n    pass\ndef main(words): return 0\n"
    )
    command = (
        "import sys; from vltrain import cli; cli.COMMANDS['plan'] = ('slow_program', ''); sys.exit(cli.main(['plan']))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    return shows_interrupted(done.returncode, f"{done.stdout}\n{done.stderr}", folder)


@attack(CTRL_C)
def ctrl_c_while_waiting_for_data(folder: Path) -> Shown:
    """Ctrl-C while another process makes the data that is waited for."""
    result = folder / "samples"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with held(lock_beside(result), result):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                made_once.made_once(lambda: None, result, remedy="-")
            except KeyboardInterrupt:
                return right("the wait ends at once")
    finally:
        signal.signal(signal.SIGINT, before)
    raise AttackFailed("wait", "the signal was not heard")


@attack(WAITS)
def a_rank_0_that_never_makes_the_data(folder: Path) -> Shown:
    """Rank 1 waits for data, and rank 0, on another node, has died."""
    before = os.environ.get("RANK")
    os.environ["RANK"] = "1"
    try:
        with changed(made_once, UNSEEN_SECONDS=0.2, POLL_SECONDS=0.05):
            return refuses(
                lambda: made_once.made_once(lambda: None, folder / "samples", remedy="-"),
                "nobody has made it",
                "rank 0 has ended",
            )
    finally:
        os.environ.pop("RANK")
        if before is not None:
            os.environ["RANK"] = before


@attack(WAITS)
def a_writer_that_never_ends(folder: Path) -> Shown:
    """Another run makes the data, and does not come to an end."""
    result = folder / "samples"
    with held(lock_beside(result), result), changed(made_once, LONGEST_SECONDS=0.3), changed(locks, POLL_SECONDS=0.05):
        return refuses(
            lambda: made_once.made_once(lambda: None, result, remedy="choose another data.root"),
            *me("choose another data.root"),
        )


@attack(WAITS)
def a_launcher_that_is_killed(folder: Path) -> Shown:
    """A rank's launcher is killed and can end nobody: the rank waits for ever."""
    (folder / "torchrun").write_text(
        "import subprocess, sys, time\n"
        "rank = 'import time; from vltrain.files.processes import end_with_launchers; end_with_launchers(); "
        "print(1, flush=True); time.sleep(600)'\n"
        "subprocess.Popen([sys.executable, '-c', rank])\ntime.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
    launcher = subprocess.Popen(
        [sys.executable, folder / "torchrun"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None and launcher.stderr is not None
    launcher.stdout.readline()  # the rank watches now
    launcher.kill()
    launcher.wait()
    _, last = launcher.communicate(timeout=60)  # ends when the rank has closed its output
    if f"error: its launcher (torchrun, pid {launcher.pid}) has died" not in last:
        raise AttackFailed("unclear", last)
    return right(last.strip())


@attack(LAST_LINE)
def output_on_a_full_disk(folder: Path) -> Shown:
    """Figures that go to a full disk: exit code 0 would say that they are there."""
    command = [sys.executable, "-c", "import sys; from vltrain.cli import main; sys.exit(main())", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    if done.returncode != 2 or not done.stderr.startswith("error: No space left") or done.stderr.count("\n") != 1:
        raise AttackFailed(
            "silent" if done.returncode == 0 else "unclear", f"exit code {done.returncode}: {done.stderr}"
        )
    return Shown("refused", done.stderr.strip())


@attack(LAST_LINE)
def a_folder_where_a_file_is_expected(folder: Path) -> Shown:
    """A file of samples that is a folder."""
    (folder / "s.jsonl").mkdir()
    return refused(pack_words(folder / "s.jsonl", folder / "packs"), str(folder / "s.jsonl"), untouched=folder)


@attack(LAST_LINE)
def an_output_below_a_file(folder: Path) -> Shown:
    """An output whose parent is a file."""
    samples = samples_of(folder)
    (folder / "file").write_text("")
    return refused(pack_words(samples, folder / "file" / "packs"), "cannot be written", untouched=folder)

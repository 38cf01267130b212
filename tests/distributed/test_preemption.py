"""A signal at any moment ends a run with a checkpoint and the code that requeues; the run goes on as if nothing had
been. Real processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import ROOT, deepspeed_command, run_ranks, start_ranks, stop_ranks
from tests.support.tiny import make_segments, write_packs
from vltrain.distributed.preemption import (
    CAUTION,
    EXIT_REQUEUE,
    RESERVE_SECONDS,
    UNSEEN_SAVE_SECONDS,
    Preemption,
    time_limit_end,
)
from vltrain.errors import EXIT_INTERRUPTED
from vltrain.train.checkpoints.checkpoint import open_checkpoint
from vltrain.train.safety import RunSafety
from vltrain.train.trainer import Trainer

NUM_STEPS = 60
CHANGES = {
    "train__packs_per_step": 3, "train__epochs": 1000.0, "train__save_every_steps": 7, "model__adapter__dropout": 0.1,
    "optim__lr": 1e-3, "data__workers": 1,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    return write_packs(tmp_path_factory.mktemp("preemption") / "packs", make_segments(14))


def scenario(packs: Path, output: Path, num_steps: int = NUM_STEPS, **changes) -> str:
    file = output.parent / f"{output.name}.json"
    ds = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500}}
    one = {"name": output.name, "packs": str(packs), "output": str(output), "ds": ds, "resume": True, "listens": True}
    file.write_text(json.dumps([{**one, "changes": {**CHANGES, "train__max_steps": num_steps, **changes}}]))
    return str(file)


def progress(output: Path, rank: int) -> int:
    return int((output / f"progress.{rank}").read_text())


def wait_for(condition, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def newest_step(output: Path) -> int:
    return open_checkpoint(output / "checkpoints" / (output / "checkpoints" / "latest").read_text().strip()).step


def signal_and_wait(processes: list[subprocess.Popen], output: Path, generator: random.Random, until: int) -> bool:
    """Signals a random rank, or all processes of both, soon after `until` steps. Checks what comes of it. False if the
    run ended before."""
    rank, number = generator.randrange(2), generator.choice([signal.SIGTERM, signal.SIGUSR1])
    told = [output / f"progress.{one}" for one in range(2)]  # both, since both are asked how far they are
    wait_for(
        lambda: (
            processes[rank].poll() is not None
            or (all(file.exists() for file in told) and progress(output, rank) >= until)
        )
    )
    time.sleep(generator.uniform(0, 0.15))
    if any(process.poll() is not None for process in processes):
        return False
    before = min(progress(output, one) for one in range(2))
    if generator.random() < 0.5:
        processes[rank].send_signal(number)
    else:
        for process in processes:
            os.killpg(process.pid, number)
    after = max(progress(output, one) for one in range(2))
    codes = [process.wait(timeout=60) for process in processes]
    if codes == [0, 0]:
        assert (
            after
            >= json.loads((output.parent / f"{output.name}.json").read_text())[0]["changes"]["train__max_steps"] - 2
        )
        return False
    assert codes == [EXIT_REQUEUE] * 2
    assert before <= newest_step(output) <= after + 2
    return True


def preempt_often(packs: Path, folder: Path, num_signals: int, num_steps: int) -> None:
    whole, broken = folder / "whole", folder / "broken"
    run_ranks("tests.train.worker", [scenario(packs, whole, num_steps)], 2, folder / "log-whole")
    generator, arguments = random.Random(num_signals), [scenario(packs, broken, num_steps)]
    stride = (num_steps - 5) // num_signals
    for moment in range(num_signals):
        done = newest_step(broken) if moment else 0
        processes = start_ranks("tests.train.worker", arguments, 2, folder / "log-broken")
        try:
            assert signal_and_wait(
                processes, broken, generator, until=max(done, moment * stride + generator.randrange(stride))
            )
        finally:
            stop_ranks(processes)
        for rank in range(2):
            (broken / f"progress.{rank}").unlink()
    run_ranks("tests.train.worker", arguments, 2, folder / "log-last")
    assert (broken / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    expected, found = load_file(whole / "result.safetensors"), load_file(broken / "result.safetensors")
    assert [
        name for name in expected if not name.startswith("gradient/") and not torch.equal(expected[name], found[name])
    ] == []


@pytest.mark.slow  # one signal, to a launcher and to its group, is heard and gone on from below
def test_signals_at_random_moments(packs, tmp_path):
    preempt_often(packs, tmp_path, num_signals=2, num_steps=NUM_STEPS)


@pytest.mark.slow
def test_signals_at_50_random_moments(packs, tmp_path):
    preempt_often(packs, tmp_path, num_signals=50, num_steps=400)


@pytest.mark.slow
@pytest.mark.parametrize("whom", [pytest.param("rank", marks=pytest.mark.slow), "group"])
def test_under_deepspeeds_launcher(packs, tmp_path, whom):
    """A signal to a rank comes out as the code; its launcher ends with a code of its own when itself is told to end,
    but not before the save."""
    output = tmp_path / "run"
    command, environment = deepspeed_command(
        "--module", "tests.support.rank", "tests.train.worker", scenario(packs, output, 100_000)
    )
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: launcher.poll() is not None or ((output / "progress.1").exists() and progress(output, 1) >= 9))
        started = psutil.Process(launcher.pid).children(recursive=True)
        if whom == "rank":
            next(
                one for one in started if "tests.train.worker" in one.cmdline() and one.environ().get("RANK") == "1"
            ).send_signal(signal.SIGUSR1)
        else:
            os.killpg(launcher.pid, signal.SIGTERM)
        after = progress(output, 1)
        code = launcher.wait(timeout=60)
        psutil.wait_procs(started, timeout=40)
        assert (code == EXIT_REQUEUE) == (whom == "rank") and code != 0
        assert after <= newest_step(output) <= after + 3, (tmp_path / "log").read_text()[-3000:]
        assert "exits with code 85" in (tmp_path / "log").read_text()
    finally:
        stop_ranks([launcher])


def run_without_model(kind: str, folder: Path, *signals: tuple[float, signal.Signals]) -> int:
    """Starts a rank without a model, sends it (seconds, signal) each, and returns its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.preemption_worker", kind, str(folder)], cwd=ROOT
    )
    try:
        wait_for((folder / "ready").exists)
        for seconds, number in signals:
            time.sleep(seconds)
            process.send_signal(number)
        return process.wait(timeout=30)
    finally:
        process.kill()


def test_before_training_a_signal_ends_it_at_once_and_cleans_up(tmp_path):
    assert run_without_model("prepare", tmp_path, (0, signal.SIGTERM)) == EXIT_REQUEUE
    assert (tmp_path / "cleaned").exists()


def test_ctrl_c_ends_it_with_a_code_of_its_own(tmp_path, capfd):
    assert run_without_model("prepare", tmp_path, (0, signal.SIGINT), (0.1, signal.SIGTERM)) == EXIT_INTERRUPTED
    said = capfd.readouterr().err
    assert said == f"SIGINT: nothing to save; exits with code {EXIT_INTERRUPTED}; run the same command to resume\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_REQUEUE), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_one_signal_is_enough_where_no_step_ends(tmp_path, capfd, number, code):
    """As in a collective whose other rank is gone."""
    assert run_without_model("hung", tmp_path, (0, number)) == code
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {number.name}: no step has ended within") and f"ends with code {code}" in last


def test_a_background_job_hears_no_ctrl_c(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what it does not wait for
    try:
        assert run_without_model("prepare", tmp_path, (0, signal.SIGINT), (0.5, signal.SIGTERM)) == EXIT_REQUEUE
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_a_rank_that_no_longer_answers(tmp_path):
    codes = run_without_model("stuck", tmp_path, (0, signal.SIGUSR1), (0.1, signal.SIGTERM), (2.5, signal.SIGTERM))
    assert codes == 128 + signal.SIGTERM


def test_the_time_limit_ends_what_comes_to_no_step(tmp_path):
    """It would sleep for a minute, which `run_without_model` does not wait for."""
    assert run_without_model("limit", tmp_path) == EXIT_REQUEUE


def test_processes_that_decode_hear_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.preemption_worker", "worker", str(tmp_path)], cwd=ROOT
    )
    wait_for((tmp_path / "ready").exists)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    alive = child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    child.kill()
    process.kill()
    process.wait()
    assert alive


def test_the_margin_learns():
    preemption = Preemption(time.time() + 100)
    assert preemption.margin_seconds() == CAUTION * UNSEEN_SAVE_SECONDS + RESERVE_SECONDS
    with preemption.saving():
        time.sleep(0.2)
    assert preemption.margin_seconds() == pytest.approx(CAUTION * 0.2 + RESERVE_SECONDS, abs=0.2)
    time.sleep(0.4)
    assert not preemption.agreed(CPU)
    assert preemption.margin_seconds() == pytest.approx(CAUTION * (0.2 + 2 * 0.4) + RESERVE_SECONDS, abs=0.3)


@pytest.mark.parametrize(
    ("seconds", "leaves"), [(RESERVE_SECONDS + CAUTION * UNSEEN_SAVE_SECONDS + 5, False), (RESERVE_SECONDS, True)]
)
def test_it_leaves_before_the_limit(seconds, leaves):
    assert Preemption(time.time() + seconds).agreed(CPU) is leaves


def test_the_earlier_limit_counts():
    assert time_limit_end({}, None, 0) is None
    assert time_limit_end({"SLURM_JOB_END_TIME": "1000"}, None, 0) == 1000
    assert time_limit_end({"SLURM_JOB_END_TIME": "1000"}, 10, 0) == 600
    assert time_limit_end({"SLURM_JOB_END_TIME": "500"}, 10, 0) == 500


@pytest.mark.parametrize(
    ("world_size", "asked", "saved_before", "saves", "leaves"),
    [(1, True, 2, [3], [3]), (1, True, 3, [], [3]), (1, False, 2, [], []), (2, True, 2, [], [])],
)
def test_a_rank_alone_that_waits_for_data_saves_and_leaves(world_size, asked, saved_before, saves, leaves):
    """It stands at a step boundary; of several ranks the others may not."""
    saved, left = [], []
    safety = SimpleNamespace(
        world_size=world_size,
        preemption=SimpleNamespace(is_asked=asked),
        guard=SimpleNamespace(flush=lambda: None),
        leaves_alone=lambda: RunSafety.leaves_alone(safety),
    )
    trainer = SimpleNamespace(
        safety=safety,
        done=3,
        saved=saved_before,
        save=saved.append,
        _leave=left.append,
    )
    Trainer._leave_while_waiting(trainer)
    assert (saved, left) == (saves, leaves)

"""Kills runs over and over, and looks whether anything of them was lost:
`python -m tests.campaign --kills 100 --log campaign.log`.

A run of a tiny model is started, killed with SIGKILL at a random moment, resumed, killed again, until it ends; then it
is compared with an undisturbed run of the same ZeRO stage on as many ranks: the same weights, optimizer states and
receipt, bit for bit. Then the next run, until there were so many kills. The moments:

    start    at any time since the process began          step     at any time once steps are being done
    save     at one of the calls of a save to the file system: before or after an fsync, a rename, ...
    rename   before or after a rename                     partial  as soon as a half-written checkpoint can be seen
    worker   a process that decodes images, not the trainer, which then has to end by itself

Three lives in ten save in the background (train.async_save). On two ranks one of them, or both at once, are killed; the
other is ended a little later, as a launcher would. Every life is a process of its own, forked from one that has
imported everything, since importing takes longer than the training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from safetensors.torch import load_file

from tests.support.processes import free_port
from tests.support.tiny import make_segments, tiny_config, write_packs
from tests.train import worker
from vltrain.models.build import build_model
from vltrain.receipts.receipt import RECEIPT, read_receipt
from vltrain.receipts.verify import prove
from vltrain.train.checkpoints.checkpoint import newest_checkpoint
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

STEPS, SAVE_EVERY = 40, 3
CHANGES = {
    "train__packs_per_step": 3,
    "train__max_steps": STEPS,
    "train__epochs": 30.0,
    "train__save_every_steps": SAVE_EVERY,
    "optim__lr": 1e-3,
    "model__adapter__dropout": 0.1,
}
# (ZeRO stage, ranks) and how many runs of a dozen it has, in random order.
SETUPS = {(0, 1): 2, (1, 1): 2, (2, 1): 2, (3, 1): 2, (2, 2): 2, (3, 2): 2}
MOMENTS = {"start": 3, "step": 6, "save": 6, "rename": 3, "partial": 3, "worker": 2}
LIFE_SECONDS = 240.0


@dataclass(kw_only=True)
class Tally:
    """What the campaign found."""

    kills: Counter = field(default_factory=Counter)
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    receipts: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)

    def summary(self, seconds: float) -> str:
        moments = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({moments}) over {self.runs} runs in {seconds / 60:.1f} minutes: "
            f"{len(self.lost)} runs lost, "
            f"{len(self.receipts)} receipts with a step or sample repeated or left out, {len(self.weights)} "
            "runs with other final weights"
        )

    @property
    def good(self) -> bool:
        return not (self.lost or self.receipts or self.weights)


class Life:
    """One life of a run: its ranks as child processes."""

    def __init__(self, scenario: dict, world_size: int, log: Path, before: Callable[[int], None] | None = None) -> None:
        port = free_port()
        self.ranks = [_fork(scenario, rank, world_size, port, log, before) for rank in range(world_size)]
        self.codes: dict[int, int] = {}

    def alive(self) -> list[int]:
        """Pids of ranks that have not ended."""
        for pid in self.ranks:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.ranks if pid not in self.codes]

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            _kill_tree(pid)

    def finish(self, deadline: float) -> list[int]:
        """Waits for the end; when a rank has failed the others are ended, as a launcher does. Returns the exit
        codes."""
        while alive := self.alive():
            if time.monotonic() > deadline or any(self.codes.values()):
                time.sleep(0.1)
                self.kill(self.alive())
            time.sleep(0.005 if alive else 0)
        return [self.codes[pid] for pid in self.ranks]


def _fork(
    scenario: dict, rank: int, world_size: int, port: int, log: Path, before: Callable[[int], None] | None
) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        output = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        if before is not None:
            before(rank)
        init_distributed()
        worker.run(scenario, rank, world_size)
        shutdown_distributed()
        code = 0
    except BaseException as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _children(pid: int) -> list[int]:
    try:
        return [
            int(word)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def _decoders(pid: int) -> list[int]:
    """The processes of a rank that decode images, not those that only clean up after them."""

    def command(child: int) -> bytes:
        try:
            return Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            return b""

    return [child for child in _children(pid) if b"spawn_main" in command(child)]


def _kill_tree(pid: int) -> None:
    """SIGKILL to a rank of ours and to the processes that it has started."""
    for victim in (pid, *_children(pid)):
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _dies_at(call: int, after: bool, names: tuple[str, ...]) -> Callable[[int], None]:
    """Lets rank 0 kill itself at its `call`-th call of one of os's functions `names`."""

    def install(rank: int) -> None:
        if rank:
            return
        count = [0]

        def wrap(function: Callable) -> Callable:
            def counted(*args, **kwargs):
                count[0] += 1
                if count[0] == call and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*args, **kwargs)
                if count[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return counted

        for name in names:
            setattr(os, name, wrap(getattr(os, name)))

    return install


class Campaign:
    """Args: folder: for packs and runs; log: what happened, a line a kill."""

    def __init__(self, folder: Path, log: TextIO, seed: int) -> None:
        self.folder, self.log, self.random, self.tally = folder, log, random.Random(seed), Tally()
        self.packs = write_packs(folder / "packs", make_segments(14))
        self.whole: dict[tuple[int, int], Path] = {}
        self.bag: list[tuple[int, int]] = []

    def say(self, text: str) -> None:
        self.log.write(text + "\n")
        self.log.flush()

    def scenario(self, output: Path, stage: int, workers: int = 0, async_save: bool = False) -> dict:
        zero = {
            "stage": stage,
            "reduce_bucket_size": 500,
            **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        }
        changes = {**CHANGES, "data__workers": workers, "train__async_save": async_save}
        told = {"name": output.name, "packs": str(self.packs), "output": str(output), "ds": {"zero_optimization": zero}}
        return {**told, "changes": changes, "resume": True}

    def live(self, output: Path, stage: int, world_size: int) -> list[int]:
        """A life that is left alone. Returns its exit codes."""
        return Life(self.scenario(output, stage), world_size, _log_of(output)).finish(time.monotonic() + LIFE_SECONDS)

    def undisturbed(self, stage: int, world_size: int) -> Path:
        if (stage, world_size) not in self.whole:
            output = self.folder / f"whole-{stage}-{world_size}"
            codes = self.live(output, stage, world_size)
            assert codes == [0] * world_size, f"the undisturbed run failed: {codes}, see {_log_of(output)}.*"
            self.whole[stage, world_size] = output
        return self.whole[stage, world_size]

    def one_life(self, output: Path, stage: int, world_size: int, moment: str) -> bool:
        """Starts and kills a life of a run. Returns whether it was killed; else it had ended before."""
        before, steps, draw = None, _steps_done(output), self.random
        if moment in ("save", "rename"):
            names = ("rename",) if moment == "rename" else ("fsync", "rename", "mkdir", "replace", "rmdir", "unlink")
            before = _dies_at(draw.randint(1, 12 if moment == "rename" else 60), draw.random() < 0.5, names)
        began, deadline = time.monotonic(), time.monotonic() + LIFE_SECONDS
        scenario = self.scenario(output, stage, workers=int(moment == "worker"), async_save=draw.random() < 0.3)
        life = Life(scenario, world_size, _log_of(output), before)
        if before is None:
            self._wait_for(moment, life, output, steps, began)
            self._strike(moment, life)
        codes = life.finish(deadline)
        killed = any(codes)
        if killed and time.monotonic() >= deadline:
            self.tally.lost.append(f"{output.name}: hung")
        return killed

    def _wait_for(self, moment: str, life: Life, output: Path, steps: int, began: float) -> None:
        draw, root = self.random, output / "checkpoints"
        if moment == "start":
            end = began + draw.uniform(0.0, 2.5)
            while life.alive() and time.monotonic() < end:
                time.sleep(0.002)
        elif moment == "partial":
            while life.alive() and not any(root.glob(".partial-*")):
                pass
        else:
            while life.alive() and _lines(output) <= steps - steps % SAVE_EVERY + draw.randint(0, 3):
                time.sleep(0.002)
            time.sleep(draw.uniform(0.0, 0.1))

    def _strike(self, moment: str, life: Life) -> None:
        alive = life.alive()
        if moment == "worker":
            decoders = [child for pid in alive for child in _decoders(pid)]
            if decoders:
                os.kill(self.random.choice(decoders), signal.SIGKILL)
        elif alive:
            life.kill(alive if self.random.random() < 0.5 else [self.random.choice(alive)])

    def one_run(self, number: int, most_kills: int) -> None:
        """A run from its first life to its last, with at most so many kills; then its comparison with the undisturbed
        one."""
        if not self.bag:
            self.bag = [setup for setup, share in SETUPS.items() for _ in range(share)]
            self.random.shuffle(self.bag)
        stage, world_size = self.bag.pop()
        output = self.folder / f"run-{number}"
        reached, kills = 0, 0
        while True:
            moment = self.random.choices(list(MOMENTS), list(MOMENTS.values()))[0]
            if kills >= most_kills:
                codes = self.live(output, stage, world_size)
                if any(codes):
                    self.tally.lost.append(f"{output.name}: undisturbed at last, it ended with {codes}")
                break
            if not self.one_life(output, stage, world_size, moment):
                break
            kills += 1
            self.tally.kills[moment] += 1
            newest = newest_checkpoint(output / "checkpoints")
            step = newest.step if newest else 0
            reach = f"{_lines(output)} steps logged, newest checkpoint {step}"
            self.say(f"run {number} ZeRO-{stage} x{world_size}: killed at '{moment}', {reach}")
            if step < reached:
                self.tally.lost.append(f"{output.name}: checkpoint {reached} is gone, {step} is left")
            reached = step
        self.compare(output, self.undisturbed(stage, world_size))
        self.say(f"run {number} ZeRO-{stage} x{world_size}: ended after {kills} kills; so far {self.tally.summary(0)}")
        self.tally.runs += 1
        shutil.rmtree(output, ignore_errors=not self.tally.good)

    def compare(self, output: Path, whole: Path) -> None:
        tally, name = self.tally, output.name
        try:
            proof = prove(output, None, whole)
            found, expected = load_file(output / "result.safetensors"), load_file(whole / "result.safetensors")
        except Exception as error:  # whatever it is, this run has come to nothing
            tally.lost.append(f"{name}: {error}")
            return
        same = (output / RECEIPT).read_bytes() == (whole / RECEIPT).read_bytes()
        if proof.failures or not same or len(read_receipt(output / RECEIPT).lines) != STEPS:
            tally.receipts.append(f"{name}: {proof.failures}")
        differing = [
            key for key in expected if not key.startswith("gradient/") and not torch.equal(found[key], expected[key])
        ]
        if differing:
            tally.weights.append(f"{name}: {differing[:3]}")


def _log_of(output: Path) -> Path:
    """What the lives of a run say; of rank r in the file of that name and `.r`."""
    return output.with_name(f"{output.name}.log")


def _lines(output: Path) -> int:
    try:
        return (output / "log.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _steps_done(output: Path) -> int:
    newest = newest_checkpoint(output / "checkpoints")
    return newest.step if newest else 0


def run_campaign(kills: int, folder: Path, log: TextIO, seed: int = 0, kills_a_run: int = 14) -> Tally:
    """Runs until there were so many kills. Returns what it found."""
    torch.set_num_threads(1)
    build_model(tiny_config(**CHANGES).model)  # imports what building needs, once for all lives
    campaign, began, number = Campaign(folder, log, seed), time.monotonic(), 0
    while (done := campaign.tally.kills.total()) < kills:
        campaign.one_run(number, min(kills_a_run, kills - done))
        number += 1
    tally = campaign.tally
    campaign.say(tally.summary(time.monotonic() - began))
    for problem in (*tally.lost, *tally.receipts, *tally.weights):
        campaign.say(f"PROBLEM {problem}")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("campaign.log"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, options.log.open("w") as log:
        tally = run_campaign(options.kills, Path(folder), log, options.seed)
    print(json.dumps({"kills": tally.kills, "runs": tally.runs, "good": tally.good}))
    print(options.log.read_text().splitlines()[-1 - len(tally.lost + tally.receipts + tally.weights)])
    return 0 if tally.good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Names the rank that hangs, and ends the run; one that is alone, too.

When one rank hangs, the others wait for it inside a collective and can say nothing. So each has a thread that writes,
every few seconds, where its rank is into a file of the run's folder, `ranks/RANK.json`. When its own rank has not moved
for the time allowed, the thread looks at all files twice: a rank whose file does not change is stopped, or its machine
is gone; else the ones that are furthest behind are those that the others wait for. It names them and ends the process,
whereupon the launcher ends the others, and a scheduler may start again.

Files, not collectives or the rendezvous' store: these are what may hang. The price is a small file per rank, written
every few seconds.
"""

from __future__ import annotations

import faulthandler
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vltrain.errors import end_at_once
from vltrain.files.atomic import renamed_when_written

FOLDER = "ranks"
EXIT_HANGS = 1
SLOW_PHASES = {"save": 6, "evaluate": 6}
"""What may take longer than a step, and how many times the time allowed it has."""
PHASES = (
    "save",
    "evaluate",
    "fetch",
    "forward",
    "backward",
    "update",
)  # on the way from one step to the next, in order


class Watchdog:
    """Args:
    folder: the run's.
    timeout_seconds: without a sign of life of the own rank's training for so long (a save or a batch of an evaluation:
    SLOW_PHASES times as
        long), the run ends; None: nothing is watched.
    end: what to do then, with the message.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float | None,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._folder, self._rank, self._world_size, self._timeout = folder / FOLDER, rank, world_size, timeout_seconds
        self._end = end or (lambda message: end_at_once(message, EXIT_HANGS))
        self._tick = min(10.0, (timeout_seconds or 0.0) / 10)
        self._step, self._micro_step, self._phase, self._since, self._beats = 0, 0, "fetch", time.monotonic(), 0
        self._stop = threading.Event()

    def goes_on(self) -> None:
        """There is progress at the place where the rank is."""
        self._since = time.monotonic()

    def at(self, step: int, phase: str, micro_step: int = 0) -> None:
        """The rank has come this far. Costs four assignments."""
        assert phase in PHASES
        self._step, self._micro_step, self._phase, self._since = step, micro_step, phase, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches inside the block."""
        if self._timeout is None:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self.at(self._step, "fetch")
        self._publish()  # over what an earlier life has left there
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._file(self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        assert self._timeout is not None
        while not self._stop.wait(self._tick):
            self._publish()
            if time.monotonic() - self._since > self._timeout * SLOW_PHASES.get(self._phase, 1):
                self._dump_stacks()
                diagnosis = self._diagnosis()
                self._publish(ended=True)
                self._end(diagnosis)
                return

    def _dump_stacks(self) -> None:
        """Where this rank's threads are, into `ranks/RANK.stacks`."""
        try:
            with self._file(self._rank).with_suffix(".stacks").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass

    def _publish(self, ended: bool = False) -> None:
        """`ended`: this rank leaves since another hangs, so it is none to be suspected."""
        self._beats += 1
        place = {"step": self._step, "micro_step": self._micro_step, "phase": self._phase}
        try:
            with renamed_when_written(self._file(self._rank), clears=False) as beside:
                beside.write_text(json.dumps({**place, "beats": self._beats, "ended": ended}))
        except OSError:  # a full disk must not end the run here: the next save will tell
            pass

    def _file(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"

    def _read_all(self) -> dict[int, dict]:
        found = {}
        for rank in range(self._world_size):
            try:
                found[rank] = json.loads(self._file(rank).read_text())
            except (OSError, ValueError):
                continue
        return found

    def _diagnosis(self) -> str:
        if self._world_size == 1:
            return self._diagnosis_alone()
        before = self._read_all()
        for _ in range(3):
            time.sleep(self._tick)
            self._publish()
        now = self._read_all()
        ended = [
            rank for rank, state in now.items() if state["ended"]
        ]  # where they were counts, that they have gone does not
        silent = [
            rank
            for rank in range(self._world_size)
            if rank not in (self._rank, *ended) and now.get(rank) == before.get(rank)
        ]
        waited = self._waited()
        if silent:
            last = {
                rank: f"last at step {now[rank]['step']} ({now[rank]['phase']})" if rank in now else "gone"
                for rank in silent
            }
            who = ", ".join(f"rank {rank}, {last[rank]}" for rank in silent[:8])
            return f"{waited}: no heartbeat from {who}. Check its log and its machine, then resume with --resume auto"
        place = {
            rank: (state["step"], state["micro_step"], PHASES.index(state["phase"])) for rank, state in now.items()
        }
        behind = [rank for rank in place if place[rank] == min(place.values())]
        if len(behind) == len(place):
            where = f"all ranks are at step {self._step} ({self._phase})"
            return (
                f"{waited}: {where}: one of them hangs inside a collective, or the network between them does. Then "
                "resume with --resume auto"
            )
        who = ", ".join(map(str, behind[:8]))
        where = f"step {now[behind[0]]['step']} ({now[behind[0]]['phase']})"
        return (
            f"{waited}: the others wait for rank {who}, which hangs at {where}. Check its log, then resume with "
            "--resume auto"
        )

    def _diagnosis_alone(self) -> str:
        if self._phase == "fetch":
            why = (
                "the image workers deliver nothing: check the disk that holds the packs, or decode in the trainer "
                "with data.workers 0"
            )
        else:
            why = f"{self._file(self._rank).with_suffix('.stacks')} shows where"
        return f"{self._waited()}: step {self._step} hangs ({self._phase}): {why}. Then resume with --resume auto"

    def _waited(self) -> str:
        return f"no progress for {time.monotonic() - self._since:.0f} seconds (train.hang_timeout_minutes)"

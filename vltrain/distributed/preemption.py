"""Leaving in time: a scheduler's signal, or the end of its time limit, becomes a checkpoint and an exit code that asks
to be started again.

    SIGTERM or SIGUSR1 on any rank -> all ranks agree at a step boundary -> checkpoint -> every rank ends with
    EXIT_REQUEUE
    Ctrl-C                         -> the same, with EXIT_INTERRUPTED

Each step ends in a vote, an all-reduce of one number, which is started after the step and read after the next one, as
the loss is: it is off the path of both. So a signal is followed by at most one more whole step. Where nothing would be
lost (data is prepared, the model loaded, or a saved state evaluated) a signal ends the rank at once, with the same
code, and the launcher ends the others. A second signal ends a rank at once, whatever it does; signals closer together
than SAME_SIGNAL_SECONDS are one, because launchers hand on what the group got already.

A thread reads the signals (from Python's wake-up descriptor), since the main one may wait in a collective that never
returns. If no step boundary comes within the time that two steps and a save take, as slow as lately seen, it ends the
rank without a checkpoint.

Trade-off: a step or a save that takes longer than the scheduler waits is lost.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from vltrain.console import LAST
from vltrain.distributed.readback import HostCopy
from vltrain.distributed.signals import HEARD_BY_RANKS
from vltrain.errors import EXIT_INTERRUPTED, close_progress_bars, end_at_once

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 85
"""Exit code of a run that left before its end and wants to be started again with the same command (Linux' ERESTART)."""
SIGNALS = HEARD_BY_RANKS
SAME_SIGNAL_SECONDS = 2.0
LEAVE_SECONDS = 10.0  # that a rank on its way out may take before it is cut short
RESERVE_SECONDS = 15.0  # before the end of the time limit, beside what steps and saves are seen to take
UNSEEN_SAVE_SECONDS = 30.0  # what a save is thought to take before the first
RECENT_STEPS = 50
CAUTION = 1.5


class Preempted(SystemExit):
    """Ends the program with EXIT_REQUEUE, or EXIT_INTERRUPTED after Ctrl-C, unless someone has more to do first."""

    def __init__(self, reason: str, code: int = EXIT_REQUEUE) -> None:
        super().__init__(code)
        self.reason = reason


def time_limit_end(environment: Mapping[str, str], limit_minutes: float | None, started: float) -> float | None:
    """When the run has to be gone, as time.time(): the earlier of Slurm's end of the job and `limit_minutes` after
    `started`; None: never."""
    ends = [] if limit_minutes is None else [started + 60 * limit_minutes]
    if environment.get("SLURM_JOB_END_TIME", "").isdigit():
        ends.append(float(environment["SLURM_JOB_END_TIME"]))
    return min(ends, default=None)


class Preemption:
    """Whether, and when, this run is to leave. Made once per rank; until `listening` it hears no signal, but knows the
    time.

    Args:
        ends_at: time.time() by which the run has to be gone; None: no limit.
    """

    def __init__(self, ends_at: float | None = None) -> None:
        self._ends_at = ends_at
        self._reason: str | None = None
        self._code = EXIT_REQUEUE
        self._waits_for_boundary = False
        self._is_saving = False
        self._leaves_by: float | None = None
        self._vote: HostCopy | None = None
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._slowest_save = UNSEEN_SAVE_SECONDS
        self._since = time.monotonic()

    @property
    def is_asked(self) -> bool:
        """Whether this rank has been asked to leave."""
        return self._reason is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are heard inside the block. For the main thread."""
        hear, self._tell = socket.socketpair()
        hear.setblocking(False)
        self._tell.setblocking(False)
        # What a shell has started in the background hears no Ctrl-C.
        heard = [number for number in SIGNALS if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        old_descriptor = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(hear,), name="preemption", daemon=True).start()
        try:
            yield
        except Preempted:
            raise  # signals stay ignored: the exit code must not become that of a late one
        except BaseException:
            self._stop_listening(before, old_descriptor)
            raise
        else:
            self._stop_listening(before, old_descriptor)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside the block a signal waits for the step boundary. Raises Preempted at its end if one still waits."""
        self._waits_for_boundary = True
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._waits_for_boundary = False
        if self._reason is not None:
            self._end_now()

    @contextmanager
    def nothing_to_lose(self) -> Iterator[None]:
        """Inside `training`: everything is saved, so inside this block a signal ends the rank at once."""
        self._waits_for_boundary = False
        if self._reason is not None:
            self._end_now()
        try:
            yield
        finally:
            self._waits_for_boundary = True
            self._since = time.monotonic()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measures a save, for the margin before the time limit; inside the block a signal cuts nothing short."""
        started = time.monotonic()
        self._is_saving = True
        yield
        self._is_saving = False
        self._since = time.monotonic()
        seconds = self._since - started
        # The first one seen replaces the guess.
        self._slowest_save = seconds if self._slowest_save == UNSEEN_SAVE_SECONDS else max(self._slowest_save, seconds)

    def margin_seconds(self) -> float:
        """How long before the time limit the run asks to leave: for the two steps that a vote takes, and a save, as
        slow as lately seen."""
        return CAUTION * (2 * max(self._step_seconds, default=0.0) + self._slowest_save) + RESERVE_SECONDS

    def agreed(self, device: torch.device) -> bool:
        """Whether all ranks leave now. A collective, called after each step, with its cost: one number summed up behind
        the next step."""
        now = time.monotonic()
        self._step_seconds.append(now - self._since)
        self._since = now
        if self._reason is None and self._ends_at is not None and time.time() + self.margin_seconds() >= self._ends_at:
            self._reason = f"the time limit is {self._ends_at - time.time():.0f} s away"
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._reason is not None
        leaves = self._read_vote()
        # Filled on the device: a copy from the host would make the host wait for the step.
        vote = torch.full((1,), float(self._code if self._reason is not None else 0), device=device)
        work = dist.all_reduce(vote, op=dist.ReduceOp.MAX, async_op=True)
        self._vote = HostCopy(vote, work)
        return leaves

    def leave(self, steps_done: int) -> NoReturn:
        """Ends this rank, once all have come here. A collective, after the save. Raises Preempted."""
        self._read_vote()
        self._is_saving = True  # rank 0 may be, and is waited for
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()  # a rank that ends early would have the launcher end the one that still writes
        reason = self._reason or "another rank was asked to leave"
        message = "%s: saved after %d steps; exits with code %d; run the same command to resume"
        logger.warning(message, reason, steps_done, self._code, extra={LAST: True})
        self._begin_to_leave()
        raise Preempted(reason, self._code)

    def _read_vote(self) -> bool:
        """Whether the ranks leave; with the same code all of them, Ctrl-C's where any has heard that."""
        if self._vote is None:
            return False
        vote, self._vote = self._vote, None
        code = int(vote.read())
        self._code = max(self._code, code)
        return code > 0

    def _end_now(self) -> NoReturn:
        reason = self._reason or "a signal"
        close_progress_bars()
        logger.warning(
            "%s: nothing to save; exits with code %d; run the same command to resume",
            reason,
            self._code,
            extra={LAST: True},
        )
        self._begin_to_leave()
        raise Preempted(reason, self._code)

    def _begin_to_leave(self) -> None:
        self._leaves_by = time.monotonic() + LEAVE_SECONDS
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its instructions."""
        self._heard(number)
        if not self._waits_for_boundary:
            self._end_now()

    def _heard(self, number: int) -> None:
        if self._reason is None:
            self._reason = signal.Signals(number).name
            self._code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE

    def _watch(self, hear: socket.socket) -> None:
        """In its own thread: a second signal, a time limit or a first signal where no step boundary comes, and a way
        out that takes too long."""
        first = patient_from = None
        while True:
            select.select([hear], [], [], 1.0)
            try:
                received = hear.recv(4096)
            except BlockingIOError:
                received = None
            if received == b"":  # nobody listens any more
                return
            heard = [number for number in received or b"" if number in SIGNALS]
            now = time.monotonic()
            if heard and first is None:
                first = now
                self._heard(heard[0])
                if (
                    not self._waits_for_boundary
                ):  # the main thread may wait in a collective, and never come to its handler
                    self._leaves_by = now + LEAVE_SECONDS
            elif heard and first is not None and now - first > SAME_SIGNAL_SECONDS:
                end_at_once(
                    f"{signal.Signals(heard[-1]).name} after {self._reason}: ended at once, without saving",
                    128 + heard[-1],
                )
            if self._leaves_by is not None and not self._waits_for_boundary and now > self._leaves_by:
                end_at_once(
                    f"{self._reason}: nothing to save; cut short after {LEAVE_SECONDS:.0f} s; ends with code "
                    f"{self._code}",
                    self._code,
                )
            if first is None or self._is_saving or not self._waits_for_boundary:
                patient_from = None
            elif patient_from is None:
                patient_from = now
            elif now - patient_from > self.margin_seconds():
                waited = f"no step has ended within {now - patient_from:.0f} s"
                end_at_once(
                    f"{self._reason}: {waited}, so what hangs there is not waited for; ends with code "
                    f"{self._code}, without saving",
                    self._code,
                )
            limit_is_here = self._ends_at is not None and time.time() + LEAVE_SECONDS >= self._ends_at
            if limit_is_here and not self._waits_for_boundary and self._leaves_by is None:
                self._reason = self._reason or "the time limit is here"
                self._leaves_by = now + LEAVE_SECONDS
                os.kill(os.getpid(), signal.SIGUSR1)

    def _stop_listening(self, before: Mapping[int, object], old_descriptor: int) -> None:
        signal.set_wakeup_fd(old_descriptor)
        self._tell.close()
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

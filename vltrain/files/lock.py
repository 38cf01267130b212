"""One writer of a folder, on one machine or over a network file system.

The writer holds `flock` on a small file, which the kernel lets go of when the process ends, however it ends; over NFS
the server knows of it too. The file says who writes (host, pid, since when, command). Its time is renewed every few
seconds: where locks do not reach other machines (NFS mounted with `nolock`, file systems without locks), and where one
that has crashed still holds the server's lock, that is what tells the living from the dead. The file is removed at the
end.

    the writer is a dead process of this machine -> taken over
    it is of another machine, lock free and STALE_SECONDS without a sign of life -> taken over
    else -> refused, with the writer's name; whoever knows that it has gone removes the file

Trade-off: a machine that crashed costs the next run on another one up to a minute of watching.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vltrain.errors import EXIT_USER_ERROR, InputError, end_at_once
from vltrain.files.processes import is_alive, stat_of

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.5
SIGN_SECONDS = 2.0  # that a holder may take to write its name
TELL_SECONDS = 60.0  # between two lines about what is waited for
COMMAND_CHARACTERS = 120
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems that have none
_held: dict[
    tuple[str, int], Writer
] = {}  # of this process, by file and thread: whoever writes a folder may call what writes it


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who writes a folder. `place`: machine, boot and process namespace in which `pid` and its `start` mean
    something."""

    host: str
    place: str
    pid: int
    start: str
    since: float
    command: str
    token: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"`{self.command}` (host {self.host}, pid {self.pid}, since {since})"


def lock_inside(folder: Path) -> Path:
    """The lock of a folder that is filled bit by bit, such as a run's."""
    return folder / ".lock"


def lock_beside(folder: Path) -> Path:
    """The lock of a folder that appears whole, such as that of packs."""
    return folder.parent / f".{folder.name}.lock"


@contextmanager
def one_writer(
    lock: Path, folder: Path, *, remedy: str = "choose another --output", wait_seconds: float = 0.0
) -> Generator[bool]:
    """Holds `folder` by its `lock` inside the block; gives whether another one was waited for. The same thread may hold
    it again.

    Args:
        remedy: what else the second writer can do but wait.
        wait_seconds: how long to wait for another writer, which is told every minute; 0: refused at once.

    Raises:
        InputError: another process writes there, or the lock cannot be made.
    """
    key = (os.path.realpath(lock), threading.get_ident())
    if key in _held:
        yield False
        return
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle, me, waited = _acquire(lock, folder, remedy, wait_seconds)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}: {error.filename or lock}); {remedy}"
        ) from None
    stop = threading.Event()
    threading.Thread(target=_beat, args=(lock, folder, me, stop), name="lock", daemon=True).start()
    _held[key] = me
    try:
        yield waited
    finally:
        del _held[key]
        stop.set()
        if _read(lock) == me:
            with suppress(OSError):
                lock.unlink()  # while it is held: a process that opened it meanwhile sees that it has gone
        os.close(handle)


def writer_of(lock: Path) -> Writer | None:
    """Who says in `lock` that he writes, if he may be alive: its time is fresh, or it is a living process of this
    machine."""
    writer = _read(lock)
    if writer is None:
        return None
    with suppress(OSError):
        alive = (
            is_alive(writer.pid, writer.start) if writer.place == _place() else _seconds_silent(lock) < STALE_SECONDS
        )
        return writer if alive else None
    return None


def _acquire(lock: Path, folder: Path, remedy: str, wait_seconds: float) -> tuple[int, Writer, bool]:
    began = told = time.monotonic()
    first_beat: int | None = None
    while True:
        found = _try(lock)
        if not isinstance(found, Writer):
            return *found, first_beat is not None
        beat, now = _beat_of(lock), time.monotonic()
        waits = now - began < wait_seconds
        # Of another machine: is it there? Its lock outlives it for a while, or does not reach us.
        watches = found.place != _place() and first_beat in (None, beat) and now - began < STALE_SECONDS + BEAT_SECONDS
        if not waits and not watches:
            silent = f", silent for {now - began:.0f} s" if found.place != _place() and first_beat == beat else ""
            raise InputError(
                f"{folder}: {found} writes there{silent}; wait for it, or {remedy} (if it has ended: remove {lock})"
            )
        if first_beat is None or now - told > TELL_SECONDS:
            told = now
            logger.warning("%s: waiting for %s, which writes there (%.0f s so far)", folder, found, now - began)
        first_beat = beat if first_beat is None else first_beat
        time.sleep(POLL_SECONDS)


def _try(lock: Path) -> tuple[int, Writer] | Writer:
    """Our own lock and name in it, or the name of who has it."""
    began = time.monotonic()
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _flock(handle)
            if locked is False:
                other = _read(lock) or (_unsigned(lock) if time.monotonic() - began > SIGN_SECONDS else None)
                if other is not None:
                    os.close(handle)
                    return other
            else:
                with _guarded(lock, needed=locked is None):
                    named = _is_named(handle, lock)  # if not, its holder has removed it meanwhile
                    before = _read(lock) if named else None
                    if before is not None and _may_live(before, lock, locked is True):
                        os.close(handle)
                        return before
                    if named:
                        return handle, _sign(handle, lock, before)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(0.02)  # it was locked and not yet signed, or removed just now


def _sign(handle: int, lock: Path, before: Writer | None) -> Writer:
    """Writes our name."""
    if before is not None:
        logger.warning("%s: taken over from %s, which no longer runs", lock, before)
    me = _me()
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps(asdict(me)).encode(), 0)
    os.fsync(handle)
    return me


def _flock(handle: int) -> bool | None:
    """Whether we have the lock now; None where the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


@contextmanager
def _guarded(lock: Path, needed: bool) -> Generator[None]:
    """Without locks of the file system: one process at a time looks and signs. What a killed one leaves behind goes
    after STALE_SECONDS."""
    guard = lock.with_name(f"{lock.name}.guard")
    while needed:
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            with suppress(OSError):
                if _seconds_silent(guard) > STALE_SECONDS:
                    guard.unlink()
            time.sleep(0.05)
    try:
        yield
    finally:
        if needed:
            guard.unlink(missing_ok=True)


def _may_live(writer: Writer, lock: Path, locked: bool) -> bool:
    """Whether the writer named in a file may still be there, though we have its lock (`locked`) or there are no
    locks."""
    if writer.place == _place():
        return not locked and is_alive(writer.pid, writer.start)
    return not locked or _seconds_silent(lock) < STALE_SECONDS


def _beat(lock: Path, folder: Path, me: Writer, stop: threading.Event) -> None:
    """In a thread: renews the file's time. Ends the process if another one has taken the folder (this one was stopped
    for long)."""
    while not stop.wait(BEAT_SECONDS):
        other = _read(lock)
        if other is not None and other != me and not stop.is_set():
            end_at_once(
                f"{folder}: {other} has taken it over from this process, which was silent too long", EXIT_USER_ERROR
            )
        with suppress(OSError):
            os.utime(lock)


def _seconds_silent(lock: Path) -> float:
    """Since the file's time was renewed, by the file system's clock, which is not this machine's. Raises OSError."""
    probe = lock.with_name(f"{lock.name}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return (probe.stat().st_mtime_ns - _beat_of(lock)) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _beat_of(lock: Path) -> int:
    """The file's time, in ns; 0 if it has gone. Opened, since NFS asks the server only then."""
    try:
        with lock.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _is_named(handle: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(lock))
    except FileNotFoundError:
        return False


def _read(lock: Path) -> Writer | None:
    try:
        return Writer(**json.loads(lock.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _me() -> Writer:
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    short = command if len(command) <= COMMAND_CHARACTERS else f"{command[:COMMAND_CHARACTERS]}..."
    pid = os.getpid()
    return Writer(
        host=socket.gethostname(),
        place=_place(),
        pid=pid,
        start=stat_of(pid)[1],
        since=round(time.time(), 3),
        command=short,
        token=uuid.uuid4().hex,
    )


def _unsigned(lock: Path) -> Writer:
    """Whoever holds the lock and has not written a name: not ours."""
    since = _beat_of(lock) / 1e9
    return Writer(host="unknown", place=_place(), pid=0, start="", since=since, command="another program", token="")


def _place() -> str:
    """The machine's boot and this process's namespace of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()

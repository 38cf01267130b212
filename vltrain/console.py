"""What programs say while they run: log lines, progress, and a run's log file. One mechanism for all commands.

On a terminal progress is a bar with its ETA, and log lines stand above it. Elsewhere (files, Slurm's logs, CI) it is
plain lines, written by time: the first after some seconds, then ever rarer. `--quiet` shows errors and the last line
alone.

    start_logging(rank, quiet=..., keeps_log=True)       to stderr; libraries' own talk waits for the log file
    with run_log(folder / "run.log"): ...                everything, with time stamps; appended to when a run goes on
    with Progress(total=9, title="images", unit="image") as progress: progress.update()
    last_line("accuracy=0.9948 (9673 questions)")        shown by --quiet too

With a log file, what libraries log or warn of below an error goes there alone. Trade-off: what native code writes to
the descriptors 1 and 2 by itself is not caught.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from vltrain import errors

FORMAT = "%(levelname)s %(name)s: %(message)s"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
RUN_LOG = "run.log"
OURS = ("vltrain", "data_prep")
HELD_RECORDS = 10_000  # of before the log file is known; what is beyond them is dropped
# (until so many seconds after the start, seconds between two plain lines)
INTERVALS = ((60.0, 10.0), (600.0, 30.0), (float("inf"), 120.0))
PROGRESS, LAST = "is_progress", "is_last"  # attributes of log records

T = TypeVar("T")
logger = logging.getLogger(__name__)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in (*OURS, "__main__")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class Terminal(logging.StreamHandler):
    """stderr: on a terminal the bars make way for a line."""

    def __init__(self, stream: Any = None) -> None:
        super().__init__(stream)
        self.setFormatter(logging.Formatter(FORMAT))
        self.rank, self.quiet, self.keeps_log = 0, False, False
        self.addFilter(self.shows)

    def shows(self, record: logging.LogRecord) -> bool:
        """Whether a record is for the user's eyes."""
        if getattr(record, LAST, False):
            return self.rank == 0
        if getattr(record, PROGRESS, False):
            return not self.quiet and self.rank == 0 and not self.is_terminal()
        if record.levelno >= logging.ERROR:
            return True
        return (
            not self.quiet
            and self.rank == 0
            and (_is_ours(record) or (record.levelno >= logging.WARNING and not self.keeps_log))
        )

    def is_terminal(self) -> bool:
        return bool(getattr(self.stream, "isatty", lambda: False)())

    def format(self, record: logging.LogRecord) -> str:
        return (
            record.getMessage()
            if getattr(record, LAST, False) and record.levelno == logging.INFO
            else super().format(record)
        )

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream) if self.is_terminal() else contextlib.nullcontext():
            super().emit(record)


class _Held(logging.Handler):
    """Keeps what is logged until it is known where the run's log is."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.records) < HELD_RECORDS:
            self.records.append(record)


class _LogFile(logging.FileHandler):
    """A run's log. One that cannot be written is told once, and is never the end of a run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter(LOG_FORMAT))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was told by then
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        logger.warning(
            "%s: cannot be written any more (%s); the run continues without it", self.baseFilename, sys.exc_info()[1]
        )


def start_logging(rank: int = 0, *, quiet: bool = False, keeps_log: bool = False) -> None:
    """Logs to stderr: everything of ours from INFO on on rank 0, errors alone on others. What a test or an embedding
    program has set up stays.

    Args:
        quiet: errors and the last line alone.
        keeps_log: a run's log follows (`run_log`): what libraries say below an error, Python's warnings too, goes there
            and not to the terminal.
    """
    root = logging.getLogger()
    terminal = _terminal()
    if terminal is None:
        if root.handlers:
            return
        terminal = Terminal()
        root.addHandler(terminal)
        root.setLevel(logging.INFO)
    terminal.rank, terminal.quiet, terminal.keeps_log = rank, quiet, keeps_log
    if (
        not keeps_log
    ):  # there is no run: DeepSpeed, which transformers imports on the way, looks for an accelerator, and nobody asked
        logging.getLogger("DeepSpeed").addFilter(_is_error)
    else:
        logging.getLogger("DeepSpeed").removeFilter(_is_error)
        logging.captureWarnings(True)
        if rank == 0 and not any(isinstance(handler, (_Held, _LogFile)) for handler in root.handlers):
            root.addHandler(_Held())
        _route_libraries()


@contextlib.contextmanager
def logged_from(level: int, name: str | None = None) -> Iterator[None]:
    """Inside the block a logger (and those below it that have no level of their own) says nothing below `level`. None:
    the root."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def _terminal() -> Terminal | None:
    return next((handler for handler in logging.getLogger().handlers if isinstance(handler, Terminal)), None)


def is_quiet() -> bool:
    terminal = _terminal()
    return terminal is not None and terminal.quiet


def keeps_log() -> bool:
    """Whether what libraries say goes to a run's log."""
    terminal = _terminal()
    return terminal is not None and terminal.keeps_log


def _route_libraries() -> None:
    """Lets libraries that write to the terminal by handlers of their own (DeepSpeed, transformers, ...) log through
    ours."""
    own = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for library in list(logging.Logger.manager.loggerDict.values()):
        if not isinstance(library, logging.Logger):
            continue
        for handler in list(library.handlers):
            if type(handler) is logging.StreamHandler and (isinstance(handler.stream, _Lines) or handler.stream in own):
                library.removeHandler(handler)
                library.propagate = True


@contextlib.contextmanager
def run_log(path: Path, *, active: bool = True) -> Iterator[None]:
    """Inside the block everything that is logged is appended to the file too, with time stamps, and at last the error
    that ends the block, if any.

    `active`: only one process writes a run's log; the others say False.
    """
    root = logging.getLogger()
    held = [handler for handler in root.handlers if isinstance(handler, _Held)]
    file = _opened(path) if active else None
    for handler in held:
        root.removeHandler(handler)
        for record in handler.records if file is not None else ():
            file.handle(record)
    if file is None:
        yield
        return
    root.addHandler(file)
    if file.stream is not None:
        errors.last_words_also_to = file.stream.fileno()
    try:
        yield
    except BaseException as error:
        file.handle(_record_of(error))
        raise
    finally:
        errors.last_words_also_to = None
        root.removeHandler(file)
        file.close()


def _opened(path: Path) -> _LogFile | None:
    try:
        return _LogFile(path)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the run continues without it", path, error.strerror or error)
        return None


def _record_of(error: BaseException) -> logging.LogRecord:
    """The line that a program ends with; of what may be our own mistake with its traceback."""
    told = isinstance(error, (errors.InputError, SystemExit, KeyboardInterrupt))
    text = errors.one_line(str(error)) or type(error).__name__
    return logger.makeRecord(
        logger.name,
        logging.ERROR,
        __file__,
        0,
        "%s",
        (text,),
        None if told else (type(error), error, error.__traceback__),
    )


def last_line(text: str) -> None:
    """The line that says how a command ended: on stderr, and in a run's log. `--quiet` shows it too."""
    logger.info("%s", text, extra={LAST: True})


class _Lines(io.TextIOBase):
    """A stream whose lines are logged."""

    def __init__(self, name: str) -> None:
        self._logger, self._text = logging.getLogger(name), ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._text = (self._text + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.info("%s", line.rstrip())
        return len(text)


@contextlib.contextmanager
def prints_are_logged(name: str) -> Iterator[None]:
    """What a library prints inside the block is logged, as `name`'s, line by line."""
    if not keeps_log():
        yield
        return
    lines = _Lines(name)
    try:
        with contextlib.redirect_stdout(lines), contextlib.redirect_stderr(lines):
            yield
    finally:
        # a handler that was made inside writes to the lines, which it would have logged by itself again
        _route_libraries()
        lines.write("\n")


class Progress:
    """How far something is: a bar on a terminal, plain lines elsewhere and in a run's log. A context manager.

    Args:
        total: None: not known.
        title: what goes on.
        unit: what is counted, in the singular.
        initial: how many were done before.
        shown: False: nothing at all, of ranks other than 0.
        in_bytes: counts are bytes.
    """

    def __init__(
        self, *, total: int | None, title: str, unit: str, initial: int = 0, shown: bool = True, in_bytes: bool = False
    ) -> None:
        self.total, self.title, self.unit, self.done, self.shown = total, title, unit, initial, shown
        self._in_bytes, self._figures = in_bytes, ""
        self._initial, self._start = initial, time.monotonic()
        self._due, self._told = self._start + INTERVALS[0][1], False
        bar = shown and not is_quiet() and sys.stderr is not None and sys.stderr.isatty()
        self._bar = (
            tqdm(
                total=total,
                initial=initial,
                desc=title,
                unit="B" if in_bytes else unit,
                unit_scale=in_bytes,
                dynamic_ncols=True,
                mininterval=0.5,
                file=sys.stderr,
                leave=False,
                smoothing=0.1,
            )
            if bar
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def update(self, count: int = 1, figures: str = "") -> None:
        """So many more are done. `figures`: what else there is to say, such as a loss."""
        self.done += count
        self._figures = figures
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(count)
        if self.shown and time.monotonic() >= self._due:
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        self._due = now + next(pause for until, pause in INTERVALS if now - self._start < until)
        self._told = True
        logger.info("%s", self.line(now - self._start), extra={PROGRESS: True})

    def line(self, seconds: float) -> str:
        """A plain line, `seconds` after the start."""
        many = self.title if self._in_bytes else f"{self.title}: {self.unit}"
        if self.total is None:
            parts = [f"{many} {self._count(self.done)}"]
        else:
            parts = [
                f"{many}{':' if self._in_bytes else ''} {self._count(self.done)} of {self._count(self.total)} "
                f"({100 * self.done / max(self.total, 1):.0f}%)"
            ]
        since = self.done - self._initial
        left = (
            ""
            if self.total is None or since <= 0 or self.done >= self.total
            else f"ETA {tqdm.format_interval(seconds / since * (self.total - self.done))}"
        )
        return ", ".join(
            part for part in (*parts, self._figures, f"{tqdm.format_interval(seconds)} so far", left) if part
        )

    def _count(self, number: int) -> str:
        return tqdm.format_sizeof(number, "B", 1000) if self._in_bytes else f"{number:,}"

    def close(self) -> None:
        """Takes the bar away; where plain lines were written, or the run's log has them, the last one says how far it
        came."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._told and self.shown:
            self._told = False
            logger.info("%s", self.line(time.monotonic() - self._start), extra={PROGRESS: True})


def watched(items: Iterable[T], *, title: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Passes items on, and shows how many there were."""
    with Progress(total=total, title=title, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()

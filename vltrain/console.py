"""What programs log while progress bars stand on the same terminal, or in the same file: each line on a line of its own."""

from __future__ import annotations

import logging

from tqdm import tqdm

FORMAT = "%(levelname)s %(name)s: %(message)s"


class _BesideBars(logging.StreamHandler):
    """Lets the bars of a terminal make way for a line; in a file, where nothing makes way, ends their line first."""

    _ended = 0.0  # until when bars had written what has been ended

    def emit(self, record: logging.LogRecord) -> None:
        bars = list(getattr(tqdm, "_instances", ()))
        if self.stream.isatty():
            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)
            return
        written = max((bar.last_print_t for bar in bars), default=0.0)
        if written > self._ended:
            self._ended = written
            self.stream.write("\n")
        super().emit(record)


def start_logging(rank: int = 0) -> None:
    """Logs to stderr: everything from INFO on on rank 0, errors alone on others. What a test or an embedding program has set up stays."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format=FORMAT, handlers=[_BesideBars()])

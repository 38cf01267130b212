"""A file that is appended to while a run goes on: on a full disk, it is named in one line."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from vltrain.errors import InputError


class AppendedFile:
    """Appends to the file at `path`; each line or record reaches the operating system at once. Raises InputError where
    that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise self._told(error) from None

    def write(self, record: str | bytes) -> None:
        """Appends a record, a text as UTF-8."""
        try:
            self._file.write(record.encode() if isinstance(record, str) else record)
            self._file.flush()
        except OSError as error:
            raise self._told(error) from None

    def sync(self) -> None:
        """Makes everything written so far survive a crash of the machine."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._told(error) from None

    def close(self) -> None:
        # What could not be written was told by then; closing would try it once more.
        with suppress(OSError):
            self._file.close()

    def _told(self, error: OSError) -> InputError:
        return InputError(
            f"{self._path}: cannot be written ({error.strerror or error}); free disk space or fix its permissions, "
            "and resume with --resume auto"
        )


class OneWriter:
    """Of several ranks the one that appends to a file (`active`); on the others every method does nothing. Whoever
    inherits from it opens the file."""

    _file: AppendedFile

    def __init__(self, *, active: bool) -> None:
        self.active = active

    def sync(self) -> None:
        """See `AppendedFile.sync`."""
        if self.active:
            self._file.sync()

    def close(self) -> None:
        if self.active:
            self._file.close()

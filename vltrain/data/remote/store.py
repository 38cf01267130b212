"""Byte ranges of the objects below an address. A read that fails, is cut short or hangs is repeated after growing
pauses; what stays that way is named. Nothing is ever listed."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from typing import Any

from vltrain.data.remote.address import file_system
from vltrain.errors import InputError

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60.0
TELL_SECONDS = 10.0
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Seconds before each repetition: together two minutes, which an object store's bad moments rarely last."""
OPENING_PAUSES = PAUSES[:3]
"""Of the first reads of an address, which a user waits for."""
_NO_RIGHTS = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError")
_RIGHTS = "look at the credentials that the protocol's package finds here, and at the rights of the bucket"


def tell(message: str) -> None:
    """Warns, at most every `TELL_SECONDS`: of a bad day's thousands of failed reads some, and how many there were."""
    with _told.guard:
        _told.untold += 1
        now = time.monotonic()
        if now - _told.at < TELL_SECONDS:
            return
        more = f" ({_told.untold - 1} more since the last such line)" if _told.untold > 1 else ""
        _told.at, _told.untold = now, 0
    logger.warning("%s%s", message, more)


class _Told:
    def __init__(self) -> None:
        self.at, self.untold, self.guard = -math.inf, 0, threading.Lock()


_told = _Told()


class Store:
    """Reads what lies below an address. Picklable: another process connects anew."""

    def __init__(self, address: str) -> None:
        """Raises InputError for an address that cannot be read from here, see `file_system`."""
        self.address = address.rstrip("/")
        self._system, self._root = file_system(self.address)
        self._root = self._root.rstrip("/")

    def name(self, name: str) -> str:
        """As messages call an object."""
        return f"{self.address}/{name}"

    def read(
        self, name: str, start: int | None = None, end: int | None = None, pauses: tuple[float, ...] = PAUSES
    ) -> bytes:
        """The bytes from `start` to before `end`, all of them without.

        Raises:
            FileNotFoundError: no such object, at once where `pauses` are few, as while opening.
            InputError: no rights, or a read that failed as often as it was repeated.
        """
        for pause in (*pauses, None):
            try:
                return self._whole(name, start, end)
            except InputError:
                raise
            except Exception as error:  # each package raises its own
                if _is_forbidden(error):
                    raise InputError(f"{self.name(name)}: no rights to read it ({_why(error)}); {_RIGHTS}") from None
                gone = isinstance(error, FileNotFoundError)
                if gone and pauses is not PAUSES:
                    raise FileNotFoundError(self.name(name)) from None
                if pause is None:
                    found = "is not there (any more)" if gone else f"cannot be read ({_why(error)})"
                    raise InputError(
                        f"{self.name(name)}: {found}, tried {len(pauses) + 1} times; restore it, or the way to it, and "
                        "start again: a run goes on from its newest checkpoint"
                    ) from None
                tell(f"{self.name(name)}: a read failed ({_why(error)}); again in {pause:g} s")
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _whole(self, name: str, start: int | None, end: int | None) -> bytes:
        data = self._once(f"{self._root}/{name}", start, end)
        if start is not None and end is not None and len(data) != end - start:
            if len(data) > end - start:
                raise InputError(
                    f"{self.name(name)}: found {len(data)} bytes, expected {end - start}: the server answers ranges "
                    "with whole objects; serve the folder by one that knows them"
                )
            raise EOFError(f"{len(data)} of {end - start} bytes came")
        return data

    def _once(self, path: str, start: int | None, end: int | None) -> bytes:
        if not getattr(self._system, "async_impl", False):
            data: bytes = self._system.cat_file(path, start=start, end=end)
            return data
        reading: Any = asyncio.run_coroutine_threadsafe(
            self._system._cat_file(path, start=start, end=end), self._system.loop
        )
        try:
            return reading.result(TIMEOUT_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"nothing came within {TIMEOUT_SECONDS:g} s") from None
        finally:
            reading.cancel()

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["address"])


def _is_forbidden(error: Exception) -> bool:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _NO_RIGHTS


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""The one mode of our files: what the umask says.

Libraries that write beside a name and rename (safetensors), or copy a file with its mode, leave others: readable to
their owner alone, or read-only.
"""

from __future__ import annotations

import os
from pathlib import Path

from vltrain.files.leftovers import remove_leftovers, temporary_beside


def umask_mode(folder: Path) -> int:
    """The mode that a new file gets in a folder. Asked of the file system, since a process's umask cannot be read
    without changing it."""
    place = folder / "mode"
    remove_leftovers(place)  # of a killed process, which may have had this one's id
    probe = temporary_beside(place)
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()

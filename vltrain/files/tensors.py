"""Writing safetensors with the mode that every other file of a run has.

safetensors writes into a private temporary file and renames it, so that its files are readable to their owner alone
whatever the umask says: a colleague could then read a run's log but none of its weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file as write  # pyright: ignore[reportUnknownVariableType] a PathLike of anything

from vltrain.files.mode import umask_mode


def save_file(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors by name, in the mode that the umask gives new files. Raises OSError naming the path."""
    try:
        write(dict(tensors), path, metadata)
        os.chmod(path, umask_mode(path.parent))
    except SafetensorError as error:  # its way to report a failed write
        raise OSError(f"{path}: {error}") from error

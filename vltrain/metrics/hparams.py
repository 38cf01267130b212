"""The table of TensorBoard's tab HPARAMS: runs beside each other, each with its settings and what came of it.

folder/NAME/events...    one session for each run
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_hparams(folder: Path, name: str, settings: Mapping[str, Any], figures: Mapping[str, float]) -> None:
    """Writes the row of one run.

    Args:
        folder: of the table.
        name: of the row, which becomes a folder.
        settings: by dotted name; what is neither number, truth value nor text stands there as a text.
        figures: by name; they are scalars of step 0, too.
    """
    from torch.utils.tensorboard import SummaryWriter  # a second
    from torch.utils.tensorboard.summary import hparams

    writer = SummaryWriter(str(folder / name.replace("/", "-")))
    assert writer.file_writer is not None
    plain = {
        key: value if isinstance(value, (bool, int, float, str)) else shown(value) for key, value in settings.items()
    }
    for summary in hparams(plain, dict(figures)):
        writer.file_writer.add_summary(summary)
    for key, value in figures.items():
        writer.add_scalar(key, value, 0)
    writer.close()


def shown(value: Any) -> str:
    """A setting as a text: lists by their words."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "[]"
    return "null" if value is None else str(value)

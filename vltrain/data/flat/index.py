"""What is known of every pack without opening it: a file of five columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vltrain.data.stream.mixing import Mixing

INDEX_SCHEMA = pa.schema(
    {
        "num_tokens": pa.int32(),
        "num_label_tokens": pa.int32(),
        "num_images": pa.int32(),
        "num_samples": pa.int32(),
        "sum_squares": pa.int64(),
    }
)


@dataclass(frozen=True, kw_only=True)
class Index:
    """Per pack, memory-mapped and read-only: int32 [packs], `sum_squares` (of segment lengths) int64 [packs].
    `mixed`: how, of several sets' packs (`vltrain.data.stream.mixed`)."""

    num_tokens: np.ndarray
    num_label_tokens: np.ndarray
    num_images: np.ndarray
    num_samples: np.ndarray
    sum_squares: np.ndarray
    mixed: Mixing | None = None

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def mixing(self) -> Mixing:
        """How the packs' sets are mixed; of one set that it is alone."""
        return self.mixed or Mixing.alone(len(self))


def read_index(path: Path) -> Index:
    """Maps an index file."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    columns: dict[str, Any] = {name: batch.column(name).to_numpy(zero_copy_only=True) for name in INDEX_SCHEMA.names}
    return Index(**columns)

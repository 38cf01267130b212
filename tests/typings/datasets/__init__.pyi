"""What is used of datasets, whose types are partial."""

from collections.abc import Iterator, Mapping
from typing import Any

class Features(dict[str, Any]): ...

class Value:
    def __init__(self, dtype: str) -> None: ...

class DatasetInfo:
    features: Features | None

class IterableDataset:
    info: DatasetInfo
    features: Features | None
    num_shards: int
    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def decode(self, enable: bool = True) -> IterableDataset: ...
    def select_columns(self, column_names: list[str]) -> IterableDataset: ...
    def shard(self, num_shards: int, index: int) -> IterableDataset: ...

class DatasetBuilder:
    config: Any
    info: DatasetInfo
    def as_streaming_dataset(self) -> Mapping[str, IterableDataset]: ...

class _Logging:
    CRITICAL: int
    def set_verbosity(self, verbosity: int) -> None: ...

logging: _Logging

def disable_progress_bars() -> None: ...
def load_dataset_builder(path: str, **arguments: Any) -> DatasetBuilder: ...

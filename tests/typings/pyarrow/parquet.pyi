from collections.abc import Iterator

from . import RecordBatch

class RowGroupMetaData:
    num_rows: int

class FileMetaData:
    def row_group(self, i: int) -> RowGroupMetaData: ...

class ParquetFile:
    metadata: FileMetaData
    num_row_groups: int
    def __init__(self, source: str) -> None: ...
    def iter_batches(self, batch_size: int = 65536, row_groups: list[int] | None = None) -> Iterator[RecordBatch]: ...

from typing import BinaryIO

from . import NativeFile, RecordBatchFileReader, RecordBatchFileWriter, Schema

__all__ = ["RecordBatchFileReader", "RecordBatchFileWriter", "new_file", "open_file"]

def open_file(source: NativeFile) -> RecordBatchFileReader: ...
def new_file(sink: str | BinaryIO, schema: Schema) -> RecordBatchFileWriter: ...

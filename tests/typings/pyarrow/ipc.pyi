from typing import BinaryIO

from . import Buffer, Message, NativeFile, RecordBatch, RecordBatchFileReader, RecordBatchFileWriter, Schema

__all__ = [
    "RecordBatchFileReader",
    "RecordBatchFileWriter",
    "new_file",
    "open_file",
    "read_message",
    "read_record_batch",
]

def open_file(source: NativeFile) -> RecordBatchFileReader: ...
def new_file(sink: str | BinaryIO | NativeFile, schema: Schema) -> RecordBatchFileWriter: ...
def read_message(source: NativeFile | Buffer) -> Message: ...
def read_record_batch(obj: Message, schema: Schema) -> RecordBatch: ...

"""What is used of fsspec, which has no types of its own."""

from contextlib import AbstractContextManager
from typing import BinaryIO

from . import core as core

def available_protocols() -> list[str]: ...
def get_filesystem_class(protocol: str) -> type: ...
def open(urlpath: str, mode: str) -> AbstractContextManager[BinaryIO]: ...

"""Fixtures that several rooms' tests use."""

import atexit
import gc
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton's kernels run in its interpreter. It is chosen when a kernel is defined, so before
# anything imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Programs that a shell starts in the background ignore Ctrl-C, and so does all that they start: tests that send it
# would wait for nothing.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Where several processes share the tests, files that take minutes must not come last, or one process works while the
# others are done.
LONG = (
    "tests/train/zero/test_equivalence", "tests/train/test_adalora", "tests/programs/test_train", "tests/train/",
    "tests/distributed/", "tests/programs/", "tests/evaluate/", "tests/memory/", "tests/ops/", "tests/export/",
    "tests/models/",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: next((place for place, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG))
    )


def pytest_collection_finish():
    """What is imported by now stays: looking through it for garbage, again and again, takes seconds."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # C++ libraries tell of leaks otherwise


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def read_only(tmp_path):
    """Copies a folder to a file system that can't be written, even by root; gives the copy."""
    disk = tmp_path / "read-only"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")

    def copied(folder: Path) -> Path:
        shutil.copytree(folder, disk / folder.name, symlinks=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return disk / folder.name

    yield copied
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's tiles of 4 queries in every row, of which some are kept for backward and some are not."""
    from vltrain.ops.packed import tiled

    for name, value in {"TILE": 4, "KEPT_KEYS": 6, "SMALLEST_WIDTH": 1, "SHORTEST": 0, "LONGEST_CAUSAL": 10**9}.items():
        monkeypatch.setattr(tiled, name, value)

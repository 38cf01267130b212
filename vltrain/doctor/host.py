"""What is not the GPU's: shared memory, limits, cores, folders, the compiler and the hub's cache."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vltrain.distributed.machine import LEAST_SHARED_BYTES, SHARED_MEMORY
from vltrain.doctor.findings import ABSENT, OK, PROBLEM, WARNING, Finding

MIB, GIB = 2**20, 2**30
TRIAL_BYTES = 32 * MIB
AMPLE_SHARED_BYTES = GIB
OPEN_FILES = 4096
SLOW_MB_PER_SECOND = 20
LEAST_DISK_BYTES = 5 * GIB


def shared_memory(local_size: int, folder: str = SHARED_MEMORY) -> Finding:
    """/dev/shm, through which NCCL and the workers that decode images pass data."""
    if not os.path.isdir(folder):
        return Finding(status=ABSENT, what="shared memory", found=f"no {folder}")
    usage = shutil.disk_usage(folder)
    numbers = {"free_gib": usage.free / GIB, "total_gib": usage.total / GIB}
    found, do = (
        f"{folder}: {{free_gib}} of {{total_gib}} GiB free",
        "remove what ended runs left there; in a container docker run --shm-size 8g",
    )
    if usage.free < local_size * LEAST_SHARED_BYTES:
        needed = f"{local_size * LEAST_SHARED_BYTES / MIB:.0f} MiB"
        return Finding(status=PROBLEM, what="shared memory", found=found, needed=needed, do=do, numbers=numbers)
    if usage.free < AMPLE_SHARED_BYTES:
        return Finding(
            status=WARNING, what="shared memory", found=found, needed="1 GiB to be safe", do=do, numbers=numbers
        )
    return Finding(status=OK, what="shared memory", found=found, numbers=numbers)


def open_files() -> Finding:
    """The limit of open files: each worker's tensors and each rank's connections take some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reachable = hard == resource.RLIM_INFINITY or hard >= OPEN_FILES
    shown = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    return Finding(
        status=OK if enough else WARNING,
        what="open files",
        found=f"limit {shown[0]} (may be raised to {shown[1]})",
        needed=f"{OPEN_FILES}",
        do="" if enough else f"ulimit -n {OPEN_FILES if reachable else 'more, by root: /etc/security/limits.conf'}",
    )


def cores_per_rank(own: Sequence[int], others: Sequence[Sequence[int]]) -> float:
    """How many cores a rank has: those that it may run on, each shared with the ranks of this machine that may run
    there too.

    Args:
        own: numbers of the cores that this rank may run on.
        others: those of all ranks on this machine, this one included.
    """
    return sum(1 / sum(core in cores for cores in others) for core in own)


def cores(own: Sequence[int], others: Sequence[Sequence[int]], workers: int) -> Finding:
    """Cores of this rank against its own process and `workers` that decode images."""
    count, needed = cores_per_rank(own, others), 1 + workers
    enough = count >= needed
    return Finding(
        status=OK if enough else WARNING,
        what="cores per rank",
        needed=f"{needed} (itself and {workers} that decode images)",
        numbers={"cores": count},
        found=f"{{cores}} ({len(own)} may be used, of {os.cpu_count()} on the machine)",
        do="" if enough else "fewer ranks, --data.workers 0, or more cores (srun --cpus-per-task)",
    )


def folder_speed(folder: Path, purpose: str) -> Finding:
    """Writes, syncs and reads 32 MiB where `folder` is or would be made; nothing is left there."""
    place = _nearest_existing(folder.absolute())
    what, shown = f"folder {folder}", "" if place == folder.absolute() else f" (to be made in {place})"
    try:
        usage = shutil.disk_usage(place)
        if usage.free < TRIAL_BYTES + MIB:
            return Finding(
                status=PROBLEM,
                what=what,
                found=f"{purpose}{shown}: {usage.free / MIB:.1f} MiB free",
                needed="room to write",
                do="free some, or take another disk",
            )
        written, read = _transfer(place)
    except OSError as error:
        return Finding(
            status=PROBLEM,
            what=what,
            found=f"{purpose}{shown}: {error.strerror or error}",
            needed="to be writable",
            do="mend its rights, or take another folder",
        )
    numbers = {"write_mb_per_s": written, "read_mb_per_s": read, "free_gib": usage.free / GIB}
    found = f"{purpose}{shown}: writes {{write_mb_per_s}} and reads {{read_mb_per_s}} MB/s, {{free_gib}} GiB free"
    if min(written, read) < SLOW_MB_PER_SECOND:
        return Finding(
            status=WARNING,
            what=what,
            found=found,
            needed=f"{SLOW_MB_PER_SECOND} MB/s",
            do="take a faster file system",
            numbers=numbers,
        )
    if usage.free < LEAST_DISK_BYTES:
        return Finding(
            status=WARNING,
            what=what,
            found=found,
            needed="room for checkpoints (vltrain plan says how much)",
            numbers=numbers,
        )
    return Finding(status=OK, what=what, found=found, numbers=numbers)


def _nearest_existing(folder: Path) -> Path:
    """An absolute folder, or the one above it in which it would be made."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _transfer(place: Path) -> tuple[float, float]:
    """MB/s written through to the disk, and read again past the page cache where the file system lets it go."""
    block = os.urandom(MIB)
    with tempfile.TemporaryFile(dir=place) as file:
        start = time.perf_counter()
        for _ in range(TRIAL_BYTES // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(MIB):
            pass
        read = time.perf_counter() - start
    return TRIAL_BYTES / written / 1e6, TRIAL_BYTES / read / 1e6


def compiler() -> Finding:
    """What DeepSpeed builds CPUAdam with: a C++ compiler that compiles, and ninja."""
    used_for, name = "only for optimizer offload", os.environ.get("CXX", "c++")
    path, ninja = shutil.which(name), shutil.which("ninja") is not None or importlib.util.find_spec("ninja") is not None
    if path is None or not ninja:
        missing = " and ".join(
            word for word, there in ((f"the C++ compiler '{name}'", path), ("ninja", ninja)) if not there
        )
        return Finding(
            status=ABSENT,
            what="compiler",
            found=f"no {missing}",
            needed=used_for,
            do="install g++ (or set CXX) and ninja",
        )
    command = [path, "-fopenmp", "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(
        command,
        input="#include <omp.h>\n#include <vector>\nint main() { return 0; }\n",
        capture_output=True,
        text=True,
        timeout=30,
    )
    if done.returncode:
        words = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        return Finding(
            status=WARNING,
            what="compiler",
            found=f"{path} cannot compile with OpenMP: {words[:200]}",
            needed=used_for,
            do="install g++ and libgomp",
        )
    return Finding(status=OK, what="compiler", found=f"{path} and ninja", needed=used_for)


def hub_cache() -> Finding:
    """Where the Hugging Face hub keeps what it downloads, and whether it may download."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    place = _nearest_existing(folder)
    flags = [
        name
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        if os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")
    ]
    offline = f"offline ({', '.join(flags)}): only what is there" if flags else "downloads allowed"
    free = shutil.disk_usage(place).free
    found, numbers = f"{folder}, {{free_gib}} GiB free, {offline}", {"free_gib": free / GIB}
    if not flags and not os.access(place, os.W_OK):
        return Finding(
            status=WARNING,
            what="hub cache",
            found=f"{found}; {place} is not writable",
            do="set HF_HOME to a folder that is",
            numbers=numbers,
        )
    if not flags and free < LEAST_DISK_BYTES:
        return Finding(
            status=WARNING,
            what="hub cache",
            found=found,
            needed="room for weights",
            do="set HF_HOME to a larger disk",
            numbers=numbers,
        )
    return Finding(status=OK, what="hub cache", found=found, numbers=numbers)

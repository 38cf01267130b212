"""A rank without a model: `python -m tests.distributed.preemption_worker KIND FOLDER`, for what a signal does outside
and inside of training."""

import ctypes
import subprocess
import sys
import time
from pathlib import Path

from vltrain.distributed import preemption as module
from vltrain.distributed.preemption import Preemption
from vltrain.distributed.signals import block_signals_in_workers


def wait_in_c() -> None:
    """Waits for ever in a call of C that no signal interrupts, as a collective does whose other rank is gone."""
    mutex = ctypes.create_string_buffer(64)
    library = ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def main(kind: str, folder: Path) -> None:
    if kind == "hung":
        module.RESERVE_SECONDS, module.UNSEEN_SAVE_SECONDS = 0.2, 0.2
    preemption = Preemption(time.time() + 11 if kind == "limit" else None)
    with preemption.listening():
        if kind == "worker":
            with block_signals_in_workers():
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            (folder / "child").write_text(str(child.pid))
        if kind in ("stuck", "hung"):
            with preemption.training():
                (folder / "ready").touch()
                wait_in_c()
        (folder / "ready").touch()
        try:
            time.sleep(60)
        finally:
            (folder / "cleaned").touch()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

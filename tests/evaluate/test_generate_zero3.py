"""Generation between training steps under ZeRO-3, where every forward is a collective, on two real ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def test_two_ranks_with_unequal_shares_answer_right_and_training_does_not_notice():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zero3_worker.py"))],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, (output, errors) in zip(ranks, outputs):
        assert process.returncode == 0, errors[-3000:]
        assert output.splitlines()[-1] == "fine"

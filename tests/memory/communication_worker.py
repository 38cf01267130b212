"""Trains each scenario of `tests.memory.zero_worker` and counts what DeepSpeed's own logger of communication says of
the third step: at stage 3 the first two find out in which order weights are needed. `FILE.NAME.RANK` gets {operation:
bytes of its messages}."""

from collections.abc import Callable
from typing import Any

import deepspeed.comm.comm as comm

from tests.memory.zero_worker import run_all
from vltrain.train.trainer import Trainer


def sent(trainer: Trainer, next_step: Callable[[], Any]) -> dict[str, int]:
    loaded = next_step()
    comm.comms_logger.reset_data()
    trainer.step(loaded)
    return {
        operation: sum(int(size) * entry[0] for size, entry in sizes.items())
        for operation, sizes in comm.comms_logger.get_raw_data().items()
    }


def main(place: str) -> None:
    logger = {"enabled": True, "prof_all": True, "verbose": False, "debug": False}
    run_all(place, sent, comms_logger=logger)

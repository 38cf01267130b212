"""Trains each scenario for some steps in this rank's process and counts what DeepSpeed's own logger of communication
says of the last of them.

FILE: [[name, DeepSpeed JSON, changes of the recipe], ...]; `FILE.NAME.RANK` gets {operation: bytes of its messages}.
"""

import json
from pathlib import Path

import deepspeed.comm.comm as comm
import torch

from tests.support.tiny import tiny_config
from vltrain.data.shards import PackedDataset
from vltrain.models.build import build_model
from vltrain.train.make_trainer import RunStart, make_trainer
from vltrain.train.zero.engine import init_distributed, shutdown_distributed

STEPS = 3  # at stage 3 the first two find out in which order weights are needed


def main(place: str) -> None:
    torch.set_num_threads(1)
    rank, _ = init_distributed()
    file = Path(place)
    for name, ds, changes in json.loads(file.read_text()):
        config = tiny_config(output=f"{file}.{name}.run", **changes)
        trainer = make_trainer(
            config,
            {**ds, "comms_logger": {"enabled": True, "prof_all": True, "verbose": False, "debug": False}},
            model=build_model(config.model),
            dataset=PackedDataset(f"{file}.packs"),
            start=RunStart(dtype=torch.float32),
            evaluate=lambda steps_done: None,
        )
        steps = iter(trainer.loader)
        for _ in range(STEPS):
            comm.comms_logger.reset_data()
            trainer.step(next(steps))
        sent = {
            operation: sum(int(size) * entry[0] for size, entry in sizes.items())
            for operation, sizes in comm.comms_logger.get_raw_data().items()
        }
        Path(f"{file}.{name}.{rank}").write_text(json.dumps(sent))
        trainer.monitor.close()
    shutdown_distributed()

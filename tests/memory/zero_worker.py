"""Trains each scenario for two steps in this rank's process and counts what DeepSpeed then keeps.

FILE: [[name, DeepSpeed JSON, changes of the recipe], ...]; `FILE.NAME.RANK` gets the bytes by kind, as
`vltrain.memory.zero` names them.
"""

import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import tiny_config
from vltrain.data.shards import PackedDataset
from vltrain.models.build import build_model
from vltrain.train.make_trainer import RunStart, make_trainer
from vltrain.train.trainer import Trainer
from vltrain.train.zero.engine import Engine, init_distributed, shutdown_distributed


def num_bytes(tensors: Iterable[Any]) -> int:
    """Of the distinct storages behind these tensors."""
    storages = (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def kept(engine: Engine) -> dict[str, int]:
    """Between two steps."""
    parameters = list(engine.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    wrapper = engine._engine.optimizer
    states = [
        value for state in engine.optimizer.state.values() for value in state.values() if getattr(value, "ndim", 0)
    ]
    result = {"optimizer states": num_bytes(states)}
    if engine.stage < 3:
        result |= {"trained weights": num_bytes(trained), "frozen weights, fp32": num_bytes(frozen)}
        result["master weights"] = num_bytes(wrapper.single_partition_of_fp32_groups) if engine.stage else 0
        return result
    flat = [wrapper.lp_param_buffer]
    held = num_bytes([*flat, *wrapper.fp32_partitioned_groups_flat])
    result |= {"trained weights": num_bytes(flat), "master weights": held - num_bytes(flat)}
    result["frozen weights, fp32"] = num_bytes(parameter.ds_tensor for parameter in frozen)
    result["gradients"] = num_bytes([wrapper.grad_partitions_flat_buffer])
    result["reduce buckets"] = num_bytes(bucket.buffer for bucket in wrapper.ipg_buckets.values())
    result["small weights kept whole"] = num_bytes(parameter for parameter in parameters if parameter.ds_persist)
    return result


def waiting_gradients(trainer: Trainer, loaded: Any) -> dict[str, int]:
    """One more step, and the gradients that wait for its later micro-steps, which at stage 3 are in a buffer of their
    own."""
    engine, result = trainer.engine, {}
    for position, batch in enumerate(loaded.batches):
        loss = engine.forward(batch).loss_sum / loaded.plan.num_label_tokens
        engine.backward(loss, last_micro_step=position == len(loaded.batches) - 1)
        if position == 0 and engine.stage < 3:
            waiting = [parameter.grad for parameter in engine.trainable.values()]
            if engine.stage:
                waiting += [
                    tensor for tensors in engine._engine.optimizer.all_grad_tensors.values() for tensor in tensors or ()
                ]
            result["gradients"] = num_bytes(waiting)
    engine.step()
    return result


def main(place: str) -> None:
    run_all(place, lambda trainer, steps: {**kept(trainer.engine), **waiting_gradients(trainer, steps())})


def run_all(place: str, count: Callable[[Trainer, Callable[[], Any]], dict[str, int]], **more: Any) -> None:
    """Trains each scenario of a file for two steps, and writes what `count` says then.

    Args:
        count: is given the trainer, and what fetches the next step.
        more: sections of DeepSpeed's JSON beside the scenario's.
    """
    torch.set_num_threads(1)
    rank, _ = init_distributed()
    file = Path(place)
    for name, ds, changes in json.loads(file.read_text()):
        config = tiny_config(output=f"{file}.{name}.run", **changes)
        trainer = make_trainer(
            config,
            {**ds, **more},
            model=build_model(config.model),
            dataset=PackedDataset(f"{file}.packs"),
            start=RunStart(dtype=torch.float32),
            evaluate=lambda steps_done: None,
        )
        steps = iter(trainer.loader)
        for _ in range(2):
            trainer.step(next(steps))
        gc.collect()
        Path(f"{file}.{name}.{rank}").write_text(json.dumps(count(trainer, lambda: next(steps))))
        trainer.monitor.close()
    shutdown_distributed()

"""A rank that builds a model under ZeRO-3, from the settings in a JSON file; writes OUT.RANK as JSON.

settings: {"warm_up": {...}, "model": {...}}, each changes to the tiny recipe. Written: `elements` of the model,
`most_whole` elements of parameters that were whole at once, and on Linux `grown_bytes`, by how much the process's
resident memory exceeded at most what it was before, pages of mapped files included; `kept_bytes` of partitions.
"""

import gc
import json
import os
from pathlib import Path

import torch

from tests.support.tiny import tiny_config
from vltrain.models.build import build_model, count_parameters
from vltrain.models.quantise import num_weights
from vltrain.train.zero.ds_config import resolve_ds_config
from vltrain.train.zero.engine import init_distributed, partitioner, shutdown_distributed

DS = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(settings_file: str, out: str) -> None:
    torch.set_num_threads(1)
    rank, world_size = init_distributed()
    settings = json.loads(Path(settings_file).read_text())
    most_whole = 0

    def build(changes: dict) -> torch.nn.Module:
        config = tiny_config(**changes)
        cut_up = partitioner(resolve_ds_config(DS, config, world_size))

        def place(unit: torch.nn.Module) -> None:
            nonlocal most_whole
            alive = (thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Parameter) and not thing.is_meta)
            most_whole = max(most_whole, sum(parameter.numel() for parameter in alive))
            cut_up(unit)

        return build_model(config.model, place=place)

    build(settings["warm_up"])  # modules that are imported at first use
    gc.collect()
    most_whole, measurable = 0, os.access("/proc/self/clear_refs", os.W_OK)
    if measurable:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        before = status("VmRSS")
    model = build(settings["model"])
    found = {
        "elements": sum(num_weights(parameter) for parameter in model.parameters()),
        "counted": sum(total for total, _ in count_parameters(model).values()),
        "left_whole": sum(parameter.numel() for parameter in model.parameters()),
        "most_whole": most_whole,
        "kept_bytes": sum(parameter.ds_tensor.nbytes for parameter in model.parameters()),
        "grown_bytes": status("VmHWM") - before if measurable else None,
        "flops_per_token": model.flops().per_token,
    }
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    shutdown_distributed()

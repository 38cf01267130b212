"""A folder of trained weights alone, what `vltrain export --format adapters` writes: a checkpoint without optimizer
states, and the recipe beside it.

    config.yaml                  the run's resolved recipe
    weights-00001.safetensors    trained parameters by full name, fp32
    run.json                     what the run says of itself and of its data, where it did
    checkpoint.json              step, the network they belong to, digests of the frozen weights' files, and of the
                                 files above

`train.init_from` takes it as it takes a checkpoint, and whoever builds the model of its recipe can load it into that.
"""

from __future__ import annotations

from pathlib import Path

from vltrain.config.older_runs import complete
from vltrain.config.recipe import RECIPE, build_config, dump_config, read_recipe
from vltrain.config.schema import Config
from vltrain.errors import InputError
from vltrain.files.atomic import write_json
from vltrain.files.strict_json import read_object
from vltrain.receipts.manifest import MANIFEST
from vltrain.train.checkpoints.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from vltrain.train.run.provenance import RUN


def write_adapters(folder: Path, config: Config, checkpoint: Checkpoint, run: Path) -> None:
    """Fills an empty folder. `run`: the folder of theirs. Raises OSError, and InputError for a run.json that is
    damaged."""
    writer = CheckpointWriter(folder)
    for name, tensor in checkpoint.weights():
        writer.add("weights", name, tensor)
    state = {} if checkpoint.precision is None else {"precision": checkpoint.precision}
    writer.finish(checkpoint.step, checkpoint.belongs_to, state)  # lists what is there, so the recipe comes after
    (folder / RECIPE).write_text(dump_config(config), encoding="utf-8")
    if (run / RUN).is_file():
        found = read_object(run / RUN, "what the run was made of")
        write_json(folder / RUN, {name: found[name] for name in ("identity", "data") if name in found})


def open_adapters(folder: Path) -> tuple[Config, Checkpoint]:
    """The recipe and the verified weights of such a folder.

    That the weights belong to the model of the recipe, or of another one, and to the frozen weights that lie on this
    machine now, is what `vltrain.train.run.identity.require_same_model` compares.

    Raises: InputError for a folder that is none, or is damaged.
    """
    expected = "expected a folder that `vltrain export --format adapters` wrote"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, {expected}")
    for name in (MANIFEST, RECIPE):
        if not (folder / name).is_file():
            kind = " (it is a peft folder)" if (folder / "adapter_config.json").is_file() else ""
            raise InputError(f"{folder}: no {name} in it{kind}, {expected}")
    checkpoint = open_checkpoint(folder)
    return build_config(complete(read_recipe(folder / RECIPE))), checkpoint

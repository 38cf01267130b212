"""`vltrain export RUN --output FOLDER [--format peft|whole] [--checkpoint best|none|FOLDER]`: a trained InstructBLIP for others to load.

    --format peft     (default) low-rank updates and what else was tuned, as peft's folder:
                      PeftModel.from_pretrained(InstructBlipForConditionalGeneration.from_pretrained(BASE), FOLDER)
    --format whole    the whole network, updates folded in, in fp32 (and with as much memory), as transformers' folder:
                      InstructBlipForConditionalGeneration.from_pretrained(FOLDER)
    --checkpoint      a checkpoint's folder, or best; left out: the run's newest; none (with whole): the model before tuning, the base of a run
                      that began with random weights

Tokenizers and the image processor are the base's and are not written. The folder must be new; it appears when it is whole. Exit code: 0, or 2
for a mistake in the input.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vltrain.data.folder import new_folder
from vltrain.errors import InputError, exits_cleanly
from vltrain.models.blip_weights import empty_blip, tie_embeddings
from vltrain.models.build import build_model
from vltrain.models.low_rank import fold_in
from vltrain.models.peft_folder import CONFIG, WEIGHTS, cut_to_kept, describe_updates, kept_directions, only_mode, peft_key, weights_in_their_names
from vltrain.models.qformer import InstructBlip
from vltrain.models.quantise import dequantise_linears
from vltrain.programs.evaluate import choose_checkpoint
from vltrain.recipe import build_config, read_recipe
from vltrain.settings import COMMAND_LINE, split_arguments
from vltrain.train.checkpoint import Checkpoint, load_trainable

OPTIONS = ("output", "format", "checkpoint")
FORMATS = ("peft", "whole")


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain export") -> int:
    """Exports what the command line names. Returns the exit code."""
    arguments = split_arguments(argv)
    if ("help", None) in arguments.options:
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    arguments.require_known(OPTIONS)
    if len(arguments.positionals) != 1 or arguments.last("output") is None:
        raise InputError(f"{COMMAND_LINE}: found {list(arguments.positionals)}, expected {program} RUN --output FOLDER")
    form = arguments.last("format") or "peft"
    if form not in FORMATS:
        raise InputError(f"{COMMAND_LINE}: --format: found '{form}', expected one of {', '.join(FORMATS)}")
    export(Path(arguments.positionals[0]), Path(str(arguments.last("output"))), form, arguments.last("checkpoint"))
    return 0


def export(run: Path, output: Path, form: str = "peft", named: str | None = None) -> None:
    """Writes the checkpoint `named` (see `choose_checkpoint`) of the run in the folder `run` into the new folder `output`, see the module.

    Raises: InputError for a run that is none or of another architecture, and for what the form cannot hold.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: no config.yaml in it, expected the folder of a run (the recipe's `output`)")
    config = build_config(read_recipe(run / "config.yaml"))
    if config.model.architecture != "instructblip":
        raise InputError(f"{run}: a run of the architecture {config.model.architecture}; only InstructBLIPs can be exported")
    blip = config.model.instructblip
    if form == "peft":
        only_mode(blip)
    checkpoint = choose_checkpoint(run, named)
    if checkpoint is None and form == "peft":
        raise InputError(f"{COMMAND_LINE}: --checkpoint none: there is nothing tuned to export; take --format whole for the base")
    with new_folder(output) as folder:
        if form == "whole":
            _write_whole(folder, config.model, checkpoint)
        else:
            assert checkpoint is not None
            _write_updates(folder, blip, checkpoint)
    print(f"{output}: {form} folder of {checkpoint.path if checkpoint is not None else 'the untuned model'}")


def _write_updates(folder: Path, blip: Any, checkpoint: Checkpoint) -> None:
    weights = weights_in_their_names(checkpoint.weights(), InstructBlip.their_name)
    pattern: dict[str, list[bool]] = {}
    if any(name.startswith("adalora/kept/") for name in checkpoint.extra()):
        kept = kept_directions(weights)
        weights = cut_to_kept(weights, kept)
        pattern = {f"{layer}.lora_E": mask.tolist() for layer, mask in kept.items()}
    settings = describe_updates(blip, weights, blip.source)
    if pattern:
        settings["rank_pattern"] = pattern
    save_file({peft_key(name): value.contiguous() for name, value in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _write_whole(folder: Path, model: Any, checkpoint: Checkpoint | None) -> None:
    built = build_model(model, dtype=torch.float32)
    if checkpoint is not None:
        load_trainable(built, checkpoint)
    dequantise_linears(built)
    fold_in(built)
    named: dict[str, Tensor] = {InstructBlip.their_name(name): value for name, value in built.state_dict().items()}
    network = empty_blip(built.config, "sdpa")
    network.load_state_dict(named, strict=True, assign=True)
    tie_embeddings(network.language_model)
    network.save_pretrained(folder)

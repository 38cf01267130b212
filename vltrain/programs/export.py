"""`vltrain export RUN --output FOLDER [--format peft|whole] [--checkpoint best|none|FOLDER]`: a trained InstructBLIP for others to load.

    --format peft     (default) low-rank updates and what else was tuned, as peft's folder:
                      PeftModel.from_pretrained(InstructBlipForConditionalGeneration.from_pretrained(BASE), FOLDER)
    --format whole    the whole network, updates folded in, in fp32 (and with as much memory), and its processor, as transformers' folder:
                      InstructBlipForConditionalGeneration.from_pretrained(FOLDER), InstructBlipProcessor.from_pretrained(FOLDER)
    --checkpoint      a checkpoint's folder, or best; left out: the run's newest; none (with whole): the model before tuning, the base of a run
                      that began with random weights

The folder must be new; it appears when it is whole; vltrain_origin.json in it says which weights it was made of. Exit code: 0, or 2 for a
mistake in the input.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from vltrain.config import Config
from vltrain.data.folder import new_folder
from vltrain.errors import InputError, exits_cleanly
from vltrain.files.tensors import save_file
from vltrain.files.whole import write_json
from vltrain.instructblip_config import InstructBlipConfig
from vltrain.models.blip_weights import empty_blip, tie_embeddings
from vltrain.models.build import build_model
from vltrain.models.low_rank import fold_in
from vltrain.models.peft_folder import cut_to_kept, describe_updates, kept_directions, only_mode, peft_key, with_tied_names
from vltrain.models.peft_reader import WEIGHTS
from vltrain.models.peft_settings import CONFIG
from vltrain.models.qformer import InstructBlip
from vltrain.models.quantise import dequantise_linears
from vltrain.programs.data_ready import tokenizer_sources
from vltrain.programs.evaluate import choose_checkpoint
from vltrain.programs.made_of import made_of
from vltrain.programs.run_folder import read_command, recipe_of, weights_before, weights_used
from vltrain.programs.stock_processor import write_processor
from vltrain.settings import COMMAND_LINE
from vltrain.train.checkpoint import Checkpoint, kept_by_adalora, load_trainable

FORMATS = ("peft", "whole")
ORIGIN = "vltrain_origin.json"  # in an exported folder: which weights it was made of


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain export") -> int:
    """Exports what the command line names. Returns the exit code."""
    told = read_command(argv, program=program, help_text=__doc__, options=("format", "checkpoint"))
    if told is None:
        return 0
    run, output, arguments = told
    form = arguments.last("format") or "peft"
    if form not in FORMATS:
        raise InputError(f"{COMMAND_LINE}: --format: found '{form}', expected one of {', '.join(FORMATS)}")
    export(run, output, form, arguments.last("checkpoint"))
    return 0


def export(run: Path, output: Path, form: str = "peft", named: str | None = None) -> None:
    """Writes the checkpoint `named` (see `choose_checkpoint`) of the run in the folder `run` into the new folder `output`, see the module.

    Raises: InputError for a run that is none or of another architecture, and for what the form cannot hold.
    """
    config = recipe_of(run)
    if config.model.architecture != "instructblip":
        raise InputError(f"{run}: a run of the architecture {config.model.architecture}; only InstructBLIPs can be exported")
    blip = config.model.instructblip
    if form == "peft":
        only_mode(blip)
    checkpoint = choose_checkpoint(run, named)
    if checkpoint is None and form == "peft":
        raise InputError(f"{COMMAND_LINE}: --checkpoint none: there is nothing tuned to export; take --format whole for the base")
    used = weights_used(run, config, checkpoint, made_of(config) if form == "whole" else None)
    with new_folder(output) as folder:
        try:
            if form == "whole":
                _write_whole(folder, config, checkpoint or weights_before(run, config))
            else:
                assert checkpoint is not None
                _write_updates(folder, blip, checkpoint)
            write_json(folder / ORIGIN, {"run": str(run), **used})
        except SafetensorError as error:  # a full disk, among others
            raise InputError(f"{output}: could not be written ({error}); nothing was left there") from None
    print(f"{output}: {form} folder of {checkpoint.path if checkpoint is not None else 'the untuned model'}")


def _write_updates(folder: Path, blip: InstructBlipConfig, checkpoint: Checkpoint) -> None:
    weights = {InstructBlip.their_name(name): value for name, value in checkpoint.weights()}
    pattern: dict[str, list[bool]] = {}
    if kept_by_adalora(checkpoint):
        kept = kept_directions(weights)
        weights = cut_to_kept(weights, kept)
        pattern = {f"{layer}.lora_E": mask.tolist() for layer, mask in kept.items()}
    settings = describe_updates(blip, weights, blip.source)
    if pattern:
        settings["rank_pattern"] = pattern
    named = {peft_key(name): value.contiguous() for name, value in with_tied_names(weights).items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _write_whole(folder: Path, config: Config, checkpoint: Checkpoint | None) -> None:
    model = config.model
    # Nothing runs here, so that kernels which a run on a GPU asked for are not missed.
    anywhere = dataclasses.replace(model.instructblip, attention="auto", kernels="auto")
    built = build_model(dataclasses.replace(model, instructblip=anywhere), dtype=torch.float32)
    if checkpoint is not None:
        load_trainable(built, checkpoint)
    dequantise_linears(built)
    fold_in(built)
    named: dict[str, Tensor] = {InstructBlip.their_name(name): value for name, value in built.state_dict().items()}
    network = empty_blip(built.config, "sdpa")
    network.load_state_dict(named, strict=True, assign=True)
    tie_embeddings(network.language_model)
    source, instruction = tokenizer_sources(config)
    assert instruction is not None, "an InstructBLIP has a Q-Former"
    write_processor(folder, built, network, source, instruction)
    network.save_pretrained(folder)

"""What an InstructBLIP is exported as.

peft   low-rank updates and what else was tuned, in peft's layout (`vltrain.models.peft_folder`)
whole  the whole network, updates folded in, in fp32 (and with as much memory), and its processor, in transformers' layout
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from vltrain.export.blip_processor import write_processor
from vltrain.export.format import Choices, Format, Source
from vltrain.files.tensors import save_file
from vltrain.models.blip_weights import empty_blip, tie_embeddings
from vltrain.models.build import build_model
from vltrain.models.low_rank import fold_in
from vltrain.models.peft_folder import cut_to_kept, describe_updates, kept_directions, only_mode, peft_key, with_tied_names
from vltrain.models.peft_reader import WEIGHTS
from vltrain.models.peft_settings import CONFIG
from vltrain.models.qformer import InstructBlip
from vltrain.models.quantise import dequantise_linears
from vltrain.train.checkpoint import kept_by_adalora, load_trainable


def _refuse_mixed_modes(source: Source, choices: Choices) -> None:
    only_mode(source.config.model.instructblip)


def _write_updates(folder: Path, source: Source, choices: Choices) -> None:
    checkpoint, blip = source.checkpoint, source.config.model.instructblip
    assert checkpoint is not None, "the format needs tuned weights"
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
def _write_whole(folder: Path, source: Source, choices: Choices) -> None:
    model = source.config.model
    # Nothing runs here, so that kernels which a run on a GPU asked for are not missed.
    anywhere = dataclasses.replace(model.instructblip, attention="auto", kernels="auto")
    built = build_model(dataclasses.replace(model, instructblip=anywhere), dtype=torch.float32)
    if source.weights is not None:
        load_trainable(built, source.weights)
    dequantise_linears(built)
    fold_in(built)
    named: dict[str, Tensor] = {InstructBlip.their_name(name): value for name, value in built.state_dict().items()}
    network = empty_blip(built.config, "sdpa")
    network.load_state_dict(named, strict=True, assign=True)
    tie_embeddings(network.language_model)
    tokenizer, instruction = source.tokenizer
    assert instruction is not None, "an InstructBLIP has a Q-Former"
    write_processor(folder, built, network, tokenizer, instruction)
    network.save_pretrained(folder)


PEFT = Format(
    summary="low-rank updates and what else was tuned, as peft's folder",
    loads="PeftModel.from_pretrained(InstructBlipForConditionalGeneration.from_pretrained(BASE), FOLDER)",
    write=_write_updates, refuse=_refuse_mixed_modes, reads_base=False,
)  # fmt: skip
WHOLE = Format(
    summary="the whole network, updates folded in, in fp32 (and with as much memory), and its processor, as transformers' folder",
    loads="InstructBlipForConditionalGeneration.from_pretrained(FOLDER), InstructBlipProcessor.from_pretrained(FOLDER)",
    write=_write_whole, needs_tuned=False,
)  # fmt: skip

"""What an InstructBLIP is exported as.

peft   low-rank updates and what else was tuned, in peft's layout (`vltrain.models.peft.folder`)
whole  the whole network, updates folded in, in fp32 (and with as much memory), and its processor, in transformers'
layout"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from vltrain.config.model.instructblip import BlipModelConfig
from vltrain.export.format import Choices, Format, Proof, Source, Written
from vltrain.export.formats.instructblip_processor import write_processor
from vltrain.export.questions import as_text
from vltrain.files.locate import locate
from vltrain.files.tensors import save_file
from vltrain.inference.build import anywhere
from vltrain.models.build import build_model
from vltrain.models.instructblip.model import InstructBlip
from vltrain.models.instructblip.weights import empty_blip, tie_embeddings
from vltrain.models.peft.folder import (
    cut_to_kept,
    describe_updates,
    kept_directions,
    only_mode,
    peft_key,
    with_tied_names,
)
from vltrain.models.peft.low_rank import merge_updates
from vltrain.models.peft.reader import WEIGHTS
from vltrain.models.peft.settings import CONFIG
from vltrain.models.quantise import dequantise_linears
from vltrain.schema import IMAGE_MARKER, Sample
from vltrain.train.checkpoints.checkpoint import kept_by_adalora, load_trainable

JPEGS = (
    "JPEGs more than three times as large as the ViT's images are decoded whole here, at a fraction of their size "
    "in the run: pixels differ by some 1 of 255"
)


def _section(source: Source) -> BlipModelConfig:
    return cast(BlipModelConfig, source.config.model)


def _refuse_mixed_modes(source: Source, choices: Choices) -> None:
    only_mode(_section(source).instructblip)


def _write_updates(folder: Path, source: Source, choices: Choices) -> None:
    checkpoint, blip = source.checkpoint, _section(source).instructblip
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
def _write_whole(folder: Path, source: Source, choices: Choices) -> Written:
    built = build_model(anywhere(source.config).model, dtype=torch.float32)
    if source.weights is not None:
        load_trainable(built, source.weights)
    dequantise_linears(built)
    built.float()  # frozen weights of 16 bits: sums are not rounded to them
    merge_updates(built)
    named: dict[str, Tensor] = {InstructBlip.their_name(name): value for name, value in built.state_dict().items()}
    network = empty_blip(built.config, "sdpa")
    network.load_state_dict(named, strict=True, assign=True)
    tie_embeddings(network.language_model)
    tokenizer, instruction = source.tokenizer
    assert instruction is not None, "an InstructBLIP has a Q-Former"
    known = write_processor(folder, built, network, tokenizer, instruction)
    network.generation_config.max_new_tokens = source.max_new_tokens
    if beyond := list(range(known, network.config.text_config.vocab_size)):  # rows that mean nothing are never chosen
        network.generation_config.suppress_tokens = beyond
    network.to(choices.torch_dtype).save_pretrained(folder)
    return Written(notes=(JPEGS,))


def _base(source: Source, place: Path) -> str:
    """The base as the run reads it: its own folder, or one that is written where there is none, or where the run keeps
    it in fewer bits."""
    model = _section(source)
    if model.instructblip.source is not None and model.bits in (None, 32):
        return locate(model.instructblip.source)
    _write_whole(place / "base", dataclasses.replace(source, checkpoint=None, before=None), Choices())
    return str(place / "base")


def _shows_one(sample: Sample) -> bool:
    """Not a question that spells `<image>` either, which transformers' processor takes for an image's place."""
    return len(sample.images) == 1 and IMAGE_MARKER not in as_text(sample)


PEFT = Format(
    summary="low-rank updates and what else was tuned, as peft's folder",
    loads="PeftModel.from_pretrained(InstructBlipForConditionalGeneration.from_pretrained(BASE), FOLDER)",
    write=_write_updates,
    refuse=_refuse_mixed_modes,
    reads_base=False,
    library="peft",
    proof=Proof(
        load="""\
from peft import PeftModel
from transformers import InstructBlipForConditionalGeneration

model = PeftModel.from_pretrained(InstructBlipForConditionalGeneration.from_pretrained(base), folder).eval()
""",
        ask="""\
prompt, decoder_only = case["prompt"][None], model.config.use_decoder_only_language_model
spoken = {*prompt[0].tolist(), *answer_ids[0].tolist()}
image_id = next(number for number in range(len(spoken) + 1) if number not in spoken)  # any that has no other use here
model.base_model.model.config.image_token_id = model.base_model.model.config.image_token_index = image_id
ids = torch.where(prompt < 0, image_id, prompt)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": case["pixel_values"]}
inputs["qformer_input_ids"] = case["read"][None]
inputs["qformer_attention_mask"] = torch.ones_like(inputs["qformer_input_ids"])
answer = None
""",
        logits="""\
if decoder_only:
    whole = torch.cat([ids, answer_ids], dim=1)
    inputs |= {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    logits = model(**inputs).logits[0, ids.shape[1] - 1 :]
else:
    text = model.config.text_config
    start = text.decoder_start_token_id if text.decoder_start_token_id is not None else text.pad_token_id
    logits = model(**inputs, decoder_input_ids=torch.cat([torch.full((1, 1), start), answer_ids], dim=1)).logits[0]
""",
        question=as_text,
        takes=_shows_one,
        base=_base,
    ),
)
WHOLE = Format(
    summary="the whole network, updates folded in (built in fp32, and with as much memory), and its processor, as "
    "transformers' folder",
    loads="InstructBlipForConditionalGeneration.from_pretrained(FOLDER), InstructBlipProcessor.from_pretrained(FOLDER)",
    write=_write_whole,
    needs_tuned=False,
    options=frozenset({"dtype"}),
    proof=Proof(
        load="""\
from PIL import Image
from transformers import GenerationConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor

processor = InstructBlipProcessor.from_pretrained(folder)
model = InstructBlipForConditionalGeneration.from_pretrained(folder).eval()
settings = GenerationConfig.from_pretrained(folder)
""",
        ask="""\
inputs = processor(images=image, text=question, return_tensors="pt").to(model.dtype)
prompt_length = inputs["input_ids"].shape[1] if model.config.use_decoder_only_language_model else 1
new = model.generate(**inputs, generation_config=settings)[0, prompt_length:]
answer = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
""",
        logits="""\
if model.config.use_decoder_only_language_model:
    ids = torch.cat([inputs["input_ids"], answer_ids], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**inputs).logits[0, prompt_length - 1 :]
else:
    start = torch.full((1, 1), settings.decoder_start_token_id)
    logits = model(**inputs, decoder_input_ids=torch.cat([start, answer_ids], dim=1)).logits[0]
""",
        question=as_text,
        takes=_shows_one,
        drafts=True,
    ),
)

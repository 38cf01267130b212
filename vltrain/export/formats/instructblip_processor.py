"""What beside weights makes an exported folder run in stock transformers: processor, tokenizers, the image token and
the ids that generation needs.

`InstructBlipProcessor.from_pretrained(FOLDER)` then gives the ids and pixels that we train on, and `generate` answers
as we do: BOS in front of a LLaMA's prompt and EOS behind a T5's, whatever the tokenizer's own files say, images as
squares without a crop, normalised as ours are.

transformers puts visual tokens in the places of `<image>`, a token of the LLM's vocabulary. Where the vocabulary has
rows to spare, as Flan-T5's and InstructBLIP's Vicuna have, it takes the first of them. Else the tables get a row more,
the mean of all others: its logit is the mean of all logits and never the largest.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

from vltrain.data.text.conversation import encode_prompt
from vltrain.data.text.instruction import InstructionSource
from vltrain.data.text.tokenizer import load_tokenizer
from vltrain.errors import InputError
from vltrain.export.formats.stock_tokenizer import open_stock
from vltrain.models.instructblip.model import InstructBlip
from vltrain.schema import Sample, Turn

logger = logging.getLogger(__name__)

IMAGE = "<image>"
PROBES = ("Question: Which one is it? Short answer:", "a", "Which of the two,  (a) or (b)?\n12 345")


def write_processor(
    folder: Path,
    model: InstructBlip,
    network: InstructBlipForConditionalGeneration,
    source: str,
    instruction: InstructionSource,
) -> int:
    """Writes the processor into `folder`, and puts into the network's config (and tables, if they are full) what goes
    with it, in place.

    Args:
        network: with the weights to be written, not yet written itself.
        source, instruction: where the LLM's and the Q-Former's tokenizer are, as `load_tokenizer` takes them.

    Returns: the ids that the LLM's tokenizer has, those from there on mean nothing.

    Raises: InputError for tokenizers that transformers reads in another way than we do.
    """
    tokenizer, reader = open_stock(source), open_stock(instruction.source, instruction.subfolder)
    _close_prompts(tokenizer, model.is_encoder_decoder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "right" if model.is_encoder_decoder else "left"
    processor = InstructBlipProcessor(_image_processor(model), tokenizer, reader, num_query_tokens=model.visual_tokens)
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    _make_room(network, image_id + 1)
    network.config.image_token_index = image_id
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if tokenizer.bos_token_id is not None:
        ids["bos_token_id"] = tokenizer.bos_token_id
    if model.is_encoder_decoder:
        ids["decoder_start_token_id"] = int(model.shifted(torch.zeros(1, 1, dtype=torch.int64))[0, 0])
    for settings in (
        network.config.text_config,
        network.generation_config,
    ):  # generate() reads the first, other programs the second
        for name, value in ids.items():
            setattr(settings, name, value)
    processor.save_pretrained(folder)
    # The name that all of transformers' versions know; which of its backends it takes is a matter of the machine.
    settings = folder / "processor_config.json"
    settings.write_text(
        settings.read_text(encoding="utf-8").replace('"BlipImageProcessorPil"', '"BlipImageProcessor"'),
        encoding="utf-8",
    )
    return _require_our_ids(folder, model, source, instruction)


def _close_prompts(tokenizer: Any, ends_prompt: bool) -> None:
    """Lets the tokenizer put around a text what our prompts have: EOS behind it, or BOS in front."""
    name = tokenizer.eos_token if ends_prompt else tokenizer.bos_token
    if name is None:
        return
    number = tokenizer.convert_tokens_to_ids(name)
    plain = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    if tokenizer("a").input_ids != ([*plain, number] if ends_prompt else [number, *plain]):
        single = f"$A {name}" if ends_prompt else f"{name} $A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[(name, number)])


def _image_processor(model: InstructBlip) -> Any:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    size = {"height": model.image_size, "width": model.image_size}
    return BlipImageProcessorPil(
        size=size, image_mean=model.mean.flatten().tolist(), image_std=model.std.flatten().tolist()
    )


def _make_room(network: InstructBlipForConditionalGeneration, num_rows: int) -> None:
    """Gives tables that are too short further rows, each the mean of those that are there."""
    llm = network.language_model
    table, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    missing = num_rows - len(table.weight)
    if missing <= 0:
        return
    is_tied = head.weight is table.weight
    longer = _longer(table.weight, missing)
    for module in {id(one): one for one in (table, *(_twins(llm)))}.values():
        module.weight, module.num_embeddings = longer, num_rows
    head.weight, head.out_features = longer if is_tied else _longer(head.weight, missing), num_rows
    network.config.text_config.vocab_size = llm.config.vocab_size = num_rows
    logger.warning(
        "%s has no row to spare for %s: its tables were given %d more, which every softmax counts",
        type(llm).__name__,
        IMAGE,
        missing,
    )


def _twins(llm: nn.Module) -> list[nn.Module]:
    return [llm.shared, llm.encoder.embed_tokens, llm.decoder.embed_tokens] if hasattr(llm, "shared") else []


def _longer(weight: Tensor, missing: int) -> nn.Parameter:
    return nn.Parameter(
        torch.cat([weight, weight.mean(dim=0, keepdim=True).expand(missing, -1)]), requires_grad=weight.requires_grad
    )


def _require_our_ids(folder: Path, model: InstructBlip, source: str, instruction: InstructionSource) -> int:
    """Reads the processor back as users will, and compares its ids of some prompts with those that we train on. Raises
    InputError."""
    ours = load_tokenizer(source, instruction)
    theirs = InstructBlipProcessor.from_pretrained(folder)
    for text in PROBES:
        turns = Turn(role="user", text=text), Turn(role="assistant", text="a")
        prompt = encode_prompt(Sample(id="probe", images=(), turns=turns), ours, model.template, model.visual_tokens)
        found = theirs.tokenizer(text).input_ids, theirs.qformer_tokenizer(text).input_ids
        if found != (prompt.input_ids.tolist(), prompt.instruction_ids.tolist()):
            raise InputError(
                f"{source}: transformers' processor reads {text!r} as {found}, we as "
                f"{(prompt.input_ids.tolist(), prompt.instruction_ids.tolist())}"
            )
    return ours.vocab_size

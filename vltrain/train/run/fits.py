"""Whether tokenizers, template, packs and questions belong to a model: asked by everything that trains, evaluates or
plans, before it starts."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from vltrain.config.schema import Config
from vltrain.data.shards import PackedDataset
from vltrain.data.text.conversation import PROCESSOR, TEMPLATES
from vltrain.data.text.tokenizer import Tokenizer
from vltrain.errors import InputError
from vltrain.models.flops import Flops
from vltrain.models.interface import ImagePart, VisionLanguageModel
from vltrain.models.positions import max_positions

logger = logging.getLogger(__name__)


def require_tokenizer_fits(config: Config, tokenizer: Tokenizer, model: VisionLanguageModel) -> None:
    """Every id has a row in the model's tables, and the template is one that it reads. `model` may be an outline.
    Raises: InputError."""
    places = config.model.tokenizers
    rows = model.llm.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens (ids up to {tokenizer.vocab_size - 1}) but the "
            f"LLM embeds {rows}: they do not belong together ({places.key})"
        )
    any_plain = [name for name, template in TEMPLATES.items() if not template.instruction and name != PROCESSOR]
    wanted = any_plain if model.template is None else [model.template]
    if config.data.template not in wanted:
        raise InputError(
            f"data.template: found '{config.data.template}', expected {' or '.join(wanted)}, which this model reads"
        )
    sizes, read = model.instruction, tokenizer.instruction
    if sizes is None:
        return
    if read is None or read.vocab_size > sizes.vocab_size:
        found = (
            f"the Q-Former's tokenizer has {read and read.vocab_size} tokens but the Q-Former embeds {sizes.vocab_size}"
        )
        raise InputError(f"{found}: they do not belong together ({places.instruction_key})")


def require_qformer_positions(config: Config, model: VisionLanguageModel) -> None:
    """The Q-Former has positions for what it is to read. Raises: InputError."""
    reads = config.model.tokenizers.instruction_tokens
    if model.instruction is not None and reads > model.instruction.positions:
        raise InputError(
            f"model.instructblip.qformer_tokens: found {reads}, but the Q-Former has positions for "
            f"{model.instruction.positions}"
        )


def kept_image_part(
    config: Config, model: VisionLanguageModel, dataset: PackedDataset | None = None
) -> ImagePart | None:
    """Whose features `train.keep_image_features` keeps; None where it is off. `model` may be an outline.

    Raises: InputError for a model that has no such part or trains something in it, and for packs without images.
    """
    if not config.train.keep_image_features:
        return None
    key, part = "train.keep_image_features", model.image_part()
    if part is None:
        raise InputError(f"{key}: found true, but the architecture {config.model.architecture} has nothing to keep")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    inside = sorted(part.weights & trained)
    if inside:
        parts = ", ".join(dict.fromkeys(map(model.part_of, inside)))
        raise InputError(
            f"{key}: found true, but what encodes images is trained, so features change with every step: {parts} "
            f"({len(inside)} parameters, the first {inside[0]}); train nothing in it, or leave it out"
        )
    if dataset is not None and dataset.manifest.num_images == 0:
        raise InputError(f"{key}: has no effect: {dataset.place} shows no image; leave it out")
    if dataset is not None and dataset.is_remote:
        raise InputError(
            f"{key}: found true, but features are kept beside the packs, and {dataset.addresses[0]} is an address; "
            "copy the packs into a folder, or leave it out"
        )
    return part


def run_flops(config: Config, model: VisionLanguageModel) -> Flops:
    """What a training step of the recipe costs, see `VisionLanguageModel.flops`; nothing for what is kept."""
    flops, part = model.flops(), kept_image_part(config, model)
    return flops if part is None else replace(flops, per_image=max(0.0, flops.per_image - part.flops_per_image))


def require_positions(dataset: PackedDataset, model: VisionLanguageModel) -> None:
    """The LLM has a position for every token of every sample. Positions begin anew with each sample of a pack, so packs
    may be longer.

    Raises: InputError naming the longest sample.
    """
    bound = max_positions(model.llm.config)
    if bound is None or dataset.manifest.pack_length <= bound:
        return
    # A sample of more than so many tokens makes the sum of squared lengths larger than their square.
    suspects = np.flatnonzero(dataset.index.sum_squares > bound**2)
    over, longest, name = 0, bound, ""
    for number in suspects.tolist():
        row = dataset.row(number)
        over += int(np.count_nonzero(row.segment_lengths > bound))
        place = int(row.segment_lengths.argmax())
        if row.segment_lengths[place] > longest:
            longest, name = int(row.segment_lengths[place]), row.sample_ids[place]
    if over:
        raise InputError(
            f"{dataset.place}: {over} sample(s) are longer than the LLM's context of {bound} positions, the "
            f"longest '{name}' with {longest} tokens; "
            f"shorten them, leave them out (data.pack_length at most {bound} with data.over_long: drop), or "
            "take an LLM with a longer context"
        )

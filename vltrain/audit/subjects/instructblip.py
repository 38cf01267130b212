"""An InstructBLIP: the whole of it is a class of transformers'."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import InstructBlipForConditionalGeneration
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vltrain.audit.samples import IN_FRONT, random_ids, segment_of
from vltrain.audit.small.sizes import VOCABULARY
from vltrain.audit.subject import Made, Reference, reloaded
from vltrain.audit.subjects.squares import loaded_by, square_pictures
from vltrain.config.model.instructblip import BlipModelConfig
from vltrain.models.build import build_model
from vltrain.models.instructblip.model import InstructBlip
from vltrain.models.peft.low_rank import merge_updates
from vltrain.models.quantise import dequantise_linears
from vltrain.schema import IMAGE_TOKEN, Segment


class BlipReference(Reference):
    """A segment without images gets none: transformers' forward asks for one."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.load = loaded_by(network.config.vision_config.image_size)

    @property
    def llm(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] a view
        return self.network.language_model

    def predictions(self, segment: Segment) -> Tensor:
        ids, is_answer = torch.from_numpy(segment.input_ids).long(), torch.from_numpy(segment.loss_mask)
        place = self.network.config.image_token_id
        given: dict[str, Any] = {"mm_encoder_outputs": {"image": self._nothing()}, "pixel_values": None}
        instructions = torch.from_numpy(segment.instruction_ids).long().expand(max(1, len(segment.images)), -1)
        if segment.images:
            mean, std = (torch.tensor(one).view(3, 1, 1) for one in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
            squares = torch.stack([torch.from_numpy(self.load(name)).float() for name in segment.images])
            given = {"pixel_values": (squares / 255 - mean) / std}
        given["qformer_input_ids"] = instructions
        if self.network.config.use_decoder_only_language_model:
            logits = self.network(input_ids=torch.where(ids < 0, place, ids)[None], use_cache=False, **given).logits
            return logits[0, :-1][is_answer[1:]]
        text = self.network.config.text_config
        first = getattr(text, "decoder_start_token_id", None)
        answer = torch.cat([torch.tensor([text.pad_token_id if first is None else first]), ids[is_answer][:-1]])
        read = torch.where(ids < 0, place, ids)[~is_answer]
        return self.network(input_ids=read[None], decoder_input_ids=answer[None], use_cache=False, **given).logits[0]

    def _nothing(self) -> Any:
        empty = torch.empty(0, self.network.language_projection.out_features)
        return SimpleNamespace(pooler_output=empty, qformer_outputs=None, vision_outputs=None)


def make(section: BlipModelConfig) -> Made:
    """Of a small section."""
    model: Any = build_model(section)
    config = copy.deepcopy(model.config)
    config.image_token_index = VOCABULARY - 1
    network: Any = InstructBlipForConditionalGeneration._from_config(config, attn_implementation="eager").train()
    if network.language_model.lm_head.weight is network.get_input_embeddings().weight and not _shares(model):
        network.language_model.lm_head.weight = torch.nn.Parameter(network.get_input_embeddings().weight.clone())
    parts = {ours.partition(".")[0]: theirs for ours, theirs in InstructBlip.THEIR_NAMES.items()}
    roots = [(getattr(model, ours), getattr(network, theirs)) for ours, theirs in parts.items() if ours != "queries"]
    roots.append((model.queries, SimpleNamespace(tokens=network.query_tokens)))

    def folded() -> Reference:
        dequantise_linears(model)
        merge_updates(model)
        named = {InstructBlip.their_name(name): value for name, value in model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            return BlipReference(reloaded(type(network), config, named, folder))

    return Made(
        kind=f"instructblip of {config.text_config.model_type}",
        model=model,
        reference=BlipReference(network),
        roots=roots,
        segments=[_segment(shape, number, model.visual_tokens) for number, shape in enumerate(IN_FRONT)],
        pictures=square_pictures(model.image_size),
        folded=folded,
    )


def _shares(model: Any) -> bool:
    return model.llm.lm_head.weight is model.llm.get_input_embeddings().weight


def _segment(shape: Any, number: int, tokens: int) -> Segment:
    made = segment_of(shape, number, [tokens] * 3, IMAGE_TOKEN, text_is_answer=False)
    generator = np.random.default_rng(100 + number)
    return replace(made, instruction_ids=random_ids(generator, 3 + 2 * number))

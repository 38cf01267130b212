"""A language model by itself, any that transformers loads as `AutoModelForCausalLM`, as our packed rows run it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from vltrain.audit.pieces import Piece, text_pieces, text_row
from vltrain.audit.small.sizes import VOCABULARY
from vltrain.audit.small.weights import disturb
from vltrain.audit.subject import RESERVED, Subject, Tuning, copy_weights
from vltrain.batch import Batch
from vltrain.evaluate.answering.decoding import CACHE_ARGUMENT
from vltrain.models.adapters.table import plain_name
from vltrain.models.backbones.head import replace_head
from vltrain.models.backbones.llm import packed_hidden_states, packed_losses
from vltrain.models.backbones.packed_decoder import prepare_decoder
from vltrain.models.interface import LossOutput, VisionLanguageModel
from vltrain.models.peft.layers import load_peft
from vltrain.models.random import seeded
from vltrain.ops.attention import PACKED_SDPA
from vltrain.ops.rows import owners

PROMPTS = (11, 4, 17)  # tokens
RANK = 4


class TextModel(VisionLanguageModel):
    """The decoder prepared for packed rows, and the head that computes losses."""

    PARTS = ("llm",)
    BRIDGE = "nothing"

    def __init__(self, llm: Any) -> None:
        super().__init__()
        prepare_decoder(llm.get_decoder(), PACKED_SDPA)
        replace_head(llm)
        self.llm = llm

    @classmethod
    def part_of(cls, name: str) -> str:
        return "llm"

    def embed(self, input_ids: Tensor, visual: Tensor, image_slots: Tensor) -> Tensor:
        return self.llm.get_input_embeddings()(input_ids)

    def language_model(self, embeds: Tensor, modality: Tensor, **arguments: Any) -> Any:
        return self.llm.get_decoder()(inputs_embeds=embeds, **arguments)

    def forward(self, batch: Batch) -> LossOutput:
        """Losses of one packed row of text."""
        embeds = self.llm.get_input_embeddings()(batch.input_ids)
        states = packed_hidden_states(self.llm, embeds, batch.position_ids, batch.segment_lengths)
        owner = owners(batch.segment_lengths, states.device)
        return LossOutput(*packed_losses(self.llm.get_output_embeddings(), states, batch, owner))


def text_subject(config: PreTrainedConfig) -> Subject:
    """Of a small config of a language model."""
    with seeded(0, "audit"):
        ours = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).train()
    with seeded(0, "audit"):
        reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).train()
    disturb(ours, ours.get_output_embeddings())
    names = {f"llm.{name}": name for name, _ in ours.named_parameters()}
    subject = Subject(
        kind=config.model_type,
        model=TextModel(ours).train(),
        reference=reference,
        names=names,
        pieces=text_pieces(3, VOCABULARY - RESERVED),
        row=text_row,
        arguments=_arguments,
        prompts=text_pieces(3, VOCABULARY - RESERVED, PROMPTS, seed=1),
        decode=partial(decode, ours),
    )
    copy_weights(subject)
    return subject


def text_tunings(subject: Subject) -> list[Tuning]:
    """All weights, and LoRA by peft in every linear layer of the decoder's layers."""
    rows = {"a row of text": subject.row(subject.pieces)}
    names = frozenset(subject.names)

    whole = Tuning(
        title="all weights",
        model=subject.model,
        rows=rows,
        trained=names,
        merged=partial(merged_lora, subject.model, subject),
    )
    tuned = copy.deepcopy(subject.model)
    settings = load_peft().LoraConfig(r=RANK, target_modules=linears_of(tuned.llm), init_lora_weights=False)
    with seeded(0, "lora"):
        load_peft().inject_adapter_in_model(settings, tuned.llm)
    added = frozenset(name for name, one in tuned.named_parameters() if one.requires_grad)
    lora = Tuning(title="LoRA", model=tuned, rows=rows, trained=added, merged=partial(merged_lora, tuned, subject))
    return [whole, lora]


def linears_of(llm: Any) -> list[str]:
    """Names of the linear layers of a decoder's layers, down to the smallest."""
    head = llm.get_output_embeddings()
    return [name for name, one in llm.named_modules() if isinstance(one, torch.nn.Linear) and one is not head]


@torch.no_grad()
def merged_lora(model: VisionLanguageModel, subject: Subject) -> Any:
    """transformers' network with the model's weights, peft's updates folded into them by peft."""
    merged = copy.deepcopy(subject.reference)
    theirs = dict(merged.named_parameters())
    layers: list[Any] = [one for one in model.modules() if isinstance(one, load_peft().tuners.lora.LoraLayer)]
    for layer in layers:
        layer.merge()
    for name, parameter in model.named_parameters():
        plain = subject.names.get(plain_name(name))
        if plain is not None:
            theirs[plain].copy_(parameter)
    for layer in layers:
        layer.unmerge()
    return merged


def _arguments(piece: Piece) -> dict[str, Any]:
    return {"input_ids": piece.input_ids[None]}


@torch.no_grad()
def decode(llm: Any, prompts: Sequence[Piece], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy answers to a batch of prompts, padded on the left, by the prepared decoder and its cache, as `Subject`
    has it."""
    decoder, head = llm.get_decoder(), llm.get_output_embeddings()
    longest = max(len(one.input_ids) for one in prompts)
    ids = torch.stack([F.pad(one.input_ids, (longest - len(one.input_ids), 0)) for one in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(one.input_ids) for one in prompts]).long()
    cache = DynamicCache(config=llm.config)
    tokens, logits = [], []
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        named = {CACHE_ARGUMENT: cache, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        states = decoder(inputs_embeds=llm.get_input_embeddings()(ids), **named).last_hidden_state
        logits.append(head(states[:, -1]))
        ids = logits[-1].argmax(-1, keepdim=True)
        tokens.append(ids[:, 0])
        mask = F.pad(mask, (0, 1), value=1)
    return torch.stack(tokens, 1), torch.stack(logits, 1)

"""A language model by itself, any that transformers loads as `AutoModelForCausalLM`, as our packed rows run it."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from vltrain.audit.samples import TEXT, segment_of
from vltrain.audit.subject import Made, Reference, reloaded
from vltrain.audit.subjects.squares import square_pictures
from vltrain.batch import Batch
from vltrain.models.adapters.table import plain_name
from vltrain.models.backbones.head import replace_head
from vltrain.models.backbones.llm import packed_hidden_states, packed_losses
from vltrain.models.backbones.packed_decoder import prepare_decoder
from vltrain.models.interface import LossOutput, VisionLanguageModel
from vltrain.models.peft.layers import lora_linear
from vltrain.models.peft.low_rank import is_low_rank, merge_updates
from vltrain.models.random import seeded
from vltrain.models.resized import RANK
from vltrain.models.stock.model import Decoder
from vltrain.ops.attention import PACKED_SDPA
from vltrain.ops.rows import owners
from vltrain.schema import Segment


@dataclass(frozen=True, kw_only=True)
class TextSection:
    """What is audited where no architecture is named: a small config, and whether LoRA is in every linear layer of the
    decoder's layers instead of all weights being trained."""

    config: PreTrainedConfig
    lora: bool = False
    architecture: str = "text"

    def identity(self) -> dict[str, Any]:
        """As a recipe's section has it."""
        return {**asdict(self), "config": self.config.to_dict()}


class TextModel(VisionLanguageModel):
    """The decoder prepared for packed rows, and the head that computes losses."""

    PARTS = ("peft", "network")
    BRIDGE = "nothing"

    def __init__(self, network: Any) -> None:
        super().__init__()
        prepare_decoder(network.get_decoder(), PACKED_SDPA)
        replace_head(network)
        self.network = network

    @property
    def llm(self) -> Decoder:  # pyright: ignore[reportIncompatibleVariableOverride] a view
        return Decoder(self.network.get_decoder(), self.network.get_output_embeddings())

    @property
    def writes(self) -> Any:
        return "whole model"

    @classmethod
    def part_of(cls, name: str) -> str:
        return "peft" if is_low_rank(name) else "network"

    def encode_images(self, pixels: Tensor) -> Tensor:
        return pixels

    def read(self, input_ids: Tensor, features: Any, slots: Tensor, **arguments: Any) -> Tensor:
        """See `vltrain.models.stock.model.StockModel.read`."""
        return self.llm.model(
            inputs_embeds=self.network.get_input_embeddings()(input_ids), **arguments
        ).last_hidden_state

    def token_types(self, input_ids: Tensor, blocks: Tensor) -> dict[str, Tensor]:
        """None."""
        return {}

    def forward(self, batch: Batch) -> LossOutput:
        """Losses of one packed row of text."""
        embeds = self.network.get_input_embeddings()(batch.input_ids)
        states = packed_hidden_states(self.network, embeds, batch.position_ids, batch.segment_lengths)
        owner = owners(batch.segment_lengths, states.device)
        return LossOutput(*packed_losses(self.llm.lm_head, states, batch, owner))


class TextReference(Reference):
    """The family's own class."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.llm = network

    @property
    def reads_ids(self) -> Any:
        return self.llm

    def predictions(self, segment: Segment) -> Tensor:
        ids = torch.from_numpy(segment.input_ids).long()
        logits = self.llm(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return logits[torch.from_numpy(segment.loss_mask)[1:]]


def make(section: TextSection) -> Made:
    """Of a small config of a language model."""
    with seeded(0, "audit"):
        ours = AutoModelForCausalLM.from_config(section.config, attn_implementation="eager", dtype=torch.float32)
    network = copy.deepcopy(ours).train()
    model = TextModel(ours.train()).train()
    if section.lora:
        head = model.llm.lm_head
        linears = [name for name, one in ours.named_modules() if isinstance(one, torch.nn.Linear) and one is not head]
        model.requires_grad_(False)
        for name in linears:
            parent, _, leaf = name.rpartition(".")
            with seeded(0, name):
                layer = lora_linear(ours.get_submodule(name), rank=RANK, alpha=2 * RANK, dropout=0.0)
            setattr(ours.get_submodule(parent), leaf, layer)

    def folded() -> Reference:
        merge_updates(model)
        weights = {plain_name(name): value for name, value in ours.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            return TextReference(reloaded(type(network), section.config, weights, folder))

    return Made(
        kind=section.config.model_type,
        model=model,
        reference=TextReference(network),
        roots=[(ours, network)],
        segments=[segment_of(shape, number, [], -1) for number, shape in enumerate(TEXT)],
        pictures=square_pictures(1),
        folded=folded,
    )


def trained_parts(section: TextSection) -> set[str]:
    """As `Architecture.trained_parts`."""
    return {"peft"} if section.lora else {"network"}


def usual_tunings(config: PreTrainedConfig) -> dict[str, TextSection]:
    """As of `vltrain.audit.subjects.stock`."""
    return {"all weights": TextSection(config=config), "LoRA": TextSection(config=config, lora=True)}

"""The language model: a decoder of transformers with our head and our attention over packed rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vltrain.batch import Batch
from vltrain.models.adapters import Routing
from vltrain.models.backbones.head import replace_head
from vltrain.models.backbones.packed_decoder import prepare_decoder
from vltrain.models.backbones.table import language_of
from vltrain.models.materialise import empty_model
from vltrain.ops.attention import packing_arguments
from vltrain.ops.liger import install_liger
from vltrain.ops.rows import nonzero_indices, segment_sums
from vltrain.schema import IGNORE_INDEX


def empty_language(config: PreTrainedConfig, attention: str) -> Any:
    """`empty_model` of the config's family, with a head that shares the embeddings' weight where the config says so."""
    llm = empty_model(language_of(config).network, config, attention)
    tie_head(llm)
    return llm


def tie_head(llm: Any) -> None:
    """Lets the head share the embeddings' weight where the config says so: to be called whenever they were given
    another."""
    if llm.config.tie_word_embeddings:
        llm.lm_head.weight = llm.model.embed_tokens.weight


def prepare_llm(llm: Any, activation_checkpointing: bool, routing: Routing | None, kernels: str) -> None:
    """Readies the decoder for packed rows, puts in the head that computes losses and the `kernels` (`liger` or
    `torch`), and switches activation checkpointing, in place."""
    prepare_decoder(llm.model, llm.config._attn_implementation)
    replace_head(llm)
    if kernels == "liger":
        install_liger(llm)
    if activation_checkpointing:
        # Not re-entrant: gradients of blocks whose inputs need none, and ZeRO-3's gathered weights, come out right.
        settings = (
            {"use_reentrant": False}
            if routing is None
            else {"use_reentrant": False, "context_fn": routing.for_checkpoint}
        )
        checkpoint_blocks(llm, settings)


def checkpoint_blocks(network: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Switches activation checkpointing of a network's blocks on, in place. `settings`: of
    `torch.utils.checkpoint.checkpoint`."""
    # Some releases (5.17) know it by its older name alone, which later ones (5.24) deprecate.
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable(settings)


def packed_hidden_states(llm: Any, embeds: Tensor, position_ids: Tensor, segment_lengths: Tensor) -> Tensor:
    """Final hidden states of one packed row, its segments isolated from each other.

    Args:
        embeds: [T, d].
        position_ids: int64 [T], restarting at 0 with every segment.
        segment_lengths: int64 [S] on the CPU.

    Returns: [T, d].
    """
    decoder = llm.get_decoder()
    arguments = packing_arguments(decoder.config._attn_implementation, segment_lengths, embeds.device, embeds.dtype)
    outputs = decoder(inputs_embeds=embeds[None], position_ids=position_ids[None], use_cache=False, **arguments)
    return outputs.last_hidden_state[0]


def packed_losses(head: nn.Module, states: Tensor, batch: Batch, owner: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of a packed row.

    Args:
        head: a `vltrain.ops.loss.LossHead`.
        states: [T, d], final ones.
        owner: int64 [T], see `vltrain.ops.rows.owners`.

    Returns: (their sum, fp32 scalar, of a filler zero; fp32 [S], the same by segment, detached).
    """
    labelled = nonzero_indices(batch.labels != IGNORE_INDEX, batch.num_label_tokens)
    loss_sum, token_losses = head(states[labelled], batch.labels[labelled])
    if batch.is_filler:
        loss_sum = loss_sum * 0.0
    return loss_sum, segment_sums(token_losses, owner[labelled], len(batch.segment_lengths))


def llm_blocks(llm: Any) -> list[nn.Module]:
    """The transformer blocks, first to last."""
    return list(llm.model.layers)


def llm_units(llm: Any) -> list[tuple[str, nn.Module]]:
    """Name and module of what is loaded at once, in the order of the forward; together all parameters."""
    blocks = [(f"model.layers.{number}", block) for number, block in enumerate(llm.model.layers)]
    return [
        ("model.embed_tokens", llm.model.embed_tokens),
        *blocks,
        ("model.norm", llm.model.norm),
        ("lm_head", llm.lm_head),
    ]

"""The language model: transformers' LLaMA with our head and our attention over packed rows."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import LlamaForCausalLM

from vltrain.models.adapters import Routing
from vltrain.ops.attention import packing_arguments
from vltrain.ops.loss import LossHead

LLM_NORMS = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}


def prepare_llm(llm: LlamaForCausalLM, activation_checkpointing: bool, routing: Routing | None) -> None:
    """Puts in the head that computes losses and switches activation checkpointing, in place."""
    llm.lm_head = LossHead.take_over(llm.lm_head)
    if activation_checkpointing:
        # Not re-entrant: gradients of blocks whose inputs need none, and ZeRO-3's gathered weights, come out right.
        settings = {"use_reentrant": False} if routing is None else {"use_reentrant": False, "context_fn": routing.for_checkpoint}
        llm.activation_checkpointing_enable(settings)


def packed_hidden_states(llm: LlamaForCausalLM, embeds: Tensor, position_ids: Tensor, segment_lengths: Tensor) -> Tensor:
    """Final hidden states of one packed row, its segments isolated from each other.

    Args:
        embeds: [T, d].
        position_ids: int64 [T], restarting at 0 with every segment.
        segment_lengths: int64 [S] on the CPU.

    Returns: [T, d].
    """
    arguments = packing_arguments(llm.config._attn_implementation, segment_lengths, embeds.device, embeds.dtype)
    outputs = llm.model(inputs_embeds=embeds[None], position_ids=position_ids[None], use_cache=False, **arguments)
    return outputs.last_hidden_state[0]


def llm_blocks(llm: LlamaForCausalLM) -> list[nn.Module]:
    """The transformer blocks, first to last."""
    return list(llm.model.layers)

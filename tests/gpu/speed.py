"""The fused adapter kernel beside torch eager, torch.compile and the time that its bytes alone take; ways of attention
beside each other."""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaModel

from tests.benchmarks.kernels import microseconds, time_all
from tests.benchmarks.samples import scienceqa_lengths
from tests.gpu.part import Findings, run_part
from vltrain.errors import InputError
from vltrain.ops.attention import packing_arguments
from vltrain.ops.attention_choice import choose_attention

ATTENTIONS = ("sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")
ROW = 8192
HEADS = {"LLaMA-2-7B's": (32, 32, 4096), "LLaMA-3-8B's": (32, 8, 4096), "SmolLM2-135M's": (9, 3, 576)}


def find(findings: Findings) -> None:
    for row in findings.attempt("the fused kernel", lambda: time_all([576, 1024, 4096, 5120], [4, 16, 32])) or ():
        findings.row("norm and fused adapter, 8192 rows, bf16, microseconds", **row)
    lengths = {"ScienceQA's lengths": _scienceqa(), "one segment": torch.tensor([ROW])}
    for title, segments in lengths.items():
        for heads, sizes in HEADS.items():
            for attention in ATTENTIONS:
                findings.attempt(
                    f"{attention}, {title}", lambda: _attention(findings, attention, title, segments, heads, sizes)
                )


def _scienceqa() -> torch.Tensor:
    lengths, total = [], 0
    for length in scienceqa_lengths(400).tolist():
        if total + length <= ROW:
            lengths.append(length)
            total += length
    return torch.tensor([*lengths, ROW - total] if total < ROW else lengths)


def _attention(
    findings: Findings, attention: str, title: str, segments: torch.Tensor, heads: str, sizes: tuple[int, int, int]
) -> None:
    """Forward and backward of one LLaMA block's attention, projections and rotary embedding included, beside the
    projections' own part of it."""
    query_heads, kv_heads, width = sizes
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        vocab_size=8,
    )
    try:
        name = choose_attention(attention, config, "cuda", torch.bfloat16)
    except InputError:
        return
    with torch.device("cuda"):
        model = LlamaModel._from_config(config, attn_implementation=name).to(torch.bfloat16)
    states = torch.randn(1, ROW, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions = torch.cat([torch.arange(length) for length in segments.tolist()])[None].cuda()
    arguments = packing_arguments(name, segments, torch.device("cuda"), torch.bfloat16)

    def forward() -> torch.Tensor:
        return model(inputs_embeds=states, position_ids=positions, use_cache=False, **arguments).last_hidden_state

    upstream = torch.randn_like(states)
    findings.row(
        "one block with attention, a row of 8192 tokens, bf16, microseconds",
        heads=heads,
        segments=f"{title}: {len(segments)}",
        attention=attention,
        forward=microseconds(lambda: forward().detach(), 15),
        forward_and_backward=microseconds(lambda: forward().backward(upstream), 15),
    )


if __name__ == "__main__":
    sys.exit(run_part("speed", find, __doc__))

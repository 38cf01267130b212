"""How much arithmetic a training step needs, as `vltrain.models.flops` counts it: of tower, neck and LLM together.
Not counted: a tower's own pooler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from vltrain.models.flops import Count, Flops, block_flops, llm_flops, matrix_flops
from vltrain.models.mmt.visual_tokens import VisualTokens


def vision_flops(vision: VisualTokens, neck: nn.Module) -> tuple[float, bool]:
    """(operations per image, do the features need a gradient?) of the ViT up to its last tap, and of the neck."""
    total, count = _tower_flops(vision)
    for linear in (module for module in neck.modules() if isinstance(module, nn.Linear)):
        total += vision.num_tokens * matrix_flops(linear.weight, needs_grad=count.needs_grad)
        count = replace(count, needs_grad=count.needs_grad or linear.weight.requires_grad)
    return total, count.needs_grad


def tower_flops(vision: VisualTokens) -> float:
    """Operations per image of the ViT up to its last tap."""
    return _tower_flops(vision)[0]


def _tower_flops(vision: VisualTokens) -> tuple[float, Count]:
    num_rows = vision.num_rows
    patch = vision.clip.get_submodule(vision.tower.patch)
    total = vision.grid**2 * matrix_flops(patch.weight, needs_grad=False)
    grad = any(
        parameter.requires_grad
        for module in (getattr(vision.clip, name) for name in vision.tower.before)
        for parameter in module.parameters()
    )
    *blocks, last = vision.live_blocks
    for block in blocks:
        count = block_flops(block, vision.tower, grad)
        total += num_rows * (count.query + count.key + num_rows * count.pair)
        grad = count.needs_grad
    count = block_flops(last, vision.tower, grad)
    total += vision.last_rows * (count.query + num_rows * count.pair) + num_rows * count.key
    return total, count


def count_flops(vision: VisualTokens, neck: nn.Module, modality_embedding: nn.Embedding, llm: Any) -> Flops:
    """The `Flops` of a whole model, given which of its parameters are trained now."""
    per_image, visual_need_grad = vision_flops(vision, neck)
    per_token, per_causal_pair, per_label = llm_flops(llm, visual_need_grad or modality_embedding.weight.requires_grad)
    half = per_causal_pair / 2
    return Flops(per_token=per_token + half, per_pair=half, per_image=per_image, per_label=per_label)

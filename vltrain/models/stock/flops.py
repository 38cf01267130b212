"""How much arithmetic a training step of a vision-language model needs, as `vltrain.models.flops` counts it, by its
linear layers: every one of a block is passed by every row of it, once.

An estimate where a block does otherwise: of a mixture of experts all are counted as if each row passed the number that
the config says, and linear attention and Mamba by their projections alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from vltrain.models.adapters import Adapter
from vltrain.models.flops import Flops, is_trained, linear_flops, matrix_flops
from vltrain.models.peft.lora import outer_linears
from vltrain.models.quantise import num_weights
from vltrain.models.stock.parts import Parts


def count_flops(parts: Parts) -> Flops:
    """The `Flops` of a whole model, given which of its parameters are trained now."""
    per_image, needs_grad = image_flops(parts)
    embeds = parts.decoder.get_input_embeddings().weight.requires_grad
    per_token, per_pair, needs_grad = _blocks_flops(parts.decoder_blocks, parts.decoder.config, needs_grad or embeds)
    return Flops(
        per_token=per_token + per_pair / 2,
        per_pair=per_pair / 2,
        per_image=per_image,
        per_label=matrix_flops(parts.head.weight, needs_grad=needs_grad),
    )


def image_flops(parts: Parts) -> tuple[float, bool]:
    """(operations per image in tower and projector, do its tokens need a gradient?)"""
    per_patch, pair, needs_grad = _blocks_flops(parts.tower_blocks, parts.tower.config, False)
    patches, tokens = patches_and_tokens(parts)
    outside = [module for name, module in parts.core.named_children() if module is not parts.decoder]
    blocks = {linear for block in parts.tower_blocks for linear in block.modules()}
    between = [linear for root in outside for linear in root.modules() if linear not in blocks]
    bridge = sum(linear_flops(one, needs_grad=needs_grad) for one in between if isinstance(one, nn.Linear))
    return patches * (per_patch + patches * pair) + tokens * bridge, needs_grad or is_trained(*between)


def patches_and_tokens(parts: Parts) -> tuple[int, int]:
    """(states of the tower, visual tokens) of an image of the size that the tower's config names, or of 448 x 448 where
    it takes any."""
    config = parts.tower.config
    edges = _pair(getattr(config, "image_size", None) or 448)
    sides = _pair(getattr(config, "patch_size", None) or 14)
    patches = max(1, (edges[0] // sides[0]) * (edges[1] // sides[1]))
    merged = getattr(config, "spatial_merge_size", 1) ** 2
    return patches, max(1, patches // merged)


def _pair(value: Any) -> tuple[int, int]:
    first, *others = value if isinstance(value, (list, tuple)) else (value,)
    return int(first), int(others[0] if others else first)


def _blocks_flops(blocks: Iterable[nn.Module], config: Any, grad: bool) -> tuple[float, float, bool]:
    """(operations per row, per causal pair of rows, do the states that leave need a gradient?) of blocks in turn.
    `grad`: do those that enter?"""
    per_row = per_pair = 0.0
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", 1)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    for block in blocks:
        entering = grad
        for module in block.modules():
            if isinstance(module, Adapter):
                per_row += module.flops_per_row(entering)
        grad = grad or is_trained(block)
        per_row += sum(linear_flops(linear, needs_grad=grad) for _, linear in outer_linears(block))  # pyright: ignore[reportArgumentType] low-rank ones stand for theirs
        per_row += _expert_flops(block, config, grad)
        per_pair += 4.0 * width * (3 if grad else 1)
    return per_row, per_pair, grad


def _expert_flops(block: nn.Module, config: Any, grad: bool) -> float:
    """Of experts whose matrices lie in one parameter [experts, ..., ...], of which a row passes some."""
    taken = getattr(config, "num_experts_per_tok", None)
    total = 0.0
    for module in block.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and taken and not isinstance(module, Adapter):
                share = taken / len(parameter)
                total += 2.0 * share * num_weights(parameter) * (1 + parameter.requires_grad + grad)
    return total

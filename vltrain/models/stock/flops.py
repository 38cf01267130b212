"""How much arithmetic a training step of a vision-language model needs, as `vltrain.models.flops` counts it, by its
linear layers: every one of a block is passed by every row of it, once.

An estimate where a block does otherwise: of a mixture of experts all are counted as if each row passed the number that
the config says, and linear attention and Mamba by their projections alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from vltrain.models.adapters import Adapter
from vltrain.models.flops import Flops, is_trained, linear_flops, matrix_flops
from vltrain.models.peft.lora import outer_linears
from vltrain.models.quantise import num_weights
from vltrain.models.stock.parts import Parts, part_of
from vltrain.models.stock.reach import ANY_SIZE, LAYERS, reach_of
from vltrain.schema import ImageSize


def count_flops(parts: Parts) -> Flops:
    """The `Flops` of a whole model, given which of its parameters are trained now."""
    images = image_flops(parts)
    enters = images.needs_grad or parts.decoder.get_input_embeddings().weight.requires_grad
    per_token, per_pair, needs_grad = _blocks_flops(parts.decoder_blocks, parts.decoder.config, enters)
    return Flops(
        per_token=per_token + per_pair / 2,
        per_pair=per_pair / 2,
        per_image=images.per_image,
        per_label=matrix_flops(parts.head.weight, needs_grad=needs_grad),
        image=images.size,
    )


class ImageFlops(NamedTuple):
    """per_image  operations in tower and projector for an image of `size`
    needs_grad  do its tokens need a gradient?
    size        the image; of a tower that takes pictures of any size, tokens stand for patches, of others for tiles, of
                which what is cut off as padding is not counted
    """

    per_image: float
    needs_grad: bool
    size: ImageSize


def image_flops(parts: Parts) -> ImageFlops:
    """Of the picture of `Reach`."""
    picture = _picture(parts)
    around = list(_around_blocks(parts, picture.rows))
    before = [(layer, rows) for part, layer, rows in around if part == "vision"]
    behind = [(layer, rows) for part, layer, rows in around if part != "vision"]
    total = sum(rows * _layer_flops(layer, False) for layer, rows in before)
    entering = is_trained(*(layer for layer, _ in before))
    per_patch, per_pair, needs_grad = _blocks_flops(_read_blocks(parts), parts.tower.config, entering)
    pairs = per_pair * picture.patches**2 / picture.tiles * picture.share
    windows = per_pair * picture.patches * picture.window * (1 - picture.share)
    total += picture.patches * per_patch + pairs + windows
    total += sum(rows * _layer_flops(layer, needs_grad) for layer, rows in behind)
    quadratic = pairs / total if picture.any_size and total else 0.0
    needs_grad = needs_grad or is_trained(*(layer for layer, _ in behind))
    return ImageFlops(total, needs_grad, ImageSize(tokens=picture.tokens, quadratic=quadratic))


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """The one that is counted.

    patches   states of the tower's blocks, of all tiles together; tokens: visual tokens
    tiles     that do not see each other
    share     of the blocks in which all patches of a tile do; in others `window` patches
    any_size  the tower takes pictures of any size as a whole
    rows      see `Reach`
    """

    patches: int
    tokens: int
    tiles: int = 1
    share: float = 1.0
    window: int = 0
    any_size: bool = False
    rows: Mapping[str, int] = field(default_factory=dict)


def _picture(parts: Parts) -> _Picture:
    reach, config = reach_of(parts.core.config), parts.tower.config
    blocks = [name for name, module in parts.core.named_modules() if module in parts.tower_blocks[:1]]
    inside = [rows for name, rows in reach.rows.items() for block in blocks if name.startswith(f"{block}.")]
    pixels = reach.tensors.get("pixel_values")
    if pixels is None or (blocks and not inside):
        return _nominal_picture(config)
    whole = getattr(config, "fullatt_block_indexes", None)
    share = len(whole) / len(parts.tower_blocks) if whole is not None else 1.0
    window = 0 if whole is None else (config.window_size // config.patch_size) ** 2
    tokens = reach.tokens
    if pixels.ndim == 5 and "image_sizes" in reach.tensors:  # tiles whose padding is cut off behind the projector
        tokens = max(rows for name, rows in reach.rows.items() if part_of(name) == "projector")
    return _Picture(
        patches=max(inside, default=0),
        tokens=tokens,
        tiles=math.prod(pixels.shape[:-3]),
        share=share,
        window=window,
        any_size=pixels.ndim == 2 or (pixels.ndim == 4 and "image_sizes" in reach.tensors),
        rows=reach.rows,
    )


def _read_blocks(parts: Parts) -> list[nn.Module]:
    """The tower's, without those behind the layer that its model reads."""
    reach = reach_of(parts.core.config)
    unused = {name.removeprefix("model.") for name in reach.unused}
    found: list[nn.Module] = []
    for name, module in parts.core.named_modules():
        if module in parts.tower_blocks:
            inside = [f"{layer}.weight" for layer in reach.rows if layer.startswith(f"{name}.")]
            if not inside or not unused.issuperset(inside):
                found.append(module)
    return found


def _nominal_picture(config: Any) -> _Picture:
    """Of a tower that no picture was found for: by the size that its config names, or 448 x 448."""
    edges = _pair(getattr(config, "image_size", None) or ANY_SIZE)
    sides = _pair(getattr(config, "patch_size", None) or 14)
    patches = max(1, (edges[0] // sides[0]) * (edges[1] // sides[1]))
    return _Picture(patches=patches, tokens=max(1, patches // getattr(config, "spatial_merge_size", 1) ** 2))


def _around_blocks(parts: Parts, rows: Mapping[str, int]) -> Iterator[tuple[str, Any, int]]:
    """(part, layer, rows of the picture) of linear layers and convolutions outside the blocks."""
    blocks = (*parts.tower_blocks, *parts.decoder_blocks)
    skipped = {layer for block in blocks for layer in block.modules()} | {*parts.decoder.modules()}
    linears = {layer for _, layer in outer_linears(parts.core)}
    low_rank = {inner for layer in linears for inner in layer.modules() if inner is not layer}
    for name, layer in parts.core.named_modules():
        if layer not in skipped | low_rank and (layer in linears or isinstance(layer, LAYERS)):
            yield part_of(name), layer, rows.get(name, 0)


def _layer_flops(layer: Any, needs_grad: bool) -> float:
    is_linear = not isinstance(layer, nn.modules.conv._ConvNd)
    return (
        linear_flops(layer, needs_grad=needs_grad) if is_linear else matrix_flops(layer.weight, needs_grad=needs_grad)
    )


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

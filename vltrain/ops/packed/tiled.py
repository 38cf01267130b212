"""Attention over a packed row in tiles: some rows of queries at a time, against just the keys that one of them sees.

What nobody in a tile can see is not computed: other segments, keys behind it, before its window or outside its chunk.
Only the keys that some of its rows do not see get a mask. Products are batched over heads of keys, with the queries
that share one as rows of one matrix: nothing is padded, and no head is repeated. Scores, weights and sums are in fp32
at least.

Made for CPUs, whose SDPA has no kernel for short segments. A tile's weights are kept for backward up to `KEPT_KEYS`
keys, so that a layer keeps at most that many numbers a head and token, and are computed again beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vltrain.ops.packed.masks import SegmentMask

TILE = 64
"""Most rows of queries in a tile."""
KEPT_KEYS = 512
SMALLEST_WIDTH, SHORTEST, LONGEST_CAUSAL = 64, 128, 640
"""See `worth_tiling`; tokens, as `Packing.typical`."""


@dataclass(frozen=True)
class Tile:
    """Queries `rows` and keys `keys` of a packed row [T]. `hidden` [m, 1, c]: added to scores of the keys `partly` [c],
    counted from the tile's first; minus infinity where a query does not see one. None: all of them see all."""

    rows: slice
    keys: slice
    partly: slice
    hidden: Tensor | None

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start


@dataclass(frozen=True)
class Scores:
    """How scores are made: products of queries and keys times `scaling`, then `softcap` * tanh(s / `softcap`) if it is
    given."""

    scaling: float
    softcap: float | None


def worth_tiling(mask: SegmentMask, width: int, dtype: torch.dtype) -> bool:
    """Whether tiles are faster than SDPA over padded groups, of heads of `width` and products in `dtype`, without
    softcap and sinks.

    Measured on an AVX-512 Xeon with one thread and two, forward and backward (`tests/benchmarks/masks.py`): in 16 bits
    always, and in fp32 from heads of 64 on where segments are long enough to fill tiles. Where causality is all that
    holds, SDPA catches up at 600 to 800 tokens, by computing in blocks of keys too.
    """
    if dtype.itemsize == 2:
        return True
    if width < SMALLEST_WIDTH:
        return False
    typical = mask.packing.typical
    return typical >= SHORTEST and (typical <= LONGEST_CAUSAL or not mask.is_causal)


def tiles_of(mask: SegmentMask) -> list[Tile]:
    """The tiles of a row under a mask, in order, which together have each query once; made once a row and rule.

    Neighbouring segments that have room in one tile share it: of a longer segment all tiles are its own.
    """
    found = mask.packing.tiles
    if mask.rule not in found:
        lengths = mask.packing.lengths.numpy()
        owner = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(owner)) - (lengths.cumsum() - lengths)[owner]
        blocks = mask.blocks
        blocks = None if blocks is None else blocks.numpy()
        found[mask.rule] = [
            _tile(mask, owner, place, blocks, start, stop, rows)
            for start, stop in _runs(lengths.tolist())
            for rows in _cut(start, stop)
        ]
    return found[mask.rule]


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Where neighbouring segments that have room in one tile, or one that is longer, begin and end."""
    runs: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        if runs and start + length - runs[-1][0] <= TILE:
            runs[-1] = (runs[-1][0], start + length)
        else:
            runs.append((start, start + length))
        start += length
    return runs


def _cut(start: int, stop: int) -> list[slice]:
    """As few tiles as possible, of equal rows as far as possible."""
    number = -(-(stop - start) // TILE)
    bounds = [start + (stop - start) * tile // number for tile in range(number + 1)]
    return [slice(first, last) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]


def _tile(
    mask: SegmentMask, owner: np.ndarray, place: np.ndarray, blocks: np.ndarray | None, start: int, stop: int,
    rows: slice,
) -> Tile:  # fmt: skip
    """`start` and `stop`: of the segments that the rows are of."""
    if blocks is None:
        stop = rows.stop  # nobody sees what comes later
    keys = slice(start, stop)
    query, key = place[rows, None], place[None, keys]
    of = (None, None) if blocks is None else (blocks[rows, None], blocks[None, keys])
    allowed = mask.sees(query, key, *of) & (owner[rows, None] == owner[None, keys])
    first, last = _ends(allowed.any(0))
    allowed, keys = allowed[:, first:last], slice(start + first, start + last)
    if allowed.all():
        return Tile(rows, keys, slice(0, 0), None)
    partly = slice(*_ends(~allowed.all(0)))
    hidden = np.where(allowed[:, partly], np.float32(0), np.float32("-inf"))
    return Tile(rows, keys, partly, torch.from_numpy(hidden[:, None]))


def _ends(found: np.ndarray) -> tuple[int, int]:
    """The first place that is true, and the one behind the last."""
    return int(found.argmax()), len(found) - int(found[::-1].argmax())


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scores: Scores, sinks: Tensor | None
) -> Tensor:
    """Attention of a row without dropout. `query` [H, T, D], `key` and `value` [H_kv, T, D], of any strides and one
    dtype; `sinks` [H]: logits of an imagined key without value.

    Returns: [T, H, D], in fp32 at least. Not differentiable twice.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, value = (states.to(wide) for states in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return _Tiled.apply(query, key, value, None if sinks is None else sinks.to(wide), tiles, scores)


class _Tiled(torch.autograd.Function):
    """Inside, queries are [H_kv, T * G, D]: the G that share a head of keys stand beside each other."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, tiles: list[Tile], scores: Scores
    ) -> Tensor:
        heads, num_tokens, width = query.shape
        ctx.shape, ctx.tiles, ctx.scores = (len(key), heads // len(key), num_tokens, width), tiles, scores
        query = _grouped(query * scores.scaling, len(key))
        key, value = key.contiguous(), value.contiguous()
        output = torch.empty_like(query)
        kept = []
        for tile in tiles:
            weights = _weights(query, key, sinks, tile, ctx.shape, scores)
            if _keeps(tile, scores):
                kept.append(weights)
            rows = _rows(tile, ctx.shape)
            torch.bmm(weights[..., : tile.num_keys], value[:, tile.keys], out=output[:, rows])
        ctx.save_for_backward(query, key, value, sinks, *kept)
        return output.view(len(key), num_tokens, -1, width).transpose(0, 1).reshape(num_tokens, heads, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(gradients[0].device.type, enabled=False):
            return _backward(ctx, gradients[0])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, *kept = ctx.saved_tensors
    kv_heads, group, num_tokens, width = ctx.shape
    gradient = _grouped(gradient.transpose(0, 1), kv_heads)
    of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    of_sinks = None if sinks is None else torch.zeros_like(sinks)
    kept = iter(kept)
    for tile in ctx.tiles:
        rows, keys = _rows(tile, ctx.shape), tile.keys
        capped = None
        if _keeps(tile, ctx.scores):
            weights = next(kept)
        else:
            scores = _scores(query, key, tile, ctx.shape, ctx.scores, sinks is not None)
            capped = None if ctx.scores.softcap is None else scores[..., : tile.num_keys] / ctx.scores.softcap
            weights = _softmax(scores, sinks, tile, ctx.shape)
        upstream = torch.zeros_like(weights) if sinks is not None else torch.empty_like(weights)
        torch.bmm(gradient[:, rows], value[:, keys].transpose(1, 2), out=upstream[..., : tile.num_keys])
        of_value[:, keys].baddbmm_(weights[..., : tile.num_keys].transpose(1, 2), gradient[:, rows])
        of_scores = torch.ops.aten._softmax_backward_data(upstream, weights, -1, weights.dtype)
        if of_sinks is not None:
            of_sinks += of_scores[..., -1].view(kv_heads, -1, group).sum(1).flatten()
            of_scores = of_scores[..., :-1]
        if capped is not None:
            of_scores = of_scores * (1 - capped * capped)
        torch.bmm(of_scores, key[:, keys], out=of_query[:, rows])
        of_key[:, keys].baddbmm_(of_scores.transpose(1, 2), query[:, rows])
    of_query = of_query.view(kv_heads, num_tokens, group, width).transpose(1, 2).flatten(0, 1)
    return of_query * ctx.scores.scaling, of_key, of_value, of_sinks, None, None


def _keeps(tile: Tile, scores: Scores) -> bool:
    """Whether a tile's weights are kept for backward, which wants a softcap's scores too."""
    return tile.num_keys <= KEPT_KEYS and scores.softcap is None


def _weights(
    query: Tensor, key: Tensor, sinks: Tensor | None, tile: Tile, shape: tuple[int, ...], how: Scores
) -> Tensor:
    """[H_kv, m * G, n], or n + 1 with the sinks' last."""
    return _softmax(_scores(query, key, tile, shape, how, sinks is not None), sinks, tile, shape)


def _scores(query: Tensor, key: Tensor, tile: Tile, shape: tuple[int, ...], how: Scores, has_sinks: bool) -> Tensor:
    rows = _rows(tile, shape)
    scores = query.new_empty(shape[0], rows.stop - rows.start, tile.num_keys + has_sinks)
    products = scores[..., : tile.num_keys]
    torch.bmm(query[:, rows], key[:, tile.keys].transpose(1, 2), out=products)
    if how.softcap is not None:
        products.div_(how.softcap).tanh_().mul_(how.softcap)
    return scores


def _softmax(scores: Tensor, sinks: Tensor | None, tile: Tile, shape: tuple[int, ...]) -> Tensor:
    """In place, of scores before the mask."""
    by_query = scores.view(shape[0], -1, shape[1], scores.shape[-1])
    if tile.hidden is not None:
        by_query[..., tile.partly] += tile.hidden
    if sinks is not None:
        by_query[..., -1] = sinks.view(shape[0], 1, shape[1])
    return torch.softmax(scores, -1, out=scores)


def _rows(tile: Tile, shape: tuple[int, ...]) -> slice:
    return slice(tile.rows.start * shape[1], tile.rows.stop * shape[1])


def _grouped(states: Tensor, kv_heads: int) -> Tensor:
    """[H, T, D] -> [H_kv, T * G, D], contiguous."""
    return states.unflatten(0, (kv_heads, -1)).transpose(1, 2).flatten(1, 2).contiguous()

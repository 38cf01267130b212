"""Tiles at their own size: against SDPA and the plain formula, in fp32 and under autocast; which rows take them; what a
layer keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vltrain.memory.live import LiveMemory
from vltrain.ops import attention, reference
from vltrain.ops.attention import PACKED_TILED, packed_sdpa_forward, packed_tiled_forward, packing_arguments
from vltrain.ops.packed.masks import Rule, SegmentMask
from vltrain.ops.packed.packing import Packing
from vltrain.ops.packed.tiled import TILE, tiles_of, worth_tiling

LENGTHS = (210, 33, 9, 167, 300)


def outcomes(forward: Any, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Output, and gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, sum(lengths), heads, 64, generator=generator).requires_grad_() for heads in (6, 2, 2)]
    arguments = packing_arguments(PACKED_TILED, torch.tensor(lengths), torch.device("cpu"), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = forward(torch.nn.Module(), *(one.transpose(1, 2) for one in states), **arguments)[0]
    assert found.dtype == dtype
    upstream = torch.randn(found.shape, generator=generator)
    return [found, *torch.autograd.grad(found, states, upstream.to(dtype))]


def plain(module: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, **_: Any) -> tuple[Tensor]:
    return (reference.packed_attention(query, key, value, packing.lengths).float(),)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def test_fp32_and_bf16_against_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_grouped_attention", None)  # all of these rows go in tiles
    expected = outcomes(plain, torch.float32)
    assert max(map(error, outcomes(packed_tiled_forward, torch.float32), expected)) < 1e-6
    monkeypatch.undo()
    tiled, sdpa = (outcomes(one, torch.bfloat16) for one in (packed_tiled_forward, packed_sdpa_forward))
    for one, other, exact in zip(tiled, sdpa, expected, strict=True):
        assert error(one, exact) <= error(other, exact) < 1e-2


def test_which_rows_go_in_tiles() -> None:
    def worth(*lengths: int, width: int = 64, dtype: torch.dtype = torch.float32, **rule: Any) -> bool:
        mask = SegmentMask(Packing(torch.tensor(lengths)), Rule(**rule))
        return worth_tiling(mask, width, dtype)

    assert worth(200, 200) and worth(480, 20, 20) and not worth(30, 40, 50) and not worth(2000, 100)
    assert worth(2000, 100, kind="window", size=128) and not worth(2000, 100, kind="window", size=2000)
    assert not worth(200, 200, width=32) and worth(30, width=32, dtype=torch.bfloat16)


def test_only_what_is_seen_is_computed() -> None:
    mask = SegmentMask(Packing(torch.tensor([300, 20, 30, 10, 70])), Rule("window", 50))
    tiles = tiles_of(mask)
    assert tiles is tiles_of(SegmentMask(mask.packing, Rule("window", 50)))
    assert [place for tile in tiles for place in range(tile.rows.start, tile.rows.stop)] == list(range(430))
    assert all(tile.rows.stop - tile.rows.start <= TILE and tile.num_keys <= TILE + 49 for tile in tiles)
    assert slice(300, 360) in [tile.rows for tile in tiles], "short segments share a tile"


def test_long_segments_keep_no_weights() -> None:
    """Beyond 512 keys: what a long segment's first tiles keep is less than what as many short ones do."""
    kept = {}
    for length in (512, 1536):
        state = torch.randn(1, 1, 1536, 64, requires_grad=True)
        lengths = torch.full((1536 // length,), length)
        arguments = packing_arguments(PACKED_TILED, lengths, torch.device("cpu"), torch.float32)
        arguments["attention_mask"] = SegmentMask(arguments["packing"], Rule("window", 1500))
        with LiveMemory() as live:
            found = packed_tiled_forward(torch.nn.Module(), state, state, state, **arguments)[0]
            kept[length] = live.live_bytes
        del found
    assert kept[1536] < kept[512]

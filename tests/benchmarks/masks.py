"""What the masks of packed attention cost beside plain causal attention, forward and backward of one layer.

    python -m tests.benchmarks.masks [--json OUT]

A row of segments of ScienceQA's lengths, 9 heads of 64 with 3 of keys (SmolLM2-135M's), fp32 on a CPU and bf16 on a
GPU; on a CPU both by padded groups (SDPA) and in tiles, whichever a run would choose. `one mask of the row` is plain
causal attention as transformers' SDPA computes it with a mask of T x T, the other way to keep segments apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.measure import alternate, command, median_ratio, report, settled
from tests.benchmarks.samples import scienceqa_lengths
from vltrain.ops.attention import PACKED_SDPA, packed_sdpa_forward, packed_tiled_forward, packing_arguments
from vltrain.ops.packed import tiled
from vltrain.ops.packed.masks import CAUSAL, Rule, SegmentMask

HEADS, KV_HEADS, WIDTH = 9, 3, 64
WINDOW, IMAGE = 128, 64
TILED = ", in tiles"


def row_lengths(num_tokens: int) -> list[int]:
    """Segments that fill a row."""
    lengths: list[int] = []
    for length in scienceqa_lengths(1000).tolist():
        if sum(lengths) + length <= num_tokens:
            lengths.append(length)
    return lengths


def image_blocks(lengths: list[int]) -> Tensor:
    """An image in front of every other segment."""
    rows = [torch.full((length,), -1) for length in lengths]
    for row in rows[::2]:
        row[:IMAGE] = 0
    return torch.cat(rows)


def competitors(
    num_tokens: int, device: torch.device, dtype: torch.dtype, length: int | None
) -> dict[str, Callable[[], float]]:
    """Seconds of one forward and backward, by name; what a row needs once is made in it. `length`: of all segments."""
    lengths = row_lengths(num_tokens) if length is None else [length] * max(1, num_tokens // length)
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, sum(lengths), WIDTH, generator=generator).to(device, dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    sinks = torch.zeros(HEADS, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(1, sum(lengths), HEADS, WIDTH, generator=generator).to(device, dtype)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def packed(
        rule: Rule = CAUSAL, blocks: Tensor | None = None, *, forward: Any = packed_sdpa_forward, **options: Any
    ) -> Callable[[], Tensor]:
        def run() -> Tensor:
            arguments = packing_arguments(PACKED_SDPA, torch.tensor(lengths), device, dtype, blocks=blocks)
            arguments["attention_mask"] = SegmentMask(arguments["packing"], rule)
            return forward(nn.Module(), *states, **arguments, **options)[0]

        return run

    def whole() -> Tensor:
        mask = ((owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()).to(device)
        key, value = (one.repeat_interleave(HEADS // KV_HEADS, 1) for one in states[1:])
        return F.scaled_dot_product_attention(states[0], key, value, attn_mask=mask).transpose(1, 2)

    cases: dict[str, dict[str, Any]] = {
        "causal": {},
        f"window of {WINDOW}": {"rule": Rule("window", WINDOW)},
        f"chunks of {WINDOW}": {"rule": Rule("chunk", WINDOW)},
        f"image blocks of {IMAGE}": {"blocks": image_blocks(lengths)},
        "softcap": {"softcap": 50.0},
        "sinks": {"s_aux": sinks},
    }
    ways = {name: packed(**case) for name, case in cases.items()}
    if device.type == "cpu":
        ways |= {f"{name}{TILED}": packed(**case, forward=packed_tiled_forward) for name, case in cases.items()}
    ways["one mask of the row"] = whole
    return {name: _timed(run, upstream, device) for name, run in ways.items()}


def _timed(run: Callable[[], Tensor], upstream: Tensor, device: torch.device) -> Callable[[], float]:
    def seconds() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run().backward(upstream)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of the row (default: 4096)")
    parser.add_argument("--length", type=int, help="of all segments (default: ScienceQA's lengths)")
    given = settled(parser.parse_args())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tiled.SHORTEST, tiled.LONGEST_CAUSAL = 0, 10**9
    results = alternate(competitors(600 if given.quick else given.tokens, device, dtype, given.length), given.runs)
    rows = [
        {
            "attention": name,
            "ms": 1e3 * statistics.median(seconds),
            "times plain causal": median_ratio(seconds, results["causal"]),
            "SDPA's, times that in tiles": (
                median_ratio(results[name.removesuffix(TILED)], seconds) if name.endswith(TILED) else None
            ),
        }
        for name, seconds in results.items()
    ]
    report({"masks": rows}, given)


if __name__ == "__main__":
    main()

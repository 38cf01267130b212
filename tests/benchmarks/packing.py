"""How full packs get and how long dealing takes, beside TRL's packing and a greedy first fit, on ScienceQA's lengths.

    python -m tests.benchmarks.packing [--sizes 100000 1000000 10000000] [--pack-length 1280] [--json OUT] [--quick]

Fill is tokens over room. The lower bound is the least number of packs that could hold the tokens; `above bound` is how
many more there are. TRL's `pack_dataset` gets a data set whose tokens are a byte each, and moves them, since it does
not give an order alone; it packs a thousand samples at a time. The greedy one takes samples as they come and the first
pack with room, by a tree. Both stop at `PEERS_UP_TO`: beyond, their loops in Python take minutes and gigabytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from data_prep.spool import windows
from tests.benchmarks.measure import alternate, command, report, settled, tell
from tests.benchmarks.samples import scienceqa_lengths
from vltrain.data.packing import pack_lengths

PEERS_UP_TO = 1_000_000


def first_fit(lengths: np.ndarray, capacity: int) -> int:
    """Packs needed if each sample goes into the first that has room."""
    size = 1 << max(1, (len(lengths) - 1).bit_length())
    room = [capacity] * (2 * size)  # a tree of the most room anywhere below
    used = 0
    for length in lengths.tolist():
        node = 1
        while node < size:
            node *= 2
            node += room[node] < length
        used = max(used, node - size + 1)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return used


def trl(lengths: np.ndarray, capacity: int) -> Callable[[], int]:
    """TRL's packing of samples of those lengths; what is returned gives the number of packs."""
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(int(lengths.sum()), np.int8)))
    dataset = Dataset(pa.table({"input_ids": tokens}))
    return lambda: len(pack_dataset(dataset, capacity, "bfd", {"keep_in_memory": True, "load_from_cache_file": False}))


def ours(lengths: np.ndarray, capacity: int) -> int:
    """Packs of samples of those lengths, assigned window by window as `data_prep.pack` does it."""
    return sum(len(pack_lengths(lengths[places], capacity)[1]) - 1 for places in windows(len(lengths), 0))


def measure(count: int, capacity: int, runs: int) -> list[dict[str, Any]]:
    lengths = scienceqa_lengths(count)
    packers: dict[str, Callable[[], int]] = {"ours": lambda: ours(lengths, capacity)}
    if count <= PEERS_UP_TO:
        if find_spec("trl") is not None:
            packers["TRL"] = trl(lengths, capacity)
        packers["first fit"] = lambda: first_fit(lengths, capacity)
    tell(f"{count:,} samples: {', '.join(packers)}")
    results = alternate({name: _timed(pack) for name, pack in packers.items()}, runs, warm_up=0)
    bound = -(-int(lengths.sum()) // capacity)
    rows = []
    for name, found in results.items():
        packs = found[0][0]
        rows.append(
            {
                "samples": count,
                "packer": name,
                "seconds": statistics.median(seconds for _, seconds in found),
                "packs": packs,
                "fill": float(lengths.sum() / (packs * capacity)),
                "above bound": packs - bound,
                "share above bound": packs / bound - 1,
            }
        )
    return rows


def _timed(pack: Callable[[], int]) -> Callable[[], tuple[int, float]]:
    def run() -> tuple[int, float]:
        start = time.perf_counter()
        return pack(), time.perf_counter() - start

    return run


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--pack-length", type=int, default=1280)
    given = settled(parser.parse_args())
    sizes = [20_000] if given.quick else given.sizes
    rows = [row for count in sizes for row in measure(count, given.pack_length, given.runs)]
    report({"packing": rows, "wanted": "fill at least 0.998; 1,000,000 samples in at most 2 s on one core"}, given)


if __name__ == "__main__":
    main()

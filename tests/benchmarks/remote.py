"""What opening a set of packs at an address costs: time, memory, requests and bytes, by number of packs.

    python -m tests.benchmarks.remote [--packs 10000 2000000] [--json OUT] [--quick]

The set has a whole index and digests of all blocks, of 6 kB of tokens and 100 kB of images a pack; its shards have the
sizes and ends that the manifest says, and nothing else, since opening reads nothing else of them. A real HTTP server on
this machine gives it. Memory is what a process of its own holds of its own (RssAnon) when the set is open and a hundred
steps from all over it are planned, less what it held before; the second opening finds index and digests in the cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from tests.benchmarks.measure import report, tell
from tests.support.object_store import object_store
from tests.support.processes import ROOT
from vltrain.data.plan import PackCost, Plan
from vltrain.data.remote.blocks import BLOCK_BYTES, write_index
from vltrain.data.remote.cache import CacheSettings
from vltrain.data.shard_writer import FILE_BYTES, describe
from vltrain.data.shards import INDEX, INDEX_SCHEMA, MANIFEST, ROWS_PER_BATCH, Manifest, PackedDataset, ShardFile

TOKEN_BYTES, IMAGE_BYTES, IMAGES = 6_000, 100_000, 2  # of a pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, nargs="+", default=[10_000, 2_000_000])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything there")
    parser.add_argument("--quick", action="store_true", help="a smoke test: no figure worth keeping")
    parser.add_argument("--open", nargs=2, metavar=("ADDRESS", "CACHE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open:
        print(json.dumps(opened(*given.open)))
        return
    rows = []
    for num_packs in [1_000, 2_000] if given.quick else given.packs:
        with tempfile.TemporaryDirectory() as place:
            made = make(Path(place, "packs"), num_packs)
            with object_store(Path(place)) as store:
                words = [f"{store.address}/packs", str(Path(place, "cache"))]
                first = in_a_process(words)
                requests, sent = sum(store.requests.values()), sum(end - start for _, start, end in store.ranges)
                again = in_a_process(words)
            rows.append(
                {
                    "packs": num_packs,
                    "shards": made,
                    "open, s": round(first["seconds"], 2),
                    "CPU s": round(first["cpu"], 2),
                    "again, s": round(again["seconds"], 2),
                    "again, CPU s": round(again["cpu"], 2),
                    "requests": requests,
                    "fetched, MiB": round(sent / 2**20, 1),
                    "own memory, MiB": round(first["own"], 1),
                    "again, MiB": round(again["own"], 1),
                }
            )
            tell(f"{num_packs} packs: {rows[-1]}")
    given.runs = 1
    report({"opened": rows}, given)


def make(folder: Path, num_packs: int) -> int:
    """Writes the set; gives the number of its shards."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    columns = {
        "num_tokens": draw.integers(900, 1280, num_packs),
        "num_label_tokens": draw.integers(100, 300, num_packs),
        "num_images": np.full(num_packs, IMAGES),
        "num_samples": draw.integers(3, 9, num_packs),
        "sum_squares": draw.integers(200_000, 400_000, num_packs),
    }
    with pa.ipc.new_file(str(folder / INDEX), INDEX_SCHEMA) as file:
        arrays = [pa.array(columns[field.name], field.type) for field in INDEX_SCHEMA]
        file.write_batch(pa.record_batch(arrays, schema=INDEX_SCHEMA))
    files, blocks = [describe(folder / INDEX, num_packs)], []
    for prefix, rows, num_bytes in (
        ("packs", num_packs, TOKEN_BYTES),
        ("images", num_packs * IMAGES, IMAGE_BYTES // IMAGES),
    ):
        in_a_file = FILE_BYTES // num_bytes // ROWS_PER_BATCH * ROWS_PER_BATCH
        for number, first in enumerate(range(0, rows, in_a_file)):
            here = min(in_a_file, rows - first)
            path = folder / f"{prefix}-{number:05d}.arrow"
            with path.open("wb") as file:
                file.truncate(here * num_bytes - 6)
                file.seek(0, 2)
                file.write(b"ARROW1")
            starts = (np.arange(0, here, ROWS_PER_BATCH) * num_bytes).tolist()
            digests = [draw.bytes(32) for _ in range(-(-here * num_bytes // BLOCK_BYTES))]
            files.append(ShardFile(name=path.name, rows=here, bytes=here * num_bytes, sha256="0" * 64))
            places = {"starts": starts, "ends": starts, "offsets": starts, "data": starts}
            blocks.append({"name": path.name, "digests": digests, **places})
    facts: dict[str, Any] = {"tokenizer_fingerprint": "none", "tokenizer": "none", "template": "mmt", "seed": 0}
    facts |= {"visual_tokens": 4, "pack_length": 1280, "max_images": None, "over_long": 0, "num_packs": num_packs}
    facts |= {name: int(columns[name].sum()) for name in ("num_samples", "num_tokens", "num_label_tokens")}
    manifest = Manifest(num_images=num_packs * IMAGES, files=tuple(files), **facts)
    (folder / MANIFEST).write_text(manifest.dumps())
    write_index(folder, blocks, manifest.checksum, BLOCK_BYTES)
    return len(blocks)


def in_a_process(words: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.remote", "--open", *words]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout)


def opened(address: str, cache: str) -> dict[str, float]:
    """Opens the set and plans; in a process of its own."""
    fsspec.filesystem("http")  # its packages are loaded by then
    settings, before = CacheSettings(folder=cache, gib=1.0), own_memory()
    began, worked = time.perf_counter(), time.process_time()
    dataset = PackedDataset(address, cache=settings)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    plan = Plan(dataset.index, seed=0, epochs=1.0, packs_per_step=16, world_size=8, cost=PackCost())
    for step in np.linspace(0, plan.num_steps - 1, 100, dtype=np.int64).tolist():
        plan.step(step)
    return {"seconds": seconds, "cpu": cpu_seconds, "own": own_memory() - before}


def own_memory() -> float:
    """Anonymous memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    main()

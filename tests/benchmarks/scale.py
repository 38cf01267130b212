"""Two ranks on two cores beside one rank on one, at every ZeRO stage; and what a rank holds of a set of 1e6 and of 1e8
packs.

    python -m tests.benchmarks.scale [--stages 0 1 2 3] [--packs 1e6 1e8] [--json OUT] [--quick]

Speed: SmolLM2-135M with adapters, two packs a step. One process, bound to one core, makes both; then two processes,
each bound to a core of its own, make one each. All stay alive and wait for their turn. Memory: a process plans and
loads steps from all over a set whose index has that many packs (of real size, on disk; the packs themselves repeat a
few), and what counts is the memory of its own, without mapped files, that it has got by then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.benchmarks.measure import alternate, command, median_ratio, report, settled, tell
from tests.benchmarks.ours import OurSteps, benchmark_config, our_trainer, sizes
from tests.benchmarks.samples import pack_samples, scienceqa_like
from tests.support.processes import ROOT, free_port, rank_environment
from vltrain.data.flat.index import INDEX_SCHEMA, Index, read_index
from vltrain.data.loader import StepLoader
from vltrain.data.pictures import SquareReader
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import INDEX, PackedDataset
from vltrain.schema import PackedRow

PACK_LENGTH = 1280
NUM_SAMPLES = 200
PACKS_PER_STEP = 2
WANTED = 1.8
STEPS_LOADED = 200


class Group:
    """Processes of one run, each bound to a core, that make a step when told to."""

    def __init__(self, cores: list[int], stage: int, quick: bool, folder: Path) -> None:
        self._ranks = []
        port = free_port()
        for rank, core in enumerate(cores):
            environment = rank_environment(rank, len(cores), port)
            words = [
                sys.executable,
                "-m",
                "tests.benchmarks.scale",
                "--rank-of",
                str(folder),
                str(core),
                str(stage),
                str(int(quick)),
            ]
            log = (folder / f"log.{rank}").open("wb")
            self._ranks.append(
                subprocess.Popen(
                    words,
                    env=environment,
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )

    def step(self) -> float:
        """Seconds of one step of all ranks."""
        start = time.perf_counter()
        for rank in self._ranks:
            rank.stdin.write("step\n")
            rank.stdin.flush()
        for rank in self._ranks:
            if rank.stdout.readline() != "done\n":
                raise SystemExit(f"a rank ended: {' '.join(rank.args)}; its log is beside {rank.args[4]}")
        return time.perf_counter() - start

    def end(self) -> None:
        for rank in self._ranks:
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait()


def run_rank(folder: Path, core: int, stage: int, quick: bool) -> None:
    """One rank: a step for every line that comes in."""
    os.sched_setaffinity(0, {core})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the log
    import torch

    from vltrain.train.zero.engine import init_distributed, shutdown_distributed

    torch.set_num_threads(1)
    rank, world_size = init_distributed()
    config = benchmark_config(
        quick,
        train__precision="fp32",
        train__packs_per_step=PACKS_PER_STEP,
        data__pack_length=PACK_LENGTH,
        data__workers=0,
        output=str(folder / "run"),
    )
    dataset = PackedDataset(folder / "packs", verify=False)
    ds = {"zero_optimization": {"stage": stage}}
    ours = OurSteps(our_trainer(config, dataset, torch.float32, ds=ds, rank=rank, world_size=world_size))
    for _ in sys.stdin:
        ours.step()
        print("done", file=answers, flush=True)
    ours.trainer.monitor.close()
    shutdown_distributed()


def speeds(stage: int, cores: list[int], runs: int, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        vocabulary, visual_tokens = sizes(benchmark_config(quick), quick)
        samples = scienceqa_like(24 if quick else NUM_SAMPLES, vocabulary=vocabulary, visual_tokens=visual_tokens)
        groups = {}
        for name, bound in (("one", cores[:1]), ("two", cores[:2])):
            folder = Path(place) / name
            folder.mkdir()
            pack_samples(samples, PACK_LENGTH, folder / "packs", visual_tokens)
            groups[name] = Group(bound, stage, quick, folder)
        tell(f"ZeRO {stage}")
        results = alternate({name: group.step for name, group in groups.items()}, runs)
        for group in groups.values():
            group.end()
    one, two = (statistics.median(results[name]) for name in ("one", "two"))
    return {
        "stage": stage,
        "1 rank, s": one,
        "2 ranks, s": two,
        "faster by": median_ratio(results["one"], results["two"]),
        "wanted": f">= {WANTED}",
    }


class Repeating(PackedDataset):
    """A few packs under an index of many."""

    def __init__(self, folder: Path, index: Path) -> None:
        super().__init__(folder, verify=False)
        self._index = index

    @property
    def index(self) -> Index:
        return read_index(self._index)

    def row(self, number: int) -> PackedRow:
        return super().row(number % len(self))


def write_long_index(packs: Path, num_packs: int, target: Path) -> None:
    """The index of `packs` again and again, as one of `num_packs`."""
    index = read_index(packs / INDEX)
    columns = [pa.array(np.resize(getattr(index, name), num_packs)) for name in INDEX_SCHEMA.names]
    with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_file(stream, INDEX_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=INDEX_SCHEMA))


def own_kib() -> int:
    """Memory of this process that no file stands behind, in KiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def run_holder(packs: Path, index: Path, image_size: int, steps: int) -> None:
    """Loads `steps` steps from all over the set and prints what it took."""
    before = own_kib()
    start = time.perf_counter()
    dataset = Repeating(packs, index)
    plan = Plan(dataset.index, seed=0, epochs=1.0, packs_per_step=16, world_size=8, cost=PackCost())
    loader = iter(StepLoader(dataset, plan, 3, SquareReader(size=image_size), 0))
    next(loader)
    opened, first = time.perf_counter() - start, own_kib() - before
    start = time.perf_counter()
    for _ in range(steps):
        next(loader)
    seconds = time.perf_counter() - start
    found = {"first step, s": opened, "a step, ms": 1000 * seconds / steps, "after the first, MiB": first / 1024}
    print(json.dumps({**found, "at the end, MiB": (own_kib() - before) / 1024}))


def memories(counts: list[int], quick: bool) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as place:
        packs, index = Path(place) / "packs", Path(place) / "index.arrow"
        pack_samples(scienceqa_like(64, vocabulary=1000, visual_tokens=4), PACK_LENGTH, packs, 4)
        for count in counts:
            write_long_index(packs, count, index)
            words = [
                sys.executable,
                "-m",
                "tests.benchmarks.scale",
                "--holder",
                str(packs),
                str(index),
                "64",
                "5" if quick else str(STEPS_LOADED),
            ]
            tell(f"{count:.0e} packs, {index.stat().st_size / 2**20:.0f} MiB of index")
            done = subprocess.run(
                words,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            rows.append(
                {
                    "packs": f"{count:.0e}",
                    "index on disk, MiB": index.stat().st_size / 2**20,
                    **json.loads(done.stdout.splitlines()[-1]),
                }
            )
    return rows


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument("--packs", type=float, nargs="+", default=[1e6, 1e8])
    parser.add_argument("--rank-of", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--holder", nargs=4, help=argparse.SUPPRESS)
    given = settled(parser.parse_args())
    if given.rank_of:
        folder, core, stage, quick = given.rank_of
        return run_rank(Path(folder), int(core), int(stage), quick == "1")
    if given.holder:
        packs, index, image_size, steps = given.holder
        return run_holder(Path(packs), Path(index), int(image_size), int(steps))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit(f"found {len(cores)} core to run on, expected two")
    found = {"memory": memories([10**4, 10**5] if given.quick else [int(count) for count in given.packs], given.quick)}
    stages = given.stages[:1] if given.quick else given.stages
    found["speed"] = [speeds(stage, cores, given.runs, given.quick) for stage in stages]
    report(found, given)


if __name__ == "__main__":
    main()

"""What `prepare` and `pack` hold of their own, by number of samples: a source that makes up text samples, prepared and
packed in a process each.

    python -m tests.benchmarks.samples_memory [--sizes 100000 1000000 10000000] [--workers N] [--table] [--json OUT]
        [--quick]

The figure is the most anonymous memory at any look, twenty a second, of the process and of all that it started
together, less what it held before its first sample; pages that several share count once (Pss_Anon), and mapped files
are the page cache's and count for nobody. Splits overlap, ids are as long as a file's name, and questions repeat
nothing. 1e7 samples want 12 GB of disk and half an hour.

`--workers N`: with so many processes (default one, the program itself): others hold an interpreter with what they have
loaded, and chunks of samples. Text alone has no image to look at, and so `prepare` starts none.

`--table` prepares rows of parquet instead, by `source: datasets`: questions on images that stand in the table, of which
100 differ.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import command, report, settled, tell

TOKENIZER, PACK_LENGTH = "asset://tiny_llama", 1280
WORDS = 64  # of which questions are made
MiB = 1 << 20


def texts(input: Path | None, options: Mapping[str, Any]) -> Iterator[Any]:
    """A source: so many samples of text alone, the hundredth of which are `val`."""
    from data_prep.sources.raw import RawSample
    from vltrain.schema import Sample, Turn

    draw = random.Random(0)
    words = [f"w{draw.randrange(10**6)}" for _ in range(WORDS)]
    for number in range(int(os.environ["NUM_SAMPLES"])):
        asked = f"{number}: {' '.join(draw.choices(words, k=3 + number % 13))}?"
        turns = (Turn(role="user", text=asked), Turn(role="assistant", text=words[number % WORDS]))
        split = "val" if number % 100 == 0 else "train"
        yield RawSample(split=split, sample=Sample(id=f"made-up/{number:012d}", turns=turns))


def prepare(folder: Path) -> int:
    from data_prep import prepare as program
    from data_prep.sources import SOURCES

    SOURCES["shapes"], program.option_texts = texts, lambda *_: {}
    return sum(program.prepare("shapes", None, folder / "samples", workers=num_workers()).values())


def write_table(folder: Path, num_rows: int) -> None:
    """Two parquet files of so many rows, each a row group as large as the library's own are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.support.tables import picture

    images = [{"bytes": picture(number, (48, 32)), "path": None} for number in range(100)]
    folder.mkdir()
    for file in range(2):
        rows = range(file * num_rows // 2, (file + 1) * num_rows // 2)
        first = {"question": "", "answer": "", "image": images[0]}
        with pq.ParquetWriter(folder / f"train-{file}.parquet", pa.Table.from_pylist([first]).schema) as writer:
            for start in range(rows.start, rows.stop, 1000):
                part = range(start, min(start + 1000, rows.stop))
                columns = {
                    "question": [f"{number}: what is in the picture of this row?" for number in part],
                    "answer": [f"number {number}" for number in part],
                    "image": [images[number % 100] for number in part],
                }
                writer.write_table(pa.table(columns))


def prepare_table(folder: Path) -> int:
    from data_prep.prepare import prepare

    options = {"val_fraction": "0"}
    return sum(prepare("datasets", folder / "table", folder / "samples", options, workers=num_workers()).values())


def pack(folder: Path) -> int:
    from data_prep.pack import PackSettings, pack

    settings = PackSettings(tokenizer=TOKENIZER, visual_tokens=4, pack_length=PACK_LENGTH)
    made = pack(folder / "samples" / "train.jsonl", folder / "packed", settings, workers=num_workers())
    assert made.fill > 0.99, made.fill
    return made.num_samples


def num_workers() -> int:
    return int(os.environ["NUM_WORKERS"])


def _anonymous_bytes(pid: int) -> int:
    """0 of one that has ended."""
    with suppress(OSError):  # it ends while it is looked at
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")), 0)
    return 0


def _started_here() -> list[int]:
    """Processes that this one has started, and those that they have."""
    above: dict[int, int] = {}
    for place in Path("/proc").iterdir():
        with suppress(OSError):
            if place.name.isdigit():
                above[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found, last = list[int](), [os.getpid()]
    while last:
        last = [pid for pid, parent in above.items() if parent in last]
        found += last
    return found


class _Most:
    """The most bytes at any look: of all processes together, of this one, and of one of the others."""

    def __init__(self) -> None:
        self.together = self.own = self.other = self.processes = 0
        self.look()

    def look(self) -> None:
        others = [_anonymous_bytes(pid) for pid in (_started_here() if num_workers() > 1 else ())]
        own = _anonymous_bytes(os.getpid())
        self.together, self.own = max(self.together, own + sum(others)), max(self.own, own)
        self.other, self.processes = max(self.other, *others, 0), max(self.processes, len(others) + 1)


def _measured(work: Callable[[Path], int], folder: Path, answers: Any) -> None:
    """In a process of its own: (samples, seconds, bytes before, what `_Most` saw)."""
    import data_prep.pack
    import data_prep.prepare  # noqa: F401, before the first look

    if work is prepare_table:
        import datasets  # noqa: F401

    most, done = _Most(), threading.Event()
    before = most.own

    def watch() -> None:
        while not done.wait(0.05):
            most.look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        count = work(folder)
    finally:
        done.set()
        watcher.join()
    answers.put((count, time.perf_counter() - start, before, vars(most)))


def measure(work: Callable[[Path], int], folder: Path, num_samples: int, workers: int) -> dict[str, Any]:
    os.environ.update(NUM_SAMPLES=str(num_samples), NUM_WORKERS=str(workers))
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_measured, args=(work, folder, answers))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{work.__name__} of {num_samples} samples failed, see above")
    count, seconds, before, most = answers.get()
    own = most["together"] - before
    tell(f"{work.__name__}: {count:,} samples, {seconds:.0f} s, {own / MiB:.0f} MiB")
    return {
        "program": work.__name__,
        "samples": num_samples,
        "processes": most["processes"],
        "seconds": seconds,
        "MiB before": before / MiB,
        "MiB of its own": own / MiB,
        "of the first": (most["own"] - before) / MiB,
        "of another, at most": most["other"] / MiB,
        "bytes a sample": own / num_samples,
    }


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--folder", type=Path, help="on whose disk samples and packs lie (default: the temporary one)")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--table", action="store_true", help="prepare rows of parquet by the source datasets")
    given = settled(parser.parse_args())
    rows: list[dict[str, Any]] = []
    for size in [2_000, 4_000] if given.quick else given.sizes:
        with tempfile.TemporaryDirectory(dir=given.folder) as place:
            if given.table:
                write_table(Path(place) / "table", size)
            works = (prepare_table,) if given.table else (prepare, pack)
            rows += [measure(work, Path(place), size, given.workers) for work in works]
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n")
    report({"memory of samples": sorted(rows, key=lambda row: row["program"])}, given)


if __name__ == "__main__":
    main()

"""`prepare` and `pack` in parts, killed by SIGKILL at random moments and started again by the same command: no part
that was done is lost or made twice, and what comes out is, byte for byte, what one undisturbed command makes."""

from __future__ import annotations

import io
import json
import multiprocessing
import random
import shutil
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.pack import main as pack_main
from data_prep.prepare import main as prepare_main
from tests.data_prep.test_parts import files_of

PARTS, NUM_IMAGES = 6, 48
PREPARE, PACK = "prepare", "pack"
LOADED = [
    "data_prep.prepare", "data_prep.pack", "data_prep.sources.streamed.read", "datasets.packaged_modules",
    "datasets.table", "huggingface_hub.repocard", "pyarrow.dataset", "pyarrow.parquet",
]  # fmt: skip


def quietly(program: str, words: list[str]) -> None:
    """In a process of its own."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        code = (prepare_main if program == PREPARE else pack_main)(words)
    if code:
        raise SystemExit(said.getvalue())


def begin(program: str, words: list[str]) -> multiprocessing.process.BaseProcess:
    """In a process whose modules are loaded already: else most kills would fall before anything is done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=quietly, args=(program, words))
    process.start()
    return process


@dataclass
class Job:
    """A command in parts, and what it has gone through. `kept`: at each kill, the parts that were done; `phases`: where
    kills fell."""

    program: str
    words: list[str]
    output: Path
    expected: dict[str, bytes]
    phases: Counter[str] = field(default_factory=Counter)
    kept: list[int] = field(default_factory=list)
    finished: int = 0

    def start(self) -> multiprocessing.process.BaseProcess:
        return begin(self.program, [*self.words, "--output", str(self.output), "--parts", str(PARTS)])

    def parts(self) -> dict[str, tuple[int, int]]:
        """Each part that is done, and which file its record is: made anew, it would be another one."""
        found = {}
        for record in self.output.parent.glob(f"{self.output.name}.parts/part-*/part.json"):
            status = record.stat()
            found[record.parent.name] = status.st_ino, status.st_mtime_ns
        return found

    def phase(self) -> str:
        """What a kill interrupted, by what it left."""
        if self.output.exists():
            return "parts are removed" if (self.output.parent / f"{self.output.name}.parts").exists() else "at the end"
        if list(self.output.parent.glob(f".{self.output.name}.*.tmp")):
            return "merge"
        return "part" if list(self.output.parent.glob(f"{self.output.name}.parts/.part-*.tmp")) else "reading"

    def run(self, kills: int, seconds: float, draw: random.Random) -> None:
        """Kills it so many times, and lets it come to its end whenever it does, and sometimes when all parts are there,
        so that parts are made again: every other time at a moment of the next `seconds`, else soon after some number of
        parts is done, however long the start takes."""
        while kills:
            before = self.parts()
            process = self.start()
            if len(before) == PARTS and draw.random() < 0.5:
                process.join()
            elif kills % 2:
                process.join(draw.random() * seconds)
            else:
                goal = draw.randint(0, PARTS)
                while process.exitcode is None and len(self.parts()) < goal:
                    process.join(0.005)
                process.join(draw.random() * seconds / PARTS)
            process.kill()
            process.join()
            if process.exitcode == 0:
                self.check_and_clear()
                continue
            assert process.exitcode == -9, process.exitcode
            kills -= 1
            phase, after = self.phase(), self.parts()
            self.phases[phase] += 1
            self.kept.append(len(after))
            if phase not in ("parts are removed", "at the end"):
                assert before.items() <= after.items(), "a part that was done is lost, or was made again"
            if phase == "at the end":
                self.check_and_clear()
        process = self.start()
        process.join(60)
        assert process.exitcode == 0
        self.check_and_clear()

    def check_and_clear(self) -> None:
        assert files_of(self.output) == self.expected
        names = {path.name for path in self.output.parent.iterdir()}
        assert names <= {self.output.name, f".{self.output.name}.lock"}, f"left behind: {names}"
        shutil.rmtree(self.output)
        self.finished += 1


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """The same questions on photos as LLaVA's JSON and as parquet."""
    folder, draw = tmp_path_factory.mktemp("raw"), random.Random(0)
    records, rows = [], []
    for number in range(NUM_IMAGES):
        image = Image.frombytes("RGB", (160, 120), draw.randbytes(160 * 120 * 3))
        image.save(folder / f"{number}.png")
        data = (folder / f"{number}.png").read_bytes()
        for kind in range(2):
            asked, said = f"what is {number} {kind}?", " ".join(["it is"] * draw.randrange(1, 9))
            turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": said}]
            records.append({"id": f"{number}-{kind}", "image": f"{number}.png", "conversations": turns})
            rows.append({"question": asked, "answer": said, "image": {"bytes": data, "path": f"{number}.png"}})
    (folder / "chats.json").write_text(json.dumps(records))
    (folder / "table").mkdir()
    for file in range(3):
        pq.write_table(pa.Table.from_pylist(rows[file::3]), folder / "table" / f"train-{file}.parquet")
    made = begin(PREPARE, ["--source", "llava_json", "--input", str(folder / "chats.json"), "--options",
                           "val_fraction=0", "--workers", "1", "--output", str(folder / "samples")])  # fmt: skip
    made.join()
    assert made.exitcode == 0
    return folder


def job_of(raw: Path, place: Path, name: str, workers: int) -> Job:
    if name == PACK:
        words = ["--samples", str(raw / "samples" / "train.jsonl"), "--tokenizer", "asset://tiny_llama"]
        words += ["--visual-tokens", "4", "--pack-length", "64"]
    else:
        input = raw / ("table" if name == "datasets" else "chats.json")
        words = ["--source", name, "--input", str(input), "--options", "val_fraction=0.1"]
    program = PACK if name == PACK else PREPARE
    words += ["--workers", str(workers), "--quiet"]
    place.mkdir()
    whole = begin(program, [*words, "--output", str(place.parent / "whole")])
    whole.join()
    assert whole.exitcode == 0
    expected = files_of(place.parent / "whole")
    shutil.rmtree(place.parent / "whole")
    return Job(program, words, place / "out", expected)


def undisturbed(job: Job) -> float:
    """Seconds that it takes when nobody kills it."""
    job.start().join()  # the server of processes loads its modules
    job.check_and_clear()
    start = time.monotonic()
    job.start().join()
    job.check_and_clear()
    return time.monotonic() - start


@pytest.mark.parametrize("name", ["llava_json", PACK])
def test_killed_a_few_times(raw, tmp_path, name):
    job = job_of(raw, tmp_path / "place", name, 1)
    job.run(4, undisturbed(job), random.Random(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers", "kills"), [("llava_json", 1, 50), ("datasets", 2, 60), (PACK, 1, 50), (PACK, 2, 40)]
)
def test_killed_many_times(raw, tmp_path, name, workers, kills, record_property):
    job = job_of(raw, tmp_path / "place", name, workers)
    job.run(kills, undisturbed(job), random.Random(0))
    record_property("phases", dict(job.phases))
    print(f"\n{name}, {workers} workers: {sum(job.phases.values())} kills, {dict(job.phases)}, "
          f"{job.finished} wholes, parts kept at a kill: {Counter(job.kept)}")  # fmt: skip
    assert sum(job.phases.values()) == kills and job.phases["part"] >= 5 and max(job.kept) >= PARTS - 1


def test_a_whole_whose_parts_were_not_yet_removed(raw, tmp_path):
    """The one moment that a random kill hardly meets."""
    for name, make in ((PACK, pack_main), ("llava_json", prepare_main)):
        job = job_of(raw, tmp_path / name, name, 1)
        words = [*job.words, "--output", str(job.output), "--parts", str(PARTS)]
        assert make(words) == 0
        stale = job.output.parent / "out.parts" / f"part-00001-of-{PARTS:05d}"
        stale.mkdir(parents=True)
        (stale / "half").write_text("removed")
        before = files_of(job.output)
        assert make(words) == 0, "finishes"
        assert files_of(job.output) == before == job.expected and not stale.parent.exists()
        stale.mkdir(parents=True)
        changed = ["--seed", "7"] if name == PACK else ["--max-image-pixels", "999999"]
        assert make([*words, *changed]) == 2, "it is another one's"
        assert make(words) == 0

"""Samples of which some say a wrong answer, and how many of those a run's history finds."""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from pathlib import Path

from tests.support.processes import vltrain
from vltrain.data.shards import PackedDataset
from vltrain.programs.blame.ranking import SampleHistory
from vltrain.receipts.history import read_history
from vltrain.receipts.receipt import RECEIPT, read_receipt


def mislabel(file: Path, share: float, seed: int = 0) -> set[str]:
    """Gives a share of a samples file's records another answer to their kind of question. Returns their ids."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    answers = defaultdict(set)
    for record in records:
        answers[record["metadata"]["kind"]].add(record["turns"][-1]["text"])
    draw = random.Random(seed)
    chosen = draw.sample(records, round(share * len(records)))
    for record in chosen:
        turn = record["turns"][-1]
        turn["text"] = draw.choice(sorted(answers[record["metadata"]["kind"]] - {turn["text"]}))
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {record["id"] for record in chosen}


def found_within(run: Path, wrong: set[str], share: float) -> float:
    """Which share of the `wrong` samples is among the first `share` of the suspects of a run."""
    header = read_receipt(run / RECEIPT).header
    packs = PackedDataset(header.packs, verify=False)
    samples = SampleHistory(read_history(run), header, packs)
    first = samples.scores().suspects()[: int(share * samples.num_samples)].tolist()
    places = [samples.place(number) for number in first]
    return len(wrong & {packs.sample_ids(pack)[segment] for pack, segment in places}) / len(wrong)


def mislabelled_run(folder: Path, *more: str) -> set[str]:
    """The quickstart on easy-VQA with a thousandth of the training answers wrong: `folder`/runs/quickstart, by one
    rank. Takes minutes. `more`: of the command line. Returns the ids of the wrong samples."""
    samples = folder / "data" / "samples"
    done = vltrain("prepare", "--source", "easyvqa", "--output", str(folder / "prepared"), folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(folder / "prepared", samples, ignore=shutil.ignore_patterns("prepared.*"))  # samples of one's own
    wrong = mislabel(samples / "train.jsonl", 0.001)
    words = ["--recipe", "quickstart", "--ds", "zero2", "--data.source", "samples", "--data.input", "data/samples"]
    words += ["--data.root", "data", "--train.eval_every_steps", "0", "--eval.max_samples", "64", *more]
    done = vltrain("train", *words, "--output", "runs/quickstart", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return wrong

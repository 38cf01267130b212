"""From raw files to shards: our `prepare` and `pack` beside datasets.map with TRL's packing, on easy-VQA as it is, and
on its images with texts of which none comes twice.

    python -m tests.benchmarks.prepare [--workers 2] [--data easy-VQA|unique] [--cpu] [--json OUT] [--quick]

All give, from the questions and image files of the package easy-vqa, token ids and loss masks in packs of 1,024 on
disk, and each image that is shown, once, after it was decoded to see that it can be. The peer does it as TRL's trainer
does, prompt and answer of one sample at a time (`datasets.map`), or batched, as a careful user would write it. Its
packs hold no image numbers and no segments' ids; ours do. Texts that repeat nothing are stretches of this project's
pages: questions of 12 words in the median, answers of 8. `--cpu`: seconds of the processor, of this process and those
that it started, on a machine that others use.
Wants: bash launch/setup_env.sh --with bench,quickstart.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from data_prep.pack import PackSettings, pack
from data_prep.prepare import prepare
from data_prep.sources import SOURCES
from tests.benchmarks.measure import alternate, command, median_ratio, refuse, report, round_ratios, settled
from vltrain.files.locate import locate
from vltrain.schema import IMAGE_MARKER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "asset://tiny_llama"
PACK_LENGTH = 1024
VISUAL_TOKENS = 4
EASYVQA, UNIQUE = DATA = ("easy-VQA", "unique")
QUESTION_WORDS, ANSWER_WORDS = 12, 8  # the medians of texts that repeat nothing
WANTED = "unique: at least 2.9 times datasets.map + TRL packing; easy-VQA: 3"
ROOT = Path(__file__).parents[2]


def ours(folder: Path, raw: Path | None, workers: int) -> dict[str, int]:
    """`vltrain prepare` of all splits and `vltrain pack` of the training split. Returns samples by split."""
    counts = prepare("easyvqa", raw, folder / "samples", workers=workers)
    settings = PackSettings(tokenizer=TOKENIZER, visual_tokens=VISUAL_TOKENS, pack_length=PACK_LENGTH)
    pack(folder / "samples" / "train.jsonl", folder / "packed", settings, workers=workers)
    return counts


def tokenize(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One sample: image places, prompt and answer, as TRL's prompt-completion data is tokenised."""
    prompt = [0] * VISUAL_TOKENS + tokenizer(example["prompt"])["input_ids"]
    answer = [*tokenizer(example["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}


def tokenize_batch(examples: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    """The same of many samples."""
    prompts = [[0] * VISUAL_TOKENS + ids for ids in tokenizer(examples["prompt"])["input_ids"]]
    answers = [
        [*ids, tokenizer.eos_token_id]
        for ids in tokenizer(examples["completion"], add_special_tokens=False)["input_ids"]
    ]
    pairs = list(zip(prompts, answers, strict=True))
    return {
        "input_ids": [one + other for one, other in pairs],
        "completion_mask": [[0] * len(one) + [1] * len(other) for one, other in pairs],
    }


def read_checked(example: dict[str, Any]) -> dict[str, Any]:
    data = Path(example["path"]).read_bytes()
    Image.open(io.BytesIO(data)).load()
    return {"data": data}


def peer(folder: Path, raw: Path | None, workers: int, *, batched: bool) -> int:
    """Raw files to packs by datasets and TRL. Returns the number of packs."""
    # Not above: our processes load this module and with it what it imports, the peer's are forked.
    import datasets
    from transformers import AutoTokenizer
    from trl import pack_dataset

    datasets.disable_progress_bars()
    read = [one for one in SOURCES["easyvqa"](raw, {}) if one.split == "train"]
    texts = [one.sample.turns for one in read]
    table = {
        "prompt": [turns[0].text.replace(IMAGE_MARKER, "Image: ") for turns in texts],
        "completion": [turns[1].text for turns in texts],
    }
    tokenizer = AutoTokenizer.from_pretrained(locate(TOKENIZER))
    options = {"num_proc": workers if workers > 1 else None, "load_from_cache_file": False}
    written = datasets.Dataset.from_dict(table)
    written.save_to_disk(
        str(folder / "raw")
    )  # so that map has a file to cache beside, as it has of a data set that was loaded
    dataset = datasets.load_from_disk(str(folder / "raw"))
    if batched:
        dataset = dataset.map(
            partial(tokenize_batch, tokenizer=tokenizer),
            batched=True,
            remove_columns=["prompt", "completion"],
            **options,
        )
    else:
        dataset = dataset.map(
            partial(tokenize, tokenizer=tokenizer), remove_columns=["prompt", "completion"], **options
        )
    packed = pack_dataset(dataset, PACK_LENGTH, "bfd", options)
    packed.save_to_disk(str(folder / "packed"))
    paths = datasets.Dataset.from_dict({"path": sorted({str(one.image_sources[0]) for one in read})})
    paths.map(read_checked, remove_columns=["path"], **options).save_to_disk(str(folder / "images"))
    return len(packed)


def excerpt(folder: Path, questions: int) -> Path:
    """A small easy-VQA: so many questions of each part."""
    source = Path(locate("package://easy_vqa/data"))
    for part in ("train", "test"):
        (folder / part / "images").mkdir(parents=True)
        # The last ones, so that training questions are left beside the held-out images.
        records = json.loads((source / part / "questions.json").read_text())
        records = list(islice(records, questions)) + (records[-questions:] if part == "train" else [])
        (folder / part / "questions.json").write_text(json.dumps(records))
        for image in {record[2] for record in records}:
            shutil.copyfile(source / part / "images" / f"{image}.png", folder / part / "images" / f"{image}.png")
    return folder


def unique_texts(folder: Path, source: Path | None) -> Path:
    """easy-VQA with other questions and answers, of natural lengths, of which none comes twice."""
    source = Path(locate("package://easy_vqa/data")) if source is None else source
    draw = random.Random(0)
    pages = (ROOT / name / "README.md" for name in ("", "vltrain", "data_prep", "launch", "tests/benchmarks"))
    words = " ".join(page.read_text(encoding="utf-8") for page in pages if page.exists()).split()

    def stretch(median: int) -> str:
        first = draw.randrange(len(words))
        return " ".join(words[first : first + max(1, round(draw.lognormvariate(math.log(median), 0.6)))])

    met: set[str] = set()

    def new(median: int) -> str:
        while (text := stretch(median)) in met:
            pass
        met.add(text)
        return text

    for part in ("train", "test"):
        shutil.copytree(source / part / "images", folder / part / "images")
        records = json.loads((source / part / "questions.json").read_text())
        (folder / part / "questions.json").write_text(
            json.dumps([[new(QUESTION_WORDS), new(ANSWER_WORDS), image] for _, _, image in records])
        )
    return folder


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes, of each")
    parser.add_argument("--data", choices=DATA, nargs="+", default=DATA)
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor, on a machine that others use")
    given = settled(parser.parse_args())
    if given.cpu and given.workers > 1:
        refuse("--cpu: seconds of other processes are not seen; set --workers 1")
    import datasets  # noqa: F401, that no run is timed with it
    import trl  # noqa: F401

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for data in given.data:
            raw = excerpt(Path(place) / "excerpt" / data, 300) if given.quick else None
            raw = unique_texts(Path(place) / "raw", raw) if data == UNIQUE else raw
            rows += measure(data, raw, Path(place) / data, given)
    report({"prepare": rows, "wanted": WANTED, "workers": given.workers, "load": os.getloadavg()}, given)


def measure(data: str, raw: Path | None, place: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All pipelines by turns, each into a new folder below `place`."""
    num_samples = sum(one.split == "train" for one in SOURCES["easyvqa"](raw, {}))
    folders = (place / str(number) for number in count())
    calls: dict[str, Callable[[Path], Any]] = {
        "ours": lambda folder: ours(folder, raw, given.workers),
        "datasets.map + TRL packing": lambda folder: peer(folder, raw, given.workers, batched=False),
        "the same, batched": lambda folder: peer(folder, raw, given.workers, batched=True),
    }

    def timed(call: Callable[[Path], Any]) -> float:
        folder = next(folders)
        folder.mkdir(parents=True)
        clock = time.process_time if given.cpu else time.perf_counter
        start = clock()
        call(folder)
        seconds = clock() - start
        shutil.rmtree(folder)
        return seconds

    results = alternate({name: partial(timed, call) for name, call in calls.items()}, given.runs)
    return [
        {
            "data": data,
            "pipeline": name,
            "samples": num_samples,
            "seconds": statistics.median(seconds),
            "samples/s": num_samples / statistics.median(seconds),
            "ours is faster by": median_ratio(seconds, results["ours"]),
            "least": min(round_ratios(seconds, results["ours"])),
            "most": max(round_ratios(seconds, results["ours"])),
        }
        for name, seconds in results.items()
    ]


if __name__ == "__main__":
    main()

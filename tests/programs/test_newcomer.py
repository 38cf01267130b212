"""A newcomer's walk: forty photos of all kinds and 120 questions in LLaVA's JSON become a tuned model that stock
transformers asks, in ten commands.

The time of each command is printed (pytest -s). No code is read on the way, and every line that a command prints is one
of ours.
"""

import json
import os
import shlex
import subprocess
import sys
import time

import pytest

from tests.pages.page import DATA
from tests.support.photos import make_photos
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow

WALK = [command.text for command in DATA.commands()][:9]
ASK = (
    "import sys\n"
    + next(text for _, text in DATA.blocks("python") if "transformers" in text)
    + "\nassert 'vltrain' not in sys.modules\n"
)


def test_from_photos_to_stock_transformers(tmp_path):
    make_photos(tmp_path / "photos")
    here = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    started, said = time.monotonic(), {}
    for line in WALK:
        words = shlex.split(line)
        before = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, env=here, capture_output=True, text=True, timeout=1200
        )
        print(f"{time.monotonic() - before:6.1f} s  {line}")
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        said[words[1] + words[-1]] = done.stdout
    splits = {
        split: [json.loads(line) for line in (tmp_path / "samples" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "val", "test")
    }
    assert sum(map(len, splits.values())) == 120
    metrics = json.loads((tmp_path / "runs" / "photos" / "eval" / "test" / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.9, "a shape's colour, and which of two it is, from 28 photos"
    assert said["askWhat shape is in the image?"].strip() in ("circle", "rectangle")
    for folder in ("merged", "mmt"):
        proof = json.loads((tmp_path / folder / "proof.json").read_text())
        assert proof["proven"] and proof["answers_equal"] == len(proof["samples"])
    alone = {name: value for name, value in here.items() if name != "PYTHONPATH"}
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=600
    )
    print(f"{time.monotonic() - before:6.1f} s  stock transformers\n{time.monotonic() - started:6.1f} s  all")
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {record["id"]: record["text"] for record in map(json.loads, done.stdout.splitlines())}
    ours = {
        record["id"]: record["prediction"]
        for record in map(
            json.loads, (tmp_path / "runs" / "photos" / "eval" / "test" / "predictions.jsonl").read_text().splitlines()
        )
    }
    differing = [name for name, text in answers.items() if text != ours[name]]
    assert len(answers) == len(ours) and len(differing) <= 1, f"fp32 there, bf16 here: {differing}"

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

from tests.support.photos import make_photos
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow

DATA = "--data.source samples --data.input samples --data.root data --data.pack_length 256"
WALK = f"""
vltrain prepare --source llava_json --input photos/chats.json --output samples --options val_fraction=0.1 test_fraction=0.2
vltrain pack --samples samples/train.jsonl --tokenizer asset://tiny_llama --visual-tokens 4 --pack-length 256 --output packed
vltrain check data packed
vltrain plan --recipe quickstart {DATA} --data.train_packs packed --train.epochs 60 --output runs/photos
vltrain train --recipe quickstart {DATA} --data.train_packs packed --train.epochs 60 --train.save_every_steps 100 --train.eval_every_steps 100 --output runs/photos
vltrain evaluate runs/photos
vltrain ask runs/photos --image photos/IMG_0013.jpg "What shape is in the image?"
vltrain export runs/photos --format merged --output merged
vltrain export runs/photos --format mmt --output mmt
"""
ASK = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

assert "vltrain" not in sys.modules
processor = AutoProcessor.from_pretrained("mmt", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("mmt", trust_remote_code=True)
for line in open("samples/test.jsonl"):
    sample = json.loads(line)
    question = sample["turns"][0]["text"].removeprefix("<image>\\n")
    inputs = processor(images=Image.open("samples/" + sample["images"][0]), text=question, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=9)
    print(json.dumps({"id": sample["id"], "text": processor.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0].strip()}))
"""


def test_from_photos_to_stock_transformers(tmp_path):
    make_photos(tmp_path / "photos")
    here = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    started, said = time.monotonic(), {}
    for line in WALK.strip().split("\n"):
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

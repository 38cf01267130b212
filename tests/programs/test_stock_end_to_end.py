"""Small random vision-language models of transformers on real pictures, as a newcomer goes: every program on the way
from raw data to an answer, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import vltrain
from tests.support.processes import ROOT
from tests.support.processors import config_of, make_processor
from tests.support.stock_world import stock_recipe
from tests.train.zero.test_equivalence import stage

pytest.importorskip("easy_vqa", reason="the easy-vqa package has the images; install the extra `test`")
SCIENCEQA = Path(os.environ.get("VLTRAIN_SAMPLE_DATA", ROOT / "../shared/data")).resolve() / "scienceqa_mini"
DATA = [
    "easyvqa",
    pytest.param(
        "scienceqa",
        marks=pytest.mark.skipif(
            not SCIENCEQA.is_dir(), reason=f"no ScienceQA sample at {SCIENCEQA} (set VLTRAIN_SAMPLE_DATA)"
        ),
    ),
]
FEW = {"easyvqa": 32, "scienceqa": 24}  # samples to train on
SPREAD = ((0, 1), (3, 2))  # ZeRO stage, ranks


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """One of vltrain's programs, which ends well and says nothing of libraries'."""
    here = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "XDG_CACHE_HOME": str(folder / "cache")}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "vltrain", *words], cwd=folder, env=here, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done


def samples(folder: Path, source: str) -> None:
    """folder/samples by `prepare`, with few.jsonl, few questions of all that the data ask pictures about."""
    options = ["--input", str(SCIENCEQA), "--options", "missing_images=drop", "prompt_format=QCM-A"]
    run(folder, "prepare", "--source", source, "--output", "samples", *(options if source == "scienceqa" else []))
    lines = (folder / "samples" / "test.jsonl").read_text().splitlines()
    lines.sort(key=lambda line: not json.loads(line)["images"])
    (folder / "samples" / "few.jsonl").write_text("\n".join(lines[: FEW[source]]) + "\n")
    (folder / "samples" / "asked.jsonl").write_text("\n".join([*lines[:4], *lines[-2:]]) + "\n")


def recipe(folder: Path, kind: str, source: str) -> None:
    """recipe.yaml: of a Qwen3-VL its folder, with weights; of a SmolVLM sizes, and a processor."""
    make_processor(kind, folder / "model")
    values = config_of(kind)
    values["text_config"]["max_position_embeddings"] = 4096
    stock: dict[str, Any] = {"config": values, "processor": "model"}
    if kind == "qwen3_vl":
        torch.manual_seed(0)
        network = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind].from_dict(values))
        network.save_pretrained(folder / "model")
        stock = {"source": "model"}
    stock["llm"] = {"peft": {"kind": "lora", "rank": 4, "targets": ["*_proj"]}}
    split = {"val": "samples/asked.jsonl", "test": "samples/asked.jsonl"}
    settings = {
        "model": {"architecture": "stock", "stock": stock,
                  "adapter": {"dim": 8, "vision": "both", "llm": "none", "bias": False}},
        "data": {"source": "samples", "input": "samples/few.jsonl", "options": split, "root": "data",
                 "template": "processor", "pack_length": 4096 if source == "scienceqa" else 512, "workers": 1},
        "train": {"precision": "fp32", "max_steps": 4, "epochs": 8, "packs_per_step": 4, "log_every_steps": 1,
                  "save_every_steps": 2},
        "optim": {"lr": 1e-2},
        "eval": {"max_new_tokens": 4, "scorer": source if source == "scienceqa" else "exact"},
        "output": "run",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("source", DATA)
def test_from_raw_data_to_an_answer(source: str, kind: str, tmp_path: Path) -> None:
    samples(tmp_path, source)
    recipe(tmp_path, kind, source)
    audited = run(tmp_path, "audit", "recipe.yaml")
    assert "FAIL" not in audited.stdout and audited.stderr == ""
    found: dict[tuple[int, int], list[float]] = {}
    for number, ranks in SPREAD:
        (tmp_path / f"zero{number}.json").write_text(json.dumps(stage(number)))
        output = "run" if (number, ranks) == (0, 1) else f"runs/{number}-{ranks}"
        words = ["--recipe", "recipe.yaml", "--ds", f"zero{number}.json", "--output", output, "--ranks", str(ranks)]
        run(tmp_path, "train", *words)
        found[number, ranks] = losses(tmp_path / output)
    for one in found.values():
        assert len(one) == 4 and one == pytest.approx(found[0, 1], rel=1e-5)
    assert found[0, 1][-1] < found[0, 1][0]
    proven(tmp_path)
    answered(tmp_path, source)
    exported(tmp_path)


def proven(folder: Path) -> None:
    """What a run proves of itself, and the samples packed by hand."""
    run(folder, "check", "weights", "run")
    replayed = run(folder, "check", "replay", "run", "--step", "2").stdout
    assert "0 with a loss that is NaN" in replayed
    assert "peak on each GPU" in run(folder, "plan", "recipe.yaml", "--ds", "zero3.json").stdout
    if (folder / "model" / "config.json").is_file():
        words = ["--samples", "samples/few.jsonl", "--processor", "model", "--pack-length", "4096"]
        run(folder, "pack", *words, "--output", "packed")
        run(folder, "check", "data", "packed")


def answered(folder: Path, source: str) -> None:
    """By generation, alike on two ranks; by ranking; one question, by the command line and in Python."""
    run(folder, "evaluate", "run", "--split", "test", "--json", "one.json")
    predictions = (folder / "run" / "eval" / "test" / "predictions.jsonl").read_text()
    run(folder, "evaluate", "run", "--split", "test", "--json", "two.json", "--ranks", "2", "--eval.batch_size", "1")
    assert (folder / "run" / "eval" / "test" / "predictions.jsonl").read_text() == predictions
    if source == "scienceqa":
        words = ["--split", "test", "--eval.method", "rank", "--json", "ranked.json"]
        run(folder, "evaluate", "run", *words)
        assert "accuracy" in json.loads((folder / "ranked.json").read_text())
    first = json.loads((folder / "samples" / "asked.jsonl").read_text().splitlines()[0])
    image, question = folder / "samples" / first["images"][0], first["turns"][0]["text"].split("\n", 1)[1]
    asked = run(folder, "ask", "run", "--image", str(image), question, "--json").stdout
    before = os.getcwd()
    os.chdir(folder)
    try:
        model = vltrain.load("run")
        assert model.ask([str(image)], question).token_ids == json.loads(asked)["token_ids"]
        mean = model.loss("samples/asked.jsonl")
    finally:
        os.chdir(before)
    assert len(mean) == 6 and all(0 < one < 10 for one in mean)


def exported(folder: Path) -> None:
    """Read by transformers alone, each format answers as the run does."""
    for form in ("merged", "lora"):
        run(folder, "export", "run", "--output", form, "--format", form, "--proof-samples", "2")
        proof = json.loads((folder / form / "proof.json").read_text())
        assert proof["proven"] and proof["max_relative_error"] <= 1e-5


@pytest.mark.slow
def test_a_table_of_lora_ranks(tmp_path: Path) -> None:
    """`ablate` over a stock recipe: each row trains and answers, and the table says how much of it."""
    path = stock_recipe("smolvlm", tmp_path, {"llm": {"peft": {"kind": "lora", "rank": 4, "targets": ["*_proj"]}}})
    rows = {f"rank-{rank}": {"model": {"stock": {"llm": {"peft": {"rank": rank}}}}} for rank in (2, 8)}
    table = {"base": str(path), "output": str(tmp_path / "out"), "ablation": {"split": "val"}, "rows": rows}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    run(tmp_path, "ablate", "table.yaml", "--ranks", "1", "--train.max_steps", "2", "--eval.scorer", "exact")
    found = {row["row"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]}
    assert {name: (row["state"], row["steps"]) for name, row in found.items()} == dict.fromkeys(rows, ("done", 2))
    assert all(row["metrics"]["total"] == 6 for row in found.values())
    two, eight = (found[name]["trained"] for name in rows)
    linears = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 96) * 3  # of a block of the LLM: q, o; k, v; gate, up, down
    assert eight - two == 2 * (8 - 2) * linears

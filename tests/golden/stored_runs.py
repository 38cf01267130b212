"""Small runs as an earlier commit left them, kept in `stored/`: what later code must still read, go on with and answer
from.

    python -m tests.golden.stored_runs FOLDER      makes them by the code of today, in a new folder

Those of `stored/` are of the commit that their run.json names. They are real runs of `vltrain train`, `export` and
`evaluate`, of both architectures, on own samples:

    NAME/recipe.yaml     with paths relative to NAME
    NAME/samples/        SPLIT.jsonl and images, drawn here
    NAME/tokenizers/     of the InstructBLIP; the other one's, and its weights, come with vltrain
    NAME/data/packed/    the packs that the run made
    NAME/run/            the whole run's log, receipt and answers, with the checkpoint of step `SAVED` of `STEPS` alone,
    as if it had been killed then
    NAME/adapters/       that checkpoint, exported
    NAME/batches.json    SHA-256 of each tensor of each step's batches
    NAME/machine.json    the CPU and the torch that computed the losses: on others they differ in the last digits
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw

from tests.support.blip import LLAMA, SIZES, blip_config, make_samples, make_tokenizers
from vltrain.cli import main as vltrain
from vltrain.config.recipe import dump_config
from vltrain.data.reading import image_reader

STORED = Path(__file__).with_name("stored")
NAMES = ("mmt", "instructblip")
STEPS, SAVED = 8, 4
TRAIN = {
    "epochs": 9.0,
    "max_steps": STEPS,
    "packs_per_step": 2,
    "precision": "fp32",
    "save_every_steps": SAVED,
    "keep_checkpoints": 9,
    "log_every_steps": 1,
}
OWN = {
    "source": "samples",
    "input": "samples",
    "root": "data",
    "eval_split": "test",
    "test_split": "test",
    "workers": 0,
}
ADALORA = {"init_rank": 4, "target_rank": 2, "tinit": 2, "tfinal": 2, "delta_t": 1}
MMT = {
    "model": {
        "vision": {"source": "asset://tiny_vit", "tap_every": 1},
        "llm": {"source": "asset://tiny_llama"},
        "adapter": {
            "kind": "bottleneck_weighted",
            "dim": 4,
            "groups": 2,
            "vision": "attention",
            "llm": "both",
            "dropout": 0.1,
        },
        "neck": {"dim": 8},
    },
    "data": {**OWN, "pack_length": 96},
    "optim": {"lr": 3e-3},
    "train": TRAIN,
    "eval": {"scorer": "exact", "max_new_tokens": 4},
    "output": "run",
}


def recipe(name: str) -> str:
    """YAML; for the InstructBLIP, the folders of its tokenizers are named as `make` makes them."""
    if name == "mmt":
        return yaml.safe_dump(MMT)
    places = {kind: f"tokenizers/{kind}" for kind in ("llama", "t5", "bert")}
    flat = {
        "qformer__mode": "adalora",
        "llm__mode": "adalora",
        "eval__method": "generate",
        "eval__scorer": "exact",
        "eval__max_new_tokens": 4,
        "optim__lr": 1e-2,
        "output": "run",
    }
    flat |= {f"adalora__{key}": value for key, value in ADALORA.items()} | {
        f"train__{key}": value for key, value in TRAIN.items()
    }
    flat |= {f"data__{key}": value for key, value in OWN.items()} | {"data__options": {}, "qformer_tokens": 32}
    flat["config"] = {
        **SIZES,
        "text_config": {**LLAMA, "initializer_range": 0.3},
    }  # small random weights hardly learn in eight steps
    return dump_config(blip_config("llama", places, **flat))


def write_samples(folder: Path) -> None:
    """Ten to train on, six to answer, with the pictures that they show."""
    samples = make_samples(16)
    folder.mkdir(parents=True)
    for split, chosen in (("train", samples[:10]), ("test", samples[10:])):
        lines = [{**one.to_json(), "metadata": {"answer": one.turns[-1].text}} for one in chosen]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw = np.random.default_rng(0)
    for name in sorted({image for one in samples for image in one.images}):
        picture = Image.new("RGB", (40, 30), tuple(draw.integers(0, 256, 3).tolist()))
        left, top = draw.integers(0, 15, 2).tolist()
        ImageDraw.Draw(picture).ellipse((left, top, left + 20, top + 14), fill=tuple(draw.integers(0, 256, 3).tolist()))
        picture.save(folder / name)


def make(name: str, folder: Path) -> None:
    """A stored run in the new folder, see the module."""
    write_samples(folder / "samples")
    if name == "instructblip":
        make_tokenizers(folder / "tokenizers")
        shutil.rmtree(folder / "tokenizers" / "t5")
    (folder / "recipe.yaml").write_text(recipe(name))
    with contextlib.chdir(folder):
        run("train", "--recipe", "recipe.yaml")
        run(
            "export",
            "run",
            "--output",
            "adapters",
            "--format",
            "adapters",
            "--checkpoint",
            f"run/checkpoints/step-{SAVED:08d}",
            "--proof",
            "none",
        )
        (folder / "batches.json").write_text(json.dumps(batch_digests(Path("run")), indent=0) + "\n")
    (folder / "machine.json").write_text(json.dumps(machine()) + "\n")
    checkpoints = folder / "run" / "checkpoints"
    shutil.rmtree(checkpoints / f"step-{STEPS:08d}")
    (checkpoints / "latest").write_text(f"step-{SAVED:08d}\n")
    for made in ("tensorboard", "run.log"):
        place = folder / "run" / made
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def run(*words: str) -> None:
    """`vltrain WORDS` in this process. Raises RuntimeError unless it ends with 0."""
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = ["vltrain", *words]
    try:
        if code := vltrain(list(words)):
            raise RuntimeError(f"vltrain {' '.join(words)}: exit code {code}")
    finally:
        sys.argv = argv
        os.environ.clear()  # of where the ranks of a run meet
        os.environ.update(environment)


def batch_digests(folder: Path) -> list[dict[str, str]]:
    """SHA-256 of each tensor of each batch that the run of the recipe in `folder` trains on, in order, on one rank."""
    from vltrain.data.loader import StepLoader
    from vltrain.data.plan import Plan
    from vltrain.data.shards import PackedDataset
    from vltrain.inference.run import recipe_of
    from vltrain.models.build import outline_model
    from vltrain.train.make_trainer import pack_cost

    config = recipe_of(folder)
    (packs,) = Path(config.data.root, "packed").iterdir()
    model, dataset = outline_model(config.model, torch.device("cpu"), torch.float32), PackedDataset(packs)
    train = config.train
    plan = Plan(
        dataset.index,
        seed=train.seed,
        epochs=train.epochs,
        packs_per_step=train.packs_per_step,
        world_size=1,
        cost=pack_cost(model.flops()),
        max_steps=train.max_steps,
    )
    loader = StepLoader(
        dataset,
        plan,
        0,
        image_reader(config, model),
        workers=0,
    )
    return [{key: digest(value) for key, value in vars(batch).items()} for step in loader for batch in step.batches]


def digest(value: Any) -> str:
    """Of a tensor's bytes, or of what else a batch holds, as text."""
    return hashlib.sha256(
        value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
    ).hexdigest()[:16]


def machine() -> dict[str, str]:
    """What the last digits of a loss depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {"cpu": model, "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    for each in NAMES:
        make(each, Path(sys.argv[1]).absolute() / each)

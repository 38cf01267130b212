"""A finished run's folder, made without training: checkpoints, receipt, recipe and run.json say what those of a real
one do."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.attacks.attack import run_vltrain
from tests.attacks.inputs import pack_words, sample, write_jsonl
from vltrain.config.recipe import build_config, dump_config
from vltrain.config.schema import Config
from vltrain.data.plan import PackCost, Plan
from vltrain.data.shards import PackedDataset
from vltrain.files.locate import locate
from vltrain.models.build import build_model
from vltrain.prepared.origins import facts_of
from vltrain.receipts.receipt import ReceiptWriter, fingerprint, samples_text
from vltrain.train.checkpoints.checkpoint import save_checkpoint
from vltrain.train.make_trainer import receipt_header
from vltrain.train.run.identity import run_id, run_identity
from vltrain.train.run.made_of import made_of
from vltrain.train.run.provenance import write_provenance

SAVED = (2, 4)  # steps


@dataclass(frozen=True)
class Places:
    """Folders that belong together below one: weights of ViT and LLM, packs, samples, and the run."""

    root: Path

    @property
    def vit(self) -> Path:
        return self.root / "vit"

    @property
    def llama(self) -> Path:
        return self.root / "llama"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    def checkpoint(self, step: int = SAVED[-1]) -> Path:
        return self.run / "checkpoints" / f"step-{step:08d}"

    def config(self, **changes: object) -> Config:
        """The run's recipe; `changes` are dotted keys with `__` for the dots."""
        settings = {
            "model.vision.source": str(self.vit),
            "model.vision.tap_every": 1,
            "model.llm.source": str(self.llama),
            "model.adapter.dim": 4,
            "model.neck.dim": 8,
            "data.root": str(self.root / "data"),
            "data.eval_split": "test",
            "data.train_packs": str(self.root / "packs"),
            "data.pack_length": 64,
            "data.workers": 0,
            "train.epochs": 2.0,
            "train.max_steps": 4,
            "train.packs_per_step": 1,
            "train.save_every_steps": 2,
            "train.precision": "fp32",
            "output": str(self.run),
        }
        return build_config({**settings, **{name.replace("__", "."): value for name, value in changes.items()}})


def finished_run(folder: Path) -> Places:
    """Makes one in an empty folder."""
    template = _template()
    for path in template.root.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    for path in (folder / "recipe.yaml", folder / "run" / "config.yaml", folder / "run" / "run.json"):
        path.write_text(path.read_text().replace(str(template.root), str(folder)))
    return Places(folder)


@functools.cache
def _template() -> Places:
    places = Places(Path(tempfile.mkdtemp()))
    atexit.register(shutil.rmtree, places.root, ignore_errors=True)
    for name in ("vit", "llama"):
        shutil.copytree(locate(f"asset://tiny_{name}"), places.root / name)
    samples = write_jsonl(
        places.root / "data" / "samples" / "train.jsonl",
        [sample(number, question=f"{number} " + "is it red? " * 4) for number in range(4)],
    )
    shutil.copy(samples, samples.with_name("test.jsonl"))
    code, output = run_vltrain(pack_words(samples, places.root / "packs"))
    assert code == 0, output
    places.recipe.write_text(dump_config(places.config()))
    write_run(places)
    return places


def write_run(places: Places, **changes: object) -> None:
    """Writes the run's folder, as the recipe with these changes would leave it."""
    config = places.config(**changes)
    dataset, model = PackedDataset(config.data.train_packs), build_model(config.model)
    identity = run_identity(config, dataset, made_of(config))
    places.run.mkdir(parents=True)
    write_provenance(
        places.run,
        resolved_config=dump_config(config),
        ds_config={},
        world_size=1,
        parameters={"llm": (1, 1)},
        identity=identity,
        tokenizer="none",
        data=facts_of(config, dataset),
    )
    train = config.train
    plan = Plan(
        dataset.index,
        seed=train.seed,
        epochs=train.epochs,
        packs_per_step=train.packs_per_step,
        world_size=1,
        cost=PackCost(),
        max_steps=train.max_steps,
    )
    assert plan.num_steps == SAVED[-1]
    own = run_id(identity, None)
    receipt = ReceiptWriter(
        places.run, receipt_header(config, plan, dataset, own), active=True, first_step=0, head=None
    )
    for step in range(plan.num_steps):
        packs = plan.packs_of(step)
        samples = samples_text(fingerprint(dataset.sample_ids(pack) for pack in packs.tolist()))
        receipt.add(
            step=step,
            samples=samples,
            label_tokens=int(dataset.index.num_label_tokens[packs].sum()),
            loss=1.0 / (step + 1),
        )
        if step + 1 in SAVED:
            state = (
                (name, one.detach(), {"exp_avg": one * 0, "exp_avg_sq": one * 0})
                for name, one in model.named_parameters()
                if one.requires_grad
            )
            told = {"receipt": receipt.head, "run": own}
            save_checkpoint(
                state,
                places.run / "checkpoints",
                step=step + 1,
                belongs_to=identity,
                keep=2,
                is_writer=True,
                run_state=told,
            )
    receipt.close()

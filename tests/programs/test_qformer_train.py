"""The Q-Former's job as a user starts it, with both kinds of LLM: trained by AdaLoRA on two ranks, evaluated, exported,
read again; and real questions."""

import json
import os
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.blip import blip_config, make_tokenizers
from tests.support.processes import ROOT, deepspeed, on_ranks, vltrain
from vltrain.config.recipe import dump_config

DATA = Path(os.environ.get("VLTRAIN_SAMPLE_DATA", Path(__file__).parents[3] / "shared" / "data"))
STEPS = 8


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def predictions(run: Path, split: str) -> list[str]:
    return [
        json.loads(line)["prediction"] for line in (run / "eval" / split / "predictions.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("kind", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_trained_evaluated_exported_and_read_again(kind, places, tmp_path):
    changes = {
        "qformer_tokens": 48,
        "qformer__mode": "adalora",
        "llm__mode": "adalora",
        "adalora__init_rank": 4,
        "adalora__target_rank": 2,
        "adalora__tfinal": 2,
        "data__root": str(tmp_path / "data"),
        "data__pack_length": 192,
        "train__packs_per_step": 3,
        "train__max_steps": STEPS,
        "train__epochs": 9.0,
        "optim__lr": 2e-2,
        "optim__schedule": "linear_epochs",
        "train__log_every_steps": 1,
        "train__eval_every_epochs": 0.5,
        "train__keep_best": True,
        "train__early_stopping_patience": 50,
        "output": str(tmp_path / "run"),
        "eval__method": "generate",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(blip_config(kind, places, **changes)))
    done, other = on_ranks("launch/train_qformer.py", "--ds", "ds_configs/zero2.json", "--recipe", str(recipe))
    assert (done.returncode, other.returncode) == (0, 0), done.stderr[-3000:]
    assert "of full Q-Former tuning" in done.stderr + done.stdout
    run = tmp_path / "run"
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    budget = [event.value for event in events.Scalars("adalora/directions")]
    assert budget == sorted(budget, reverse=True) and budget[-1] == budget[0] / 2
    assert {"adalora/rank/qformer/cross", "adalora/rank/llm/attn", "adalora/orthogonality"} <= set(
        events.Tags()["scalars"]
    )
    (accuracy,) = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/") and tag.endswith("/accuracy")]
    evaluations = [event.step for event in events.Scalars(accuracy)]
    drawn = [event.step for event in events.Images("adalora/ranks")]
    assert len(drawn) > 1 and drawn == evaluations[-len(drawn) :], "the ranks over time"

    for words in (
        ["importance", str(run), "--output", str(tmp_path / "ranks")],
        ["export", str(run), "--output", str(tmp_path / "peft")],
    ):
        assert (told := vltrain(*words)).returncode == 0, told.stderr[-2000:]
    assert vltrain("evaluate", str(run)).returncode == 0
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.yaml").write_text(
        dump_config(blip_config(kind, places, **changes, adapters=str(tmp_path / "peft")))
    )
    assert (told := vltrain("evaluate", str(again), "--checkpoint", "none")).returncode == 0, told.stderr[-2000:]
    assert predictions(again, "test") == predictions(run, "test")
    untuned = vltrain("evaluate", str(run), "--checkpoint", "none")
    assert untuned.returncode == 0 and predictions(run, "test") != predictions(again, "test")


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "iconqa_mini").is_dir(), reason=f"no IconQA sample at {DATA} (set VLTRAIN_SAMPLE_DATA)")
def test_real_questions_are_learned_by_heart(tmp_path):
    """150 of IconQA's, of all three types: a small InstructBLIP of random weights answers every one in the end.

    Many differ in their image alone. To tell those apart the ViT wants a long warm-up: without, the LLM learns the
    questions first, and it stays there.
    """
    recipe = yaml.safe_load((ROOT / "launch" / "recipes" / "qformer_shapes.yaml").read_text())
    held_out = {"val_fraction": 0.0, "test_fraction": 0.0}
    recipe["data"] |= {
        "source": "iconqa",
        "input": str(DATA / "iconqa_mini"),
        "root": str(tmp_path / "data"),
        "options": held_out,
        "eval_split": "train",
    }
    recipe["train"] |= {"epochs": 280, "eval_every_steps": 0, "packs_per_step": 2, "precision": "fp32"}
    recipe["optim"] |= {"warmup_epochs": 30, "weight_decay": 0.0}
    recipe["model"]["instructblip"]["config"]["vision_config"] |= {"image_size": 128, "patch_size": 16}
    recipe["eval"] = {"scorer": "iconqa", "method": "generate", "max_new_tokens": 16, "max_samples": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output": str(tmp_path / "run")}))
    words = ("launch/train_qformer.py", "--ds", "ds_configs/zero2.json", "--recipe", str(tmp_path / "recipe.yaml"))
    done = deepspeed(*words, timeout_seconds=3600)  # 1,540 steps take some twenty minutes
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "eval" / "train" / "metrics.json").read_text())
    assert metrics["total"] == metrics["correct"] == 150, metrics["columns"]

"""`vltrain export --format adapters`: small, whole, and what a new run and `vltrain.load` go on from."""

import json
import shutil

import pytest
import torch

from tests.support.export_run import mmt_run
from vltrain.errors import InputError
from vltrain.export.proof import PROOF
from vltrain.inference import load
from vltrain.inference.run import recipe_of
from vltrain.programs.export import export
from vltrain.train.checkpoints.checkpoint import newest_checkpoint
from vltrain.train.run.adapters_folder import open_adapters
from vltrain.train.run.origin import open_origin

KINDS = {
    "bottleneck": {},
    "router": {"model__adapter__kind": "router"},
    "loha": {
        "model__adapter__kind": "loha_silu",
        "model__adapter__vision_kind": "loha_router",
        "model__adapter__rank": 2,
    },
    "prompts": {
        "model__llm__peft__kind": "adaption_prompt",
        "model__llm__peft__adapter_len": 2,
        "model__vision__peft__kind": "pissa",
        "model__adapter__llm": "none",
    },
    "4 bits": {"model__bits": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_says_what_the_run_says(kind, tmp_path, here):
    run = mmt_run(tmp_path, **KINDS[kind])
    export(run, tmp_path / "out", "adapters")
    proof = json.loads((tmp_path / "out" / PROOF).read_text())
    assert proof["proven"] and proof["answers_equal"] == 8 and proof["max_abs_error"] == 0.0, (
        "the same weights, in the same model"
    )
    config, checkpoint = open_adapters(tmp_path / "out")
    trained = newest_checkpoint(run / "checkpoints")
    assert config == recipe_of(run) and checkpoint.step == trained.step
    expected = dict(trained.weights())
    assert {name: torch.equal(value, expected[name]) for name, value in checkpoint.weights()} == dict.fromkeys(
        expected, True
    )


def test_it_is_asked_like_the_run(tmp_path):
    run = mmt_run(tmp_path)
    export(run, tmp_path / "out", "adapters", proof_samples=None)
    picture = str(run.parent / "data" / "samples" / "0.png")
    answers = [load(place, device="cpu").ask([picture], "red?").token_ids for place in (run, tmp_path / "out")]
    assert answers[0] == answers[1]


def test_a_damaged_folder_is_refused(tmp_path):
    run = mmt_run(tmp_path)
    export(run, tmp_path / "out", "adapters", proof_samples=None)
    for name, said in (
        ("checkpoint.json", "no checkpoint.json"),
        ("config.yaml", "no config.yaml"),
        ("weights-00001.safetensors", "missing"),
    ):
        broken = shutil.copytree(tmp_path / "out", tmp_path / f"without {name}")
        (broken / name).unlink()
        with pytest.raises(InputError, match=said):
            open_adapters(broken)
    weights = tmp_path / "out" / "weights-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    for opened in (open_adapters, lambda place: open_origin(place, tmp_path / "new")):
        with pytest.raises(InputError, match="SHA-256"):
            opened(tmp_path / "out")
    with pytest.raises(InputError, match="no such folder"):
        open_adapters(tmp_path / "nowhere")
